"""What cannot go together with the head and with how it is regularised.

Two reasons hold for most of it: who sends statistics or gradients of the plain loss trains nothing
that could be regularised, and a form that is solved for, or whose single examples' gradients are
known in closed form, is a linear head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedtl.errors import Problem
from fedtl.scenario.adaptation_rules import OTHER_LOSS
from fedtl.scenario.schema import Scenario
from fedtl.scenario.strategies import CLOSED_FORMS

CURVED = ("cosine", "prototype")
"""Kinds of head whose scores are not linear in what is trained."""

SHARES_NOTHING = ("fedper", "fedrep", "fedbabu")
"""Strategies whose clients keep the last layer."""

OTHERWISE = {
    **OTHER_LOSS,
    "pfedme": "it trains on one batch at a time, over and over",
    "apfl": "it takes the gradient of a mixture of heads from one plain step",
}
"""Strategies whose clients' training cannot be regularised, and why."""


def regularised(scenario: Scenario) -> dict[str, float]:
    """Keys that are set and that only ``clients.autograd`` knows, with their values."""
    asked = scenario.training
    values = {
        "training.label_smoothing": asked.label_smoothing,
        "training.mixup": asked.mixup,
        "training.dropout": asked.dropout,
        "training.early_stopping": asked.early_stopping,
        "augmentation.noise": scenario.augmentation.noise,
    }
    return {key: value for key, value in values.items() if value}


def _kind(scenario: Scenario) -> Iterator[Problem]:
    """Where a head must be linear, or have hidden layers."""
    head, name = scenario.head, scenario.strategy.name
    if head.kind not in CURVED:
        if head.scale is not None:
            yield Problem(
                "head.scale",
                f'has no effect: "{head.kind}" has no scale',
                f"{head.scale:g}",
                do='Remove it, or set head.kind = "cosine" or "prototype"',
            )
        return
    kind = f'"{head.kind}"'
    if name in (*CLOSED_FORMS, "lbfgs"):
        yield Problem(
            "head.kind",
            f'"{name}" is exact for a linear head, whose problem has one answer',
            kind,
            '"linear"',
        )
    if scenario.adaptation.adversarial:
        yield Problem(
            "adaptation.adversarial",
            f"a {head.kind} head on frozen features has no layer that could be made to forget "
            "domains",
            f"{scenario.adaptation.adversarial:g}",
            "0",
            'Set head.kind = "mlp"',
        )
    packs = scenario.compression.kind
    if packs != "none" and name in SHARES_NOTHING and scenario.transfer.mode == "head":
        yield Problem(
            "compression.kind",
            f'"{name}" with a {head.kind} head sends nothing that could be packed',
            f'"{packs}"',
            '"none"',
            'Set head.kind = "mlp"',
        )


def _from_statistics(scenario: Scenario) -> Iterator[Problem]:
    """A start that round 1 makes: of heads right on the features, for rounds that go on from it."""
    head, name = scenario.head, scenario.strategy.name
    if not head.from_statistics:
        return
    got, ridge = f'"{head.initial}"', head.initial == "fed3r"
    if head.kind == "mlp" or (ridge and head.kind in CURVED):
        what = "the closed form is a linear head" if ridge else "the means are of the features"
        own = "has hidden layers" if head.kind == "mlp" else f'is "{head.kind}"'
        yield Problem(
            "head.initial",
            f"{what}, and this {'one' if ridge else 'head'} {own}",
            got,
            '"zeros", or head.kind = "linear"',
        )
    if name in CLOSED_FORMS:
        yield Problem(
            "head.initial",
            f'"{name}" starts from nothing: its head is a closed form already',
            got,
            '"zeros"',
        )
    if scenario.rounds == 1:
        alone = "fed3r" if ridge else "fedncm"
        yield Problem(
            "head.initial",
            "round 1 makes the closed-form head, and no other follows to start from it",
            got,
            do=f'Set rounds to at least 2, or strategy.name = "{alone}"',
        )


def _regularised(scenario: Scenario) -> Iterator[Problem]:
    """Who cannot have another local training than the plain one."""
    name, example = scenario.strategy.name, scenario.privacy.mechanism == "example"
    for key, value in regularised(scenario).items():
        got = f"{value:g}"
        if name in OTHERWISE:
            yield Problem(
                key,
                f'it changes local training, and "{name}" cannot have that: {OTHERWISE[name]}',
                got,
                "0",
                'Use it with strategy.name = "fedavg", or another that trains one shared head',
            )
        if example:
            yield Problem(
                key,
                "example-level noise needs each example's own plain gradient",
                got,
                "0",
                'Or set privacy.mechanism = "central" or "local"',
            )
        if scenario.adaptation.adversarial:
            yield Problem(
                key,
                "domain-adversarial training knows the plain loss only",
                got,
                "0, or adaptation.adversarial = 0",
            )


def _early_stopping(scenario: Scenario) -> Iterator[Problem]:
    """Early stopping needs a validation part, and a validation part serves nothing else."""
    asked, name = scenario.training, scenario.strategy.name
    if asked.early_stopping and not asked.validation_fraction:
        yield Problem(
            "training.early_stopping",
            "a client has nothing to judge its own training by",
            str(asked.early_stopping),
            "0",
            "Or set training.validation_fraction, e.g. to 0.2",
        )
    if asked.validation_fraction and not asked.early_stopping:
        yield Problem(
            "training.validation_fraction",
            "takes examples from training, and nothing looks at them",
            f"{asked.validation_fraction:g}",
            "0",
            "Or set training.early_stopping, e.g. to 2",
        )
    if asked.early_stopping and name in ("scaffold", "fednova"):
        yield Problem(
            "training.early_stopping",
            f'"{name}" counts on every client\'s number of steps, which would follow from its data',
            str(asked.early_stopping),
            "0",
        )
    if asked.validation_fraction and scenario.augmentation.views > 1:
        yield Problem(
            "training.validation_fraction",
            "views of one image would be trained on and judged by",
            f"{asked.validation_fraction:g}",
            "0, or augmentation.views = 1",
        )


HEAD_RULES: tuple[Callable[[Scenario], Iterator[Problem]], ...] = (
    _kind,
    _from_statistics,
    _regularised,
    _early_stopping,
)
