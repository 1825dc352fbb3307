"""``fedtl episodes``: how well few examples do on a trunk's features, before any federation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from fedtl.build import open_data
from fedtl.data.leakage import check_leaks, find_leaks
from fedtl.errors import InputError
from fedtl.few_shot.episodes import METHODS, Pool, accuracies, draw_many, interval
from fedtl.interrupts import Interrupts
from fedtl.ready_features import ExtractionProgress, ReadyFeatures, make_features
from fedtl.scenario.schema import Scenario
from fedtl.terminal import Terminal, percent, plain_table, shown
from fedtl.transfer.views import without_views

CLIENTS_MOST = 50
"""Clients whose own episodes are shown; of more, so many are drawn (seeded)."""

ASSUMED = (
    "intervals are 95 %: mean +- 1.96 deviations of the episodes / sqrt(their number)",
    "they take episodes as independent draws from the examples at hand and say nothing of examples "
    "or classes that are not among them",
    "features are scaled to length 1; heads learn from an episode's support alone",
)
"""What the figures rest on."""


def measure_episodes(
    scenario: Scenario,
    ways: int,
    shots: Sequence[int],
    queries: int,
    count: int,
    interrupts: Interrupts,
    progress: ExtractionProgress | None = None,
) -> dict[str, Any]:
    """Accuracy of heads that learn from a few examples, as JSON values.

    Three kinds of pools: everybody's examples together, each client's own, and each client's to
    learn from with everybody else's to be judged on.

    Args:
        ways: classes of an episode, at least 2.
        shots: examples of a class to learn from; each number is measured by itself.
        queries: examples of a class to be judged on, at least 1.
        count: episodes of each pool, at least 2.

    Raises:
        InputError: too few classes, or too few examples of them, anywhere; whatever is wrong with
            the data.
    """
    _check(ways, shots, queries, count)

    def extracting(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total)
        interrupts.check("interrupted while examples went through the trunk")

    data = scenario.data.model_copy(update={"shots": None})
    plain = without_views(scenario.model_copy(update={"data": data}))
    opened = open_data(plain)
    ready = make_features(opened, extracting)
    check_leaks(find_leaks(ready.content, ready.split, ready.examples), scenario.data.leakage)
    began = time.perf_counter()
    rows = []
    for pool in _pools(ready, scenario.seed):
        for number in shots:
            interrupts.check("interrupted between episodes")
            drawn = draw_many(
                pool, ready.examples.labels, ways, number, queries, count, scenario.seed
            )
            if drawn is not None:
                found = accuracies(ready.matrix, *drawn)
                rows.append(_row(pool, number, found))
    if not any(row["pool"] == EVERYBODY for row in rows):
        raise _too_few(ready, ways, shots, queries)
    return {
        "name": scenario.name,
        "scenario_hash": scenario.hash(),
        "backbone": opened.backbone.name,
        "ways": ways,
        "queries": queries,
        "episodes": count,
        "classes": len(np.unique(ready.examples.labels)),
        "rows": rows,
        "skipped": _skipped(ready, rows),
        "assumptions": list(ASSUMED),
        "notes": list(ready.notes),
        "seconds": round(time.perf_counter() - began, 3),
    }


EVERYBODY, OTHERS = "everybody", "{} for others"


def show_episodes(
    scenario: Scenario,
    ways: int,
    shots: Sequence[int],
    queries: int,
    count: int,
    console: Console,
    interrupts: Interrupts,
) -> dict[str, Any]:
    """Measure and print; returns what ``measure_episodes`` does."""
    with Terminal(console) as terminal:
        facts = measure_episodes(
            scenario, ways, shots, queries, count, interrupts, terminal.extracting
        )
    console.print(
        f"[bold]{shown(facts['name'])}[/] {count} episodes of {ways} of {facts['classes']} classes,"
        f" {queries} queries of each, on features of {shown(facts['backbone'])}"
    )
    table = plain_table("examples of", "shots", *METHODS)
    for row in facts["rows"]:
        cells = [
            f"{percent(row[name]['mean'])} +-{100 * row[name]['half']:.1f}" for name in METHODS
        ]
        table.add_row(shown(row["pool"]), str(row["shots"]), *cells)
    console.print(table)
    for line in (*facts["skipped"], *facts["assumptions"]):
        console.print(shown(line), highlight=False)
    return facts


def _check(ways: int, shots: Sequence[int], queries: int, count: int) -> None:
    for name, least, values in (
        ("--ways", 2, (ways,)),
        ("--shots", 1, shots),
        ("--queries", 1, (queries,)),
        ("--episodes", 2, (count,)),
    ):
        for value in values:
            if value < least:
                raise InputError(
                    "too small for an episode", where=name, got=value, allowed=f"at least {least}"
                )


def _pools(ready: ReadyFeatures, seed: int) -> list[Pool]:
    from fedtl import seeding

    split, everything = ready.split, np.arange(len(ready.examples))
    pools = [Pool(EVERYBODY, everything, everything)]
    clients = np.arange(len(split.names))
    if len(clients) > CLIENTS_MOST:
        stream = seeding.generator(seed, "episode_clients")
        clients = np.sort(stream.choice(clients, CLIENTS_MOST, replace=False))
    both = [(split.train.of(k), split.test.of(k)) for k in clients.tolist()]
    held = [np.sort(np.concatenate(parts)) for parts in both]
    pools += [Pool(split.names[k], own, own) for k, own in zip(clients, held, strict=True)]
    if len(split.names) > 1:
        pools += [
            Pool(OTHERS.format(split.names[k]), own, np.setdiff1d(everything, own))
            for k, own in zip(clients, held, strict=True)
        ]
    return pools


def _row(pool: Pool, shots: int, found: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"pool": pool.name, "shots": shots}
    for name, values in found.items():
        mean, half = interval(values)
        row[name] = {"mean": mean, "half": half, "low": mean - half, "high": mean + half}
    return row


def _skipped(ready: ReadyFeatures, rows: Sequence[dict[str, Any]]) -> list[str]:
    shown_pools = {row["pool"] for row in rows}
    names = ready.split.names
    lines = []
    if missing := sum(name not in shown_pools for name in names):
        lines.append(f"{missing} of {len(names)} clients are not shown by themselves: too few")
        lines[-1] += " classes with enough examples, or more clients than are shown"
    return lines


def _too_few(ready: ReadyFeatures, ways: int, shots: Sequence[int], queries: int) -> InputError:
    counts = np.bincount(ready.examples.labels, minlength=len(ready.examples.classes))
    least = min(shots) + queries
    return InputError(
        f"too few classes have enough examples for {ways} ways",
        where="--ways",
        got=f"{int((counts >= least).sum())} classes of {least} examples (shots + queries) or "
        f"more, the largest class has {int(counts.max())}",
        allowed=f"at least {ways} such classes",
        do="Ask for fewer --ways, --shots or --queries",
    )
