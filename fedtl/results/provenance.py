"""What a run cost, what to beware of, and how to make it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtl.errors import times
from fedtl.results.tables import RunTables, number
from fedtl.scenario.schema import PATHS

RARE = 5
"""Reasons for unused answers that are shown; all are in clients.parquet."""


def bytes_text(count: Any) -> str:
    """Bytes in a unit that reads well."""
    found = number(count)
    if found is None:
        return "undefined"
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if found < 1024 or unit == "GiB":
            return f"{found:,.0f} {unit}" if unit == "bytes" else f"{found:,.1f} {unit}"
        found /= 1024
    raise AssertionError("unreachable")


def cost(run: RunTables) -> list[tuple[str, str]]:
    """What it took: name and figure."""
    summary: Mapping[str, Any] = run.summary or {}
    seconds = summary.get("seconds", {})
    rows = [
        ("Rounds", f"{run.done_rounds}"),
        ("Sent by all clients", bytes_text(run.rounds["bytes_up"].sum(min_count=1))),
        ("Sent to all clients", bytes_text(run.rounds["bytes_down"].sum(min_count=1))),
    ]
    for name, title in (
        ("extract", "Examples to features"),
        ("train", "Training rounds"),
        ("references", "Models to compare with"),
        ("total", "Whole run"),
    ):
        if (found := number(seconds.get(name))) is not None:
            rows.append((title, f"{found:,.1f} seconds"))
    if (memory := number(summary.get("peak_rss_mib"))) is not None:
        rows.append(("Memory at most", f"{memory:,.0f} MiB"))
    rows += estimated(summary.get("cost") or {})
    if summary.get("cpu"):
        rows.append(
            (
                "Machine",
                f"{summary['cpu']}, {summary.get('device')}, {summary.get('threads')} threads",
            )
        )
    return rows


def estimated(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Passes, float operations and energy, as far as they are known: name and figure."""
    passes, flops = card.get("passes", {}), card.get("flops", {})
    rows = []
    if (now := number(passes.get("trunk"))) is not None:
        made = number(passes.get("trunk_when_made"))
        stored = f" ({made:,.0f} when their features were made)" if not now and made else ""
        rows.append(("Examples through the backbone", f"{now:,.0f}{stored}"))
    if (trained := number(passes.get("examples_trained"))) is not None:
        rows.append(("Examples trained on, over all rounds", f"{trained:,.0f}"))
    for name, title in (("trunk", "the backbone"), ("training", "the training")):
        if (found := number(flops.get(name))) is not None:
            rows.append((f"Operations of {title}", f"{found / 1e9:,.2f} GFLOP"))
    if (energy := number(card.get("energy_wh"))) is not None:
        co2 = number(card.get("co2_g")) or 0.0
        rows.append(("Energy, an estimate", f"{energy:.2g} Wh, {co2:.2g} g of CO2"))
    return rows


def assumptions(run: RunTables) -> list[str]:
    """What the estimates of the cost rest on."""
    return [str(line) for line in ((run.summary or {}).get("cost") or {}).get("assumptions", ())]


def warnings(run: RunTables) -> list[str]:
    """What a reader should know before trusting the figures."""
    found = [str(note) for note in (run.summary or {}).get("notes", ())]
    data = (run.summary or {}).get("data", {})
    if data.get("skipped_examples"):
        found.append(f"{data['skipped_examples']} examples could not be read and were left out.")
    if data.get("excluded_clients"):
        found.append(f"{data['excluded_clients']} clients had too few examples and were left out.")
    if data.get("leaks_train_test"):
        found.append(
            f"The same example is in training and test data {times(data['leaks_train_test'])}: "
            "accuracies are too good."
        )
    if data.get("leaks_between_clients"):
        found.append(f"The same example is at two clients {times(data['leaks_between_clients'])}.")
    abandoned = int(run.rounds["abandoned"].fillna(False).astype(bool).sum())
    if abandoned:
        found.append(f"{abandoned} rounds had too few answers; the model stayed as it was.")
    for reason, count in list(run.unused.items())[:RARE]:
        what = "answer of a client was" if count == 1 else "answers of clients were"
        found.append(f"{count} {what} not used: {reason.removeprefix('unused: ')}.")
    if len(run.unused) > RARE:
        found.append(f"{len(run.unused) - RARE} more reasons are in clients.parquet.")
    attack = run.scenario.get("attack", {}).get("kind", "none")
    if attack != "none":
        found.append(f"Some clients lie on purpose in this run: attack {attack}.")
    pooled = (run.summary or {}).get("references", {}).get("centralised", {})
    if pooled.get("converged") is False:
        found.append("The pooled model's fit has not converged: the yardstick may be too low.")
    undefined = int(run.own["accuracy"].isna().sum())
    if undefined:
        found.append(f"{undefined} clients have no test example: their figures are undefined.")
    few = int((run.own["examples"] < 30).sum())
    if few:
        found.append(
            f"{few} of {len(run.own)} clients have fewer than 30 test examples: their figures are "
            "rough."
        )
    return found


def reproduce(run: RunTables) -> dict[str, Any]:
    """Commands, hashes, versions and the resolved scenario, without this machine's folders."""
    summary: Mapping[str, Any] = run.summary or {}
    command = f"fedtl run {run.path.name}/scenario.toml"
    data, backbone = summary.get("data", {}), summary.get("backbone", {})
    mode = run.scenario.get("transfer", {}).get("mode", "head")
    facts = {
        "Scenario": run.name,
        "Seed": run.scenario.get("seed", 0),
        "Strategy": run.scenario.get("strategy", {}).get("name"),
        "Engine": summary.get("engine") or run.scenario.get("engine", {}).get("kind"),
        "Scenario hash": summary.get("scenario_hash"),
        "Data fingerprint": data.get("fingerprint"),
        "Backbone": backbone.get("name") or run.scenario.get("backbone", {}).get("name"),
        "Backbone's weights": backbone.get("weights_source"),
        "Backbone's weights (SHA-256)": backbone.get("weights_sha256"),
        "Backbone's licence": backbone.get("licence"),
        "Preprocessing": json.dumps(found) if (found := backbone.get("preprocessing")) else None,
        "Cut": None if mode == "head" else backbone.get("cut"),
        "Trained beside the head": None if mode == "head" else mode,
        "Head (SHA-256)": summary.get("head_sha256"),
        "Cohorts (BLAKE2b)": summary.get("cohorts_blake2b"),
        "Batches (BLAKE2b)": summary.get("batches_blake2b"),
    }
    return {
        "commands": [] if run.real else [command, f"fedtl report {run.path.name}"],
        "facts": {name: value for name, value in facts.items() if value is not None},
        "versions": summary.get("versions", {}),
        "scenario": list(flat(without_folders(run.scenario))),
    }


def without_folders(scenario: Mapping[str, Any]) -> dict[str, Any]:
    """A scenario whose paths are told by their last name only."""
    content = {k: dict(v) if isinstance(v, Mapping) else v for k, v in scenario.items()}
    for table, entry in PATHS:
        inner = content.get(table)
        if isinstance(inner, dict) and isinstance(inner.get(entry), str):
            inner[entry] = Path(inner[entry]).name
    return content


def flat(content: Mapping[str, Any], prefix: str = "") -> Any:
    """(key path, value) of every entry of nested tables."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
