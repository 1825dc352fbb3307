"""Is one run really better than another? Paired differences on the same test examples.

With one seed each, the clients are the evidence: their differences say whether these two heads
differ, on clients like these. With several seeds, the seeds are: each gives one difference of the
means, and they say whether the two ways of making a head differ. Holm's correction goes over
all pairs of runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import ValidationError
from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]

from fedtl.errors import InputError
from fedtl.results.paired import Float64, clients_test, seeds_test, unpaired_test
from fedtl.results.provenance import flat, without_folders
from fedtl.results.tables import RunTables, number, read_run, seed_folders
from fedtl.scenario.schema import Scenario

NOT_ENOUGH = "not enough evidence"

TESTED_BY = ("data", "clients", "shift")
"""Tables of the scenario that decide who is judged on which test examples."""

NO_MATTER = frozenset({"data.on_bad_file", "data.leakage", "data.max_pixels", "clients.fraction"})
"""Keys of these tables that decide other things."""


@dataclass(frozen=True)
class Entry:
    """One of the runs compared: a run, or the runs of several seeds.

    Attributes:
        name: the folder's.
        seeds: tables by seed.
    """

    name: str
    seeds: Mapping[int, RunTables]

    @property
    def first(self) -> RunTables:
        """The run of the first seed."""
        return next(iter(self.seeds.values()))


@dataclass(frozen=True)
class Comparison:
    """What comparing several runs found; ``as_facts`` are plain JSON values."""

    facts: Mapping[str, Any]

    def as_facts(self) -> dict[str, Any]:
        """Runs, differing keys of their scenarios, every pair, and notes.

        Of a pair: names ``a`` and ``b``; ``unit`` (clients or seeds) and ``n`` of them; ``home``
        and ``everywhere`` with ``difference`` (b minus a), ``interval``, ``p``, ``p_holm``;
        ``better``, ``worse``, ``equal``: clients for whom b is; ``says``: a sentence. Undefined is
        None.
        """
        return dict(self.facts)


def compare_runs(paths: Sequence[Path], *, allow_unlike: bool) -> Comparison:
    """Compare every two of several runs.

    Args:
        paths: run folders, or folders of ``fedtl run --seeds``.
        allow_unlike: also compare runs that were not judged on the same test examples: unpaired.

    Raises:
        InputError: fewer than two runs, one in which nothing was judged, or runs judged on
            different test examples.
    """
    if len(paths) < 2:
        raise InputError("one run has nothing to be compared with", do="Name two runs or more")
    entries = _named([_entry(path) for path in paths])
    unlike = [(a.name, b.name, why) for a, b in combinations(entries, 2) if (why := _unlike(a, b))]
    if unlike and not allow_unlike:
        a, b, why = unlike[0]
        raise InputError(
            f"{a} and {b} were not judged on the same test examples: {why}",
            do="Compare runs of the same data, clients and seeds, or add --allow-unlike",
        )
    rules = entries[0].first.scenario.get("verdict", {})
    level, margin = float(rules.get("level", 0.05)), float(rules.get("margin", 0.01))
    strangers = {(a, b) for a, b, _ in unlike}
    pairs = [
        _pair(a, b, paired=(a.name, b.name) not in strangers, level=level)
        for a, b in combinations(entries, 2)
    ]
    _correct(pairs)
    for pair in pairs:
        pair["says"] = _says(pair, level, margin)
    notes = [f"{a} and {b}: {why}; compared unpaired." for a, b, why in unlike]
    notes += [note for entry in entries for note in _notes(entry)]
    if any(pair["unit"] == "clients" for pair in pairs):
        notes.append(
            "With one seed in common this is about these two heads, not about the ways they were "
            "made: run both with --seeds 5 to learn that."
        )
    return Comparison(
        {
            "format": 1,
            "level": level,
            "margin": margin,
            "runs": [_run_facts(entry) for entry in entries],
            "differences": differing_keys([entry.first.scenario for entry in entries]),
            "pairs": pairs,
            "notes": notes,
        }
    )


def differing_keys(scenarios: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Keys in which scenarios differ, without seed and engine: key and one value per scenario."""
    flats = [dict(flat(without_folders(_complete(scenario)))) for scenario in scenarios]
    keys = dict.fromkeys(key for one in flats for key in one)
    return [
        {"key": key, "values": [one.get(key) for one in flats]}
        for key in keys
        if key not in ("name", "seed")
        and not key.startswith(("engine.", "report."))
        and any(one.get(key) != flats[0].get(key) for one in flats)
    ]


def _complete(scenario: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults of keys that an older version did not write."""
    strategy = {"name": "fedavg", **scenario.get("strategy", {})}
    try:
        known = Scenario.model_validate({"name": "defaults", "strategy": strategy})
    except ValidationError:  # of a version that knew another strategy
        known = Scenario(name="defaults")
    defaults = known.model_dump(mode="json")
    content = {
        key: {**value, **scenario.get(key, {})} if isinstance(value, Mapping) else value
        for key, value in defaults.items()
    }
    plain = {key: value for key, value in scenario.items() if not isinstance(value, Mapping)}
    return {**scenario, **content, **plain}


def _entry(path: Path) -> Entry:
    folders = seed_folders(path) or [path]
    tables = [read_run(folder) for folder in folders]
    for one in tables:
        if not one.own["accuracy"].notna().any():
            raise InputError(
                "nothing was judged in this run",
                where=one.path,
                do=f"Type 'fedtl resume {one.path}' if it was interrupted",
            )
    name = path.name or path.resolve().name
    return Entry(name, {int(one.scenario.get("seed", 0)): one for one in tables})


def _named(entries: Sequence[Entry]) -> list[Entry]:
    """Entries with names that tell them apart."""
    names = [entry.name for entry in entries]
    return [
        Entry(f"{entry.name} ({i})", entry.seeds) if names.count(entry.name) > 1 else entry
        for i, entry in enumerate(entries, 1)
    ]


def _unlike(a: Entry, b: Entry) -> str | None:
    """Why two runs cannot be paired, or None."""
    common = sorted(set(a.seeds) & set(b.seeds))
    if not common:
        return f"seeds {_listed(a.seeds)} against {_listed(b.seeds)}"
    for seed in common:
        one, other = a.seeds[seed], b.seeds[seed]
        marks = [(t.summary or {}).get("data", {}).get("fingerprint") for t in (one, other)]
        if None not in marks and marks[0] != marks[1]:
            return "their data are not the same"
        keys = [
            d["key"]
            for d in differing_keys([one.scenario, other.scenario])
            if _decides_tests(d["key"])
        ]
        if keys:
            return f"they differ in {', '.join(keys)}"
        both = one.own.merge(other.own, on="name", suffixes=("", "_other"))
        if both.empty:
            return "they have no client in common"
        if (both["examples"] != both["examples_other"]).any():
            return "their clients have other test examples"
    return None


def _decides_tests(key: str) -> bool:
    return key.partition(".")[0] in TESTED_BY and key not in NO_MATTER


def _listed(seeds: Mapping[int, Any]) -> str:
    return ", ".join(map(str, seeds))


def _pair(a: Entry, b: Entry, *, paired: bool, level: float) -> dict[str, Any]:
    """One pair of runs, not yet corrected; ``difference`` is b minus a."""
    facts: dict[str, Any] = {"a": a.name, "b": b.name, "paired": paired}
    if not paired:
        one, other = (_mean_accuracies(entry) for entry in (a, b))
        home = unpaired_test(one, other, min(a.seeds), level)
        return {**facts, "unit": "clients", "n": [len(one), len(other)], "home": home,
                "everywhere": _plain(_everywhere(b) - _everywhere(a)),
                **dict.fromkeys(("better", "worse", "equal"))}  # fmt: skip
    common = sorted(set(a.seeds) & set(b.seeds))
    each = [_by_client(a.seeds[seed], b.seeds[seed]) for seed in common]
    far = np.array([_far(b.seeds[s]) - _far(a.seeds[s]) for s in common])
    every = np.concatenate(each)
    facts |= {
        "better": int((every > 0).sum()),
        "worse": int((every < 0).sum()),
        "equal": int((every == 0).sum()),
    }
    if len(common) == 1:
        home = clients_test(each[0], common[0], level)
        return {**facts, "unit": "clients", "n": len(each[0]), "home": home,
                "everywhere": _plain(far[0])}  # fmt: skip
    home = seeds_test(np.array([one.mean() for one in each]), level)
    known = np.isfinite(far)
    everywhere = seeds_test(far[known], level) if known.sum() > 1 else _plain(math.nan)
    return {**facts, "unit": "seeds", "n": len(common), "home": home, "everywhere": everywhere}


def _by_client(a: RunTables, b: RunTables) -> Float64:
    """b minus a in accuracy at home, for every client judged in both."""
    both = a.own[["name", "accuracy"]].merge(b.own[["name", "accuracy"]], on="name")
    found = (both["accuracy_y"] - both["accuracy_x"]).dropna().to_numpy(float)
    return np.asarray(found)


def _mean_accuracies(entry: Entry) -> Float64:
    """Each client's accuracy at home, its mean over seeds: seeds are no further clients."""
    every = pd.concat([one.own[["name", "accuracy"]] for one in entry.seeds.values()])
    return np.asarray(every.groupby("name")["accuracy"].mean().dropna(), dtype=float)


def _far(run: RunTables) -> float:
    accuracy = run.everyone["accuracy"]
    return float(accuracy.mean()) if accuracy.notna().any() else math.nan


def _everywhere(entry: Entry) -> float:
    return float(np.mean([_far(run) for run in entry.seeds.values()]))


def _plain(difference: float) -> dict[str, Any]:
    """A difference with nothing to test it by: one head against another, everywhere."""
    return {"difference": number(difference), "interval": None, "p": None}


def _correct(pairs: Sequence[dict[str, Any]]) -> None:
    """Holm's correction over the pairs, at home and everywhere by themselves."""
    for place in ("home", "everywhere"):
        found = [pair[place] for pair in pairs]
        tested = [one for one in found if one["p"] is not None]
        corrected = multipletests([one["p"] for one in tested], method="holm")[1] if tested else []
        for one in found:
            one["p_holm"] = None
        for one, p in zip(tested, corrected, strict=True):
            one["p_holm"] = float(p)


def _says(pair: Mapping[str, Any], level: float, margin: float) -> str:
    """The pair in a sentence, about the clients' own tests."""
    home, unit = pair["home"], pair["unit"]
    if home["difference"] is None or home["p_holm"] is None:
        return f"{NOT_ENOUGH}: too few {unit}, or none of them differs from another"
    size = f"{100 * abs(home['difference']):.1f} points"
    if home["p_holm"] > level:
        return f"{NOT_ENOUGH} that either is better ({100 * home['difference']:+.1f} points)"
    if abs(home["difference"]) < margin:
        return f"the difference is certain, but too small to matter ({size})"
    better, worse = ("b", "a") if home["difference"] > 0 else ("a", "b")
    if not pair["paired"]:  # the tests, not the heads, may be what differs
        return f"{pair[better]} scores {size} more than {pair[worse]}, on unlike tests"
    return f"{pair[better]} is better than {pair[worse]} by {size}"


def _notes(entry: Entry) -> list[str]:
    found = []
    for seed, run in entry.seeds.items():
        which = f"{entry.name}, seed {seed}" if len(entry.seeds) > 1 else entry.name
        if run.interrupted:
            planned = run.planned_rounds or "?"
            found.append(
                f"{which} was interrupted at round {run.done_rounds} of {planned}: its last judged "
                "round counts."
            )
    return found


def _run_facts(entry: Entry) -> dict[str, Any]:
    """One run: means over its seeds."""
    runs = list(entry.seeds.values())

    def mean(values: Sequence[float]) -> float | None:
        return number(np.mean(values)) if values else None

    worst = [
        float(run.rounds["worst_decile_accuracy"].dropna().iloc[-1])
        for run in runs
        if run.rounds["worst_decile_accuracy"].notna().any()
    ]
    return {
        "name": entry.name,
        "scenario": entry.first.name,
        "strategy": entry.first.scenario.get("strategy", {}).get("name"),
        "seeds": list(entry.seeds),
        "rounds": [run.done_rounds for run in runs],
        "clients": [len(run.own) for run in runs],
        "interrupted": any(run.interrupted for run in runs),
        "home": mean([float(run.own["accuracy"].mean()) for run in runs]),
        "worst_decile": mean(worst),
        "everywhere": mean([_far(run) for run in runs]),
    }
