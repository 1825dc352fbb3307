"""What left the clients, what could be learnt from it, and what is promised, in plain words."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

from fedtl.results.provenance import bytes_text
from fedtl.results.report import percent, points
from fedtl.results.tables import FEDERATED, RunTables, accuracy_of, number
from fedtl.scenario.compatibility import CLOSED_FORMS
from fedtl.scenario.transfer import FROM_STATISTICS

SENT = {
    "statistics": "sums over its examples' features, class by class (how many, their sum, and for "
    "some methods the sums of their products), once",
    "gradient": "the gradient of its loss: one number for each weight of the head",
    "train": "a trained head: one number for each weight, and how many examples it was trained on",
}
"""What a client sends, by the task of a round."""

SENT_BEHIND = (
    "a trained head and what is trained behind the cut: one number for each weight, and how many "
    "examples they were trained on"
)
"""The same where more than a head is trained."""

UNITS = {
    "client": "one client with all of its examples",
    "example": "one example of one client",
}
"""Whose presence epsilon hides, by unit."""

ATTACKS = {"loss": "small loss", "lira": "likelihood ratio"}
"""Membership attacks, as a reader may know them."""

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
        "per_client": _span(each, used),
        "stayed": "Examples, their features and their labels stayed with the clients; "
        "what was sent is made of them."
        if run.real
        else "This was a simulation: all data lay on one machine. With real clients, examples, "
        "their features and their labels stay where they are; what is sent is made of them.",
        "could": _could(run, told),
        "could_not": _could_not(told),
        "card": _card(run, told),
        "assumptions": list(told.get("assumptions", ())),
        "paid": _paid(run),
        "audit": run.audit,
        "attacks": ATTACKS,
        "real": run.real,
        "audit_command": None
        if run.real or run.interrupted or _behind_the_cut(run)
        else f"fedtl audit {shlex.quote(run.path.name)}",
    }


def promised(run: RunTables) -> Mapping[str, Any]:
    """The run's ``privacy`` in its summary; empty where nothing was protected, or not yet known."""
    found = (run.summary or {}).get("privacy")
    return found if isinstance(found, Mapping) else {}


def _behind_the_cut(run: RunTables) -> bool:
    """Whether more than a head on frozen features was trained."""
    return str(run.scenario.get("transfer", {}).get("mode", "head")) != "head"


def _sent(run: RunTables, told: Mapping[str, Any]) -> list[str]:
    """What a client sends, a phrase each."""
    strategy = run.scenario.get("strategy", {}).get("name", "fedavg")
    task = "train"
    if strategy in CLOSED_FORMS:
        task = "statistics"
    elif strategy == "lbfgs":
        task = "gradient"
    sent = [SENT_BEHIND if task == "train" and _behind_the_cut(run) else SENT[task]]
    if task == "train" and _tells_loss(told):
        sent.append("the mean loss of that training")
    if run.scenario.get("head", {}).get("initial") in FROM_STATISTICS:
        sent.append("in the first round, sums of its features")
    if told.get("noise_at") == "clients":
        sent.append(
            "none of these numbers as it is: noise is added before they leave. How many examples "
            "it has is told without noise"
        )
    if told.get("secure_aggregation"):
        sent.append(
            "them as whole numbers under masks, which cancel only in the sum of all clients"
            + _unmasked(told)
        )
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
    if told.get("noise_at") == "server":
        found.append(
            "the clients' messages before the noise was added: the promise holds for whoever sees "
            "the model alone, and the server itself must be trusted"
        )
    if not _limited(told):
        found.append(
            "without a limit, whatever these say about single examples: how often each class "
            "occurs, whether an example took part in the training, and from sums over a single "
            "example that example's features"
        )
        if _behind_the_cut(run):
            found.append(
                "from what was trained behind the cut, perhaps what went into it: an approximation "
                "of an example, the better the fewer examples and steps a message rests on, and "
                "the nearer the cut is to the input"
            )
    found.append("how often the model is right on each client's test examples, class by class")
    return found


def _could_not(told: Mapping[str, Any]) -> list[str]:
    """What it could not."""
    found = ["images, texts or rows: none is sent"]
    if _limited(told):
        found.append("features or labels of single examples, as they are")
    else:
        found.append(
            "features or labels of single examples, as they are, but for what the list above says"
        )
    secure = told.get("secure_aggregation")
    if secure:
        found.append(
            "any single client's message, as long as the server follows the protocol and at least "
            f"{secure.get('threshold')} clients answer{_unmasked(told)}"
        )
    epsilon = number(told.get("epsilon_against_server", told.get("epsilon")))
    if _limited(told) and epsilon is not None:
        what = "what the data of a client are"
        if told.get("unit") != "client":
            what = "whether an example was in a client's data"
        found.append(f"{what}, beyond what epsilon = {epsilon:.3g} allows")
    return found


def _limited(told: Mapping[str, Any]) -> bool:
    """Whether epsilon also bounds what the server itself learns."""
    return number(told.get("epsilon")) is not None and told.get("noise_at") == "clients"


def _unmasked(told: Mapping[str, Any]) -> str:
    only = (told.get("secure_aggregation") or {}).get("protocol") == "arithmetic"
    return " (only the arithmetic of it was simulated here, without masks)" if only else ""


def _tells_loss(told: Mapping[str, Any]) -> bool:
    leaves = told.get("leaves")
    return leaves is None or any(leaf.get("tensor") == "loss" for leaf in leaves)


def _span(each: float | None, used: Any) -> str | None:
    """How much a client sends in a run, from the least to the most."""
    if each is None or not len(used):
        return None
    least, most = bytes_text(each * used.min()), bytes_text(each * used.max())
    return least if least == most else f"{least} to {most}"


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
        else f"epsilon for {UNITS.get(unit, unit)}, but for a chance of "
        f"{number(told.get('delta')) or 0.0:g} (delta)",
        "lower": "not measured" if found is None else f"{found:.3g}",
        "lower_words": "type the command below"
        if not audit
        else _found(lower)
        if found is not None
        else str(lower.get("note") or "this run cannot be audited"),
        "unit": UNITS.get(unit, unit),
        "odds": _odds(epsilon),
        "power": str(lower.get("note") or "") if found is not None else "",
        "shouted": found is not None and epsilon is not None and found > epsilon,
    }


def _odds(epsilon: float | None) -> str:
    """What an epsilon means for a guess: from even odds to at most e^epsilon to 1."""
    if epsilon is None:
        return ""
    if epsilon > 5:
        return "with this one, a guess by a coin may still become all but certain."
    return (
        "with this one, whoever guesses whether it was there is right in at most "
        f"{100 / (1 + math.exp(-epsilon)):.3g} of 100 cases, instead of 50 by a coin."
    )


def _found(lower: Mapping[str, Any]) -> str:
    sure = number(lower.get("confidence"))
    words = "epsilon, by attack"
    if not number(lower.get("epsilon")):
        words = "epsilon: the attack proved nothing"
    elif sure is not None:
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
