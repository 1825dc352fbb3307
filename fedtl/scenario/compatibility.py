"""Combinations of keys that cannot work together, each with the reason.

A rule is a function from a valid scenario to the problems it sees. Rules look at the scenario
alone; what only the data can tell (clients without a domain, say) is refused where it is met.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fedtl.errors import InputError, Problem
from fedtl.scenario.adaptation_rules import ADAPTATION_RULES
from fedtl.scenario.backbone_rules import BACKBONE_RULES
from fedtl.scenario.data_rules import DATA_RULES
from fedtl.scenario.example_rules import EXAMPLE_RULES
from fedtl.scenario.head_rules import HEAD_RULES
from fedtl.scenario.lora_rules import LORA_RULES
from fedtl.scenario.privacy_rules import PRIVACY_RULES
from fedtl.scenario.schema import Scenario
from fedtl.scenario.secure_rules import secure_cohort
from fedtl.scenario.strategies import CLOSED_FORMS as CLOSED_FORMS
from fedtl.scenario.strategies import Bulyan, FLTrust, Krum, MultiKrum, TrimmedMean
from fedtl.scenario.table_rules import TABLE_RULES
from fedtl.scenario.text_rules import TEXT_RULES
from fedtl.scenario.transfer_rules import TRANSFER_RULES

UPDATE_ATTACKS = ("sign_flip", "gaussian", "inner_product", "alie", "min_max")
"""Attacks on what liars send; the others are on what they train on."""


def find_conflicts(scenario: Scenario) -> list[Problem]:
    """Every impossible combination in ``scenario``, empty where there is none."""
    return [problem for rule in RULES for problem in rule(scenario)]


def _backbone(scenario: Scenario) -> Iterator[Problem]:
    backbone = scenario.backbone
    if backbone.name == "identity":
        if scenario.data.source not in ("arrays", "table"):
            given = "texts" if scenario.data.source in ("texts", "datasets") else "images"
            yield Problem(
                "backbone.name",
                f'"identity" takes features, and source "{scenario.data.source}" gives {given}',
                do='Use a pretrained backbone, or data.source = "arrays" with float features',
            )
        for key in ("image_size", "sha256"):
            if getattr(backbone, key) is not None:
                yield Problem(f"backbone.{key}", '"identity" has no trunk to apply it to')
        if backbone.weights != "default":
            yield Problem("backbone.weights", '"identity" has no weights', repr(backbone.weights))
    if backbone.weights == "none" and backbone.sha256 is not None:
        yield Problem("backbone.sha256", 'weights "none" are random and have no file to check')


def _references(scenario: Scenario) -> Iterator[Problem]:
    names = scenario.evaluation.references
    if len(set(names)) < len(names):
        yield Problem("evaluation.references", "names one twice", repr(names))
    if "from_scratch" in names and scenario.backbone.name == "identity":
        yield Problem(
            "evaluation.references",
            '"from_scratch" trains a network on images, and there are only features',
            '"from_scratch"',
            "any others",
        )


def _participation(scenario: Scenario) -> Iterator[Problem]:
    for absence in scenario.participation.absent:
        if absence.round > scenario.rounds:
            yield Problem(
                "participation.absent",
                "names a round that the scenario does not have",
                str(absence.round),
                f"1 to {scenario.rounds}",
            )


def check_cohort(scenario: Scenario, num_clients: int) -> None:
    """Refuse a cohort too small for the strategy, once the data have told the clients' number.

    Raises:
        InputError: in the words in which the scenario is refused where it says the number itself.
    """
    for problem in (*_cohort(scenario, num_clients), *secure_cohort(scenario, num_clients)):
        raise InputError(
            problem.what,
            where=problem.where,
            got=problem.got,
            allowed=problem.allowed,
            do=problem.do,
        )


def least_clients(rule: str, malicious: int, selected: int | None = None) -> int:
    """Updates that a rule needs against ``malicious`` liars (f).

    Krum and multi-Krum n > 2f + 2 (Blanchard et al. 2017, proposition 1), with n - f not less than
    what is ``selected``; Bulyan n >= 4f + 3 (El Mhamdi et al. 2018, section 4).
    """
    if rule == "bulyan":
        return 4 * malicious + 3
    return max(2 * malicious + 3, malicious + (selected or 0))


def _known_cohort(scenario: Scenario) -> Iterator[Problem]:
    if scenario.clients.num is not None:
        yield from _cohort(scenario, scenario.clients.num)


def _cohort(scenario: Scenario, num_clients: int) -> Iterator[Problem]:
    strategy = scenario.strategy
    cohort = max(1, math.floor(scenario.clients.fraction * num_clients + 0.5))
    who = f"{cohort} clients a round"
    if isinstance(strategy, Krum | MultiKrum | Bulyan):
        f = strategy.malicious
        needed = least_clients(strategy.name, f)
        selected = strategy.selected if isinstance(strategy, MultiKrum) else None
        if cohort < needed:
            reason = (
                "needs n >= 4 f + 3, else its last choices are the liars'"
                if strategy.name == "bulyan"
                else "needs n > 2 f + 2, else the liars alone decide which updates are near others"
            )
            yield Problem(
                "strategy.malicious",
                f"{strategy.name} {reason}",
                f"f = {f}, {who}",
                f"at least {needed} clients a round",
                "Lower strategy.malicious, or raise clients.num or clients.fraction",
            )
        elif cohort < least_clients(strategy.name, f, selected):
            yield Problem(
                "strategy.selected",
                "averages more updates than can be honest",
                f"{selected} of {who}, of which {f} may lie",
                f"at most {cohort - f}",
            )
    if (
        isinstance(strategy, TrimmedMean)
        and strategy.trim > 0
        and strategy.trim * cohort < 1 - 1e-9
    ):
        yield Problem(
            "strategy.trim",
            f"cuts nobody off of {who}, so it is the plain mean",
            f"{strategy.trim:g}",
            f"0, or at least {math.ceil(1e4 / cohort) / 1e4:g} for one client at each end"
            if cohort > 2
            else 'only 0; with so few clients "fedavg" is the same',
        )


def _trusted(scenario: Scenario) -> Iterator[Problem]:
    strategy = scenario.strategy
    if not isinstance(strategy, FLTrust):
        return
    if scenario.clients.fraction < 1:
        yield Problem(
            "clients.fraction",
            '"fltrust" needs its trusted client in every round',
            f"{scenario.clients.fraction:g}",
            "1",
        )
    if strategy.root in scenario.attack.clients and scenario.attack.kind != "none":
        yield Problem(
            "attack.clients",
            'names the client that "fltrust" trusts',
            repr(strategy.root),
            "any others",
        )


def _attack(scenario: Scenario) -> Iterator[Problem]:
    attack, name = scenario.attack, scenario.strategy.name
    if attack.kind not in UPDATE_ATTACKS:
        return
    if name in (*CLOSED_FORMS, "lbfgs"):
        what = "gradients" if name == "lbfgs" else "statistics"
        yield Problem(
            "attack.kind",
            f'it falsifies trained heads, and clients of "{name}" send {what}',
            repr(attack.kind),
            "label_flip, backdoor",
        )


def _closed_form(scenario: Scenario) -> Iterator[Problem]:
    head, name = scenario.head, scenario.strategy.name
    if head.kind == "mlp" and name in CLOSED_FORMS:
        yield Problem(
            "head.kind",
            f'"{name}" solves for a linear head from sums over the features; '
            "hidden layers have no closed form",
            '"mlp"',
            '"linear"',
        )


def _compression(scenario: Scenario) -> Iterator[Problem]:
    name = scenario.strategy.name
    if scenario.compression.kind == "none":
        return
    reason = {
        **dict.fromkeys(CLOSED_FORMS, "sends statistics, which must stay exact"),
        "lbfgs": "sends gradients, which must stay exact",
        "flower": "reads whole heads and knows nothing of packed ones",
        "mime": "also sends gradients, which are not packed",
    }.get(name)
    if reason:
        yield Problem(
            "compression.kind",
            f'it packs trained heads, and "{name}" {reason}',
            repr(scenario.compression.kind),
            '"none"',
        )
    if name in ("fedper", "fedrep", "fedbabu") and scenario.head.kind == "linear":
        yield Problem(
            "compression.kind",
            f'"{name}" with a linear head sends nothing that could be packed',
            repr(scenario.compression.kind),
            '"none"',
            'Set head.kind = "mlp"',
        )
    if name == "scaffold" and scenario.compression.kind == "top_k":
        yield Problem(
            "compression.kind",
            "SCAFFOLD's variates follow from whole updates; from mostly empty ones they diverge",
            '"top_k"',
            '"none", "int8" or "sign"',
        )


def _local_steps(scenario: Scenario) -> Iterator[Problem]:
    if scenario.strategy.name == "mime" and scenario.training.momentum > 0:
        yield Problem(
            "training.momentum",
            "\"mime\"'s momentum is the server's, its clients take plain steps",
            f"{scenario.training.momentum:g}",
            "0",
        )


def _every_answer(scenario: Scenario) -> Iterator[Problem]:
    name = scenario.strategy.name
    if name in (*CLOSED_FORMS, "lbfgs") and scenario.participation.over_selection > 1:
        yield Problem(
            "participation.over_selection",
            f'"{name}" is exact because every client\'s answer counts; this drops the last ones',
            f"{scenario.participation.over_selection:g}",
            "1",
        )


def _everybody(scenario: Scenario) -> Iterator[Problem]:
    if scenario.strategy.name == "lbfgs" and scenario.clients.fraction < 1:
        yield Problem(
            "clients.fraction",
            '"lbfgs" needs every client\'s gradient: a sample has another objective each round',
            f"{scenario.clients.fraction:g}",
            "1",
        )


RULES = (
    *DATA_RULES, *ADAPTATION_RULES, _backbone, _references, _participation,
    _known_cohort, _trusted, _attack, _closed_form, _compression, _local_steps, _every_answer,
    _everybody, *PRIVACY_RULES, *TRANSFER_RULES, *LORA_RULES, *BACKBONE_RULES, *HEAD_RULES,
    *TEXT_RULES, *TABLE_RULES, *EXAMPLE_RULES,
)  # fmt: skip
