"""The heads that a run's summary tells of, each under one name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def partly_shared(summary: Mapping[str, Any]) -> bool:
    """Whether clients keep a part of the head: what counts as federated is then each client's own.

    Such a summary has the same figures under ``final`` and ``personal``.
    """
    own = summary.get("personal")
    return own is not None and own == summary.get("final")


def judged_heads(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What each head scored, by name: federated, personal, or the references' own."""
    own = {"personal": summary["personal"]} if summary.get("personal") else {}
    shared = {} if partly_shared(summary) else {"federated": summary["final"]}
    return {**shared, **own, **summary["references"]}
