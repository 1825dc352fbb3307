"""``fedtl gap``: how far clients lie from each other and from the backbone, before any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from fedtl import input_checks
from fedtl.backbone_choice import rank_backbones
from fedtl.build import open_data, population_of
from fedtl.data.leakage import check_leaks, find_leaks
from fedtl.evaluation import gaps
from fedtl.evaluation.gap_words import expectation
from fedtl.evaluation.source_classes import source_classifier
from fedtl.gap_terminal import print_gap
from fedtl.interrupts import Interrupts
from fedtl.ready_features import ExtractionProgress, allowed_threads, make_features
from fedtl.results.files import refuse_unwritable, write_atomic
from fedtl.scenario.schema import Scenario
from fedtl.terminal import Terminal, shown
from fedtl.transfer.tails import before_training
from fedtl.transfer.views import without_views

__all__ = ["measure_gap", "rank_backbones", "show_gap"]

FORMAT = 1


def show_gap(
    scenario: Scenario,
    command: str,
    console: Console,
    interrupts: Interrupts,
    *,
    html: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure the gaps of a scenario and print them.

    Args:
        command: what the user called the scenario, for the command to type next.
        html, out: where a page and a JSON file are written.

    Returns:
        What ``measure_gap`` does.

    Raises:
        InputError: as a run would for its data, clients and backbone; or no folder to write to.
    """
    refuse_unwritable(html, out)
    with Terminal(console) as terminal:
        facts = measure_gap(scenario, interrupts, terminal.extracting)
    print_gap(facts, console, f"fedtl run {command}, then fedtl report last")
    if out is not None:
        write_atomic(out, (json.dumps(facts, indent=2, allow_nan=False) + "\n").encode())
        console.print(f"The figures are in {shown(str(out))}", soft_wrap=True)
    if html is not None:
        from fedtl.results.pages import gap_page

        write_atomic(html, gap_page(facts).encode())
        console.print(f"The page is {shown(str(html))}", soft_wrap=True)
    return facts


def measure_gap(
    scenario: Scenario, interrupts: Interrupts, progress: ExtractionProgress | None = None
) -> dict[str, Any]:
    """Features as a run would have them, then all gaps, as JSON values.

    Args:
        progress: called with images done and images in all.

    Raises:
        InputError: as a run would for its data, clients and backbone.
    """
    opened = open_data(without_views(before_training(scenario)))

    def extracting(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total)
        interrupts.check("interrupted while examples went through the trunk")

    ready = make_features(opened, extracting)
    check_leaks(find_leaks(ready.content, ready.split, ready.examples), scenario.data.leakage)
    population, threads = population_of(ready), allowed_threads(scenario)

    def check() -> None:
        interrupts.check("interrupted while gaps were measured")

    found = gaps.measure(
        population,
        scenario.seed,
        classifier=source_classifier(opened.backbone, population.features.shape[1]),
        threads=threads,
        check=check,
    )
    found["notes"] = [*ready.notes, *found["notes"]]
    found["sampling"] |= input_checks.sampling()
    facts = {
        "format": FORMAT,
        "name": scenario.name,
        "scenario_hash": scenario.hash(),
        "backbone": {
            "name": opened.backbone.name,
            "cut": opened.backbone.cut,
            "weights": opened.backbone.weights_source,
            "weights_sha256": opened.backbone.weights_hash,
        },
        **found,
        "checks": input_checks.check_inputs(opened, ready, threads, check),
    }
    return {**facts, "expectation": expectation(facts)}
