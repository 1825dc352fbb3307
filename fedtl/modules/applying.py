"""Modules put on their trunk over other data: the trunk runs once, whatever stands behind it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.build import open_examples
from fedtl.clients.batched import one_torch_thread
from fedtl.clients.blocks import run_blocks
from fedtl.clients.networks import JUDGED, JUDGED_THROUGH, network, scores
from fedtl.data.sources import load_examples
from fedtl.errors import InputError
from fedtl.modules.trunk_of import seed_of
from fedtl.ready_features import ReadyFeatures, allowed_threads, make_features
from fedtl.results.files import write_atomic
from fedtl.results.module_card import Card, read_module
from fedtl.scenario.load import validate
from fedtl.scenario.schema import Scenario
from fedtl.transfer.backbones import Backbone, open_backbone
from fedtl.transfer.heads import initial_head
from fedtl.transfer.tails import initial_tensors, open_network
from fedtl.types import Float32, Head, Int64, Tail


@dataclass(frozen=True)
class Applied:
    """One module on some examples.

    Attributes:
        predicted: of each example the class with the largest score, into ``card.classes``.
        probability: softmax of that score.
        right: whether it is the example's own; None where classes are not compared.
    """

    card: Card
    predicted: Int64
    probability: Float32
    right: npt.NDArray[np.bool_] | None


@dataclass(frozen=True)
class Application:
    """Modules on the same examples.

    Attributes:
        rows: of the examples, int64 [n].
        groups: of each row, a client or a domain.
        features: the trunk's activations and the examples.
    """

    modules: Sequence[Applied]
    rows: Int64
    groups: Sequence[str]
    features: ReadyFeatures


def apply_modules(
    cards: Sequence[Card],
    scenario: Scenario,
    *,
    whole: bool,
    predict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Application:
    """Run the trunk once over a scenario's examples and every module on what it gives.

    Args:
        scenario: whose data, clients and trunk are used.
        whole: all examples are judged, not only what clients are tested on.
        predict: the data's own classes do not matter.

    Raises:
        InputError: a module that is for another trunk, another cut or other classes, by name.
    """
    for card in cards:
        _refuse_unlike(card, cards[0])
    transfers = {card.path: _sections(card) for card in cards}
    first = transfers[cards[0].path]
    examples = load_examples(scenario.data)
    plain = validate(
        {
            **{key: _dumped(scenario)[key] for key in ("name", "seed", "data", "clients", "shift")},
            "backbone": _dumped(scenario)["backbone"],
            "transfer": _dumped(first)["transfer"],
        },
        str(cards[0].path),
        {},
    )
    here = open_backbone(plain.backbone, plain.seed)
    for card in cards:
        _refuse_strange(card, here)
    opened = open_examples(plain, examples)
    if cards[0].facts["cut"] != opened.backbone.cut:
        raise _other_cut(cards[0], opened.backbone.cut)
    if not predict:
        for card in cards:
            _refuse_classes(card, opened.examples.classes)
    tails = {}
    for card in cards:
        own = transfers[card.path]
        tails[card.path] = opened.tail
        if (own.transfer, own.seed) != (plain.transfer, plain.seed):
            front, tails[card.path] = open_network(
                plain.backbone, own.transfer, own.seed, len(examples)
            )
            if front.cut != opened.backbone.cut:
                raise _other_cut(card, opened.backbone.cut)
    features = make_features(opened, progress)
    rows = np.arange(len(features.examples)) if whole else features.split.test.index
    found = []
    for card in cards:
        head = _fitting(card, transfers[card.path], tails[card.path], features)
        found.append(_applied(card, head, tails[card.path], features, rows, plain, predict))
    return Application(found, rows, _groups(features, rows, whole), features)


def _sections(card: Card) -> Scenario:
    """What of the card decides how the module is built: transfer, head, seed."""
    sections = card.part("sections")
    if not isinstance(sections, dict):
        raise card.damaged("its card says not how it was built")
    kept = {
        name: {key: value for key, value in sections[name].items() if value is not None}
        for name in ("transfer", "head")
        if isinstance(sections.get(name), dict)
    }
    kept.get("head", {}).pop("initial", None)  # where training began is no part of the module
    raw = {"name": "module", "seed": seed_of(card), **kept}
    return validate(raw, str(card.path), {})


def _dumped(scenario: Scenario) -> dict[str, Any]:
    dumped: dict[str, Any] = scenario.model_dump(mode="json", exclude_none=True)
    return dumped


def _refuse_unlike(card: Card, other: Card) -> None:
    """Raise InputError for a module that no shared head is, or that is for another trunk."""
    if card.facts.get("whole") != "yes":
        raise InputError(
            "every client of this module's run has layers of its own: it is no model alone",
            where=card.path,
            do="Apply a module of a run with strategy.name = 'fedavg'",
        )
    if card.facts.get("aligned") != "none":
        raise InputError(
            "this module was trained on features that each client aligned for itself",
            where=card.path,
            got=f"adaptation.features = {card.facts.get('aligned', '')[:40]!r}",
            do="Apply a module of a run with adaptation.features = 'none'",
        )
    for key, what in (("backbone_sha256", "trunk"), ("cut", "cut"), *_MADE):
        if card.facts[key] != other.facts[key]:
            raise InputError(
                f"these modules stand on another {what}: they cannot share one pass",
                where=card.path,
                got=f"{card.trunk}, cut {card.facts['cut'][:80]}",
                allowed=f"{other.trunk}, cut {other.facts['cut'][:80]}",
                do="Apply them one at a time",
            )


_MADE = (("preprocessing", "image size or preprocessing"), ("settings", "setting of the trunk"))


def _refuse_strange(card: Card, here: Backbone) -> None:
    """Raise InputError where the trunk here is not the one that the module is for."""
    if card.facts["backbone_sha256"] != here.weights_hash:
        raise InputError(
            "this module is for another trunk",
            where=card.path,
            got=f"it is for {card.trunk}; here is {here.name} {here.weights_hash[:12]}",
            do=f"Give a scenario with backbone.name = {card.facts['backbone'][:80]!r} and the "
            f"weights of SHA-256 {card.facts['backbone_sha256'][:12]} with --to",
        )
    mine = here.card()
    for key, what in _MADE:
        if card.part(key) != _as_json(mine[key]):
            raise InputError(
                f"this module is for another {what}",
                where=card.path,
                got=str(mine[key])[:200],
                allowed=card.facts[key][:200],
                do="Set backbone.image_size, and what else differs, as the module has it",
            )


def _as_json(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value))


def _other_cut(card: Card, here: str) -> InputError:
    return InputError(
        "this module is for another cut of the trunk",
        where=card.path,
        got=f"here it is cut at {here}",
        allowed=card.facts["cut"][:200],
        do="Set transfer.activations as in the run that the module is of, or apply it alone",
    )


def _refuse_classes(card: Card, here: Sequence[str]) -> None:
    if strange := [name for name in here if name not in card.classes]:
        raise InputError(
            "this module knows not all classes of these data",
            where=card.path,
            got=", ".join(strange[:8]) + (f" and {len(strange) - 8} more" * (len(strange) > 8)),
            allowed=", ".join(name[:40] for name in card.classes[:8]),
            do="Give --predict to have its predictions alone, or data of its own classes",
        )


def _fitting(card: Card, own: Scenario, tail: Tail | None, features: ReadyFeatures) -> Head:
    """The module's tensors, once they are known to be those of the network they were made for."""
    if len(card.classes) < 2:
        raise card.damaged("its card names no two classes")
    width = tail.width if tail is not None else int(features.matrix.shape[1])
    wanted = {
        name: tensor.shape
        for name, tensor in {
            **initial_tensors(tail),
            **initial_head(own.head, width, len(card.classes), own.seed),
        }.items()
    }
    if wanted != dict(card.tensors):
        odd = sorted(set(wanted.items()) ^ set(card.tensors.items()))
        raise card.damaged(f"{odd[0][0][:80]!r} is not as its card says")
    return read_module(card)


def _applied(
    card: Card,
    head: Head,
    tail: Tail | None,
    features: ReadyFeatures,
    rows: Int64,
    scenario: Scenario,
    predict: bool,
) -> Applied:
    """Predictions for the rows, the same whatever the threads."""
    import torch

    predicted = np.zeros(len(rows), np.int64)
    sure = np.zeros(len(rows), np.float32)
    tensors = {name: torch.tensor(own) for name, own in head.items()}
    size = JUDGED if tail is None else JUDGED_THROUGH

    def work(first: int, stop: int) -> None:
        torch.set_num_threads(1)
        with network(tail) as through, torch.no_grad():
            for low in range(first * size, min(stop * size, len(rows)), size):
                part = slice(low, low + size)
                x = torch.from_numpy(features.matrix[rows[part]].astype(np.float32))
                found = scores(tensors, x, through)
                predicted[part] = found.numpy().argmax(1)
                sure[part] = found.double().softmax(1).numpy().max(1)

    with one_torch_thread():
        threads = allowed_threads(scenario)
        run_blocks(work, -(-len(rows) // size), threads=threads, block_size=1)
    right = None
    if not predict:
        place = {name: i for i, name in enumerate(card.classes)}
        own = np.array([place[name] for name in features.examples.classes], np.int64)
        right = own[features.examples.labels[rows]] == predicted
    return Applied(card, predicted, sure, right)


def _groups(features: ReadyFeatures, rows: Int64, whole: bool) -> list[str]:
    """Of each row its domain, or where there are none the client that tests on it; "" else."""
    examples = features.examples
    if examples.domains is not None:
        return [examples.domain_names[i] for i in examples.domains[rows].tolist()]
    if whole:
        return [""] * len(rows)
    counts = features.split.test.counts
    return list(np.repeat(np.array(features.split.names, object), counts))


def facts_of(found: Application, predict: bool) -> dict[str, Any]:
    """What was found, as plain values."""
    groups = np.array(found.groups, object)
    names = [name for name in dict.fromkeys(found.groups) if name]
    modules = []
    for one in found.modules:
        counts = np.bincount(one.predicted, minlength=len(one.card.classes)).tolist()
        right = one.right
        modules.append(
            {
                "module": str(one.card.path),
                "kind": one.card.kind,
                "predicted": dict(zip(one.card.classes, counts, strict=True)),
                "accuracy": _mean(right),
                "groups": {
                    name: {
                        "examples": int((groups == name).sum()),
                        "accuracy": None if right is None else _mean(right[groups == name]),
                    }
                    for name in names
                },
            }
        )
    return {
        "format": 1,
        "trunk": found.modules[0].card.trunk,
        "examples": len(found.rows),
        "judged": not predict,
        "features": dict(found.features.facts),
        "notes": list(found.features.notes),
        "modules": modules,
    }


def _mean(right: npt.NDArray[np.bool_] | None) -> float | None:
    return float(right.mean()) if right is not None and len(right) else None


def write_predictions(found: Application, path: Path) -> None:
    """A csv file with a row per example: where it lies, its class, and every module's answer."""
    examples = found.features.examples
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    numbers = range(1, len(found.modules) + 1)
    own = [name for i in numbers for name in (f"predicted_{i}", f"probability_{i}")]
    out.writerow(["example", "label", "group", *own])
    for place, row in enumerate(found.rows.tolist()):
        answers: list[Any] = []
        for one in found.modules:
            name = one.card.classes[one.predicted[place]]
            answers += [name, f"{one.probability[place]:.6f}"]
        label = examples.classes[examples.labels[row]]
        out.writerow([examples.where(row), label, found.groups[place], *answers])
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))
