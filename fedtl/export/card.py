"""The model card: what a model is, what it was made from, and what it is not for.

Data are told by counts alone. Clients and domains have the names that they have in the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedtl import machine
from fedtl.export.opened import Model
from fedtl.export.rows import is_inside
from fedtl.results.tables import RunTables, number
from fedtl.transfer.backbones import IDENTITY, Backbone
from fedtl.types import TAIL

FORMAT = 1
"""Of the card as JSON."""

FEW = 30
"""Test examples below which a client's figures are rough."""

OUTPUTS = {
    "scores": "float32 [n, C], one score per class, in the order of the labels",
    "probabilities": "float32 [n, C], their softmax",
}


def card_facts(model: Model, parity: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The card as JSON values.

    Args:
        parity: how the file compares with the run, as ``Parity.facts`` gives it.
    """
    run, scenario = model.tables, model.scenario
    summary: Mapping[str, Any] = run.summary or {}
    metrics = _metrics(run)
    return {
        "format": FORMAT,
        "name": scenario.name,
        "labels": list(model.labels),
        "inputs": inputs_of(model),
        "outputs": OUTPUTS,
        "preprocessing": preprocessing_of(model),
        "trunk": _trunk(model.front),
        "head": {
            "kind": scenario.head.kind,
            "trained": scenario.transfer.mode,
            "parameters": int(sum(tensor.size for tensor in model.head.values())),
            "behind_the_cut": int(
                sum(t.size for name, t in model.head.items() if name.startswith(TAIL))
            ),
        },
        "data": _data(run, summary),
        "metrics": metrics,
        "verdict": (summary.get("verdict") or {}).get("headline"),
        "privacy": _privacy(summary),
        "training": {
            "strategy": scenario.strategy.name,
            "rounds": summary.get("rounds_completed"),
            "clients": "real" if run.real else "simulated",
            "seed": scenario.seed,
        },
        "provenance": {
            "scenario_hash": summary.get("scenario_hash"),
            "head_sha256": summary.get("head_sha256"),
            "versions": {**summary.get("versions", {}), "exported_with": machine.versions()},
        },
        "limits": _limits(model, metrics),
        "parity": None if parity is None else dict(parity),
    }


def _trunk(front: Backbone) -> dict[str, Any]:
    return {
        "name": front.name,
        "model": front.settings.get("model"),
        "source": front.weights_source,
        "sha256": front.weights_hash,
        "licence": "no weights" if front.name == IDENTITY else front.licence or "unknown",
        "cut": front.cut,
    }


def inputs_of(model: Model) -> dict[str, str]:
    """What the program takes, by name."""
    if model.takes == "images":
        side = model.front.image_size
        return {"pixels": f"uint8 [n, {side}, {side}, 3], RGB, 0 to 255"}
    if model.takes == "texts":
        return {
            "input_ids": "int64 [n, t], numbers of tokens, filled up to the longest",
            "attention_mask": "int64 [n, t], 1 for a token, 0 for filling",
        }
    return {"rows": f"float32 [n, {_width(model)}], finite"}


def _width(model: Model) -> int:
    return model.columns if model.columns is not None and is_inside(model) else model.width


def preprocessing_of(model: Model) -> dict[str, Any]:
    """How an example becomes what the program takes; any program can follow it."""
    if model.takes == "images":
        own = model.front.preprocessing
        return {
            "kind": "images",
            "resize": own.resize,
            "crop": own.crop,
            "interpolation": own.interpolation,
            "steps": [
                "decode, turn upright as EXIF says, RGB, transparency over white",
                f"resize so that the shorter side is {own.resize} pixels, {own.interpolation}, "
                "antialiased as Pillow does (the longer side: rounded down)",
                f"cut out the {own.crop} x {own.crop} pixels in the centre (left and top: half of "
                "what is over, a half rounded to the even number)",
                "nothing else: mean and deviation are inside the program",
            ],
            **(
                {"matched": "each client's pixels were first given the channel means and "
                 "deviations that the weights were trained with; do the same with yours"}
                if model.scenario.adaptation.input == "match"
                else {}
            ),
        }  # fmt: skip
    if model.takes == "texts":
        return {
            "kind": "texts",
            "tokenizer": "tokenizer.json, beside this file",
            "max_tokens": int(model.front.settings["max_tokens"]),
            "length": model.tokens,
            "steps": [
                "tokenize, cut at max_tokens",
                "fill up to the longest of the batch, attention_mask 0 there"
                if model.tokens is None
                else f"fill up to {model.tokens} tokens, attention_mask 0 there",
            ],
        }
    trunk = model.front.name
    steps = ["float32, no missing value"]
    if not is_inside(model):
        steps = [f"features of the {trunk} trunk, which is no part of this file; see its card"]
    if model.scenario.data.source == "table":
        steps.insert(
            0,
            "each client scaled and filled in its columns with statistics of its own training "
            "rows, which are not in this file: do the same with yours",
        )
    return {"kind": "rows", "width": _width(model), "trunk": trunk, "steps": steps}


def _data(run: RunTables, summary: Mapping[str, Any]) -> dict[str, Any]:
    told = summary.get("data") or {}
    domains = sorted({str(d) for d in run.own["domain"].dropna() if d})
    return {
        "clients": summary.get("num_clients"),
        "training_examples": told.get("train"),
        "test_examples": told.get("test"),
        "classes": told.get("classes"),
        "domains": domains,
    }


def _metrics(run: RunTables) -> dict[str, Any]:
    """Of the shared model on the clients' own tests."""
    final = (run.summary or {}).get("final") or {}
    rows: list[dict[Any, Any]] = run.own.to_dict("records")
    clients: list[dict[str, Any]] = [
        {
            "name": row["name"],
            "domain": row["domain"] or None,
            "examples": int(row["examples"]),
            "accuracy": number(row["accuracy"]),
            "balanced_accuracy": number(row["balanced_accuracy"]),
            "alone": number(row["local_only_accuracy"]),
        }
        for row in rows
    ]
    names = dict.fromkeys(one["domain"] for one in clients)
    domains = [
        _domain(name, [one for one in clients if one["domain"] == name])
        for name in names
        if name is not None
    ]
    judged = [one for one in clients if one["accuracy"] is not None]
    worst = min(judged, key=lambda one: one["accuracy"]) if judged else None
    return {
        "accuracy": number(final.get("accuracy")),
        "balanced_accuracy": number(final.get("balanced_accuracy")),
        "accuracy_client_mean": number(final.get("accuracy_client_mean")),
        "worst_client": None if worst is None else worst["name"],
        "clients": clients,
        "domains": domains,
    }


def _domain(name: str, clients: list[dict[str, Any]]) -> dict[str, Any]:
    judged = [one for one in clients if one["accuracy"] is not None and one["examples"]]
    sizes = np.array([one["examples"] for one in judged], float)
    rights = np.array([one["accuracy"] for one in judged], float) * sizes
    return {
        "name": name,
        "clients": len(clients),
        "examples": int(sizes.sum()),
        "accuracy": float(rights.sum() / sizes.sum()) if judged else None,
    }


def _privacy(summary: Mapping[str, Any]) -> dict[str, Any]:
    told = summary.get("privacy") or {}
    epsilon = number(told.get("epsilon", summary.get("epsilon")))
    return {
        "epsilon": epsilon,
        "delta": number(told.get("delta")),
        "unit": told.get("unit"),
        "secure_aggregation": told.get("secure_aggregation"),
        "promise": "no bound: without differential privacy a model may tell of what it was "
        "trained on"
        if epsilon is None
        else "what this model tells of a unit is bounded as epsilon and delta say, against "
        "whoever has the model",
    }


def _limits(model: Model, metrics: Mapping[str, Any]) -> list[str]:
    scenario = model.scenario
    found = [
        "It tells its own classes apart and no others: whatever it is given gets one of these "
        "labels, also what is none of them.",
        "Its figures are those of the clients' own tests. For another place, another device or "
        "another time there are none: measure there before relying on it.",
    ]
    worst = next((c for c in metrics["clients"] if c["name"] == metrics["worst_client"]), None)
    if worst is not None:
        found.append(
            f"It does worst for {worst['name']}: {100 * worst['accuracy']:.1f} % of "
            f"{worst['examples']} tests."
        )
    few = sum(one["examples"] < FEW for one in metrics["clients"])
    if few:
        found.append(f"{few} clients have fewer than {FEW} tests: their figures are rough.")
    if scenario.attack.kind != "none":
        found.append(f"Some clients lied on purpose in training (attack {scenario.attack.kind}).")
    if scenario.shift.kinds:
        found.append(f"Its data were shifted on purpose: {', '.join(scenario.shift.kinds)}.")
    if scenario.transfer.batch_norm == "local" and model.tail is not None:
        found.append("Each client keeps batch norm of its own; this file has the shared one.")
    if scenario.adaptation.prior in ("logit_adjustment", "bbse"):
        found.append("Each client corrects for its own class frequencies; this file does not.")
    if scenario.strategy.name in (
        "finetune",
        "ditto",
        "pfedme",
        "apfl",
        "knnper",
        "personal_ridge",
    ):
        found.append("Each client makes a model of its own from this one; this is the shared one.")
    return found
