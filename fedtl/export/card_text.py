"""The model card as Markdown. Whatever came as a name stays a name: no markup, no link."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedtl.errors import printable

_SPECIAL = re.compile(r"[\\`*_{}\[\]<>#|~&$!@]|:(?=//)|(?<=www)\.|^[-+]|(?<=\d)\.(?=\s|$)")
"""What has a meaning in Markdown, or would become a link by itself."""


def plain(text: Any) -> str:
    """Text from outside as Markdown that shows exactly it, on one line."""
    return _SPECIAL.sub(r"\\\g<0>", printable(str(text)))


def percent(value: float | None) -> str:
    """A fraction, or that there is none."""
    return "undefined" if value is None else f"{100 * value:.1f} %"


def card_text(card: Mapping[str, Any], file: str) -> str:
    """The card's Markdown.

    Args:
        card: what ``card_facts`` gives, perhaps with ``quantized``.
        file: name of the artefact.
    """
    trunk, head, data = card["trunk"], card["head"], card["data"]
    metrics, privacy = card["metrics"], card["privacy"]
    parts = [
        f"# {plain(card['name'])}",
        f"A classifier of {len(card['labels'])} classes, trained by {data['clients']} "
        f"{card['training']['clients']} clients together; their data stayed apart."
        if card["training"]["clients"] == "real"
        else f"A classifier of {len(card['labels'])} classes, trained in a simulation of "
        f"{data['clients']} clients.",
        _facts(
            [
                ("File", file),
                ("Verdict", card["verdict"]),
                ("Accuracy on the clients' own tests", percent(metrics["accuracy"])),
                ("Balanced accuracy", percent(metrics["balanced_accuracy"])),
                ("Worst client", metrics["worst_client"]),
            ]
        ),
        "## What it takes and gives",
        _facts([*card["inputs"].items(), *card["outputs"].items()]),
        "Preprocessing:",
        "\n".join(f"{i}. {plain(step)}" for i, step in enumerate(_steps(card), 1)),
        "Labels, in order: " + ", ".join(plain(label) for label in card["labels"]),
        "## Made from",
        _facts(
            [
                ("Trunk", " ".join(filter(None, (trunk["name"], trunk.get("model"))))),
                ("Weights", trunk["source"]),
                ("SHA-256 of the weights", trunk["sha256"]),
                ("Licence of the weights", trunk["licence"]),
                ("Cut", trunk["cut"]),
                ("Head", head["kind"]),
                ("Trained", f"{head['trained']}, {head['parameters']:,} numbers"),
                (
                    "Strategy",
                    f"{card['training']['strategy']}, {card['training']['rounds']} rounds",
                ),
            ]
        ),
        "## Data, by counts alone",
        _facts(
            [
                ("Clients", data["clients"]),
                ("Training examples", data["training_examples"]),
                ("Test examples", data["test_examples"]),
                ("Domains", ", ".join(data["domains"]) or "none named"),
            ]
        ),
        "## How well it does",
        _table(metrics["clients"], ("name", "domain", "examples", "accuracy", "alone")),
        _table(metrics["domains"], ("name", "clients", "examples", "accuracy")),
        "## Privacy",
        _privacy(privacy),
        "## Limits",
        "\n".join(f"- {plain(limit)}" for limit in card["limits"]),
        "## Checked",
        *_checked(card),
        "## How to load it",
        _loading(file, card),
        "## Where it comes from",
        _facts([*_flat(card["provenance"])]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _steps(card: Mapping[str, Any]) -> Sequence[str]:
    own = card["preprocessing"]
    return [*([own["matched"]] if "matched" in own else []), *own["steps"]]


def _facts(rows: Sequence[tuple[str, Any]]) -> str:
    lines = [f"| {plain(k)} | {plain('undefined' if v is None else v)} |" for k, v in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    if not rows:
        return ""
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for row in rows:
        cells = [
            percent(row[c])
            if c in ("accuracy", "alone")
            else plain("" if row[c] is None else row[c])
            for c in columns
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _privacy(own: Mapping[str, Any]) -> str:
    if own["epsilon"] is None:
        return plain(own["promise"]).capitalize() + "."
    amount = f"epsilon = {own['epsilon']:.3g}"
    amount += f", delta = {own['delta']:.3g}" if own["delta"] else ""
    unit = f", for one {own['unit']}" if own["unit"] else ""
    return plain(f"{amount}{unit}: {own['promise']}.")


def _checked(card: Mapping[str, Any]) -> list[str]:
    parity, quantized = card["parity"], card.get("quantized")
    found = []
    if parity is not None:
        what = "made-up inputs" if parity["note"] else "test examples of the run"
        found.append(
            plain(
                f"On {parity['examples']} {what} the largest difference of a probability to the "
                f"run is {parity['difference']:.2g}; {percent(parity['agreement'])} get the same "
                f"label."
            )
        )
        if parity["note"]:
            found.append(plain(f"Made up, as {parity['note']}."))
    if quantized:
        found.append(
            _table(
                [{**row, "bytes": f"{row['bytes']:,}", "p50 ms": f"{1e3 * row['p50']:.2f}"}
                 for row in quantized["files"]],
                ("name", "bytes", "p50 ms", "accuracy"),
            )
        )  # fmt: skip
        found.append(plain(quantized["verdict"]))
    return found


def _loading(file: str, card: Mapping[str, Any]) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]", "_", file)
    taken = ", ".join(f'"{one}": {one}' for one in card["inputs"])
    arguments = ", ".join(card["inputs"])
    if file.endswith(".onnx"):
        code = (
            "import json, onnxruntime\n"
            f'session = onnxruntime.InferenceSession("{name}")\n'
            "facts = session.get_modelmeta().custom_metadata_map\n"
            'labels = json.loads(facts["labels"])\n'
            f'scores, probabilities = session.run(["scores", "probabilities"], {{{taken}}})'
        )
        return f"```python\n{code}\n```\n\nOr serve it: `fedtl serve {name}`"
    if file.endswith(".pt2"):
        code = (
            "import torch\n"
            f'program = torch.export.load("{name}").module()\n'
            f"scores, probabilities = program({arguments})"
        )
    else:
        code = (
            "from fedtl.export import load_model\n"
            f'model, card = load_model("{name}")\n'
            f"scores, probabilities = model({arguments})"
        )
    return f"```python\n{code}\n```"


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key} ")
        else:
            found.append((f"{prefix}{key}".replace("_", " "), value))
    return found
