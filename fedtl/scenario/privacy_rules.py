"""What goes together with differential privacy and secure aggregation, and why the rest does not.

``SENDS_MORE``, ``PRIVACY_RULES`` and ``secure_rules`` are the whole table. Its two principles:

- A sum under central noise or under masks is all that the server may use, so what looks at single
  updates is out, and so is what weighs them by their clients' data.
- What leaves a client beside the thing that the mechanism covers is covered by nothing.

Order at a client: clip, pack, clip what was packed, add noise, mask; compression therefore goes
with all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedtl.errors import Problem
from fedtl.scenario.adaptation_rules import IN_ROUNDS
from fedtl.scenario.privacy import Privacy, unit_of
from fedtl.scenario.schema import Scenario
from fedtl.scenario.secure_rules import KNOWS_OTHERS, NEEDS_SINGLE, secure_sums
from fedtl.scenario.strategies import CLOSED_FORMS

ONE_RELEASE = ("fed3r", "afl", "fedncm", "fedlda")
"""Closed forms whose head is post-processing of sums that are noised once."""

SUMMABLE = (*ONE_RELEASE, "ccvr", "personal_ridge")
"""Closed forms that need no more than the sum over clients."""

SENDS_MORE = {
    "qfedavg": "clients also send their loss",
    "mime": "clients also send a gradient",
    "lbfgs": "clients send gradients",
    **dict.fromkeys(CLOSED_FORMS, "clients send statistics"),
}
"""Strategies whose clients send what noise on updates, or in their training, does not cover."""


def _noise(scenario: Scenario) -> Iterator[Problem]:
    """How much noise: said once where there is a mechanism, nowhere else."""
    asked = scenario.privacy
    given = {"epsilon": asked.epsilon, "noise_multiplier": asked.noise_multiplier}
    told = [f"{key} = {value:g}" for key, value in given.items() if value is not None]
    if asked.mechanism == "none":
        keys = [key for key, value in given.items() if value is not None]
        keys += ["budget"] if asked.budget is not None else []
        for key in keys:
            yield Problem(
                f"privacy.{key}",
                "nothing adds noise, so there is nothing that it could say",
                f"{getattr(asked, key):g}",
                do='Set privacy.mechanism = "central", "local", "example" or "release"',
            )
        return
    if len(told) != 1:
        yield Problem(
            "privacy",
            f'mechanism "{asked.mechanism}" needs to know how much noise, and one key says it',
            " and ".join(told) or "neither epsilon nor noise_multiplier",
            "one of epsilon and noise_multiplier",
        )
    if asked.noise_multiplier == 0 and asked.budget is not None:
        yield Problem(
            "privacy.budget",
            "without noise every round spends without bound",
            f"{asked.budget:g} with noise_multiplier = 0",
            do="Set privacy.noise_multiplier above 0, or remove the budget",
        )


def _unused(scenario: Scenario) -> Iterator[Problem]:
    """Keys that would change nothing as the others stand; a mechanism may be switched off."""
    asked, fresh = scenario.privacy, Privacy()
    central, secure = asked.mechanism == "central", asked.secure_aggregation
    conditions: dict[str, tuple[bool, str]] = {}
    if asked.mechanism != "none":
        own = 'mechanism "central"'
        conditions = {
            "unit": (asked.mechanism == "release", 'only mechanism "release" has a choice'),
            "adaptive_clip": (central, f"only {own} has a clip that can follow"),
            "clip_quantile": (asked.adaptive_clip, "adaptive_clip is off"),
            "clip_rate": (asked.adaptive_clip, "adaptive_clip is off"),
            "sampling": (central, f"only {own} gains by it, the others count without"),
            "noise": (central, f"only the sum of {own} has correlated noise"),
            "bands": (asked.noise == "banded", "noise is independent"),
        }
    if secure != "none":
        plus = secure == "secagg_plus"
        conditions["neighbours"] = plus, 'only "secagg_plus" has neighbours'
    if asked.canaries:
        examples = (unit_of(asked) or asked.unit) != "client"
        conditions["canary_labels"] = examples, "canaries are whole clients"
    for key, (used, why) in conditions.items():
        value, default = getattr(asked, key), getattr(fresh, key)
        if not used and value != default:
            do = "Remove it" if default is None else f"Set it to {_shown(default)}"
            yield Problem(f"privacy.{key}", f"has no effect: {why}", _shown(value), do=do)


def _strategy(scenario: Scenario) -> Iterator[Problem]:
    """Which strategies each mechanism carries."""
    asked, name = scenario.privacy, scenario.strategy.name
    why, instead = None, 'Use "fedavg", or another that averages'
    if asked.mechanism == "central":
        why = NEEDS_SINGLE.get(name)
        if name in CLOSED_FORMS:
            why = why or "its clients send statistics, whose noise is another"
    elif asked.mechanism == "local":
        why = SENDS_MORE.get(name)
        if name == "fedexp":
            why = "it takes the noise in every update for disagreement of the clients"
    elif asked.mechanism == "example":
        why = SENDS_MORE.get(name)
        if name in IN_ROUNDS:
            why = "its clients also train by steps that are not noised"
        if scenario.head.kind != "linear":
            yield Problem(
                "head.kind",
                "example-level noise needs the gradient of every example, which is in closed form "
                "for a linear head only",
                f'"{scenario.head.kind}"',
                '"linear"',
                'Or set privacy.mechanism = "central" or "local"',
            )
    elif asked.mechanism == "release" and name not in ONE_RELEASE:
        why, instead = "its head is no closed form of summed statistics", ""
    if name in ONE_RELEASE and why:
        instead = 'Set privacy.mechanism = "release"'
    if why:
        allowed = ", ".join(ONE_RELEASE) if asked.mechanism == "release" else None
        yield Problem(
            "strategy.name",
            f'it cannot be under privacy.mechanism = "{asked.mechanism}": {why}',
            f'"{name}"',
            allowed,
            instead or None,
        )
    if asked.mechanism in ("local", "example") and _reports_loss(scenario):
        yield Problem(
            "strategy.class",
            "it has clients also send their loss, which no noise covers",
            f'"{getattr(scenario.strategy, "class_", "")}"',
        )
    if asked.mechanism != "none" and scenario.head.from_statistics:
        yield Problem(
            "head.initial",
            "its first round sends statistics, which this mechanism does not cover",
            f'"{scenario.head.initial}"',
            '"zeros"',
        )


def _reports_loss(scenario: Scenario) -> bool:
    named = str(getattr(scenario.strategy, "class_", ""))
    return scenario.strategy.name == "flower" and named.split(":")[-1].split(".")[-1] == "QFedAvg"


def _weights(scenario: Scenario) -> Iterator[Problem]:
    """A client's weight must not be its data's."""
    by_examples = getattr(scenario.strategy, "weighting", "uniform") == "examples"
    if scenario.privacy.mechanism in ("central", "local") and by_examples:
        yield Problem(
            "strategy.weighting",
            "a client with many examples would move the mean farther than clipping and noise count "
            "on",
            '"examples"',
            '"uniform"',
            'Set strategy.weighting = "uniform"',
        )


def _rounds(scenario: Scenario) -> Iterator[Problem]:
    """Who takes part in rounds, as the account of them has it."""
    asked, part = scenario.privacy, scenario.participation
    fraction = scenario.clients.fraction
    if asked.mechanism == "release":
        if scenario.rounds != 1:
            yield Problem("rounds", "statistics are released once", str(scenario.rounds), "1")
        if fraction < 1:
            yield Problem(
                "clients.fraction",
                "statistics are released once, of all clients",
                f"{fraction:g}",
                "1",
            )
    summed = asked.mechanism in ("central", "release") or asked.secure_aggregation != "none"
    if summed and part.over_selection > 1:
        yield Problem(
            "participation.over_selection",
            "who is in the sum would follow from who answers first",
            f"{part.over_selection:g}",
            "1",
        )
    coins = asked.mechanism == "central" and asked.sampling == "poisson" and fraction < 1
    if coins and part.quorum > 1:
        yield Problem(
            "participation.quorum",
            "clients come by a coin each, and a small or empty round counts like any other",
            str(part.quorum),
            "1",
            'Or set privacy.sampling = "fixed" or "cyclic"',
        )
    if asked.mechanism == "central" and asked.noise == "banded":
        yield from _banded(scenario)


def _banded(scenario: Scenario) -> Iterator[Problem]:
    asked = scenario.privacy
    if asked.sampling != "cyclic" and scenario.clients.fraction < 1:
        yield Problem(
            "privacy.sampling",
            "correlated noise counts on clients that come in turns",
            f'"{asked.sampling}"',
            '"cyclic", or clients.fraction = 1',
        )
    if asked.adaptive_clip:
        yield Problem(
            "privacy.adaptive_clip",
            "noise of earlier rounds cancels against later, which needs one clip for all",
            "true",
            "false",
        )
    if asked.secure_aggregation != "none":
        yield Problem(
            "privacy.noise",
            "nobody would know the earlier rounds' noise, of which each client made a part",
            '"banded"',
            '"independent"',
        )
    if asked.bands is not None and asked.bands > scenario.rounds:
        yield Problem(
            "privacy.bands",
            "are more than there are rounds",
            str(asked.bands),
            f"1 to {scenario.rounds}",
        )


def _data(scenario: Scenario) -> Iterator[Problem]:
    """What makes one member's part depend on others' data."""
    asked, adaptation = scenario.privacy, scenario.adaptation
    unit = unit_of(asked)
    if unit is None:
        return
    if adaptation.features == "coral":
        yield Problem(
            "adaptation.features",
            "its target is made of everybody's features, and no noise covers that",
            '"coral"',
            '"none", "standardise", "whiten"' if unit == "client" else '"none"',
        )
    if adaptation.prior == "bbse":
        yield Problem(
            "adaptation.prior",
            "it needs everybody's confusion matrix, and no noise covers that",
            '"bbse"',
            '"none"',
        )
    if asked.mechanism == "central" and scenario.attack.kind in KNOWS_OTHERS:
        yield Problem(
            "attack.kind",
            "liars who know the honest updates pass on what noise should hide",
            repr(scenario.attack.kind),
            "label_flip, backdoor, sign_flip, gaussian",
        )
    if unit == "client":
        return
    alone = "one example would change what is made of the client's others"
    if adaptation.features in ("standardise", "whiten"):
        kind = f'"{adaptation.features}"'
        yield Problem("adaptation.features", alone, kind, '"none"')
    if adaptation.input == "match":
        yield Problem("adaptation.input", alone, '"match"', '"none"')
    if adaptation.prior == "balanced_softmax":
        yield Problem("adaptation.prior", alone, '"balanced_softmax"', '"none"')
    if asked.min_class_examples > 1:
        yield Problem(
            "privacy.min_class_examples",
            "one example could bring its whole class in or out, farther than the noise counts on",
            str(asked.min_class_examples),
            "1",
        )


def _gate(scenario: Scenario) -> Iterator[Problem]:
    """The gate on classes stands before statistics."""
    least = scenario.privacy.min_class_examples
    if least > 1 and scenario.strategy.name not in CLOSED_FORMS:
        if scenario.head.from_statistics:
            return
        yield Problem(
            "privacy.min_class_examples",
            f'it keeps classes out of statistics, and clients of "{scenario.strategy.name}" send '
            "none",
            str(least),
            "1",
        )


def _shown(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return str(value).lower() if isinstance(value, bool) else f"{value}"


PRIVACY_RULES = (_noise, _unused, _strategy, _weights, _rounds, secure_sums, _data, _gate)
