"""What left the clients, what could be learnt from it, and what is promised, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtl.results.provenance import bytes_text
from fedtl.results.report import percent, points
from fedtl.results.tables import FEDERATED, RunTables, accuracy_of, number
from fedtl.scenario.compatibility import CLOSED_FORMS

SENT = {
    "statistics": "sums over its examples' features, class by class (how many, their sum, and for "
    "some methods the sums of their products), once",
    "gradient": "the gradient of its loss: one number for each weight of the head",
    "train": "a trained head: one number for each weight, how many examples it was trained on, "
    "and the mean loss",
}
"""What a client sends, by the task of a round."""

UNITS = {
    "client": "one client with all of its examples",
    "example": "one example of one client",
}
"""Whose presence epsilon hides, by unit."""

UNPROTECTED = "unprotected"
"""The head of the same training without differential privacy."""


def privacy(run: RunTables) -> dict[str, Any]:
    """What left each client, in kind and amount, who could learn what, and what it cost."""
    told = promised(run)
    up = number(run.rounds["bytes_up"].sum(min_count=1))
    answers = number(run.rounds["accepted"].sum(min_count=1))
    used = run.training["used"]
    each = None if up is None or not answers else up / answers
    return {
        "sent": _sent(run, told),
        "per_answer": bytes_text(each),
        "per_client": None
        if each is None or not len(used)
        else (bytes_text(each * used.min()), bytes_text(each * used.max())),
        "stayed": "Images, features and labels of single examples stayed with the clients."
        if run.real
        else "This was a simulation: all data lay on one machine. With real clients images, "
        "features and labels of single examples stay where they are.",
        "could": _could(run, told),
        "could_not": _could_not(told),
        "card": _card(run, told),
        "assumptions": list(told.get("assumptions", ())),
        "paid": _paid(run),
        "audit": run.audit,
        "audit_command": None if run.real or run.interrupted else f"fedtl audit {run.path.name}",
    }


def promised(run: RunTables) -> Mapping[str, Any]:
    """The run's ``privacy`` in its summary; empty where nothing was protected, or not yet known."""
    found = (run.summary or {}).get("privacy")
    return found if isinstance(found, Mapping) else {}


def _sent(run: RunTables, told: Mapping[str, Any]) -> list[str]:
    """What a client sends, a phrase each."""
    strategy = run.scenario.get("strategy", {}).get("name", "fedavg")
    task = "train"
    if strategy in CLOSED_FORMS:
        task = "statistics"
    elif strategy == "lbfgs":
        task = "gradient"
    sent = [SENT[task]]
    if run.scenario.get("head", {}).get("initial") == "fed3r":
        sent.append("in the first round, sums of its features")
    if told.get("noise_at") == "clients":
        sent.append("all of it with noise that is added before it leaves")
    if told.get("secure_aggregation"):
        sent.append("as whole numbers under masks that only cancel in the sum of all clients")
    if int(told.get("min_class_examples") or 1) > 1:
        sent.append(f"nothing of a class of which it has under {told['min_class_examples']}")
    return sent


def _could(run: RunTables, told: Mapping[str, Any]) -> list[str]:
    """What an honest but curious server could learn."""
    found = ["how many examples each client has, which classes it knows, and when it answered"]
    if not told.get("secure_aggregation"):
        noise = ", with the client's noise on it" if told.get("noise_at") == "clients" else ""
        found.append(f"each client's message one by one{noise}: they were not summed under masks")
    else:
        found.append("the sum of the clients' messages of a round")
    if told.get("mechanism", "none") == "none" or number(told.get("epsilon")) is None:
        found.append(
            "without a limit, whatever these say about single examples: how often each class "
            "occurs, whether an example took part in the training, and from sums over a single "
            "example that example's features"
        )
    elif told.get("noise_at") == "server":
        found.append(
            "the clients' messages before the noise was added: the promise is to whoever sees the "
            "model, and the server itself must be trusted"
        )
    found.append("how often the model is right on each client's test examples, class by class")
    return found


def _could_not(told: Mapping[str, Any]) -> list[str]:
    """What it could not."""
    found = ["images, and features or labels of single examples, as they are"]
    secure = told.get("secure_aggregation")
    if secure:
        partial = " (only the arithmetic of it was simulated here)"
        found.append(
            "any single client's message, as long as the server follows the protocol and at least "
            f"{secure.get('threshold')} clients answer"
            + (partial if secure.get("protocol") == "arithmetic" else "")
        )
    epsilon = number(told.get("epsilon"))
    if epsilon is not None:
        what = "whether a client took part" if told.get("unit") == "client" else ""
        what = what or "whether an example was there"
        found.append(f"{what}, beyond what epsilon = {epsilon:.3g} allows")
    return found


def _card(run: RunTables, told: Mapping[str, Any]) -> dict[str, Any] | None:
    """The promise and what an attack found, side by side; None where there is neither."""
    epsilon, audit = number(told.get("epsilon")), run.audit or {}
    lower = audit.get("lower") or {}
    if told.get("mechanism", "none") == "none" and not audit:
        return None
    unit = str(told.get("unit") or audit.get("unit") or "example")
    found = number(lower.get("epsilon"))
    return {
        "upper": "no limit" if epsilon is None else f"{epsilon:.3g}",
        "upper_words": "nothing is promised"
        if epsilon is None
        else f"promised: epsilon is at most this, but for a chance of {told.get('delta'):g}",
        "lower": "not measured" if found is None else f"{found:.3g}",
        "lower_words": "type the command below"
        if not audit
        else _found(lower)
        if found is not None
        else str(lower.get("note") or "this run cannot be audited"),
        "unit": UNITS.get(unit, unit),
        "shouted": found is not None and epsilon is not None and found > epsilon,
    }


def _found(lower: Mapping[str, Any]) -> str:
    sure = number(lower.get("confidence"))
    words = "found by attack: epsilon is at least this"
    if sure is not None:
        words += f", with {100 * sure:.0f} % confidence"
    if lower.get("guesses"):
        words += f" ({lower['correct']} of {lower['guesses']} guesses right)"
    return words


def _paid(run: RunTables) -> str:
    """What protection cost in accuracy."""
    if UNPROTECTED not in run.heads:
        if number(promised(run).get("noise_multiplier")) is None:
            return "Nothing was added to the model, so no accuracy was paid."
        return "What the noise cost in accuracy was not measured."
    column = accuracy_of(UNPROTECTED)
    own = run.own[run.own[column].notna() & (run.own["examples"] > 0)]
    weights = own["examples"] / own["examples"].sum()
    plain, kept = (float((own[name] * weights).sum()) for name in (column, accuracy_of(FEDERATED)))
    return (
        f"The same training without protection is right on {percent(plain)} of the clients' own "
        f"test cases, this one on {percent(kept)}: {points(kept - plain)} points."
    )
