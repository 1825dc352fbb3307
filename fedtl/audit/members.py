"""Membership attacks on a run's head: who was in its training?"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedtl import seeding
from fedtl.audit.reopened import Reopened
from fedtl.audit.scores import confidences_of
from fedtl.audit.shadows import halves, solves_from_sums
from fedtl.interrupts import Interrupts
from fedtl.privacy.membership import attack_facts, lira, losses
from fedtl.types import Float64, Int64

ROWS_MOST = 4000
"""Rows of each kind that the attack with shadow heads looks at."""

ENTRIES = 5e7
"""Rows times features times classes of these, so that one shadow head's scores take no second."""


def attack_members(run: Reopened, interrupts: Interrupts) -> tuple[list[dict[str, Any]], list[str]]:
    """The attacks by loss and by likelihood ratio, and what is to be said about them.

    Members are the rows that were trained on, the others everybody's test rows.
    """
    members, others = run.trained.train.index, run.trained.test.index
    notes = []
    if run.built.features.examples.is_test is not None:
        notes.append(
            "the data came with their own split: where test examples are unlike training examples "
            "for another reason, membership attacks find that too"
        )
    loss = attack_facts("loss", *(-losses(_own(run, rows)) for rows in (members, others)))
    loss["note"] = "an example with a small loss is taken for a trained one"
    most = int(np.clip(ENTRIES / sum(t.size for t in run.head.values()), 250, ROWS_MOST))
    stream = seeding.generator(run.scenario.seed, "audit_rows")
    members, others = (np.sort(stream.permutation(rows)[:most]) for rows in (members, others))
    rows = np.concatenate([members, others])
    heads, inside = [], []
    for head, mask in halves(run, interrupts):
        heads.append(confidences_of(head, run.trained, rows))
        inside.append(mask[rows])
    if not heads:
        notes.append("no likelihood-ratio attack: training shadow federations would take too long")
        return [loss], notes
    ratio = lira(_own(run, rows), np.array(heads), np.array(inside))
    found = attack_facts("lira", ratio[: len(members)], ratio[len(members) :])
    kind = "solved from sums" if solves_from_sums(run) is not None else "whole federations"
    found["note"] = (
        f"likelihood ratio against {len(heads)} shadow heads ({kind}, each on half of all "
        "examples, without noise)"
    )
    return [loss, found], notes


def _own(run: Reopened, rows: Int64) -> Float64:
    return confidences_of(run.head, run.trained, rows)
