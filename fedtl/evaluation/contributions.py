"""What each client contributes to the pooled ridge head, and forgetting one, from statistics alone.

With A, B and n summed over all clients, W_-k = (A - A_k + ridge I)^-1 (B - B_k) is exactly the head
without client k, and on any rows whose statistics are known the summed squared error of a head is
n - 2 <W, B> + <W, A W>: no client is asked again and nobody's rows are seen. The errors are those
of the ridge regression onto one-hot labels; accuracy does not follow from these sums.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save

from fedtl.clients.blocks import one_blas_thread
from fedtl.clients.statistics import unpack_symmetric
from fedtl.errors import InputError, client_of
from fedtl.results.commits import read_commit
from fedtl.results.files import write_atomic
from fedtl.results.runs import SCENARIO
from fedtl.results.statistics import kept_names, read_statistics
from fedtl.scenario.load import load_scenario
from fedtl.strategies import ServerState, make_strategy
from fedtl.strategies.closed_form import OneShot, ridge_weights
from fedtl.types import ClientUpdates, Float64, Head

Sums = Mapping[str, npt.NDArray[Any]]
"""``gram`` packed [W (W + 1) / 2], ``sums`` [C, W], ``counts`` [C] of one client or of several."""


@dataclass(frozen=True)
class Contribution:
    """How the pooled ridge head changes without one client; errors are means per row.

    Attributes:
        client: its id.
        examples: its rows.
        own_error, own_error_without: on its rows, of the head with and without it.
        others_error, others_error_without: the same on everybody else's rows; nan without others.
    """

    client: int
    examples: int
    own_error: float
    own_error_without: float
    others_error: float
    others_error_without: float

    @property
    def gain_own(self) -> float:
        """What taking part brings the client: how much its error would rise without it."""
        return self.own_error_without - self.own_error

    @property
    def gain_others(self) -> float:
        """What the client brings the others; negative where they would be better off without."""
        return self.others_error_without - self.others_error


def without(total: Sums, own: Sums) -> dict[str, npt.NDArray[Any]]:
    """The sums of everybody else."""
    return {name: total[name] - own[name] for name in ("gram", "sums", "counts")}


def squared_error(weights: Float64, sums: Sums) -> float:
    """SSE of W [W, C] on the rows behind the sums: n - 2 <W, B> + <W, A W>."""
    gram = unpack_symmetric(np.asarray(sums["gram"]))
    cross = float((weights * sums["sums"].T).sum())
    return float(sums["counts"].sum()) - 2 * cross + float((weights * (gram @ weights)).sum())


def contribution_table(
    total: Sums,
    clients: Iterable[tuple[int, Sums]],
    ridge: float,
    ridge_without: float | None = None,
) -> list[Contribution]:
    """Leave each client out in turn (F2).

    Args:
        total: sums over all clients.
        clients: id and own sums of each, read one at a time.
        ridge: of the head.
        ridge_without: of the head without a client; the same by default.
    """
    rows: list[Contribution] = []
    with one_blas_thread():
        weights, _ = ridge_weights(dict(total), ridge)
        for client, own in clients:
            others = without(total, own)
            left, _ = ridge_weights(others, ridge if ridge_without is None else ridge_without)
            mine, theirs = int(own["counts"].sum()), int(others["counts"].sum())
            rows.append(
                Contribution(
                    client,
                    mine,
                    *(_mean(squared_error(w, own), mine) for w in (weights, left)),
                    *(_mean(squared_error(w, others), theirs) for w in (weights, left)),
                )
            )
    return rows


def _mean(total: float, rows: int) -> float:
    return total / rows if rows else float("nan")


@dataclass(frozen=True)
class KeptRun:
    """A closed-form run from its folder: its last state, and what is needed to change it."""

    path: Path
    strategy: OneShot
    state: ServerState
    names: Mapping[int, str]

    @property
    def total(self) -> Sums:
        """Sums over all clients that have reported."""
        return self.state.slots

    def clients(self) -> Iterable[tuple[int, Sums]]:
        """Id and statistics of each client that is in the sums, one at a time."""
        for client in np.flatnonzero(self.state.slots["reported"]).tolist():
            yield client, read_statistics(self.path, client)

    def contributions(self) -> list[Contribution]:
        """``contribution_table`` of this run, with its own ridge (AFL: none, or its gammas)."""
        strategy = self.strategy
        if getattr(strategy, "clean", True):
            return contribution_table(
                self.total, self.clients(), float(getattr(strategy, "ridge", 0.0))
            )
        gamma, reported = getattr(strategy, "gamma", 0.0), int(self.state.slots["reported"].sum())
        return contribution_table(
            self.total, self.clients(), gamma * reported, gamma * (reported - 1)
        )


def open_kept(path: Path) -> KeptRun:
    """Read a run's last commit. Raises InputError where no statistics were kept."""
    if not (path / SCENARIO).is_file():
        raise InputError(
            "this is no run's folder", where=path, do="Of several seeds give one, as seed-1"
        )
    scenario = load_scenario(str(path / SCENARIO))
    commit, _ = read_commit(path / "checkpoints")
    names = kept_names(path)
    strategy = make_strategy(scenario, list(names.values())) if names else None
    if commit is None or not isinstance(strategy, OneShot):
        raise InputError(
            "this run has kept no statistics of its clients",
            where=path,
            allowed="a run of fed3r or afl with strategy.keep_statistics",
        )
    parts: dict[str, dict[str, npt.NDArray[Any]]] = {"head": {}, "slots": {}}
    for name, tensor in commit.tensors.items():
        kind, _, own = name.partition(".")
        parts[kind][own] = tensor
    return KeptRun(path, strategy, ServerState(parts["head"], parts["slots"]), names)


def forget_client(path: Path, client_name: str) -> Path:
    """Take one client out of a finished run's head, exactly as if it had never taken part (F4).

    Its statistics are subtracted from the committed sums and the head is solved again; no client is
    asked. Not true of a head that was trained on after the closed form.

    Args:
        path: the run folder; nothing in it is changed.
        client_name: as in the run's tables.

    Returns:
        The new file, ``head-without-<client>.safetensors``, beside the run's own head.

    Raises:
        InputError: no statistics were kept, or none of this client; nobody else is left.
    """
    run = open_kept(path)
    ids, names = list(run.names), list(run.names.values())
    client = ids[client_of(client_name, names, path / "statistics")]
    if not run.state.slots["reported"][client]:
        raise InputError("this client is not in the head", where=path, got=repr(client_name))
    head = head_without(run, client)
    safe = re.sub(r"[^\w.-]", "_", client_name)[:100]
    target = path / f"head-without-{safe}.safetensors"
    facts: dict[str, str] = {"without": client_name}
    if (path / "head.safetensors").is_file():
        with safe_open(path / "head.safetensors", framework="numpy") as file:
            facts = {**(file.metadata() or {}), **facts}
    write_atomic(target, save(dict(head), metadata=facts))
    return target


def head_without(run: KeptRun, client: int) -> Head:
    """The run's head without one client."""
    own = {name: tensor[None] for name, tensor in read_statistics(run.path, client).items()}
    one = np.array([client], np.int64)
    left = run.strategy.forget(
        run.state, ClientUpdates(0, one, own, own["counts"].sum(axis=1), np.full(1, np.nan))
    )
    if not left.slots["counts"].any():
        raise InputError("nobody would be left", where=run.path, got=repr(run.names[client]))
    return run.strategy.solve(left).head
