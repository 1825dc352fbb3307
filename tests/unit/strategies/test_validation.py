"""A bad update is refused by name, before anything of its reply counts; the others go on."""

from dataclasses import replace

import numpy as np
import pytest

from fedtl.plans import RoundPlan
from fedtl.strategies.validation import accept_updates
from fedtl.types import ClientFailure, LocalTraining

HEAD = {"weight": np.zeros((2, 3), np.float32), "bias": np.zeros(2, np.float32)}
DECLARED = np.full(9, 10, np.int64)
PLAN = RoundPlan(1, np.array([1, 3, 5]), np.zeros(3, np.uint64), LocalTraining(1, 1, 0.1))


@pytest.fixture
def one(updates):
    """A reply of one client, as a real client sends it."""

    def make(client: int, **changes):
        tensors = {n: np.ones((1, *t.shape), np.float32) * (client + 1) for n, t in HEAD.items()}
        return replace(updates(tensors, clients=[client]), **changes)

    return make


def accept(replies, ratio: float = 1e4):
    accepted, norms = accept_updates(replies, PLAN, HEAD, DECLARED, ratio)
    return accepted, norms, {f.client: f.reason for f in accepted.failures}


def test_replies_in_any_order_give_the_same_sorted_updates(one) -> None:
    a, norms, failures = accept([one(5), one(1), one(3)])
    b, _, _ = accept([one(1), one(3), one(5)])
    assert a.clients.tolist() == b.clients.tolist() == [1, 3, 5]
    assert a.tensors["weight"].tobytes() == b.tensors["weight"].tobytes()
    np.testing.assert_allclose(norms, np.array([2, 4, 6]) * np.sqrt(8))
    assert failures == {}


def tensors(client: int = 3, **wrong):
    good = {n: np.ones((1, *t.shape), np.float32) for n, t in HEAD.items()}
    return {**good, **wrong}


BAD = {
    "nan": ({"tensors": tensors(bias=np.array([[1, np.nan]], np.float32))}, "bias .* not finite"),
    "inf": ({"tensors": tensors(weight=np.full((1, 2, 3), np.inf, np.float32))}, "weight"),
    "shape": ({"tensors": tensors(bias=np.ones((1, 1), np.float32))}, r"shape \(1,\) instead"),
    "dtype": ({"tensors": tensors(bias=np.ones((1, 2)))}, "float64 instead of float32"),
    "int8": ({"tensors": tensors(bias=np.ones((1, 2), np.int8))}, "int8"),
    "keys": ({"tensors": {"weight": np.ones((1, 2, 3), np.float32)}}, "tensors"),
    "extra": ({"tensors": tensors(evil=np.ones((1, 2), np.float32))}, "evil"),
    "stale": ({"round": 0}, "answers round 0"),
    "future": ({"round": 2}, "answers round 2"),
    "none": ({"num_examples": np.array([0])}, "trained on 0"),
    "negative": ({"num_examples": np.array([-9])}, "-9"),
    "huge": ({"num_examples": np.array([10**12])}, "declared 10"),
    "float": ({"num_examples": np.array([np.nan])}, "float64 instead of int64"),
    "norm": ({"tensors": tensors(bias=np.full((1, 2), 1e9, np.float32))}, "cohort's median"),
    "overflow": ({"tensors": tensors(bias=np.full((1, 2), 3e38, np.float32))}, "median"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_one_bad_client_is_named_and_the_round_goes_on(case: str, one) -> None:
    changes, reason = BAD[case]
    accepted, _, failures = accept([one(1), one(3, **changes), one(5)])
    assert accepted.clients.tolist() == [1, 5]
    assert list(failures) == [3]
    assert pytest.importorskip("re").search(reason, failures[3])


def test_who_does_not_answer_or_failed_is_named(one) -> None:
    reply = replace(one(1), failures=(ClientFailure(3, "out of memory"),))
    accepted, _, failures = accept([reply])
    assert accepted.clients.tolist() == [1]
    assert failures == {3: "out of memory", 5: "no answer"}


def test_a_client_counts_once(one) -> None:
    accepted, _, failures = accept([one(1), one(1), one(3), one(5)])
    assert accepted.clients.tolist() == [1, 3, 5]
    assert failures == {}


def test_a_stranger_is_refused(one) -> None:
    accepted, _, failures = accept([one(1), one(4), one(3), one(5)])
    assert accepted.clients.tolist() == [1, 3, 5]
    assert failures == {}


def test_nobody_is_both_accepted_and_missing(one) -> None:
    confused = replace(one(1), failures=(ClientFailure(99, "?"), ClientFailure(3, "lost")))
    accepted, _, failures = accept([confused, one(3)])
    assert accepted.clients.tolist() == [1, 3]
    assert failures == {5: "no answer"}


def test_nobody_left_is_an_empty_cohort_not_a_crash() -> None:
    accepted, norms, failures = accept([])
    assert len(accepted.clients) == len(norms) == 0
    assert set(failures) == {1, 3, 5}
    assert accepted.tensors["weight"].shape == (0, 2, 3)


EXTRA = {f"start_gradient.{n}": np.ones((1, *t.shape), np.float32) for n, t in HEAD.items()}


@pytest.mark.parametrize(
    ("plan", "changes", "what"),
    [
        (
            replace(PLAN, reports=("start_gradient",)),
            {"tensors": {**tensors(), **{n: t * 1e15 for n, t in EXTRA.items()}}},
            "gradient is 1e",
        ),
        (replace(PLAN, reports=("start_loss",)), {"loss": np.array([1e100])}, "loss is 1e"),
        (replace(PLAN, reports=("start_loss",)), {"loss": np.array([-1.0])}, "loss is negative"),
        (replace(PLAN, reports=("start_loss",)), {"loss": np.array([np.nan])}, "not finite"),
    ],
)
def test_what_is_sent_beside_a_head_is_measured_too(plan, changes, what: str, one) -> None:
    own = {**tensors(), **(EXTRA if "start_gradient" in plan.reports else {})}
    honest = [one(client, tensors=own) for client in (1, 5)]
    accepted, _ = accept_updates([*honest, one(3, tensors=own)], plan, HEAD, DECLARED, 1e4)
    assert accepted.clients.tolist() == [1, 3, 5]
    liar = one(3, **{"tensors": own, **changes})
    accepted, _ = accept_updates([*honest, liar], plan, HEAD, DECLARED, 1e4)
    assert accepted.clients.tolist() == [1, 5]
    (failure,) = accepted.failures
    assert what in failure.reason


def test_a_gradient_out_of_all_proportion_is_refused(one) -> None:
    plan = replace(PLAN, task="gradient")
    own = {n: t.astype(float) for n, t in tensors().items()}
    huge = {n: t * 1e100 for n, t in own.items()}
    replies = [one(c, tensors=huge if c == 3 else own) for c in (1, 3, 5)]
    accepted, _ = accept_updates(replies, plan, HEAD, DECLARED, 1e4)
    assert accepted.clients.tolist() == [1, 5]
    assert "update is 1e+100 times" in accepted.failures[0].reason
