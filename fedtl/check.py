"""``fedtl check``: everything that can go wrong before training, found before training."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedtl.build import check_strategy, open_data
from fedtl.data.clients import ClientSplit
from fedtl.data.examples import BadImage, Images
from fedtl.data.leakage import check_leaks, find_leaks, row_hashes
from fedtl.data.shifts import unshifted
from fedtl.forecast import forecast
from fedtl.interrupts import Interrupts
from fedtl.ready_features import OpenedData, allowed_threads, without
from fedtl.scenario.schema import Scenario
from fedtl.strategies.personal import degenerate
from fedtl.terminal import plain_table, plan_table, sentences, shown
from fedtl.transfer.features import bad_images, named
from fedtl.transfer.text_features import hash_texts
from fedtl.types import Int32

SHOWN_CLIENTS = 20
SHOWN_CLASSES = 12
DECODED_AT_A_TIME = 256


def check_scenario(
    scenario: Scenario, command: str, console: Console, interrupts: Interrupts
) -> dict[str, Any]:
    """Decode all data, look for leaks, show who has what and what a run will cost.

    Args:
        command: what the user called the scenario, for the command to type next.

    Returns:
        The plan as JSON values.

    Raises:
        InputError: as a run would, for the first stage that fails.
    """
    opened = open_data(scenario)
    examples = opened.examples
    if examples.kind == "rows":
        content = row_hashes(examples)
    else:
        opened.backbone.trunk()  # its weights are read only here, and in a run
        content, bad = _decode_all(opened, interrupts)
        lines = list(bad.values())
        if bad and (scenario.data.on_bad_file == "stop" or len(bad) == len(examples)):
            raise bad_images(lines, len(bad), len(examples))
        if bad:
            console.print(f"[yellow]note[/] left out {shown(named(lines, len(bad)))}")
            keep = np.setdiff1d(np.arange(len(examples)), np.array(list(bad)))
            opened, content = without(opened, keep), content[keep]
            examples = opened.examples
    check_leaks(find_leaks(content, opened.split, examples), scenario.data.leakage)
    plan = forecast(opened)
    check_strategy(opened)
    console.print(plan_table(opened, plan))
    console.print()
    console.print(class_table(opened.split, examples.labels, examples.classes))
    for note in (*examples.notes, *plan.privacy_notes):
        console.print(sentences([("[yellow]note[/]", note)]))
    mode = scenario.transfer.mode
    if same := degenerate(scenario.strategy.name, scenario.head.kind, mode):
        console.print(f"[yellow]note[/] {same}")
    for name, count in opened.split.excluded[:5]:
        console.print(f"[yellow]left out[/] {shown(name)}: {count} examples, too few to train on")
    console.print(f"\nAll good. Next: fedtl run {shown(command)}", soft_wrap=True)
    if scenario.privacy.mechanism != "none":
        planned = re.sub(r" --engine \S+", "", command)  # it is the same on every engine
        console.print(
            f"What is promised, and on what: fedtl privacy {shown(planned)}", soft_wrap=True
        )
    return {"scenario_hash": scenario.hash(), **asdict(plan)}


def class_table(split: ClientSplit, labels: Int32, classes: tuple[str, ...]) -> Table:
    """Examples per client and class, training and test together."""
    columns = classes[:SHOWN_CLASSES]
    more = len(classes) - len(columns)
    table = plain_table("client", "examples", *map(shown, columns), *([f"+{more}"] if more else []))
    for client in range(min(len(split.names), SHOWN_CLIENTS)):
        rows = np.concatenate([split.train.of(client), split.test.of(client)])
        counts = np.bincount(labels[rows], minlength=len(classes))
        cells = [str(n) if n else "." for n in counts[: len(columns)].tolist()]
        rest = [str(int(counts[len(columns) :].sum()))] if more else []
        table.add_row(shown(split.names[client]), str(len(rows)), *cells, *rest)
    if len(split.names) > SHOWN_CLIENTS:
        table.add_row(f"and {len(split.names) - SHOWN_CLIENTS} more")
    return table


def _decode_all(opened: OpenedData, interrupts: Interrupts) -> tuple[Any, dict[int, str]]:
    """Content hashes of all images, zeros for bad ones, and a line per bad one by its row."""
    if (texts := opened.examples.texts) is not None:
        return hash_texts(texts), {}
    assert opened.examples.images is not None
    images = unshifted(opened.examples.images)  # what is shifted differently is still a copy
    content = np.zeros((len(images), 16), np.uint8)
    bad: dict[int, str] = {}
    with ThreadPoolExecutor(allowed_threads(opened.scenario)) as pool:
        for start in range(0, len(images), DECODED_AT_A_TIME):
            interrupts.check("interrupted while decoding")
            chunk = range(start, min(start + DECODED_AT_A_TIME, len(images)))
            for i, found in zip(chunk, pool.map(lambda i: _hash(images, i), chunk), strict=True):
                if isinstance(found, str):
                    bad[i] = found
                else:
                    content[i] = found
    return content, bad


def _hash(images: Images, i: int) -> Any:
    from fedtl.transfer.pipeline import hash_pixels

    try:
        return hash_pixels(images.load(i))
    except BadImage as error:
        return f"{error.where}: {error.reason}"
