"""What a run's page says: figures and plain sentences, read off its tables alone.

Nothing here knows HTML. A figure that is not known is None or NaN, and "undefined" on the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from fedtl.results.evenness import evenness
from fedtl.results.tables import FEDERATED, RunTables, accuracy_of, number

HEAD_WORDS = {
    FEDERATED: ("Shared", "one model that all clients trained together (federated)"),
    "personal": ("Personal", "each client's own model, made from the shared one as it trained"),
    "fine_tuned": ("Shared, then tuned", "the shared model, tuned by each client on its own data"),
    "local_only": ("Alone", "each client's own model, trained without the others"),
    "centralised": ("Pooled", "one model on everybody's data in one place: the yardstick"),
    "ridge": ("Pooled, closed form", "a quick model on everybody's data in one place"),
    "best_client": ("Best single client", "the best of the clients' own models, used by all"),
    "unprotected": ("Without privacy", "the same training without noise: what privacy cost"),
    "from_scratch": ("From scratch", "the whole network trained without the pretrained weights"),
    "start": ("Start", "the model before anybody trained"),
}
"""Each head's name on the page and what it is, in the order they are shown."""

PARTLY_SHARED = (
    "Shared in part",
    "each client's own model: a part is trained by all together, the rest stays at home",
)
"""In place of the shared one's words where clients keep a part of the head."""

NO_SHARED_MODEL = (
    "Each client keeps a part of its model at home, so there is no one model for all: what is "
    "called shared here are the clients' models with the part that all trained together."
)

CELLS_MOST = 4000
"""Cells of the table of who has what; a larger one is summed by domain."""


def percent(value: Any) -> str:
    """A fraction as per cent."""
    found = number(value)
    return "undefined" if found is None else f"{100 * found:.1f}\u00a0%"


def points(value: Any) -> str:
    """A difference of two fractions in percentage points, with its sign."""
    found = number(value)
    return "undefined" if found is None else f"{100 * found:+.1f}".replace("-", "−")


def tuned_head(run: RunTables) -> str | None:
    """The head that clients tuned for themselves, if any was judged."""
    return next((head for head in ("personal", "fine_tuned") if head in run.heads), None)


def paired_interval(
    wins: Any, losses: Any, examples: Any, level: float = 0.05
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Interval of the difference of two accuracies on the same examples.

    Adjusted Wald interval (Bonett and Price 2012, J. Educ. Behav. Stat. 37, eq. 4): one is added
    to both kinds of discordant answers.

    Args:
        wins, losses: examples that only the first, only the second head has right; NaN: unknown.
        examples: test examples.
        level: chance of missing the difference, in (0, 1).

    Returns:
        Lower and upper ends, NaN where unknown, within [-1, 1].
    """
    first, second = np.asarray(wins, float), np.asarray(losses, float)
    n = np.asarray(examples, float) + 2
    p, q = (first + 1) / n, (second + 1) / n
    half = norm.isf(level / 2) * np.sqrt(np.maximum(p + q - (p - q) ** 2, 0) / n)
    return np.maximum(p - q - half, -1), np.minimum(p - q + half, 1)


def client_frame(run: RunTables) -> pd.DataFrame:
    """One row per judged client: what its page row shows.

    Columns: client, name, domain, train, test, the accuracies federated, alone, tuned at home and
    (``_everywhere``) on everybody's tests, difference (federated minus alone at home) with low and
    high, p_holm, verdict, advice, calibration_error, auroc.
    """
    own, tuned = run.own, tuned_head(run)
    everywhere = run.everyone.set_index("client")
    frame = own[["client", "name", "domain", "verdict", "advice", "p_holm"]].copy()
    frame["train"] = frame["client"].map(run.training["train"])
    frame["test"] = own["examples"]
    for column, head in (("federated", FEDERATED), ("alone", "local_only"), ("tuned", tuned)):
        name = accuracy_of(head) if head else None
        frame[column] = own[name] if name else np.nan
        frame[f"{column}_everywhere"] = frame["client"].map(everywhere[name]) if name else np.nan
    frame["difference"] = frame["federated"] - frame["alone"]
    frame["low"], frame["high"] = paired_interval(
        own["beats_local_only"], own["loses_to_local_only"], own["examples"], level_of(run)
    )
    unknown = frame["difference"].isna()
    frame.loc[unknown, ["low", "high"]] = np.nan
    frame[["calibration_error", "auroc"]] = own[["calibration_error", "auroc"]]
    return frame


def level_of(run: RunTables) -> float:
    """The verdict's level, by default 0.05."""
    return float(run.scenario.get("verdict", {}).get("level", 0.05))


def heads(run: RunTables) -> list[dict[str, Any]]:
    """Every head at home and everywhere, the same test examples for all.

    ``home`` is over all own test examples as in the summary, ``everywhere`` the mean over clients
    of their head's accuracy on everybody's tests; ``by_clients`` and ``by_examples``: ``evenness``.
    """
    rows = []
    for head, (title, what) in HEAD_WORDS.items():
        if head not in run.heads:
            continue
        if head == FEDERATED and run.partly_shared:
            title, what = PARTLY_SHARED
        column = accuracy_of(head)
        own = run.own.loc[run.own[column].notna() & (run.own["examples"] > 0)]
        accuracy, sizes = own[column].to_numpy(float), own["examples"].to_numpy(int)
        by_clients = evenness(accuracy, np.ones_like(sizes))
        by_examples = evenness(accuracy, sizes)
        everywhere = run.everyone[column]
        rows.append(
            {
                "head": head,
                "title": title,
                "what": what,
                "home": _float(by_examples["mean"]),
                "mean": _float(by_clients["mean"]),
                "worst": _float(by_clients["worst_decile"]),
                "everywhere": float(everywhere.mean()) if everywhere.notna().any() else math.nan,
                "by_clients": by_clients,
                "by_examples": by_examples,
            }
        )
    return rows


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def at_home_and_everywhere(run: RunTables) -> dict[str, Any]:
    """Sentences: at home, everywhere, and what tuning wins back; and whether they disagree.

    All over the clients for whom every one of these heads was judged.
    """
    tuned = tuned_head(run)
    if "local_only" not in run.heads:
        return {"sentences": [], "opposite": None}
    frame = client_frame(run)
    columns = ["federated", "alone", *(["tuned"] if tuned else [])]
    frame = frame[frame[columns].notna().all(axis=1)]
    weights = frame["test"] / frame["test"].sum()
    home = {name: float((frame[name] * weights).sum()) for name in columns}
    far = {name: float(frame[f"{name}_everywhere"].mean()) for name in columns}
    shared, alone = "federated", "alone"
    gains = home[shared] - home[alone], far[shared] - far[alone]
    sentences = [
        *([NO_SHARED_MODEL] if run.partly_shared else []),
        f"At home, on each client's own test cases, the shared model is right on "
        f"{percent(home[shared])} and the clients' own models on {percent(home[alone])}: "
        f"{points(gains[0])} percentage points for the shared one.",
        "Everywhere, on all clients' test cases, the clients' own models were not judged: they "
        "stayed with their clients."
        if math.isnan(gains[1])
        else f"Everywhere, on all clients' test cases, the shared model is right on "
        f"{percent(far[shared])} and a client's own model, on average, on "
        f"{percent(far[alone])}: {points(gains[1])} points for the shared one.",
        "What tuning the shared model at home would win back was not measured."
        if tuned is None and not run.partly_shared
        else "There is no model of all to be tuned at home besides."
        if tuned is None
        else f"Tuned at home, the shared model is right on {percent(home['tuned'])} of a client's "
        f"own cases: {points(home['tuned'] - home[shared])} points against the shared model as it "
        f"is, {points(home['tuned'] - home[alone])} against staying alone"
        + (
            "."
            if math.isnan(far["tuned"])
            else f"; everywhere it is right on {percent(far['tuned'])}."
        ),
    ]
    return {"sentences": sentences, "opposite": _opposite(run, gains)}


def _opposite(run: RunTables, gains: tuple[float, float]) -> str | None:
    """The sentence that home and everywhere disagree; where it is known, only if both are clear."""
    told: Mapping[str, Any] = (run.summary or {}).get("verdict") or {}
    outcomes = [(told.get(place) or {}).get("outcome") for place in ("home", "everyone")]
    clear = "none" not in outcomes
    if not clear or not gains[0] * gains[1] < 0:
        return None
    better, worse = ("at home", "everywhere") if gains[0] > 0 else ("everywhere", "at home")
    return (
        f"The two places give opposite answers: the shared model is the better one {better} "
        f"and the worse one {worse}. Which place counts depends on where it will be used."
    )


def forgetting(run: RunTables) -> dict[str, Any] | None:
    """What tuning at home loses on everybody's tests; None where that was not judged."""
    tuned = tuned_head(run)
    if tuned is None:
        return None
    frame = client_frame(run)
    lost = (frame["federated_everywhere"] - frame["tuned_everywhere"]).dropna()
    if not len(lost):
        return None
    gained = (frame["tuned"] - frame["federated"]).dropna()
    worst = int(lost.argmax())
    return {
        "sentence": f"Tuning at home changes a client's accuracy by {points(gained.mean())} points "
        f"at home, and by {points(-lost.mean())} points on everybody's cases (mean over "
        f"{len(lost)} clients). The most is lost by "
        f"{frame['name'].loc[lost.index].iloc[worst]}: {points(-lost.iloc[worst])} points.",
        "mean": float(lost.mean()),
    }


def source_task(run: RunTables) -> str | None:
    """What the network forgot of the task that its weights were trained for."""
    told = (run.summary or {}).get("forgetting")
    if not told:
        return None
    before = f"{percent(told['before'])} of {told['judged']:,} pictures of {told['source']}"
    if told["by_construction"]:
        return (
            f"Of its source task the network forgot nothing: only a head was trained on it. "
            f"A probe on its features is right on {before}."
        )
    return (
        f"On its source task a probe on the pretrained network is right on {before}; on the "
        f"trained one on {percent(told['after'])} ({points(-told['forgotten'])} points), and when "
        f"fitted anew on {percent(told['after_refitted'])} ({points(-told['lost'])} points)."
    )


def by_domain(run: RunTables) -> list[dict[str, Any]]:
    """Accuracy at home by domain, weighted by examples and by clients."""
    frame = client_frame(run)
    rows = []
    for domain, group in frame.groupby("domain", sort=True):
        row = {"domain": domain, "clients": len(group), "test": int(group["test"].sum())}
        for head in ("federated", "alone", "tuned"):
            there = group[group[head].notna()]
            total = there["test"].sum()
            row[head] = float((there[head] * there["test"]).sum() / total) if total else math.nan
        row["client_mean"] = float(group["federated"].mean())
        rows.append(row)
    return rows


def by_class(run: RunTables) -> list[dict[str, Any]]:
    """Examples and recall by class; none where the run kept no classes."""
    if run.classes is None:
        return []
    summed = run.classes.groupby("class", sort=False)[
        ["train", "test", "correct", "local_only_correct"]
    ].sum(min_count=1)
    summed["holders"] = run.classes[run.classes["train"].fillna(0) > 0].groupby("class").size()
    tests = summed["test"].where(summed["test"] > 0)
    summed["recall"] = summed["correct"] / tests
    summed["alone"] = summed["local_only_correct"] / tests
    own = run.classes["correct"] / run.classes["test"].where(run.classes["test"] > 0)
    summed["recall_by_clients"] = own.groupby(run.classes["class"]).mean()
    summed = summed.reset_index()
    return [{str(k): v for k, v in row.items()} for row in summed.to_dict("records")]


def calibration(run: RunTables) -> dict[str, Any] | None:
    """How far confidence and truth lie apart, and the ranking of the answers."""
    own = run.own
    error, auroc = own["calibration_error"], own["auroc"]
    if not error.notna().any() and not auroc.notna().any():
        return None
    told: Mapping[str, Any] = (run.summary or {}).get("calibration") or {}
    return {
        "error": told.get("calibration_error"),
        "auroc": told.get("auroc"),
        "mean_error": float(error.mean()),
        "worst_error": float(error.max()),
        "mean_auroc": float(auroc.mean()),
        "undefined": int(auroc.isna().sum()),
        "clients": len(own),
    }


def who_has_what(run: RunTables) -> dict[str, Any] | None:
    """Training examples, clients by classes; summed by domain where that would be too large."""
    if run.classes is None or not run.classes["train"].notna().any():
        return None
    by = "name"
    if run.classes["client"].nunique() * run.classes["class"].nunique() > CELLS_MOST:
        by = "domain"
    classes = list(dict.fromkeys(run.classes["class"]))
    table = run.classes.pivot_table(
        index=by, columns="class", values="train", aggfunc="sum", fill_value=0, sort=False
    )
    return {
        "by": "client" if by == "name" else by,
        "rows": [str(name) for name in table.index],
        "columns": classes,
        "values": table[classes].to_numpy(int).tolist(),
    }
