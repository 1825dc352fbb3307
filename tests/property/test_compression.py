"""Compression against the slow version, over updates of every size, and over blocks of clients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from runpy import run_path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedtl.clients.compression import compress, expand
from fedtl.clients.personal_store import PersonalStore
from fedtl.plans import Compression, RoundPlan
from fedtl.types import ClientUpdates, Float32, Head

UNIT = Path(__file__).parents[1] / "unit" / "clients"
oracle = SimpleNamespace(**run_path(str(UNIT / "compression_oracle.py")))

compressions = st.builds(
    Compression,
    kind=st.sampled_from(["top_k", "int8", "sign"]),
    fraction=st.sampled_from([1e-6, 0.1, 0.5, 1.0]),
    error_feedback=st.just(False),
)
values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-140), 1e-30, 3e37, -3e37]),
    st.floats(-4, 4, width=32),
)
shapes = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=2), min_size=1, max_size=4)


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[Head, ClientUpdates]:
    """Heads that begin at zero, so that a trained head is its update, bit for bit."""
    names = draw(st.permutations(["weight", "bias", "hidden.0.weight", "hidden.0.bias"]))
    forms = dict(zip(names, draw(shapes), strict=False))
    count = draw(st.integers(1, 4))
    tensors = {
        name: draw(arrays(np.float32, (count, *form), elements=values.map(np.float32)))
        for name, form in forms.items()
    }
    head = {name: np.zeros(form, np.float32) for name, form in forms.items()}
    clients = np.sort(np.array(draw(st.permutations(range(count)))))
    return head, ClientUpdates(1, clients, tensors, np.ones(count, np.int64), np.zeros(count))


def packed(updates: ClientUpdates, head: Head, plan: RoundPlan, store: object = None) -> list:
    out = compress(updates, head, plan, store, [f"c{i}" for i in range(4)])  # type: ignore[arg-type]
    return [{name: t[i] for name, t in out.tensors.items()} for i in range(len(out.clients))]


def row(updates: ClientUpdates, i: int) -> Float32:
    return oracle.flat({name: tensor[i] for name, tensor in updates.tensors.items()})


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cohorts(), compressions)
def test_agrees_with_one_entry_after_another(
    cohort: tuple[Head, ClientUpdates], asked: Compression
) -> None:
    head, updates = cohort
    plan = oracle.plan_for(updates.clients, asked)
    sent = packed(updates, head, plan)
    heads = expand(compress(updates, head, plan, None, []), head, plan)
    assert heads.failures == ()
    assert sum(values.nbytes for values in sent[0].values()) == plan.up_bytes(head)
    for i, own in enumerate(sent):
        for name, expected in oracle.pack(row(updates, i), head, asked).items():
            assert own[name].tolist() == np.array(expected, own[name].dtype).tolist(), name
        assert np.array_equal(row(heads, i), oracle.unpack(own, head))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cohorts(), compressions, st.integers(0, 2**32 - 1))
def test_a_client_alone_sends_the_same_bits(
    cohort: tuple[Head, ClientUpdates], asked: Compression, seed: int
) -> None:
    head, updates = cohort
    plan = oracle.plan_for(updates.clients, asked)
    together = packed(updates, head, plan)
    for i in np.random.default_rng(seed).permutation(len(updates.clients)).tolist():
        alone = ClientUpdates(
            1,
            updates.clients[[i]],
            {name: tensor[[i]] for name, tensor in reversed(updates.tensors.items())},
            updates.num_examples[[i]],
            updates.loss[[i]],
        )
        (own,) = packed(alone, head, plan.part(np.array([i])))
        assert {n: v.tobytes() for n, v in own.items()} == {
            n: v.tobytes() for n, v in together[i].items()
        }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cohorts(), compressions)
def test_what_is_left_is_as_short_as_the_papers_say(
    cohort: tuple[Head, ClientUpdates], asked: Compression
) -> None:
    """The bounds that convergence rests on: what is left of v is shorter than v.

    top_k leaves at most (1 - m/P)|v|^2 (Stich et al. 2018, section 2); int8 at most half a level of
    each entry; sign leaves |v|^2 - |v|_1^2 / P of each tensor (Karimireddy et al. 2019: the scaled
    sign is a compressor with delta = |v|_1^2 / (P |v|^2)).
    """
    head, updates = cohort
    plan = oracle.plan_for(updates.clients, asked)
    for i, own in enumerate(packed(updates, head, plan)):
        v = row(updates, i).astype(np.float64)
        left = v - oracle.unpack(own, head)
        if asked.kind == "top_k":
            share = len(own["top_k.places"]) / len(v)
            assert (left**2).sum() <= (1 - share) * (v**2).sum() * (1 + 1e-12)
            continue
        start = 0
        for name in sorted(head):
            part = slice(start, start + head[name].size)
            start = part.stop
            largest = np.abs(v[part]).max()
            tiny = 2.0**-149  # below it float32 has nothing
            if asked.kind == "int8":
                assert np.abs(left[part]).max() <= largest / 254 * (1 + 1e-4) + 128 * tiny
            else:
                size = head[name].size
                exact = (v[part] ** 2).sum() - np.abs(v[part]).sum() ** 2 / size
                slack = 1e-6 * (v[part] ** 2).sum() + size * (largest + tiny) * tiny * 4
                assert abs((left[part] ** 2).sum() - exact) <= slack


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cohorts(), compressions, st.lists(st.booleans(), min_size=3, max_size=6))
def test_a_killed_run_goes_on_with_the_same_bits(
    cohort: tuple[Head, ClientUpdates], asked: Compression, killed: list[bool]
) -> None:
    """Rounds that are done twice, as a kill between answer and commit has it."""
    head, updates = cohort
    asked = replace(asked, error_feedback=True)

    def run(again: list[bool]) -> list[bytes]:
        out = []
        with TemporaryDirectory() as folder:
            for round, twice in enumerate(again, 1):
                plan = oracle.plan_for(updates.clients, asked, round)
                for _ in range(1 + twice):
                    sent = packed(updates, head, plan, PersonalStore(Path(folder)))
                out.append(b"".join(v.tobytes() for own in sent for v in own.values()))
        return out

    assert run(killed) == run([False] * len(killed))
