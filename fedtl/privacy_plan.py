"""``fedtl privacy``: what a scenario promises, and what it could, before anything runs."""

from __future__ import annotations

import math
import shlex
from typing import Any

import numpy as np
from rich.console import Console

from fedtl.build import deal
from fedtl.data.sources import load_examples
from fedtl.errors import InputError
from fedtl.privacy.promise import Promise, make_promise
from fedtl.privacy.words import UNITS
from fedtl.privacy_card import promised
from fedtl.scenario.compatibility import find_conflicts
from fedtl.scenario.privacy import Privacy, unit_of
from fedtl.scenario.privacy_rules import ONE_RELEASE
from fedtl.scenario.schema import Scenario
from fedtl.terminal import plain_table, sentences, shown
from fedtl.types import Roster

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""For which the noise is told."""

POINTS = 8
"""Rounds at which the curve is told, at most."""

NAMED = 3
"""Clients that are named."""

BAR = 30
"""Characters of the longest bar of the curve."""


def show_privacy(
    scenario: Scenario,
    command: str,
    console: Console,
    *,
    epsilon: float | None = None,
    noise: float | None = None,
) -> dict[str, Any]:
    """Show what is promised, what it takes, and how it grows; nothing is trained.

    A scenario without a mechanism is shown as it would be for whole clients, with noise in the sum
    of their updates or, of a closed form, of their statistics.

    Args:
        command: what the user called the scenario, for the command to type next.
        epsilon, noise: in place of the scenario's.

    Returns:
        The same as JSON values.

    Raises:
        InputError: both epsilon and noise, one that cannot be, or data that cannot be read.
    """
    if_set = scenario.privacy.mechanism == "none"
    asked, settings = _asked(scenario, epsilon, noise)
    roster, counted = _roster(asked)
    promise = make_promise(asked, roster)
    assert promise is not None
    said = not if_set or epsilon is not None or noise is not None
    facts = {
        "name": scenario.name,
        "scenario_hash": scenario.hash(),
        "only_if_set": if_set,
        "in_the_way": [problem.line() for problem in find_conflicts(asked)] if if_set else [],
        **_promise_facts(promise, asked.privacy, said),
        "noise_for": [_noise_at(promise, e) for e in EPSILONS],
        "curve": [
            {"round": round, "epsilon": promise.epsilon_after(round)}
            for round in (_points(promise.rounds) if said else ())
        ],
        "worst": _worst(promise, roster) if said else None,
        "clients_counted": counted,
        "secure_aggregation": _secure(asked.privacy, promise),
    }
    _print(console, facts)
    if not facts["in_the_way"]:
        first = f"fedtl {'privacy' if if_set else 'run'} {_chosen(command, settings)}"
        console.print(f"\nNext: {shown(first)}", soft_wrap=True)
    return facts


def _chosen(command: str, settings: list[str]) -> str:
    """The command with these settings, and without its own of the same."""
    keys = {one.partition("=")[0] for one in settings}
    if keys & {"privacy.epsilon", "privacy.noise_multiplier"}:
        keys |= {"privacy.epsilon", "privacy.noise_multiplier"}
    kept: list[str] = []
    for word in shlex.split(command):
        if kept[-1:] == ["--set"] and word.partition("=")[0].strip() in keys:
            kept.pop()
        else:
            kept.append(word)
    return shlex.join([*kept, *(word for one in settings for word in ("--set", one))])


def check_amount(epsilon: float | None, noise: float | None) -> None:
    """Refuse what cannot be asked for.

    Raises:
        InputError: both, or a number that none can have.
    """
    if epsilon is not None and noise is not None:
        raise InputError(
            "one of both follows from the other", where="--epsilon, --noise", do="Give one"
        )
    for name, value, least in (("--epsilon", epsilon, "above 0"), ("--noise", noise, "0 or more")):
        if value is not None and not (0 <= value < math.inf and (value or name == "--noise")):
            raise InputError("there is no such amount", where=name, got=value, allowed=least)


def _asked(
    scenario: Scenario, epsilon: float | None, noise: float | None
) -> tuple[Scenario, list[str]]:
    """The scenario with what the command line says instead; what to set where nothing is set."""
    check_amount(epsilon, noise)
    amount: dict[str, Any] = {}
    if epsilon is not None or noise is not None:
        amount = {"epsilon": epsilon, "noise_multiplier": noise}
    section = scenario.privacy
    key, value = ("noise_multiplier", noise) if noise is not None else ("epsilon", epsilon or 8.0)
    setting = f"privacy.{key}={value:g}"
    if section.mechanism != "none":
        asked = scenario.model_copy(update={"privacy": section.model_copy(update=amount)})
        return asked, [setting] if amount else []
    name = "release" if scenario.strategy.name in ONE_RELEASE else "central"
    wanted = amount or {"noise_multiplier": 1.0}
    unit = "client" if name == "release" else None
    changed: dict[str, Any] = {
        "privacy": section.model_copy(update={"mechanism": name, "unit": unit, **wanted})
    }
    settings = [f"privacy.mechanism={name}", setting]
    if name == "release":
        settings += ["privacy.unit=client", *(["rounds=1"] if scenario.rounds > 1 else [])]
        changed["rounds"] = 1
    if getattr(scenario.strategy, "weighting", "") == "examples":
        settings.append("strategy.weighting=uniform")
        changed["strategy"] = scenario.strategy.model_copy(update={"weighting": "uniform"})
    return scenario.model_copy(update=changed), settings


def _roster(scenario: Scenario) -> tuple[Roster, bool]:
    """The clients, and whether the data were looked at for it: only where they matter."""
    known = scenario.clients.num
    if known is not None and unit_of(scenario.privacy) == "client":
        nothing = np.zeros(known, np.int64)
        return Roster(
            tuple(f"client {i}" for i in range(known)), ("",) * known, (), nothing, nothing, 0
        ), False
    examples, split = deal(scenario, load_examples(scenario.data))
    return Roster(
        split.names, split.domains, examples.classes, split.train.counts, split.test.counts, 0
    ), True


def _promise_facts(promise: Promise, asked: Privacy, said: bool) -> dict[str, Any]:
    budget = asked.budget
    return {
        "mechanism": promise.mechanism,
        "unit": promise.unit,
        "protects": UNITS[promise.unit],
        "epsilon": promise.epsilon_after(promise.rounds) if said else None,
        "epsilon_against_server": promise.server_after(promise.rounds) if said else None,
        "delta": promise.delta,
        "noise_multiplier": promise.noise_multiplier if said else None,
        "clip": promise.clip,
        "accountant": promise.accountant,
        "sampling": promise.sampling,
        "rate": promise.rate,
        "denominator": promise.denominator,
        "noise_in_mean": _in_mean(promise) if said else None,
        "rounds": promise.rounds,
        "clients": promise.population,
        "bands": len(promise.coefficients) or None,
        "budget": budget,
        "rounds_within_budget": None if budget is None else promise.rounds_within(budget),
        "assumptions": list(promise.assumptions),
        "notes": list(promise.notes) if said else [],
    }


def _in_mean(promise: Promise) -> float | None:
    """Deviation of the noise on every entry of a round's mean update; None for other noise."""
    if promise.mechanism != "central":
        return None
    own = promise.noise_multiplier * promise.clip / promise.denominator
    return own * promise.sensitivity


def _noise_at(promise: Promise, epsilon: float) -> dict[str, float | None]:
    try:
        noise: float | None = promise.noise_within(epsilon)
    except InputError:
        noise = None
    return {"epsilon": epsilon, "noise_multiplier": noise}


def _points(rounds: int) -> list[int]:
    """Up to ``POINTS`` rounds, nearer to each other at the beginning; the last is among them."""
    found = {1, rounds}
    for i in range(1, POINTS - 1):
        found.add(round(rounds ** (i / (POINTS - 1))))
    return sorted(found)


def _worst(promise: Promise, roster: Roster) -> dict[str, Any]:
    """Who loses most."""
    who = promise.worst_clients(promise.rounds).tolist()
    alike = len(who) == promise.population
    why = "every client's data are as well hidden as any other's"
    if not alike and promise.mechanism == "example":
        size, batch = int(promise.sizes[who[0]]), promise.batch_size
        steps = promise.epochs * -(-size // batch)
        why = (
            f"{size:,} examples: {steps:,} steps a round, and each sees "
            f"{min(1.0, batch / size):.0%} of them"
        )
    elif not alike:
        why = "takes part most often"
    return {
        "clients": [roster.names[client] for client in who[:NAMED]],
        "count": len(who),
        "all": alike,
        "why": why,
    }


def _secure(asked: Privacy, promise: Promise) -> dict[str, Any] | None:
    if asked.secure_aggregation == "none":
        return None
    coins = promise.sampling == "poisson"
    least = None if coins else max(1, math.ceil(asked.threshold * promise.cohort - 1e-9))
    return {
        "protocol": asked.secure_aggregation,
        "threshold": asked.threshold,
        "least_clients": least,
        "hides": "single clients' messages from the server, which learns the sum of a round's "
        f"clients, of at least {asked.threshold:.0%} of them"
        + ("" if least is None else f" ({least} clients)"),
        "does_not_hide": "who takes part, and what the sums and the head tell",
    }


def _print(console: Console, facts: dict[str, Any]) -> None:
    known = "" if facts["clients_counted"] else ", as the scenario says; none is left out yet"
    sampled = {
        "none": "all in each round" if facts["rate"] == 1 else "in rounds by lot",
        "poisson": f"each in a round by a coin ({facts['rate']:.3g})",
        "fixed": f"{facts['denominator']:g} in each round",
        "cyclic": f"{facts['denominator']:g} in each round, in turns",
    }[facts["sampling"]]
    rows = {
        "promise": _promise_line(facts),
        "unit": facts["protects"],
        "clients": f"{facts['clients']:,}, {sampled}{known}",
        "rounds": f"{facts['rounds']:,}",
    }
    if facts["noise_multiplier"] is not None:
        correlated = f", correlated over {facts['bands']} rounds" if facts["bands"] else ""
        rows["noise"] = (
            f"multiplier {facts['noise_multiplier']:.4g}, clip {facts['clip']:g}{correlated}; "
            f"added up by {facts['accountant']}"
        )
        if facts["noise_in_mean"]:
            rows["noise"] += f"; {facts['noise_in_mean']:.3g} on each entry of a round's mean"
    if (worst := facts["worst"]) is not None:
        more = f" and {worst['count'] - NAMED:,} more" if worst["count"] > NAMED else ""
        who = "" if worst["all"] else f"{', '.join(worst['clients'])}{more}: "
        rows["worst off"] = who + worst["why"]
    rows["server"] = _server_line(facts)
    if facts["budget"] is not None:
        within = facts["rounds_within_budget"]
        rows["budget"] = f"{facts['budget']:g}: {within:,} of {facts['rounds']:,} rounds are in it"
    console.print(f"[bold]{shown(facts['name'])}[/] [dim]what is promised[/]")
    console.print(sentences([(f"{name:9s}", text) for name, text in rows.items()]))
    _print_tables(console, facts)
    below = {
        "[dim]assumed[/]": facts["assumptions"],
        "[yellow]in the way[/]": facts["in_the_way"],
        "[yellow]note[/]": facts["notes"],
    }
    for what, told in below.items():
        if not told:
            continue
        console.print(sentences([(what, sentence) for sentence in told]))


def _promise_line(facts: dict[str, Any]) -> str:
    if facts["noise_multiplier"] is None:
        return (
            "none, as privacy.mechanism is not set; what it would take for whole clients stands "
            "below"
        )
    line = promised(facts["mechanism"], facts["unit"], facts["epsilon"], facts["delta"])
    if facts["noise_multiplier"] == 0:
        line += ": there is no noise"
    return ("if it were set: " if facts["only_if_set"] else "") + line


def _server_line(facts: dict[str, Any]) -> str:
    secure, epsilon = facts["secure_aggregation"], facts["epsilon_against_server"]
    sees = "sees what each client sends"
    if secure is not None:
        sees = f"sees the sum of a round's clients (at least {secure['threshold']:.0%}), no message"
        if secure["protocol"] == "arithmetic":
            sees += " (as far as the arithmetic goes: nothing is masked)"
    if epsilon is not None:
        return f"{sees}; knowing who took part, epsilon {epsilon:.4g}"
    return f"{sees}; against it nothing is bounded" if secure is None else sees


def _print_tables(console: Console, facts: dict[str, Any]) -> None:
    """Noise by epsilon, and epsilon by rounds."""
    table = plain_table("epsilon", *(f"{row['epsilon']:g}" for row in facts["noise_for"]))
    noises = [row["noise_multiplier"] for row in facts["noise_for"]]
    table.add_row("noise multiplier", *("-" if n is None else f"{n:.4g}" for n in noises))
    console.print()
    console.print(table)
    curve = [point for point in facts["curve"] if point["epsilon"] is not None]
    if curve:
        most = max(point["epsilon"] for point in curve) or 1.0
        table = plain_table("after round", "epsilon", "")
        table.columns[2].justify = "left"
        for point in curve:
            bar = "#" * max(1, round(BAR * point["epsilon"] / most))
            table.add_row(f"{point['round']:,}", f"{point['epsilon']:.4g}", bar)
        console.print()
        console.print(table)
    console.print()
