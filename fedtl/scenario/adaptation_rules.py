"""What cannot go together with what clients do against their gap (``scenario.adaptation``)."""

from __future__ import annotations

from collections.abc import Iterator

from fedtl.errors import InputError, Problem
from fedtl.scenario.backbone_rules import real_backbone_problems
from fedtl.scenario.schema import Scenario
from fedtl.scenario.strategies import CLOSED_FORMS
from fedtl.scenario.table_rules import real_table_problems

IN_ROUNDS = ("fedper", "lgfedavg", "fedrep", "fedbabu", "ditto", "pfedme", "apfl")
"""Strategies whose clients train something of their own in every round."""

OWN_HEADS = (*IN_ROUNDS, "finetune", "knnper", "personal_ridge")
"""Strategies whose clients have a head or predictor of their own in the end."""

AT_HOME = ("logit_adjustment", "bbse")
"""Priors that change predictions only."""


def _input(scenario: Scenario) -> Iterator[Problem]:
    if scenario.adaptation.input == "match" and scenario.backbone.name == "identity":
        yield Problem(
            "adaptation.input",
            'it changes pixels, and backbone "identity" takes ready features',
            '"match"',
            '"none"',
            'Use adaptation.features = "standardise" for features',
        )


OTHER_LOSS = {
    **dict.fromkeys(CLOSED_FORMS, "its clients send statistics and train nothing"),
    "lbfgs": "its clients send gradients of the plain loss and train nothing",
    "mime": "its clients also send gradients of the plain loss",
    "qfedavg": "it weights clients by their plain loss",
}
"""Strategies that cannot have another loss in local training, and why."""


def _balanced(scenario: Scenario) -> Iterator[Problem]:
    """Balanced softmax changes the loss of local training, and nothing else."""
    name = scenario.strategy.name
    at_home = "its clients train what stays at home, where their own class frequencies hold"
    reasons = {**OTHER_LOSS, **dict.fromkeys(IN_ROUNDS, at_home)}
    if scenario.adaptation.prior == "balanced_softmax" and name in reasons:
        yield Problem(
            "adaptation.prior",
            f'it changes the loss of local training, and "{name}" cannot have that: '
            f"{reasons[name]}",
            '"balanced_softmax"',
            '"none"',
            'Use it with strategy.name = "fedavg", or another that trains one shared head',
        )


def _at_home(scenario: Scenario) -> Iterator[Problem]:
    """The others give each client a head of its own: the shared one with another bias."""
    name, prior = scenario.strategy.name, scenario.adaptation.prior
    if prior not in AT_HOME:
        return
    if name in OWN_HEADS:
        yield Problem(
            "adaptation.prior",
            f'it makes a head for home of the shared one, and "{name}" makes one already',
            f'"{prior}"',
            '"none"',
        )
    elif name in CLOSED_FORMS:
        instead = "Set strategy.client_prior = true" if name == "fedlda" else None
        yield Problem(
            "adaptation.prior",
            f'it adds log-frequencies to scores, and those of "{name}" are no log-probabilities',
            f'"{prior}"',
            '"none"',
            instead or 'Use strategy.name = "fedavg", or another that trains the head',
        )


def _strength(scenario: Scenario) -> Iterator[Problem]:
    adaptation = scenario.adaptation
    if adaptation.prior_strength != 1 and adaptation.prior in ("none", "bbse"):
        yield Problem(
            "adaptation.prior_strength",
            f'prior "{adaptation.prior}" has no strength',
            f"{adaptation.prior_strength:g}",
            "1",
            'Set adaptation.prior = "balanced_softmax" or "logit_adjustment"',
        )


def _adversarial(scenario: Scenario) -> Iterator[Problem]:
    weight, name = scenario.adaptation.adversarial, scenario.strategy.name
    if weight == 0:
        return
    at_home = "its clients train layers that stay at home, where there is one domain"
    own_form = "it knows only the tensors of a plain head"
    reasons = {**OTHER_LOSS, **dict.fromkeys(IN_ROUNDS, at_home), "flower": own_form}
    if scenario.head.kind == "linear":
        yield Problem(
            "adaptation.adversarial",
            "a linear head on frozen features has no layer that could be made to forget domains",
            f"{weight:g}",
            "0",
            'Set head.kind = "mlp"',
        )
    elif name in reasons:
        yield Problem(
            "adaptation.adversarial",
            f'it changes the loss of local training, and "{name}" cannot have that: '
            f"{reasons[name]}",
            f"{weight:g}",
            "0",
            'Use it with strategy.name = "fedavg", or another that trains one shared head',
        )


ADAPTATION_RULES = (_input, _balanced, _at_home, _strength, _adversarial)


def check_real(scenario: Scenario) -> None:
    """Refuse what real clients cannot do.

    Raises:
        InputError: why, and what to do instead.
    """
    for problem in real_problems(scenario):
        raise InputError(
            problem.what,
            where=problem.where,
            got=problem.got,
            allowed=problem.allowed,
            do=problem.do,
        )


def real_problems(scenario: Scenario) -> Iterator[Problem]:
    """What real clients cannot do: nobody holds everybody's data, or may change them."""
    adaptation, shift = scenario.adaptation, scenario.shift
    if shift.kinds or shift.concept_fraction:
        yield Problem(
            "shift",
            "is for simulation only, nobody's real data are changed",
            repr(shift.kinds) if shift.kinds else f"concept_fraction = {shift.concept_fraction:g}",
            "kinds = [] and concept_fraction = 0",
        )
    if adaptation.features == "coral":
        yield Problem(
            "adaptation.features",
            "its target is the covariance of everybody's features, which nobody has with real "
            "clients",
            '"coral"',
            '"none", "standardise", "whiten"',
            'Use "whiten": the same map but for one turn that all clients share',
        )
    elif adaptation.features != "none" and not adaptation.allow_label_skew:
        yield Problem(
            "adaptation.features",
            "where clients' classes differ it takes away what tells them apart, and nobody knows "
            "real clients' class frequencies",
            f'"{adaptation.features}"',
            '"none"',
            "Set adaptation.allow_label_skew = true if you know that they are alike",
        )
    if adaptation.adversarial:
        yield Problem(
            "adaptation.adversarial",
            "real clients do not say which domain they are of",
            f"{adaptation.adversarial:g}",
            "0",
        )
    if adaptation.prior == "bbse":
        yield Problem(
            "adaptation.prior",
            "it needs everybody's confusion matrix, which real clients do not send",
            '"bbse"',
            '"none", "balanced_softmax", "logit_adjustment"',
        )
    if scenario.privacy.secure_aggregation == "arithmetic":
        yield Problem(
            "privacy.secure_aggregation",
            "its arithmetic alone hides nothing from the server",
            '"arithmetic"',
            '"secagg", "secagg_plus"',
        )
    if scenario.privacy.canaries:
        yield Problem(
            "privacy.canaries",
            "nobody's real examples are left out, or mislabelled, for an audit",
            str(scenario.privacy.canaries),
            "0",
        )
    yield from real_table_problems(scenario)
    yield from real_backbone_problems(scenario)
