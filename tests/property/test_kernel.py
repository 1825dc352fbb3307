"""The fused kernel against the autograd loop, and its bits against everything they must not see."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtl.clients.batched import train_batched
from fedtl.clients.evaluation import evaluate_clients
from fedtl.clients.training import train_clients
from fedtl.plans import RoundPlan
from fedtl.types import ClientUpdates, LocalTraining, Population

UNIT = Path(__file__).parents[1] / "unit" / "clients"
oracle = SimpleNamespace(**run_path(str(UNIT / "oracle.py")))

trainings = st.builds(
    LocalTraining,
    epochs=st.integers(1, 3),
    batch_size=st.integers(1, 50),
    learning_rate=st.sampled_from([0.01, 0.1]),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    proximal=st.sampled_from([0.0, 0.1]),
)
shapes = st.tuples(
    st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 70), st.integers(2, 13)
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes, trainings, st.integers(0, 2**32 - 1))
def test_fused_batched_and_loop_agree(
    shape: tuple[list[int], int, int], training: LocalTraining, seed: int
) -> None:
    sizes, width, num_classes = shape
    people = oracle.federation(sizes, width, num_classes, seed)
    head, plan = oracle.linear_head(width, num_classes, seed), oracle.plan_for(people, training)
    exact, losses = oracle.train_all(people, head, plan)
    single, _ = oracle.train_all(people, head, plan, torch.float32)
    fused = train_clients(people, head, plan)
    starts = {name: tensor[None] for name, tensor in head.items()}
    batched = train_batched(people, starts, plan, threads=1, device="cpu")
    for name in head:
        # A small step may vanish in a larger weight's last bit: both sizes count.
        size = np.abs(exact[name] - head[name]).max() + 0.1 * np.abs(exact[name]).max()
        for updates in (fused, batched):
            assert np.abs(updates.tensors[name] - single[name]).max() <= 3e-5 * size
            assert np.abs(updates.tensors[name] - exact[name]).max() <= 1e-4 * size
    np.testing.assert_allclose(fused.loss, losses, rtol=1e-5)
    np.testing.assert_allclose(batched.loss, losses, rtol=1e-5)


def unaligned(people: Population, floats: int) -> Population:
    """The same features, beginning ``floats`` after a cache line's start."""
    size = people.features.size
    memory = np.empty(size + 64, np.float32)
    start = (-memory.ctypes.data % 64) // 4 + floats
    moved = memory[start : start + size].reshape(people.features.shape)
    moved[:] = people.features
    return dataclasses.replace(people, features=moved)


def misaligned(people: Population) -> Population:
    """The same features at an odd address."""
    raw = np.empty(people.features.nbytes + 1, np.uint8)[1:]
    moved = raw.view(np.float32).reshape(people.features.shape)
    moved[:] = people.features
    assert not moved.flags.aligned
    return dataclasses.replace(people, features=moved)


def same(a: ClientUpdates, b: ClientUpdates, of: list[int] | slice = slice(None)) -> bool:
    return all(np.array_equal(a.tensors[n], b.tensors[n][of]) for n in a.tensors) and (
        np.array_equal(a.loss, b.loss[of])
    )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.sampled_from([16, 33, 64]),
    st.integers(2, 13),
    trainings,
    st.integers(1, 15),
    st.randoms(use_true_random=False),
)
def test_bits_depend_on_the_client_alone(
    width: int, num_classes: int, training: LocalTraining, shift: int, random: object
) -> None:
    people = oracle.federation([5, 17, 1, 40, 8, 23, 2, 9] * 2 + [70], width, num_classes)
    head, plan = oracle.linear_head(width, num_classes), oracle.plan_for(people, training)
    reference = train_clients(people, head, plan)
    for block_size in (1, 3, 7, 16, 17):
        for threads in (1, 2):
            again = train_clients(people, head, plan, threads=threads, block_size=block_size)
            assert same(again, reference)
    for moved in (unaligned(people, shift), misaligned(people)):
        assert same(train_clients(moved, head, plan), reference)
    few = random.sample(range(17), 6)  # type: ignore[attr-defined]
    part = RoundPlan(1, np.array(few), plan.batch_keys[few], training)
    assert same(train_clients(people, head, part, threads=2), reference, few)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.sampled_from([16, 33, 64]), st.integers(2, 13), st.integers(1, 15))
def test_judging_depends_on_the_client_alone(width: int, num_classes: int, shift: int) -> None:
    people = oracle.federation([5, 17, 1, 140, 8], width, num_classes)
    head = oracle.linear_head(width, num_classes)
    reference = evaluate_clients(people, head, np.arange(5))
    for moved in (people, unaligned(people, shift), misaligned(people)):
        again = evaluate_clients(moved, head, np.array([3, 1]), threads=2)
        assert np.array_equal(again.loss_sum, reference.loss_sum[[3, 1]])
        assert np.array_equal(again.correct, reference.correct[[3, 1]])
