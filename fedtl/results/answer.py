"""The answer of a run: who should join, personalise or stay alone, and what is missing to tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtl.results.report import HEAD_WORDS, level_of
from fedtl.results.tables import RunTables

ADVICE = {
    "join": "The shared model is clearly better than the client's own: on its own cases, or on "
    "everybody's with no loss worth mentioning on its own.",
    "personalise": "Take the shared model and tune it at home: tuned, it is clearly better than "
    "the client's own, or loses nothing worth mentioning at home and is clearly better on "
    "everybody's cases.",
    "stay alone": "The client's own model is clearly better than the shared one, and tuning does "
    "not make up for it.",
    "not enough evidence": "Too few test cases, or too small a difference, to tell.",
}
"""The answers a client can get, in the order they are shown, and what they mean."""

REFERENCES = ("local_only", "centralised", "fine_tuned")
"""What a full page needs."""


def state(run: RunTables) -> dict[str, Any]:
    """Whether the run came to its end, and what is missing: sentences with commands."""
    missing = []
    interrupted = None
    if run.interrupted:
        planned = run.planned_rounds or "?"
        interrupted = f"interrupted at round {run.done_rounds} of {planned}"
        command = "fedtl server resume" if run.real else "fedtl resume"
        missing.append(
            ("The run is not finished: nothing was compared yet.", f"{command} {run.path.name}")
        )
    else:
        lacking = [head for head in REFERENCES if head not in run.heads]
        if run.real:
            lacking = [head for head in lacking if head != "centralised"]
        if lacking:
            wanted = ", ".join(f'"{head}"' for head in dict.fromkeys((*_asked(run), *lacking)))
            words = ", ".join(HEAD_WORDS[head][0].lower() for head in lacking)
            missing.append(
                (
                    f"Not measured in this run: {words}.",
                    f"fedtl run {run.path.name}/scenario.toml "
                    f"--set 'evaluation.references=[{wanted}]'",
                )
            )
        if "local_only" in run.heads and not run.own["advice"].notna().any():
            missing.append(
                ("The run was made by an older version, which gave no advice per client.",
                 f"fedtl run {run.path.name}/scenario.toml")
            )  # fmt: skip
    if run.gap is None and not run.real:
        missing.append(
            ("How far the clients' data lie apart was not measured.",
             f"fedtl report {run.path.name} --gap")
        )  # fmt: skip
    return {"interrupted": interrupted, "missing": missing}


def _asked(run: RunTables) -> list[str]:
    return list(run.scenario.get("evaluation", {}).get("references", []))


def verdict(run: RunTables) -> dict[str, Any]:
    """The answer first: who should join, who not, and by what measure."""
    told: Mapping[str, Any] = (run.summary or {}).get("verdict") or {}
    found = run.own["advice"].value_counts()
    counts: list[dict[str, Any]] = [
        {"advice": word, "count": int(found.get(word, 0)), "meaning": meaning}
        for word, meaning in ADVICE.items()
    ]
    judged = sum(one["count"] for one in counts)
    rules = run.scenario.get("verdict", {})
    test = {"mcnemar": "McNemar's test", "bootstrap": "a paired bootstrap"}
    basis = (
        f"How this was decided: both models answered the same test cases of a client. A difference "
        f"counts only if it is at least {100 * rules.get('margin', 0.01):g} percentage points and "
        f"{test.get(rules.get('test', 'mcnemar'), 'the test')} finds it certain enough: at home, "
        f"everywhere and for tuned models, each by itself, the chance of finding even one "
        f"difference where there is none, with all {judged} clients together, is at most "
        f"{100 * level_of(run):g} % (Holm's correction). Where none is found, there may be one."
    )
    return {
        "headline": _headline(run, {one["advice"]: one["count"] for one in counts}, told),
        "average": told.get("headline"),
        "lines": list(told.get("lines", ())),
        "counts": counts if judged else [],
        "judged": judged,
        "basis": basis if judged else None,
    }


def _headline(run: RunTables, counts: Mapping[str, int], told: Mapping[str, Any]) -> str:
    judged = sum(counts.values())
    if run.interrupted:
        return "No verdict yet: the run was interrupted."
    if not judged:
        if "local_only" in run.heads and told.get("headline"):
            return str(told["headline"])
        return "No verdict: the shared model was not compared with the clients' own."
    if counts["not enough evidence"] == judged:
        return "Not enough evidence: for no client is the difference certain."
    told_to = [word for word in ADVICE if counts[word] and word != "not enough evidence"]
    if counts[told_to[0]] == judged:
        who = f"All {judged} clients" if judged > 1 else "The client"
        return f"{who} should {told_to[0]}."
    parts = [f"{counts[word]} should {word}" for word in told_to]
    parts[0] = f"{counts[told_to[0]]} of {judged} should {told_to[0]}"
    rest = counts["not enough evidence"]
    tail = f"; for {rest} there is not enough evidence" if rest else ""
    first = ", ".join(parts[:-1])
    return f"{first} and {parts[-1]}{tail}." if first else f"{parts[-1]}{tail}."
