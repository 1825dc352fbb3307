"""Pages of what is known before training: who has what, the gaps, and which backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedtl.results import plots, report
from fedtl.results.page import figure, render, shades

DISTANCES = {
    "js": "Jensen-Shannon",
    "hellinger": "Hellinger",
    "emd": "Earth mover's",
}
"""Distances between the clients' mixes of classes."""

SCORES = {"h_score": "H-score", "logme": "LogME", "nce": "NCE", "leep": "LEEP"}

MATRIX_CLIENTS = 60
"""Clients up to which a page shows every two of them."""


def split_page(facts: Mapping[str, Any]) -> str:
    """The page of ``fedtl split``.

    Args:
        facts: what ``fedtl.split.show_split`` gives.
    """
    names, classes = facts["clients"], facts["classes"]
    counts = {split: np.asarray(facts[split], int) for split in ("train", "test")}
    clients = []
    for i, name in enumerate(names):
        row = {
            "name": name,
            "domain": facts["domains"][i],
            "train": int(counts["train"][i].sum()),
            "test": int(counts["test"][i].sum()),
            "classes": int((counts["train"][i] > 0).sum()),
        }
        row |= {key: facts["distances"][key]["to_all"][i] for key in DISTANCES}
        clients.append(row)
    total = sum(row["train"] + row["test"] for row in clients)
    headline = f"{len(names):,} clients hold {total:,} examples of {len(classes)} classes."
    return render(
        "split.html.j2",
        {
            "title": headline,
            "headline": headline,
            "warnings": facts["warnings"],
            "clients": clients,
            "titles": DISTANCES,
            "pairs": {key: facts["distances"][key]["pairs"] for key in DISTANCES},
            "excluded": facts["excluded"],
            **{
                split: holdings(names, facts["domains"], classes, counts[split]) for split in counts
            },
        },
    )


def gap_page(facts: Mapping[str, Any]) -> str:
    """The page of ``fedtl gap``.

    Args:
        facts: what ``fedtl.gap.measure_gap`` gives.
    """
    names, kinds = facts["clients"], facts["kinds"]
    scores = facts.get("scores") or {key: {"title": title} for key, title in SCORES.items()}
    clients = [
        {
            "name": name,
            "domain": facts["domains"][i],
            "examples": facts["examples"][i],
            "rest": [_at(facts["rest"], kind, i) for kind in kinds],
        }
        for i, name in enumerate(names)
    ]
    pairs = facts.get("pairs") or {}
    matrices = [
        {
            "title": f"{kinds[kind]['title']} ({kinds[kind]['made_from']}; {kinds[kind]['range']})",
            "rows": names,
            "columns": names,
            "cells": shades(values),
        }
        for kind, values in pairs.items()
        if kind in kinds and len(names) <= MATRIX_CLIENTS
    ]
    remarks = list(facts["notes"])
    if pairs and not matrices:
        remarks.append(
            f"Distances between every two of {len(names)} clients are too many for a page: "
            "'fedtl gap --out FILE' keeps them."
        )
    scored = facts["transferability"]
    everybody = [{"name": "everybody", "scored": _all_of(scored["all"], scores)}]
    each = [
        {"name": name, "scored": _all_of(values, scores)}
        for name, values in zip(names, scored["clients"], strict=True)
    ]
    warned = sum(check["severity"] == "warning" for check in facts["checks"])
    headline = f"{len(names):,} clients compared on the features of {facts['backbone']['name']}"
    headline += f": {warned} warning{'s' if warned != 1 else ''}." if warned else "."
    return render(
        "gap.html.j2",
        {
            "title": f"{facts['name']}: {headline}",
            "headline": headline,
            "name": facts["name"],
            "backbone": facts["backbone"],
            "checks": facts["checks"],
            "expectation": facts.get("expectation"),
            "kinds": list(kinds.values()),
            "clients": clients,
            "matrices": matrices,
            "scores": {key: score["title"] for key, score in scores.items()},
            "transfer": everybody + each,
            "holdings": holdings(
                names, facts["domains"], facts["classes"], np.asarray(facts["counts"], int)
            ),
            "made": [
                {"range": "", "made_from": "", "note": "", **one}
                for one in (*kinds.values(), *scores.values())
            ],
            "sampling": facts["sampling"],
            "remarks": remarks,
            "scenario_hash": facts["scenario_hash"],
            "seconds": facts["seconds"],
        },
    )


def backbones_page(facts: Mapping[str, Any]) -> str:
    """The page of ``fedtl gap --backbones``.

    Args:
        facts: what ``fedtl.gap.rank_backbones`` gives.
    """
    ranked = facts["backbones"]
    known = [one for one in ranked if one["accuracy"] is not None]
    headline = "No backbone could be judged."
    figures = []
    if known:
        best = max(known, key=lambda one: one["accuracy"])
        headline = f"{best['name']} has the best quick head: {report.percent(best['accuracy'])}."
        told = "Accuracy against images per second; the table has all figures."
        caption = "Filled: no other is better in accuracy, speed and size at once."
        figures.append(figure(plots.backbones(facts), "backbones", told, caption))
    return render(
        "backbones.html.j2",
        {
            "title": headline,
            "headline": headline,
            "backbones": ranked,
            "figures": figures,
            "remarks": facts["notes"],
        },
    )


def holdings(
    names: Sequence[str],
    domains: Sequence[str],
    classes: Sequence[str],
    counts: np.ndarray[Any, Any],
) -> dict[str, Any]:
    """Examples by client and class; summed by domain where that table would be too large.

    Args:
        counts: int [K, C].
    """
    rows, by = list(names), "client"
    if counts.size > report.CELLS_MOST:
        rows, by = list(dict.fromkeys(domains)), "domain"
        place = np.array([rows.index(domain) for domain in domains])
        summed = np.zeros((len(rows), len(classes)), int)
        np.add.at(summed, place, counts)
        counts = summed
    return {
        "by": by, "rows": rows, "columns": list(classes), "cells": shades(counts.tolist())
    }  # fmt: skip


def _at(table: Mapping[str, Any], kind: str, i: int) -> Any:
    column = table.get(kind)
    return None if column is None else column[i]


def _all_of(values: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values.get(key) for key in scores}
