"""``fedtl gap --backbones``: which backbone suits these clients, before anything is trained.

All candidates see the same seeded sample of every client's pictures: accuracy of the quick
closed-form head on the clients' own tests and H-score and LogME of the features, against images per
second and bytes. What no other candidate beats in all of these is marked (Pareto).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from fedtl.build import open_data
from fedtl.errors import EnvironmentFault, InputError, unknown_name
from fedtl.evaluation.client_sums import ClientSums
from fedtl.evaluation.gaps import from_statistics
from fedtl.evaluation.quick_head import Sample, accuracy, draw_sample, quick_answers
from fedtl.interrupts import Interrupts
from fedtl.ready_features import OpenedData, allowed_threads
from fedtl.results.files import refuse_unwritable, write_atomic
from fedtl.scenario import schema
from fedtl.scenario.schema import Scenario
from fedtl.terminal import percent, plain_table, shown, size
from fedtl.transfer import backbones, extraction, pipeline
from fedtl.transfer.backbones import Backbone, open_backbone
from fedtl.transfer.features import FeatureStore
from fedtl.types import Float32, Population, Rows

FORMAT = 1

TRAIN, TEST = 1200, 800
"""Pictures of all clients together: to fit the quick head, and to judge it."""

TIMED, TIMES = 64, 3
"""Pictures on which the speed is measured, and how often: the best counts, for others may be at
work on this machine."""

NAME_WIDTH = 24

NOISE = 0.1
"""Speeds that differ by less are taken for equal."""

NAME = re.compile(r"([^@:]+)(?:@([^:]+))?(?::(native|\d+))?")
"""name, name@weights, name:pixels, name@weights:pixels."""


def rank_backbones(
    scenario: Scenario,
    names: Sequence[str],
    command: str,
    console: Any,
    interrupts: Interrupts,
    *,
    html: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Compare candidates on a sample of the scenario's clients, best first.

    Args:
        names: ``name[@weights][:size]``: weights "default", "none" (random), one of torchvision's
            names or a file; size in pixels or "native". Left out, the scenario's backbone keeps its
            own weights, others take "default", and all take the scenario's image_size.
        command: what the user called the scenario, for the command to type next.
        html, out: where to write a page, and the facts as JSON.

    Returns:
        "format", "backbones" (a dict each, numbers None and "note" the reason where one could not
        be run) and "notes".

    Raises:
        InputError: an unknown backbone, ready features, or no candidate that can be run.
    """
    refuse_unwritable(html, out)
    if scenario.backbone.name == backbones.IDENTITY:
        raise InputError("these data are features already: there is no backbone to choose")
    sections = {name: parse_candidate(name, scenario.backbone) for name in dict.fromkeys(names)}
    if not sections:
        raise InputError("no backbone to rank", where="--backbones", do="'fedtl list' shows all")
    ready: dict[str, Backbone] = {}
    reasons: dict[str, str] = {}
    for name, section in sections.items():
        try:
            ready[name] = open_backbone(section, scenario.seed)
        except InputError as error:
            reasons[name] = error.what
    if not ready:
        raise InputError(
            "none of these backbones can be run",
            where="--backbones",
            got="; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
        )
    first = scenario.model_copy(update={"backbone": sections[next(iter(ready))]})
    opened = open_data(first)
    sample = draw_sample(opened.split, TRAIN, TEST, scenario.seed, "backbones")
    rows: list[dict[str, Any]] = []
    speeds: dict[tuple[str, int], float] = {}  # whatever the weights, one network is as fast
    for name in sections:
        if name in ready:
            try:
                row = _measured(name, ready[name], opened, sample, speeds, console, interrupts)
                rows.append(row)
                continue
            except (InputError, EnvironmentFault) as error:
                reasons[name] = error.what
        rows.append({"name": name, **dict.fromkeys(NUMBERS), "note": reasons[name]})
    for row in rows:
        row["pareto"] = pareto(row, rows)
    rows.sort(key=lambda row: -1.0 if row["accuracy"] is None else row["accuracy"], reverse=True)
    facts = {"format": FORMAT, "backbones": rows, "notes": _notes(opened, sample)}
    _show(console, facts, command)
    if html is not None:
        from fedtl.results.pages import backbones_page

        write_atomic(html, backbones_page(facts).encode())
    if out is not None:
        write_atomic(out, (json.dumps(facts, indent=2) + "\n").encode())
    return facts


NUMBERS = (
    "accuracy", "h_score", "logme", "images_per_second", "feature_bytes", "weights_bytes",
)  # fmt: skip


def parse_candidate(text: str, section: schema.Backbone) -> schema.Backbone:
    """``name[@weights][:size]`` as a scenario's section. Raises InputError."""
    match = NAME.fullmatch(text)
    if match is None:
        raise InputError(
            "not a backbone", where="--backbones", got=repr(text), allowed="name[@weights][:size]"
        )
    name, weights, pixels = match.groups()
    elsewhere = set(backbones.OPENERS) - {backbones.EMBEDDED}  # they need more than a name
    if name not in (known := [n for n in backbones.names() if n not in elsewhere]):
        raise unknown_name("backbone", name, known, where="--backbones")
    changes: dict[str, Any] = {"name": name}
    if weights is not None or name != section.name:
        changes.update(weights=weights or "default", sha256=None)
    if pixels is not None:
        changes["image_size"] = None if pixels == "native" else int(pixels)
    try:
        return schema.Backbone.model_validate({**section.model_dump(), **changes})
    except ValidationError as error:
        what = error.errors()[0]["msg"]
        raise InputError(what, where="--backbones", got=repr(text)) from error


def pareto(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no other row is as good in accuracy, speed and bytes and better in one of them.

    Speeds within NOISE are equal.
    """
    if row["accuracy"] is None:
        return False
    return not any(
        other is not row and other["accuracy"] is not None and _beats(other, row) for other in rows
    )


def _beats(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    speed = a["images_per_second"] / b["images_per_second"]
    order = [
        a["accuracy"] - b["accuracy"],
        0.0 if 1 / (1 + NOISE) <= speed <= 1 + NOISE else speed - 1,
        b["feature_bytes"] - a["feature_bytes"],
        b["weights_bytes"] - a["weights_bytes"],
    ]
    return bool(min(order) >= 0 and max(order) > 0)


def _measured(
    name: str,
    backbone: Backbone,
    opened: OpenedData,
    sample: Sample,
    speeds: dict[tuple[str, int], float],
    console: Any,
    interrupts: Interrupts,
) -> dict[str, Any]:
    """One candidate's row."""
    scenario, threads = opened.scenario, allowed_threads(opened.scenario)
    chosen = opened.examples.subset(sample.kept)
    assert chosen.images is not None

    def check() -> None:
        interrupts.check("interrupted while backbones were compared")

    with console.status(f"{shown(name)}: {len(chosen):,} pictures"):
        stored = FeatureStore().features(
            backbone,
            chosen.images,
            chosen.fingerprint,
            dtype=scenario.backbone.feature_dtype,
            way=scenario.backbone.extraction,
            device=scenario.engine.device,
            on_bad_file=scenario.data.on_bad_file,
            threads=threads,
            progress=lambda done, total: check(),
        )
        whole = sample.only(stored.kept)
        population = whole.population(stored.matrix, opened.examples, opened.split)
        scores = _scores(population, threads, check)
        network = backbone.name, backbone.image_size
        if network not in speeds:
            speeds[network] = _speed(backbone, opened, sample, stored.way, threads, check)
    return {
        "name": name,
        "accuracy": accuracy(quick_answers(population, threads)),
        "h_score": scores["h_score"],
        "logme": scores["logme"],
        "images_per_second": round(speeds[network], 1),
        "feature_bytes": stored.matrix.shape[1] * stored.matrix.dtype.itemsize,
        "weights_bytes": _weights_bytes(backbone),
        "note": f"{backbone.image_size} px, weights {backbone.weights_source}, by {stored.way}",
    }


def _scores(population: Population, threads: int, check: Any) -> dict[str, Any]:
    """H-score and LogME of everybody's sampled training rows."""
    index = population.train.index
    together = Rows(index, np.array([0, len(index)], np.int64))
    pooled = Population(
        population.features, population.labels, population.classes, together, together,
        ("all",), ("",),
    )  # fmt: skip
    sums = ClientSums(pooled, threads, check)
    facts = from_statistics(
        sums, pooled.names, pooled.domains, pooled.classes, pairs=False, threads=threads
    )
    scores: dict[str, Any] = facts["transferability"]["all"]
    return scores


def _speed(
    backbone: Backbone, opened: OpenedData, sample: Sample, way: str, threads: int, check: Any
) -> float:
    """Pictures decoded and run through the trunk per second, now, on this machine."""
    spread = np.unique(np.linspace(0, len(sample.kept) - 1, TIMED).astype(np.int64))
    images = opened.examples.subset(sample.kept[spread]).images
    assert images is not None
    exports = extraction.Exports(FeatureStore().root / "trunks")
    forward = extraction.open_forward(
        way, backbone, exports, lambda: pipeline.sample_batch(images, backbone.preprocessing, 16)
    )

    def nowhere(first: int, features: Float32) -> None:
        check()

    best = float("inf")
    for _ in range(TIMES + 1):  # the first is to warm up
        began = time.perf_counter()
        pipeline.extract(
            images, backbone.preprocessing, forward, nowhere,
            stop_on_bad=False, threads=threads, progress=None,
        )  # fmt: skip
        best = min(best, time.perf_counter() - began)
    return len(images) / best


def _weights_bytes(backbone: Backbone) -> int:
    """Of the trunk's parameters: the classifier that came with them is not used."""
    return sum(own.numel() * own.element_size() for own in backbone.trunk().parameters())


def _notes(opened: OpenedData, sample: Sample) -> list[str]:
    fitted, judged, everything = len(sample.train.index), len(sample.test.index), opened.split
    whole = len(everything.train.index) + len(everything.test.index)
    which = "all" if fitted + judged == whole else "a seeded sample, even over the clients, of the"
    return [
        f"accuracy is that of the quick closed-form head on {judged:,} of the clients' own test "
        f"pictures, fitted on {fitted:,} training pictures: {which} {whole:,}",
        f"images per second were measured now, decoding included, on {TIMED} of these pictures "
        f"with {allowed_threads(opened.scenario)} threads; speeds within 10 % count as equal",
        "*: no other is as good in accuracy, images per second, bytes of an image's features and "
        "bytes of weights and better in one of them (Pareto)",
    ]


def _show(console: Any, facts: Mapping[str, Any], command: str) -> None:
    table = plain_table("backbone", "accuracy", "H-score", "LogME", "img/s", "features", "weights")
    for row in facts["backbones"]:
        if row["accuracy"] is None:
            table.add_row(shown(_short(row["name"])), *["-"] * 6)
            continue
        table.add_row(
            shown(_short(row["name"])) + (" *" if row["pareto"] else ""),
            percent(row["accuracy"]),
            _number(row["h_score"]),
            _number(row["logme"]),
            f"{row['images_per_second']:.0f}",
            size(row["feature_bytes"]),
            size(row["weights_bytes"]),
        )
    console.print(table)
    for row in facts["backbones"]:
        console.print(f"[dim]{shown(row['name'])}: {shown(row['note'])}[/]", soft_wrap=True)
    for note in facts["notes"]:
        console.print(f"[yellow]note[/] {shown(note)}")
    best = facts["backbones"][0]["name"]
    name, weights, pixels = NAME.fullmatch(best).groups()  # type: ignore[union-attr]
    changes = [f"backbone.name={name}"]
    changes += [f"backbone.weights={weights}"] if weights else []
    changes += [f"backbone.image_size={pixels}"] if pixels and pixels != "native" else []
    settings = " ".join(f"--set {change}" for change in changes)
    console.print(f"\nNext: fedtl gap {shown(command)} {shown(settings)}", soft_wrap=True)
    if pixels == "native":
        console.print("and leave backbone.image_size out of the scenario")


def _short(name: str) -> str:
    """Without the folders of a weights file, and not too long for a table."""
    head, mark, weights = name.partition("@")
    name = head + mark + weights.rpartition("/")[2]
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
