"""``fedtl lodo``: leave each domain out in turn, train on the others, judge on it.

What a federation is worth to somebody new: the head has never seen the domain. Gulrajani and
Lopez-Paz 2021 (arXiv 2007.01434) judge domain generalisation in this way.

Every training is an ordinary run in a folder of its own under ``out``: the same loop and commits,
and an interrupted one is gone on with. A finished one is not run again.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from statsmodels.stats.proportion import proportion_confint  # type: ignore[import-untyped]

from fedtl import simulation
from fedtl.build import population_of, resolve_device
from fedtl.clients.evaluation import evaluate_heads
from fedtl.clients.networks import pretrained
from fedtl.errors import InputError
from fedtl.evaluation.quick_head import accuracy, quick_answers
from fedtl.interrupts import Interrupts
from fedtl.lodo.domains import Study, open_study
from fedtl.lodo.shown import Progress, show
from fedtl.ready_features import OpenedData, allowed_threads
from fedtl.results.files import write_atomic
from fedtl.results.runs import SCENARIO, SUMMARY, RunFolder
from fedtl.scenario.load import dump_scenario, with_seed
from fedtl.scenario.schema import Scenario
from fedtl.types import Head, Int64

__all__ = ["leave_one_domain_out"]

PLAN, RESULT = "plan.json", "lodo.json"
"""In the folder: what is run, so that it can be gone on with, and what came out."""

EVERYBODY = "everybody"
"""Folder of the run that leaves nobody out."""

LEVEL = 0.05


def leave_one_domain_out(
    scenario: Scenario, out: Path | None, seeds: int, console: Any, interrupts: Interrupts
) -> dict[str, Any]:
    """Train once without each domain, and once with all, for each seed; judge on what was left out.

    Args:
        out: folder of the runs; one that holds some of them already is gone on with.
        seeds: how many, counted up from the scenario's.

    Returns:
        "name", "scenario_hash", "domains" (a dict each: "domain", "accuracy" on all its examples,
        the mean over seeds; "interval", Wilson's 95 % over the examples; "examples"; "seeds", an
        accuracy each; "spread", their standard deviation; "unseen_classes"; "references", accuracy
        on the domain's own test examples of three heads: "left_out", "with_domain", and "own", a
        closed-form one of its training examples alone), "mean" over domains, and "notes".

    Raises:
        InputError: fewer than two domains, clients of several domains, a domain without a class in
            common with the others, or no shared head to judge.
    """
    if scenario.adaptation.features != "none":
        raise InputError(
            "a domain that nobody trained on has no aligned features",
            where="adaptation.features",
            got=repr(scenario.adaptation.features),
            allowed='"none"',
        )
    out = out or Path("runs") / f"{scenario.name}-lodo-{datetime.now():%Y%m%d-%H%M%S}"
    interrupts.hint = f"Give the same command with --out {out} to go on"
    progress = Progress(console, interrupts)
    found: list[dict[str, Any]] = []
    studies: list[Study] = []
    try:
        for seed in range(scenario.seed, scenario.seed + seeds):
            study = open_study(with_seed(scenario, seed), progress.extracting)
            if not studies:
                _refuse_other(out, scenario, study)
            studies.append(study)
            found.append(_one_seed(study, out / f"seed-{seed}", progress, interrupts))
    finally:
        progress.close()
    facts = _facts(scenario, studies[0], found)
    facts["notes"] = [*dict.fromkeys(progress.notes), *facts["notes"]]
    write_atomic(out / RESULT, (json.dumps(facts, indent=2) + "\n").encode())
    show(console, facts, out / RESULT)
    return facts


def _refuse_other(out: Path, scenario: Scenario, study: Study) -> None:
    """Keep what is run beside the runs; raise InputError where something else is there."""
    plan = {
        "scenario_hash": scenario.hash(),
        "data": study.ready.examples.identity,
        "domains": list(study.domains),
    }
    path = out / PLAN
    if path.is_file():
        if json.loads(path.read_bytes()) == plan:
            return
    elif not out.exists() or (out.is_dir() and not any(out.iterdir())):
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(plan, indent=2).encode())
        return
    raise InputError(
        "the folder holds something else, or was made with another scenario or other data",
        where=out,
        do="Choose another --out",
    )


def _one_seed(
    study: Study, place: Path, progress: Progress, interrupts: Interrupts
) -> dict[str, Any]:
    """All runs of one seed, and every domain judged."""
    runs: dict[int | None, str] = {None: EVERYBODY}
    runs.update({d: f"without-{d + 1}-{_safe(name)}" for d, name in enumerate(study.domains)})
    heads: dict[int | None, Head] = {}
    for domain, name in runs.items():
        left = EVERYBODY if domain is None else f"without {study.domains[domain]}"
        progress.begin(f"seed {study.opened.scenario.seed}, {left}")
        _run(study.without(domain), place / name, progress, interrupts)
        heads[domain] = load_file(place / name / "head.safetensors")
    return {
        name: _judged(study, domain, heads[domain], heads[None])
        for domain, name in enumerate(study.domains)
    }


def _run(opened: OpenedData, path: Path, progress: Progress, interrupts: Interrupts) -> None:
    """One ordinary run, new or gone on with, unless it is finished."""
    if (path / SUMMARY).is_file():
        return
    if (path / SCENARIO).is_file():
        folder = RunFolder.reopen(path)
        folder.event("resumed")
    else:
        folder = RunFolder.create(path, dump_scenario(opened.scenario))
    try:
        simulation.carry_on(opened, folder, progress, interrupts, time.perf_counter())
    finally:
        folder.release()


def _judged(study: Study, domain: int, head: Head, everybody: Head) -> dict[str, Any]:
    """One domain's examples, under the head that never saw it and under others."""
    split = study.split(domain)
    tests, threads = split.test.index, allowed_threads(study.opened.scenario)
    plain = pretrained(study.ready.tail, study.ready.matrix)
    alone = population_of(replace(study.ready, split=split, matrix=plain, tail=None))
    inside, outside = study.classes(domain)
    names = study.ready.examples.classes
    return {
        "accuracy": _accuracy(study, head, study.rows(domain)),
        "examples": len(study.rows(domain)),
        "unseen_classes": [names[c] for c in np.setdiff1d(inside, outside).tolist()],
        "references": {
            "left_out": _accuracy(study, head, tests),
            "with_domain": _accuracy(study, everybody, tests),
            "own": accuracy(quick_answers(alone, threads)),
        },
    }


def _accuracy(study: Study, head: Head, rows: Int64) -> float | None:
    if not len(rows):
        return None
    scenario, examples = study.opened.scenario, study.ready.examples
    found = evaluate_heads(
        study.ready.matrix,
        examples.labels,
        rows,
        {name: tensor[None] for name, tensor in head.items()},
        len(examples.classes),
        threads=allowed_threads(scenario),
        device=resolve_device(scenario),
        tail=study.ready.tail,
    )
    return float(found.correct.sum() / found.count.sum())


def _facts(scenario: Scenario, study: Study, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds."""
    domains = []
    for name in study.domains:
        each = [seed[name] for seed in found]
        seeds = [one["accuracy"] for one in each]
        mean, examples = statistics.mean(seeds), each[0]["examples"]
        low, high = proportion_confint(mean * examples, examples, LEVEL, method="wilson")
        domains.append(
            {
                "domain": name,
                "accuracy": mean,
                "interval": [float(low), float(high)],
                "examples": examples,
                "seeds": seeds,
                "spread": statistics.stdev(seeds) if len(seeds) > 1 else None,
                "unseen_classes": each[0]["unseen_classes"],
                "references": {
                    key: _mean([one["references"][key] for one in each])
                    for key in each[0]["references"]
                },
            }
        )
    notes = [
        "intervals are Wilson's 95 % over a domain's examples: they cover which examples there "
        "happen to be, neither another seed nor another domain"
        + ("; the spread over seeds is beside them" if len(found) > 1 else ""),
        "'own tests' are the domain's test examples only, for three heads: the one that never saw "
        "the domain, the one trained with it, and a closed-form head of its own training examples",
    ]
    for one in domains:
        if one["unseen_classes"]:
            unseen = ", ".join(one["unseen_classes"][:5])
            notes.append(f"{one['domain']} has classes that nobody else has: {unseen}; there the "
                         "head that never saw it cannot be right")  # fmt: skip
    return {
        "name": scenario.name,
        "scenario_hash": scenario.hash(),
        "domains": domains,
        "mean": statistics.mean(one["accuracy"] for one in domains),
        "notes": notes,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII)[:60]
