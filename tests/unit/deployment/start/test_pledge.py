"""What a client is told of privacy it holds the server to: anything weaker is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtl.deployment.host import PrivateHost
from fedtl.deployment.pledge import Pledge, check_demands, read_pledge
from fedtl.deployment.promises import carried_sums, promise_to, settlement
from fedtl.engines.flower_engine import FlowerEngine
from fedtl.engines.wire import unpack
from fedtl.errors import InputError, SecurityRefusal
from fedtl.interrupts import Interrupts
from fedtl.planning import plan_round
from fedtl.plans import Personal, Protection, RoundPlan, Statistics
from fedtl.results.runs import RunFolder
from fedtl.rounds import Federation, run_rounds
from fedtl.scenario.compatibility import find_conflicts
from fedtl.scenario.privacy import Privacy
from fedtl.secure_rounds import simulated_sums
from fedtl.strategies import make_strategy, protected
from fedtl.types import LocalTraining

NAMES = ("north", "east", "west")


def privacy(mechanism: str, **more: Any) -> Privacy:
    given = {"mechanism": mechanism, "clip": 0.5, **more}
    if mechanism != "none" and "epsilon" not in given:
        given.setdefault("noise_multiplier", 2.0)
    return Privacy.model_validate(given)


def pledge(section: Privacy, client_noise: float = 2.0, **numbers: Any) -> Pledge:
    told = Pledge(section, 5)
    if section.mechanism == "none":  # there is nothing to settle
        return told
    settled = {"noise_multiplier": 2.0, "client_noise": client_noise, "epsilon": 3.0, **numbers}
    return told.settle(settled)


def plan(task: str = "train", round: int = 1, **protection: Any) -> RoundPlan:
    one, keys = np.zeros(1, np.int64), np.zeros(1, np.uint64)
    return RoundPlan(
        round, one, keys, LocalTraining(1, 4, 0.1), task=task,  # type: ignore[arg-type]
        statistics=Statistics() if task == "statistics" else None,
        protection=Protection(**protection) if protection else None,
    )  # fmt: skip


RING = {"ring_bits": 32, "scale": 2.0, "limit": 9}
MASKS = {**RING, "masked": True}
LOCAL = {"clip": 0.5, "noise": 1.0}
SHARE = {"clip": 0.5, "noise": 0.5, **MASKS}
EXAMPLE = {"example_clip": 0.5, "example_noise": 1.0}
ROWS = {"row_clip": 0.5}

WEAKER = {
    "local, none": ("local", {}, {}),
    "local, longer": ("local", {}, {"clip": 0.51, "noise": 1.02}),
    "local, unbounded": ("local", {}, {"noise": 1.0, "row_clip": 1.0}),
    "local, quieter": ("local", {}, {**LOCAL, "noise": 0.99}),
    "example, none": ("example", {}, {}),
    "example, other noise": ("example", {}, LOCAL),
    "example, quieter": ("example", {}, {**EXAMPLE, "example_noise": 0.9}),
    "example, longer": ("example", {}, {"example_clip": 1.0, "example_noise": 2.0}),
    "masks, none": ("none", {"secure_aggregation": "secagg"}, {}),
    "masks, ring alone": ("none", {"secure_aggregation": "secagg"}, RING),
    "masks, without share": (
        "central", {"secure_aggregation": "secagg"}, {**SHARE, "noise": 0.0}
    ),
    "masks, small share": ("central", {"secure_aggregation": "secagg"}, {**SHARE, "noise": 0.49}),
    "masks, longer": (
        "central", {"secure_aggregation": "secagg"}, {**SHARE, "clip": 1.0, "noise": 1.0}
    ),
    "masks, adaptive, quieter": (
        "central",
        {"secure_aggregation": "secagg", "adaptive_clip": True},
        {**SHARE, "clip": 4.0, "noise": 3.9},
    ),
    "masks, bare": ("central", {"secure_aggregation": "secagg"}, {"clip": 0.5, "noise": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize(("mechanism", "more", "given"), WEAKER.values(), ids=WEAKER)
def test_a_weaker_plan_than_was_told_is_refused(
    mechanism: str, more: dict[str, Any], given: dict[str, Any]
) -> None:
    told = pledge(privacy(mechanism, **more), 1.0 if more and mechanism == "central" else 2.0)
    with pytest.raises(SecurityRefusal, match="the server asks for"):
        told.hold(plan(**given))


KEPT = {
    "none": ("none", {}, {}),
    "local": ("local", {}, LOCAL),
    "local, more": ("local", {}, {"clip": 0.25, "noise": 1.0}),
    "example": ("example", {}, EXAMPLE),
    "central, the server's": ("central", {}, {}),
    "masks": ("none", {"secure_aggregation": "secagg_plus"}, MASKS),
    "masks and noise": ("central", {"secure_aggregation": "secagg"}, SHARE),
    "adaptive": (
        "central",
        {"secure_aggregation": "secagg", "adaptive_clip": True},
        {**SHARE, "clip": 4.0, "noise": 4.0},
    ),
}


@pytest.mark.parametrize(("mechanism", "more", "given"), KEPT.values(), ids=KEPT)
def test_what_was_told_is_done(mechanism: str, more: dict[str, Any], given: dict[str, Any]) -> None:
    here = {"central": 1.0 if more else 0.0, "none": 0.0}.get(mechanism, 2.0)
    pledge(privacy(mechanism, **more), here).hold(plan(**given))


def test_statistics_are_held_to_their_bounds_too() -> None:
    told = pledge(privacy("release", min_class_examples=3), 0.0)
    told.hold(plan("statistics", **ROWS, least_per_class=3))
    for weaker in ({**ROWS}, {"row_clip": 1.0, "least_per_class": 3}, {"least_per_class": 3}):
        with pytest.raises(SecurityRefusal):
            told.hold(plan("statistics", **weaker))
    told = pledge(privacy("release", secure_aggregation="secagg"), 1.5)
    told.hold(plan("statistics", **ROWS, noise=1.5, **MASKS))
    with pytest.raises(SecurityRefusal, match="less noise"):
        told.hold(plan("statistics", **ROWS, noise=1.4, **MASKS))


def test_the_last_round_is_the_last() -> None:
    told = pledge(privacy("local"))
    told.hold(plan(round=5, **LOCAL))
    with pytest.raises(SecurityRefusal, match="after the last of 5 rounds"):
        told.hold(plan(round=6, **LOCAL))


@pytest.mark.parametrize(
    ("section", "numbers", "why"),
    [
        (privacy("local"), {"noise_multiplier": 1.9}, "less noise than it said"),
        (privacy("local"), {"client_noise": 1.9}, "less noise here"),
        (privacy("example"), {"client_noise": 0.0}, "less noise"),
        (privacy("central", secure_aggregation="secagg"), {"client_noise": 0.0}, "less noise"),
        (privacy("local", epsilon=2.9), {}, "larger epsilon"),
        (privacy("local", epsilon=2.9), {"epsilon": None}, "larger epsilon"),
    ],
)
def test_what_is_settled_is_no_weaker_than_what_was_said(
    section: Privacy, numbers: dict[str, Any], why: str
) -> None:
    with pytest.raises(SecurityRefusal, match=why):
        pledge(section, **numbers)
    assert pledge(section, **{"epsilon": 2.0}).epsilon == 2.0 if not numbers else True


def test_what_is_settled_stays() -> None:
    told = pledge(privacy("local"))
    same = {"noise_multiplier": 2.0, "client_noise": 2.0, "epsilon": 3.0}
    assert told.settle(same) == told
    with pytest.raises(SecurityRefusal, match="another epsilon or noise"):
        told.settle({**same, "epsilon": 4.0})


@pytest.mark.parametrize(
    "odd",
    [
        {}, {"noise_multiplier": "2"}, {"noise_multiplier": -1}, {"client_noise": True},
        {"epsilon": float("inf")}, {"epsilon": "3"},
    ],
    ids=str,
)  # fmt: skip
def test_odd_numbers_are_refused(odd: dict[str, Any]) -> None:
    good = {"noise_multiplier": 2.0, "client_noise": 2.0, "epsilon": 3.0}
    with pytest.raises(InputError):
        Pledge(privacy("local"), 5).settle({**good, **odd} if odd else {})


@pytest.mark.parametrize(
    "odd", [{"privacy": None}, {"privacy": {"mechanism": "trust"}}, {"rounds": 0}, {"rounds": "5"}]
)
def test_odd_terms_are_refused(odd: dict[str, Any]) -> None:
    good = {"privacy": Privacy().model_dump(mode="json"), "rounds": 5}
    assert read_pledge(good).asked == Privacy()
    with pytest.raises(InputError, match="the server"):
        read_pledge({**good, **odd})


def test_a_client_can_insist() -> None:
    none, masks = privacy("none"), privacy("none", secure_aggregation="secagg")
    Pledge(masks, 5).insist(["secagg"])
    Pledge(privacy("local", epsilon=3.0), 5).insist(["dp"])
    pledge(privacy("central", secure_aggregation="secagg")).insist(["dp", "secagg"])
    for section, demand in ((none, "secagg"), (none, "dp"), (masks, "dp"), (
        privacy("local"), "secagg"), (privacy("local", noise_multiplier=0.0), "dp"),
    ):  # fmt: skip
        with pytest.raises(SecurityRefusal, match="takes part only with"):
            Pledge(section, 5).insist([demand])
    quiet = pledge(privacy("local", noise_multiplier=0.0), 0.0, noise_multiplier=0, epsilon=None)
    with pytest.raises(SecurityRefusal):
        quiet.insist(["dp"])
    with pytest.raises(InputError, match="--require"):
        check_demands(["secagg", "trust"])


WORDS = {
    "none": (privacy("none"), "no differential privacy is applied.*sees this client's answers"),
    "masks": (privacy("none", secure_aggregation="secagg"), "the sum alone, over at least 67%"),
    "central": (
        privacy("central"),
        "whole clients.*the server, which is trusted.*of 2 times that length",
    ),
    "share": (privacy("central", secure_aggregation="secagg"), "adds its share of the noise"),
    "example": (privacy("example", epsilon=3.0), "single examples.*epsilon will be at most 3 "),
    "release": (privacy("release"), "single examples: statistics are bounded to length 0.5"),
}


@pytest.mark.parametrize(("section", "words"), WORDS.values(), ids=WORDS)
def test_the_user_is_told_in_words(section: Privacy, words: str) -> None:
    assert re.search(words, " ".join(Pledge(section, 5).words()))


def test_the_user_is_told_what_epsilon_came_to() -> None:
    told = " ".join(pledge(privacy("local", epsilon=3.0)).words())
    assert "of 2 times that length; as the server computes it, epsilon is 3 (delta 1e-05)" in told
    nothing = pledge(privacy("local", noise_multiplier=0.0), 0.0, noise_multiplier=0, epsilon=None)
    assert "nothing is promised" in " ".join(nothing.words())


@pytest.fixture
def clients(make_site: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Three clients with features of their own, gathered; the site, the gathering, the engine."""

    def make(demands: tuple[str, ...] = (), **tables: Any) -> tuple[Any, Any, FlowerEngine]:
        site = make_site(
            data={"source": "arrays", "path": "/none.npz", "domains": False},
            clients={"partition": "natural"},
            backbone={"name": "identity", "weights": "default", "image_size": None},
            training={"local_epochs": 2, "batch_size": 8, "learning_rate": 0.1},
            **{"rounds": 3, **tables},
        )
        rng = np.random.default_rng(1)
        for name in NAMES:
            y = np.arange(50) % 3
            x = rng.normal(size=(50, 5)).astype(np.float32)
            x[np.arange(50), y] += 1.5
            np.savez(tmp_path / f"{name}.npz", x=x, y=y)
            site.add(name, tmp_path / f"{name}.npz", demands=demands)
        gathering = site.gathering()
        gathered = gathering.gather()
        engine = FlowerEngine(
            site.exchange, gathered.roster, gathering.seat, gathered.seats, real=True
        )
        return site, gathering, engine

    return make


def federation_of(site: Any, gathering: Any, engine: FlowerEngine, settle: bool = True) -> Any:
    """As ``deployment.running`` makes it."""
    scenario, roster = site.scenario, engine.roster
    head = {"weight": np.zeros((3, 5), np.float32), "bias": np.zeros(3, np.float32)}
    promise = promise_to(scenario, roster)
    strategy = protected(make_strategy(scenario, roster.names), scenario, promise, roster.train)
    if promise is not None and settle:
        gathering.settle(settlement(promise, strategy))
    sums = carried_sums(scenario, roster, engine, "run", lambda round, client, what: None)
    return Federation(scenario, roster, head, strategy, engine, {}, promise, sums, "system")


def run(federation: Federation, place: Path) -> tuple[Any, Any, list[Any]]:
    folder, rows = RunFolder.create(place, ""), list[Any]()
    try:
        federation.engine.start(federation.head)
        return *run_rounds(
            federation, folder, lambda row, updates: rows.append((row, updates)), Interrupts()
        ), rows  # fmt: skip
    finally:
        folder.release()


BOTH = {
    "mechanism": "central", "noise_multiplier": 1.0, "clip": 0.3, "secure_aggregation": "secagg",
}  # fmt: skip


def test_noise_and_masks_of_real_clients_together(
    clients: Callable[..., Any], tmp_path: Path
) -> None:
    site, gathering, engine = clients(("dp", "secagg"), privacy=BOTH)
    federation = federation_of(site, gathering, engine)
    state, progress, rows = run(federation, tmp_path / "run")
    assert [row["accepted"] for row, _ in rows] == [3, 3, 3]
    assert (progress.dropouts, progress.aborted) == (0, 0)
    promise = federation.promise
    assert promise is not None
    assert rows[-1][0]["epsilon"] == pytest.approx(promise.epsilon_after(3))
    assert any("how many examples it has" in one for one in promise.assumptions)
    told = "\n".join(site.told["east"])
    assert "secure aggregation: what is trained here leaves under masks" in told
    assert f"epsilon is {promise.epsilon_after(3):.4g}" in told
    for node in site.nodes.values():  # nothing but rings has left, and not one loss
        trained = [unpack(r, 10**7) for r in node.replies]
        trained = [(f, t) for f, t in trained if f.get("masked")]
        assert len(trained) == 3
        assert all(set(t) == {"clients", "examples", "loss", "head.ring.values"}
                   and np.isnan(t["loss"]).all() for _, t in trained)  # fmt: skip
    # the same scenario and data once more, another head
    again = federation_of(*clients(privacy=BOTH))
    other, *_ = run(again, tmp_path / "again")
    assert not np.array_equal(state.head["weight"], other.head["weight"])


MASKED = {"secure_aggregation": "secagg"}
NOISY = {"noise_multiplier": 1.0, "clip": 0.3}
FED3R = {"name": "fed3r"}
UNIFORM = {"name": "fedavg", "weighting": "uniform"}
RUNS = {
    "local": ({"mechanism": "local", **NOISY}, UNIFORM),
    "local under masks": ({"mechanism": "local", **NOISY, **MASKED}, UNIFORM),
    "example": ({"mechanism": "example", **NOISY}, {"name": "fedavg"}),
    "example under masks": ({"mechanism": "example", **NOISY, **MASKED}, {"name": "fedavg"}),
    "central": ({"mechanism": "central", **NOISY}, UNIFORM),
    "adaptive": ({"mechanism": "central", **NOISY, "adaptive_clip": True}, UNIFORM),
    "epsilon": ({"mechanism": "central", "epsilon": 5.0, **MASKED}, UNIFORM),
    "few masks": ({"secure_aggregation": "secagg_plus", "neighbours": 2}, {"name": "fedavg"}),
    "statistics": ({**MASKED, "min_class_examples": 3}, FED3R),
    "least of a class": ({"min_class_examples": 3}, FED3R),
    "release": ({"mechanism": "release", **NOISY}, FED3R),
    "release of clients": ({"mechanism": "release", "unit": "client", **NOISY}, FED3R),
    "release under masks": ({"mechanism": "release", **NOISY, **MASKED}, FED3R),
    "release of clients under masks": (
        {"mechanism": "release", "unit": "client", **NOISY, **MASKED}, FED3R
    ),
}  # fmt: skip


@pytest.mark.parametrize(("section", "strategy"), RUNS.values(), ids=RUNS)
def test_an_honest_server_is_refused_nothing(
    section: dict[str, Any], strategy: dict[str, Any], clients: Callable[..., Any], tmp_path: Path
) -> None:
    rounds = 1 if strategy is FED3R else 2
    site, gathering, engine = clients(privacy=section, strategy=strategy, rounds=rounds)
    find = find_conflicts(site.scenario)
    assert [problem.line() for problem in find] == []
    federation = federation_of(site, gathering, engine)
    _, _, rows = run(federation, tmp_path / "run")
    assert [(row["accepted"], updates.failures) for row, updates in rows] == [(3, ())] * rounds
    told = "\n".join(site.told["east"])
    if federation.promise is None:
        assert "no differential privacy is applied" in told
    else:
        epsilon = federation.promise.epsilon_after(rounds)
        assert f"epsilon is {epsilon:.4g}" in told
        assert rows[-1][0]["epsilon"] == pytest.approx(epsilon)


def test_masks_alone_give_the_simulations_head(clients: Callable[..., Any], tmp_path: Path) -> None:
    site, gathering, engine = clients(privacy={"secure_aggregation": "secagg"})
    federation = federation_of(site, gathering, engine)
    state, *_ = run(federation, tmp_path / "real")
    told = [line for line in site.told["east"] if "privacy" in line]
    assert told == ["no differential privacy is applied"]
    from fedtl.engines import LocalEngine
    from fedtl.types import Population, Rows

    each = [site.hosts[name].population() for name in engine.roster.names]
    ends = np.cumsum([0, *(len(own.features) for own in each)])

    def rows(which: str) -> Rows:
        own = [getattr(one, which).index + first for one, first in zip(each, ends, strict=False)]
        return Rows(np.concatenate(own), np.cumsum([0, *map(len, own)]))

    everybody = Population(
        np.concatenate([own.features for own in each]), np.concatenate([o.labels for o in each]),
        each[0].classes, rows("train"), rows("test"), engine.roster.names, ("",) * 3,
    )  # fmt: skip
    simulated = replace(
        federation, engine=LocalEngine(everybody, 1), noise="seeded",
        secure=simulated_sums(site.scenario, engine.roster.train),
    )  # fmt: skip
    wanted, *_ = run(simulated, tmp_path / "simulated")
    for name in wanted.head:
        assert state.head[name].tobytes() == wanted.head[name].tobytes()


def test_a_client_that_drops_out_is_told_and_the_rest_is_summed(
    clients: Callable[..., Any], tmp_path: Path
) -> None:
    site, gathering, engine = clients(privacy={**BOTH, "threshold": 0.6})
    victim, at = next(n for n, name in site.names.items() if name == "west"), [0]

    def before(kind: str) -> None:
        at[0] += kind == "secagg_keys"
        site.nodes[victim].silent = at[0] == 2 and kind == "train"

    federation = federation_of(site, gathering, engine)
    site.nodes[victim].before = before
    _, progress, rows = run(federation, tmp_path / "run")
    assert [row["accepted"] for row, _ in rows] == [3, 2, 3]
    assert progress.dropouts == 1
    (failure,) = rows[1][1].failures
    assert (failure.client, failure.reason) == (2, "no answer")


def test_below_the_threshold_the_round_is_no_round(
    clients: Callable[..., Any], tmp_path: Path
) -> None:  # FAULTS 72
    site, gathering, engine = clients(privacy={**BOTH, "threshold": 1.0})
    victim = next(n for n, name in site.names.items() if name == "west")
    begun, asked = dict.fromkeys(site.nodes, 0), list[tuple[int, str]]()

    def watch(node: int) -> Callable[[str], None]:
        def before(kind: str) -> None:
            begun[node] += kind == "secagg_keys"
            asked.append((begun[node], kind))
            site.nodes[node].silent = (node, begun[node], kind) == (victim, 2, "train")

        return before

    federation = federation_of(site, gathering, engine)
    for node in site.nodes:
        site.nodes[node].before = watch(node)
    _, progress, rows = run(federation, tmp_path / "run")
    assert [row["accepted"] for row, _ in rows] == [3, 0, 3]
    assert rows[1][0]["abandoned"]
    assert progress.aborted == 1
    assert rows[1][0]["epsilon"] == rows[0][0]["epsilon"] or rows[1][0]["epsilon"] is None
    ledger = (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    assert len(ledger) == 2  # nothing was released in the second
    assert asked.count((2, "secagg_reveal")) == 0
    assert asked.count((1, "secagg_reveal")) == asked.count((3, "secagg_reveal")) == 3


def test_who_was_not_told_epsilon_is_told_before_it_answers(
    clients: Callable[..., Any], tmp_path: Path
) -> None:
    """A client that did not hear of it asks to be made ready; the next round has it."""
    site, gathering, engine = clients(privacy={"mechanism": "local", "noise_multiplier": 1.0})
    federation = federation_of(site, gathering, engine, settle=False)
    assert federation.promise is not None
    told = settlement(federation.promise, federation.strategy)
    deaf = next(n for n, name in site.names.items() if name == "west")
    site.nodes[deaf].silent = True
    gathering.settle(told)
    site.nodes[deaf].silent = False
    _, _, rows = run(federation, tmp_path / "run")
    assert [row["accepted"] for row, _ in rows] == [2, 3, 3]
    assert "the server has not said yet what epsilon is" in rows[0][1].failures[0].reason


def test_a_round_is_answered_once(clients: Callable[..., Any]) -> None:
    site, gathering, engine = clients(privacy={"mechanism": "local", "noise_multiplier": 1.0})
    federation = federation_of(site, gathering, engine)
    state = federation.strategy.init(federation.head, 3)
    mine: PrivateHost = site.hosts["east"]
    step = plan_round(site.scenario, 3, federation.strategy, state, 1, seeded_noise=False)
    assert step.noise_keys is None
    assert step.protection is not None
    assert step.protection.noise == 1.0
    mine.protected(step)
    with pytest.raises(SecurityRefusal, match="round 1 after round 1"):
        mine.protected(step)
    mine.protected(replace(step, round=2))
    mine.protected(replace(step, training=replace(step.training, epochs=0), protection=None))
    bare = replace(step, round=3, protection=None)
    for pretext in (
        bare,
        replace(bare, training=replace(step.training, epochs=0), personal=Personal("pfedme")),
        replace(bare, training=replace(step.training, epochs=0), reports=("start_loss",)),
        replace(bare, training=replace(step.training, epochs=0, prior_strength=1e9)),
    ):
        with pytest.raises(SecurityRefusal):
            mine.protected(pretext)


def test_the_least_share_of_noise_is_that_of_the_largest_cohort(
    clients: Callable[..., Any],
) -> None:
    site, gathering, engine = clients(privacy={**BOTH, "threshold": 0.6})
    federation = federation_of(site, gathering, engine)
    assert federation.promise is not None
    told = settlement(federation.promise, federation.strategy)
    assert told["client_noise"] == pytest.approx(1.0 / sqrt(0.6 * 3))
    state = federation.strategy.init(federation.head, 3)
    step = plan_round(site.scenario, 3, federation.strategy, state, 1, seeded_noise=False)
    assert step.protection is not None
    assert step.protection.noise == pytest.approx(told["client_noise"] * 0.3)


def test_a_server_that_is_started_again_settles_again(
    clients: Callable[..., Any], tmp_path: Path
) -> None:
    """The same clients, in processes that stayed; the run begins anew, with another id."""
    site, gathering, engine = clients(privacy=BOTH)
    run(federation_of(site, gathering, engine), tmp_path / "run")
    del site.exchange
    gathering = site.gathering()
    gathered = gathering.gather()
    engine = FlowerEngine(site.exchange, gathered.roster, gathering.seat, gathered.seats, real=True)
    *_, rows = run(federation_of(site, gathering, engine), tmp_path / "again")
    assert [row["accepted"] for row, _ in rows] == [3, 3, 3]
    assert sum("epsilon is" in line for line in site.told["east"]) == 2


@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_release_tells_the_share_that_it_asks_for(unit: str, clients: Callable[..., Any]) -> None:
    section = {"mechanism": "release", "unit": unit, **NOISY, **MASKED, "threshold": 0.6}
    site, gathering, engine = clients(privacy=section, strategy=FED3R, rounds=1)
    federation = federation_of(site, gathering, engine)
    assert federation.promise is not None
    told = settlement(federation.promise, federation.strategy)
    # z times the sensitivity, sqrt(2) of rows of length 1, over two clients that are enough
    wanted = 1.0 if unit == "example" else 1 / sqrt(2)
    assert told["client_noise"] == pytest.approx(wanted)
    state = federation.strategy.init(federation.head, 3)
    step = plan_round(site.scenario, 3, federation.strategy, state, 1, seeded_noise=False)
    assert step.protection is not None
    bound = 1.0 if unit == "example" else 0.3
    assert step.protection.noise == pytest.approx(told["client_noise"] * bound)
    quieter = replace(step.protection, noise=0.99 * step.protection.noise)
    with pytest.raises(SecurityRefusal, match="less noise"):
        site.hosts["east"].protected(replace(step, protection=quieter))
    site.hosts["east"].protected(step)


def test_a_client_that_insists_on_more_does_not_join(
    make_site: Callable[..., Any], tmp_path: Path
) -> None:
    from fedtl.errors import PolicyStop

    site = make_site(
        data={"source": "arrays", "path": "/none.npz", "domains": False},
        clients={"partition": "natural"},
        backbone={"name": "identity", "weights": "default", "image_size": None},
    )
    np.savez(tmp_path / "a.npz", x=np.ones((9, 2), np.float32), y=np.arange(9) % 2)
    site.add("a", tmp_path / "a.npz", demands=("secagg",))
    with pytest.raises(PolicyStop):
        site.gathering(join_seconds=0.5).gather()
    ((name, why),) = site.watcher.of("refused")
    assert name == "a"
    assert "takes part only with secure aggregation" in why
