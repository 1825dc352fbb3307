"""Does the trunk get what its weights were trained on? Told before training, with what to change.

A seeded sample of each client's pictures is looked at. What is unlike the weights' own pictures is
told with the key to set and, where that can be tried, with what it would gain: the quick head on
the same few hundred pictures before and after the change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedtl.input_checks import ready
from fedtl.input_checks.findings import CHECKS, Finding, look
from fedtl.input_checks.trials import LOOKED_AT, LOOKED_AT_EACH, TEST, TRAIN, Trials
from fedtl.ready_features import OpenedData, ReadyFeatures

__all__ = ["check_inputs", "sampling"]

LEVEL = 0.01
"""Of McNemar's exact test: a gain that is less certain is no warning. Several changes are tried."""


def check_inputs(
    opened: OpenedData,
    features: ReadyFeatures,
    threads: int,
    check: Callable[[], None],
    *,
    measure: bool = True,
) -> list[dict[str, Any]]:
    """What in the data is unlike what the trunk expects, warnings first.

    Args:
        opened: with the backbone.
        features: those of the scenario as it is.
        threads: workers; the result does not depend on it.
        check: called often; may raise to stop.
        measure: also try the changes, each on at most TRAIN + TEST pictures; their features are
            kept in the feature store.

    Returns:
        A dict each: "severity" ("warning", or "note" where the change would gain nothing that is
        certain), "what", "clients" (names), "change", "gain" (accuracy of the quick head on the
        clients' own tests, None where not measured) and "gain_note".
    """
    names = features.split.names
    found: list[Finding]
    if features.examples.images is None:
        columns = ready.look(features, opened.scenario.seed)
        found = [finding for of in ready.CHECKS for finding in of(columns)]
    else:
        seen = look(opened, features, threads, check)
        found = [finding for of in CHECKS for finding in of(seen)]
    trials = Trials(opened, features, threads, check) if measure else None
    told = [_told(finding, names, trials) for finding in found]
    return sorted(told, key=lambda one: (one["severity"] != "warning", -(one["gain"] or 0.0)))


def sampling() -> dict[str, Any]:
    """What ``check_inputs`` samples, for whoever shows its result."""
    return {
        "looked_at_each": LOOKED_AT_EACH,
        "looked_at": LOOKED_AT,
        "tried_train": TRAIN,
        "tried_test": TEST,
    }


def _told(finding: Finding, names: Sequence[str], trials: Trials | None) -> dict[str, Any]:
    """A finding as facts, after its change was tried."""
    gain, warning, note = None, not finding.mild, finding.why_not or "not measured"
    if trials is not None and finding.trial is not None:
        gain = trials.gain(finding.trial)
        if gain is None:
            note = "cannot be measured: there is nothing to fit, or to judge, a head on"
        else:
            certain = gain.p_value < LEVEL
            warning = warning and certain and gain.gain > 0
            note = trials.words(gain)
            if not warning:
                note += "; keep it as it is" if certain else "; not enough evidence for the change"
    elif trials is not None and finding.probe is not None:
        probe = trials.gain(finding.probe, finding.probe_base)
        if probe is not None:
            matters = probe.gain < 0 and probe.p_value < LEVEL
            warning = warning and matters  # nobody misses what takes nothing away
            note += f"; with half as many pixels to a side {trials.words(probe)}"
            note += ": detail matters" if matters else ": no sign that detail matters"
    return {
        "severity": "warning" if warning else "note",
        "what": finding.what,
        "clients": [name for name, here in zip(names, finding.clients, strict=True) if here],
        "change": _sentence(finding.change),
        "gain": None if gain is None else gain.gain,
        "gain_note": _sentence(note),
    }


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
