"""Local training that promises something of every single example: DP-SGD at each client.

``clients.training`` with the steps of ``private_kernel`` in place of plain ones. A client's number
of rows n is public, and so are its number of steps, epochs * ceil(n / B), and the sampling rate
B / n. It tells no loss; a round that would have it use or tell more of its rows is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedtl.clients.blocks import BlockRows, block_rows, frozen, label_error, readable, run_blocks
from fedtl.clients.training import LINEAR, check_heads, check_plan, check_stacked
from fedtl.errors import InputError
from fedtl.plans import Protection, RoundPlan
from fedtl.types import ClientUpdates, Float32, Head, Int64, Population

DRAWN = 1 << 20
"""Normals, or coins, that are drawn from the system at once: 8 MB of float64."""


def train_private(
    population: Population,
    head: Head,
    plan: RoundPlan,
    *,
    threads: int = 1,
    device: str = "cpu",
    block_size: int | None = None,
    secure: bool = False,
) -> ClientUpdates:
    """Train every client of the plan by DP-SGD on its own rows.

    Args:
        population, threads, block_size: see ``train_clients``.
        head: where all clients start; linear.
        plan: as for ``train_clients``; its protection has ``example_clip`` above 0.
        device: wherever else training runs, this runs on the CPU.
        secure: coins and noise come from the operating system, not from the plan's keys.

    Returns:
        One update per planned client. A client without rows returns its start; the loss is NaN. A
        NaN among the features or weights survives to the result.

    Raises:
        InputError: shapes, ids or hyper-parameters that do not fit together, a head that is not
            linear, or a plan that would have clients use or tell what is not protected.
    """
    check_plan(population, plan)
    protection = _checked(plan, head, secure)
    starts = check_heads(population, head, None, len(plan.clients))
    if plan.corrections:
        check_stacked(plan.corrections, head, len(plan.clients), "the plan's corrections")
    training = _Training(starts, plan, protection)

    def work(first: int, stop: int) -> None:
        ids = plan.clients[first:stop]
        rows = block_rows(
            population.features,
            population.labels,
            [population.train.of(client) for client in ids.tolist()],
        )
        bad = training.secure(rows, first) if secure else training.seeded(rows, first, stop)
        if bad is not None:
            raise label_error(population, int(ids[bad]), starts["bias"].shape[1])

    if secure or not readable(population.features):
        block_size = 1  # noise or copied rows: of one client a thread
    run_blocks(work, len(plan.clients), threads=threads, block_size=block_size)
    return ClientUpdates(
        round=plan.round,
        clients=plan.clients,
        tensors=training.heads,
        num_examples=population.train.counts[plan.clients],
        loss=np.full(len(plan.clients), np.nan),
    )


def _checked(plan: RoundPlan, head: Head, secure: bool) -> Protection:
    """The plan's protection, once nothing stands against it."""
    protection, own = plan.protection, plan.training
    if protection is None or not protection.example_clip > 0:
        raise InputError("DP-SGD needs protection.example_clip above 0")
    if not (np.isfinite(protection.example_noise) and protection.example_noise >= 0):
        raise InputError(
            "protection.example_noise must be at least 0", got=protection.example_noise
        )
    if set(head) != LINEAR:
        raise InputError(
            "DP-SGD trains linear heads only", got=sorted(head), do="Set head.kind to 'linear'"
        )
    for what, there in (
        ("personal heads", plan.personal is not None),
        ("reports of " + " and ".join(plan.reports), bool(plan.reports)),
        ("balanced softmax", own.prior_strength != 0),
    ):
        if there:
            raise InputError(f"{what} would use single examples outside of DP-SGD's protection")
    keys = 0 if plan.noise_keys is None else len(plan.noise_keys)
    if protection.example_noise and not secure and keys != len(plan.clients):
        raise InputError(
            "a plan with noise needs one noise key per client",
            where=f"round {plan.round}",
            got=keys,
            allowed=len(plan.clients),
        )
    return protection


class _Training:
    """The clients' heads while they are trained, and what the kernel is told.

    Attributes:
        heads: name -> float32 [k, ...].
    """

    def __init__(self, starts: Head, plan: RoundPlan, protection: Protection) -> None:
        self._own, self._protection = plan.training, protection
        num = len(plan.clients)
        self._starts = _pair(starts)
        weight, bias = (np.repeat(start, num, axis=0) for start in self._starts)
        self.heads = {"weight": weight, "bias": bias}
        self._extra = _pair(plan.corrections or {name: starts[name][:0] for name in LINEAR})
        keys = plan.batch_keys if plan.noise_keys is None else plan.noise_keys  # not read without
        self._keys = np.ascontiguousarray(plan.batch_keys, np.uint64)
        self._noise_keys = np.ascontiguousarray(keys, np.uint64)
        self._num_classes, width = self._starts[0].shape[1:]
        self._row = width + 1

    def seeded(self, rows: BlockRows, first: int, stop: int) -> int | None:
        """Train a block of clients; returns the first whose labels are out of range."""
        coins = np.empty((0, 0), np.uint32)
        noise = np.empty((0, self._num_classes, self._row), np.float32)
        steps, speed = self._steps(rows), self._still(rows)
        return self._run(rows, slice(first, stop), coins, noise, 0, steps, speed)

    def secure(self, rows: BlockRows, client: int) -> int | None:
        """The same for one client, with coins and noise from the system, some steps at a time."""
        from fedtl.privacy.noise import from_system

        source, num = from_system(), len(rows.index)
        size = self._num_classes * self._row
        steps, speed = self._steps(rows), self._still(rows)
        at_once = max(1, DRAWN // max(size, num))
        bad = None
        for begin in range(0, max(1, int(steps[0])), at_once):  # once without steps: to be checked
            end = np.minimum(begin + at_once, steps)
            taken = int(end[0]) - begin
            tossed = bytearray(os.urandom(4 * taken * num))
            coins = np.frombuffer(tossed, np.uint32).reshape(taken, num)
            drawn = source.normal(taken * size if self._protection.example_noise else 0)
            noise = drawn.astype(np.float32).reshape(-1, self._num_classes, self._row)
            place = slice(client, client + 1)
            bad = self._run(rows, place, coins, noise, begin, end, speed)
        return bad

    def _steps(self, rows: BlockRows) -> Int64:
        """Of each client of a block, int64 [b]."""
        epochs = self._own.epochs if self._own.layers != "hidden" else 0  # it has none
        return np.asarray(epochs * -(-(rows.stops - rows.starts) // self._own.batch_size))

    def _still(self, rows: BlockRows) -> tuple[Float32, Float32]:
        """No momentum yet."""
        shape = (len(rows.starts), self._num_classes, self._row - 1)
        return np.zeros(shape, np.float32), np.zeros(shape[:2], np.float32)

    def _run(
        self, rows: BlockRows, part: slice, coins: npt.NDArray[np.uint32], noise: Float32,
        begin: int, end: Int64, speed: tuple[Float32, Float32],
    ) -> int | None:  # fmt: skip
        """Have a block's clients take their steps from ``begin`` to ``end``."""
        from fedtl.clients.kernel import EVERYTHING_FINE
        from fedtl.clients.private_kernel import train_private_block

        own, protection = self._own, self._protection
        with np.errstate(over="ignore"):  # a rate beyond float32 is infinite, its update is refused
            rate, momentum, decay, proximal = (
                np.float32(value)
                for value in (own.learning_rate, own.momentum, own.weight_decay, own.proximal)
            )
        bad = train_private_block(
            rows.features, rows.halves, rows.labels, rows.index, rows.starts, rows.stops,
            *self._starts, self._extra[0][part], self._extra[1][part],
            self._keys[part], self._noise_keys[part], coins, noise, begin, end,
            own.batch_size, protection.example_clip, protection.example_noise,
            rate, momentum, decay, proximal,
            self.heads["weight"][part], self.heads["bias"][part], *speed,
        )  # fmt: skip
        return None if bad == EVERYTHING_FINE else int(bad)


def _pair(tensors: Mapping[str, Float32]) -> tuple[Float32, Float32]:
    return frozen(tensors["weight"], np.float32), frozen(tensors["bias"], np.float32)
