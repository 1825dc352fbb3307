"""``fedtl split``: who has what, how unlike the clients' labels are, and what will be hard."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from fedtl import seeding
from fedtl.build import deal
from fedtl.data.clients import ClientSplit, test_rows
from fedtl.data.examples import Examples
from fedtl.data.partitions import MIXED, assign_clients
from fedtl.data.sources import load_examples
from fedtl.data.split_files import write_split
from fedtl.evaluation.labels import DISTANCES, pairs, to_all
from fedtl.results.files import refuse_unwritable, write_atomic
from fedtl.scenario.schema import Scenario, Shift
from fedtl.terminal import plain_table, shown
from fedtl.types import Float64, Int32, Int64, Rows

SHOWN_CLIENTS = 40
SHOWN_CLASSES = 20
WIDEST_LABEL = 8
"""Characters of a class's name above its column."""

PAIRED_CLIENTS = 300
"""Of more clients, the distances between so many are looked at (seeded)."""

FEW = 10
"""Training examples below which a client is called tiny."""

MANY_DOMAINS = 1000
"""Beyond it every client is a domain of its own, and pairs of domains say nothing new."""

UNLIKE_SIZES = 20
"""Times the smallest client's examples from which on the largest is worth a word."""


def show_split(
    scenario: Scenario, command: str, console: Console, html: Path | None, write: Path | None
) -> dict[str, Any]:
    """Show who has what before anything is trained; no image is decoded, no trunk runs.

    Args:
        command: what the user called the scenario, for the command to type next.
        html: also write a page there.
        write: also keep the split there, for ``clients.split_file``.

    Returns:
        The same as JSON values: counts per client and class, distances, warnings.

    Raises:
        InputError: the data or the partition are not as the scenario has it.
        EnvironmentFault: a file cannot be written.
    """
    refuse_unwritable(html, write)
    source = load_examples(scenario.data)
    examples, split = deal(scenario, source)
    facts = split_facts(scenario, examples, split)
    console.print(f"[bold]{shown(scenario.name)}[/] [dim]who has what[/]")
    for line in summary(scenario, examples, facts):
        console.print(shown(line), soft_wrap=True)
    console.print()
    for row in heatmap(facts, console):
        console.print(row, soft_wrap=True)
    console.print()
    _print_distances(console, facts)
    for note in (*examples.notes, *facts["notes"]):
        console.print(f"[yellow]note[/] {shown(note)}", soft_wrap=True)
    for warning in facts["warnings"]:
        console.print(f"[yellow]warning[/] {shown(warning)}", soft_wrap=True)
    if html is not None:
        from fedtl.results.pages import split_page

        write_atomic(html, split_page(facts).encode())
        console.print(f"page: {shown(str(html))}", soft_wrap=True)
    if write is not None:
        keep_split(scenario, source, write)
        console.print(f"split: {shown(str(write))}", soft_wrap=True)
    console.print(f"\nNext: {shown(next_command(scenario, command, write))}", soft_wrap=True)
    return facts


def keep_split(scenario: Scenario, source: Examples, path: Path) -> None:
    """Write the split file: of all clients, and of the examples as they are before any shift."""
    examples, _ = deal(scenario.model_copy(update={"shift": Shift()}), source)
    assignment = assign_clients(examples, scenario.clients, scenario.seed)
    is_test = test_rows(assignment, examples, scenario.data.test_fraction, scenario.seed)
    write_split(path, examples, assignment, is_test)


def next_command(scenario: Scenario, command: str, write: Path | None) -> str:
    """What to type next: the gap, or a run with the split that was written."""
    if write is None or scenario.clients.partitioner is not None:
        return f"fedtl gap {command}"
    settings = ["clients.partition=file", f"clients.split_file={write}"]
    settings += ["clients.within_domains=false"] if scenario.clients.within_domains else []
    return f"fedtl run {command} " + shlex.join(p for s in settings for p in ("--set", s))


def split_facts(scenario: Scenario, examples: Examples, split: ClientSplit) -> dict[str, Any]:
    """What is told of a split, as JSON values."""
    train, test = (
        class_counts(rows, examples.labels, len(examples.classes))
        for rows in (split.train, split.test)
    )
    num, notes = len(split.names), []
    looked_at = np.arange(num)
    if num > PAIRED_CLIENTS:
        stream = seeding.generator(scenario.seed, "pairs")
        looked_at = np.sort(stream.choice(num, PAIRED_CLIENTS, replace=False))
        notes.append(
            f"distances between clients are of {PAIRED_CLIENTS} of {num:,}, drawn at random"
        )
    above = np.triu_indices(len(looked_at), 1)
    return {
        "name": scenario.name,
        "scenario_hash": scenario.hash(),
        "clients": list(split.names),
        "domains": list(split.domains),
        "classes": list(examples.classes),
        "train": train.tolist(),
        "test": test.tolist(),
        "distances": {
            name: {
                "to_all": [defined(value) for value in to_all(distance, train).tolist()],
                "pairs": spread_of(pairs(distance, train[looked_at])[above]),
            }
            for name, distance in DISTANCES.items()
        },
        "warnings": list(warnings_of(scenario, examples, split, train, test)),
        "excluded": [[name, count] for name, count in split.excluded],
        "notes": notes,
    }


def class_counts(rows: Rows, labels: Int32, num_classes: int) -> Int64:
    """Examples by client and class, int64 [K, C]."""
    num = len(rows.counts)
    cells = np.repeat(np.arange(num), rows.counts) * num_classes + labels[rows.index]
    return np.bincount(cells, minlength=num * num_classes).reshape(num, num_classes)


def defined(value: float) -> float | None:
    """A number, or None for an undefined one."""
    return None if math.isnan(value) else value


def spread_of(values: Float64) -> dict[str, float | None]:
    """Least, median, mean and largest of the defined values; None where there are none."""
    values = values[~np.isnan(values)]
    if not len(values):
        return dict.fromkeys(("min", "median", "mean", "max"))
    return {
        "min": float(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "max": float(values.max()),
    }


def warnings_of(
    scenario: Scenario, examples: Examples, split: ClientSplit, train: Int64, test: Int64
) -> Iterator[str]:
    """What will be hard with these clients, in words."""
    names, num, num_classes = split.names, *train.shape
    sizes, held = train.sum(axis=1), (train > 0).sum(axis=1)
    if num == 1:
        yield f"there is one client ({names[0]}): it has nobody to learn with"
    if split.excluded:
        yield (
            f"{_clients(len(split.excluded))} too few examples to train on and left out: "
            + _some([f"{name} ({count})" for name, count in split.excluded])
        )
    lacking = num_classes - held
    if lacking.any():
        low, high = int(lacking[lacking > 0].min()), int(lacking.max())
        many = f"{high}" if low == high else f"{low} to {high}"
        who = _of(np.flatnonzero(lacking), names, "lacks", "lack")
        yield f"{who} {many} of {num_classes} classes"
    if (single := held == 1).any():
        yield (
            _of(np.flatnonzero(single), names, "has", "have")
            + " training examples of one class only"
        )
    if (unseen := ((test > 0) & (train == 0)).any(axis=1)).any():
        who = _of(np.flatnonzero(unseen), names, "is", "are")
        yield f"{who} judged on classes without a training example of their own"
    if (tiny := sizes < FEW).any():
        who = _of(np.flatnonzero(tiny), names, "has", "have")
        yield f"{who} fewer than {FEW} training examples"
    needed = math.ceil(math.log2(2 * num / scenario.verdict.level))
    if (short := test.sum(axis=1) < needed).any():
        who = _of(np.flatnonzero(short), names, "has", "have")
        yield (
            f"{who} fewer than {needed} test examples, too few for a verdict by themselves: even "
            f"with another answer to each, McNemar's p times {num:,} (Holm) would exceed "
            f"{scenario.verdict.level:g}"
        )
    if num > 1 and sizes.max() >= UNLIKE_SIZES * sizes.min():
        yield (
            f"the largest client has {sizes.max() / sizes.min():.0f} times the training examples "
            f"of the smallest: {names[int(sizes.argmax())]} {sizes.max():,}, "
            f"{names[int(sizes.argmin())]} {sizes.min():,}"
        )
    yield from class_warnings(examples.classes, train, test)
    yield from domain_warnings(split.domains, train + test)


def class_warnings(classes: Sequence[str], train: Int64, test: Int64) -> Iterator[str]:
    """Classes that nobody, or only one client, can teach."""
    holders = (train > 0).sum(axis=0)
    nobody = np.flatnonzero(holders == 0)
    if len(nobody):
        judged = ", though some are judged on it" if test[:, nobody].any() else ""
        yield (
            "no client has a training example of "
            + _some([classes[i] for i in nobody.tolist()])
            + judged
        )
    single = np.flatnonzero(holders == 1)
    if len(single) and len(train) > 1:
        yield "only one client has training examples of " + _some(
            [classes[i] for i in single.tolist()]
        )


def domain_warnings(domains: Sequence[str], counts: Int64) -> Iterator[str]:
    """Domains without a common class: there is nothing that one could learn from another."""
    known = sorted(set(domains) - {"", MIXED})
    if not 1 < len(known) <= MANY_DOMAINS:
        return
    place = {name: i for i, name in enumerate(known)}
    of = np.array([place.get(name, -1) for name in domains])
    held = np.zeros((len(known), counts.shape[1]), dtype=np.int64)
    np.add.at(held, of[of >= 0], counts[of >= 0])
    shared = (held > 0).astype(np.int64) @ (held > 0).T
    apart = np.argwhere(np.triu(shared == 0, 1)).tolist()
    if apart:
        named = [f"{known[a]} and {known[b]}" for a, b in apart[:4]]
        yield "domains without a class in common: " + _some(named, len(apart))


def _of(chosen: Int64, names: Sequence[str], one: str, many: str) -> str:
    """ "3 of 40 clients (a, b, c) lack", with the verb that fits."""
    listed = _some([names[client] for client in chosen[:4].tolist()], len(chosen))
    return (
        f"{len(chosen):,} of {len(names):,} clients ({listed}) {one if len(chosen) == 1 else many}"
    )


def _clients(count: int) -> str:
    return "1 client has" if count == 1 else f"{count:,} clients have"


def _some(names: Sequence[str], count: int | None = None) -> str:
    """The first three of ``count`` names (default: all that are given)."""
    count = len(names) if count is None else count
    more = f" and {count - 3:,} more" if count > 3 else ""
    return ", ".join(names[:3]) + more


def summary(scenario: Scenario, examples: Examples, facts: dict[str, Any]) -> Iterator[str]:
    """The first lines: what data, how dealt, how large the clients are."""
    clients = scenario.clients
    domains = f", {len(examples.domain_names)} domains" if examples.domains is not None else ""
    within = " within domains" if clients.within_domains else ""
    train, test = (np.sum(facts[part], axis=1) for part in ("train", "test"))
    yield (
        f"data     {scenario.data.source}: {len(examples):,} examples, "
        f"{len(examples.classes)} classes{domains}"
    )
    yield f"clients  {len(train):,}, {clients.partition} split{within}, seed {scenario.seed}"
    for name, sizes in (("training", train), ("testing", test)):
        yield (
            f"{name:9s}{sizes.sum():,} examples; a client has {sizes.min():,} to {sizes.max():,}, "
            f"median {np.median(sizes):,.0f}"
        )


def heatmap(facts: dict[str, Any], console: Console) -> Iterator[Text]:
    """Training examples by client and class, darker where more of a client's lie.

    Numbers stand in it, so it reads the same without colours. What is too much for a screen is
    added up at its end.
    """
    counts, tests = np.asarray(facts["train"]), np.sum(facts["test"], axis=1)
    classes, names = facts["classes"], facts["clients"]
    label = max(3, min(WIDEST_LABEL, max(map(len, classes))))
    cell = max(label, len(f"{counts.max(initial=0)}")) + 1
    first = max(6, min(24, max(len(name) for name in names[:SHOWN_CLIENTS])))
    columns = min(len(classes), SHOWN_CLASSES)
    if console.is_terminal and first + 17 + columns * cell > console.width:
        columns = max(1, (console.width - first - 17 - len("  +999 more")) // cell)
    more = len(classes) - columns
    header = f"{'client':{first}}{'train':>8}{'test':>7}  "
    header += "".join(f"{shown_cut(name, cell - 1):>{cell}}" for name in classes[:columns])
    yield Text(header + (f"  +{more} more" if more else ""), "bold")
    for client, (name, row) in enumerate(zip(names, counts[:SHOWN_CLIENTS], strict=False)):
        total = int(row.sum())
        line = Text(f"{shown_cut(name, first):{first}}{total:>8,}{tests[client]:>7,}  ")
        for count in row[:columns].tolist():
            share = count / total if total else 0.0
            line.append(f"{count if count else '.':>{cell}}", shade(share))
        yield line.append(f"  {row[columns:].sum():,}") if more else line
    if len(names) > SHOWN_CLIENTS:
        rest = counts[SHOWN_CLIENTS:].sum(axis=1)
        yield Text(
            f"and {len(rest):,} more clients with {rest.min():,} to {rest.max():,} training "
            "examples; --json and --html have them all"
        )


def shade(share: float) -> str:
    """A rich style: the darker the blue, the more of a client's examples."""
    if share == 0:
        return "dim"
    depth = math.sqrt(share)  # small shares can be told apart, too
    red, green, blue = (round(255 - depth * (255 - dark)) for dark in (8, 48, 107))
    return f"{'white' if depth > 0.5 else 'black'} on rgb({red},{green},{blue})"


def shown_cut(text: str, width: int) -> str:
    """Text from outside in a column: "?" for what cannot be shown, and its middle left out.

    Names that share their beginning (client-0001, Greek/character01) can still be told apart.
    """
    clean = "".join(c if c.isprintable() else "?" for c in text)
    if len(clean) <= width:
        return clean
    return f"{clean[: (width - 1) // 2]}~{clean[-(width // 2) :]}"


def _print_distances(console: Console, facts: dict[str, Any]) -> None:
    """Quartiles of the label distances."""
    table = plain_table("label distance, 0 to 1", "min", "25 %", "median", "75 %", "max", "pairs")
    titles = {"js": "Jensen-Shannon, bits", "hellinger": "Hellinger", "emd": "earth mover's"}
    for name, found in facts["distances"].items():
        values = np.array([value for value in found["to_all"] if value is not None])
        cells = np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist() if len(values) else [None] * 5
        cells.append(found["pairs"]["median"])
        texts = ["undefined" if value is None else f"{value:.3f}" for value in cells]
        table.add_row(titles[name], *texts)
    console.print(table)
    console.print("[dim]of each client to all together; pairs: the median between two clients[/]")
