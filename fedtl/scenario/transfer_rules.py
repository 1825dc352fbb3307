"""What cannot go together with the cut and with what is trained behind it.

Behind a cut are tensors like a head's: they travel, are averaged, clipped, noised, masked and
packed with it. What does not go is what needs the features that the head stands on to stay as they
are (closed forms, neighbours), or a gradient of every example by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedtl.errors import Problem
from fedtl.scenario.schema import Scenario
from fedtl.scenario.strategies import CLOSED_FORMS

UNFREEZING = ("last_blocks", "full", "scratch")
"""Modes that train the network's own tensors behind the cut, batch norm with them."""

PLAIN_MEAN = ("fedavg", "fedprox")

AVERAGES = (
    *(*PLAIN_MEAN, "finetune", "fedper", "lgfedavg", "fedrep", "fedbabu", "ditto"),
    *("krum", "multikrum", "bulyan", "median", "trimmed_mean", "geometric_median", "norm_clip"),
)
"""Strategies whose next tensors lie between the clients', so that a variance stays one."""

AROUND = (*PLAIN_MEAN, "fednova", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "fedexp")
"""Strategies of the mean whose clients keep nothing and train one model."""

PLAIN = {
    **dict.fromkeys(CLOSED_FORMS, "it solves for a head on features that stay as they are"),
    "lbfgs": "it solves for a head on features that stay as they are",
    "mime": "its clients also send gradients, which are in closed form for plain heads only",
    "knnper": "its neighbours are those of features that stay as they are",
}
"""Strategies that need plain features, and why."""


def _whole(scenario: Scenario) -> Iterator[Problem]:
    transfer = scenario.transfer
    if transfer.mode in ("full", "scratch") and transfer.cut not in (None, "input"):
        yield Problem(
            "transfer.cut",
            f'"{transfer.mode}" trains the whole network',
            repr(transfer.cut),
            "nothing",
            'Leave it out, or set transfer.mode = "last_blocks"',
        )
    if transfer.mode == "scratch":
        if scenario.backbone.weights not in ("default", "none") or scenario.backbone.sha256:
            yield Problem(
                "backbone.weights",
                '"scratch" begins with random weights',
                repr(scenario.backbone.weights),
                '"none"',
                'Set transfer.mode = "full" to begin with these',
            )
        if transfer.l2_pretrained:
            yield Problem(
                "transfer.l2_pretrained",
                '"scratch" has no pretrained values to be pulled to',
                f"{transfer.l2_pretrained:g}",
                "0",
            )


def _unused(scenario: Scenario) -> Iterator[Problem]:
    transfer = scenario.transfer
    plain = type(transfer)()
    if transfer.mode == "head":
        keys = ["batch_norm", "warmup_rounds", "unfreeze_every", "rate_factor", "l2_pretrained"]
        keys += ["activations", *(["cut"] if transfer.cut != 0 else [])]
        for key in keys:
            if getattr(transfer, key) != getattr(plain, key):
                yield Problem(
                    f"transfer.{key}",
                    'nothing is trained behind the cut in mode "head"',
                    repr(getattr(transfer, key)),
                    do='Leave it out, or set transfer.mode = "last_blocks"',
                )
    elif transfer.warmup_rounds >= scenario.rounds:
        yield Problem(
            "transfer.warmup_rounds",
            "the head warms up until the end, so nothing behind the cut is ever trained",
            str(transfer.warmup_rounds),
            f"below rounds = {scenario.rounds}",
        )


def _batch_norm(scenario: Scenario) -> Iterator[Problem]:
    kind, name = scenario.transfer.batch_norm, scenario.strategy.name
    if scenario.transfer.mode not in UNFREEZING or kind not in ("local", "aggregated"):
        return
    fitting = AROUND if kind == "local" else AVERAGES
    why = {
        "local": "clients keep batch norm to themselves, which goes with a plain average of the "
        f'rest, and "{name}" is none',
        "aggregated": "running variances are averaged with all else, and what "
        f'"{name}" makes of the clients\' tensors need not lie between them',
    }[kind]
    do = 'Set transfer.batch_norm = "frozen" or "group", or strategy.name = "fedavg"'
    if name not in fitting:
        known = ", ".join(f'"{other}"' for other in fitting)
        yield Problem("transfer.batch_norm", why, f'"{kind}"', f"with strategy.name {known}", do)
    rate = getattr(scenario.strategy, "server_learning_rate", 1.0)
    if kind == "aggregated" and not 0 < rate <= 1:
        yield Problem(
            "strategy.server_learning_rate",
            "running variances could fall below 0",
            f"{rate:g}",
            "above 0, at most 1",
        )
    where = {
        "privacy.mechanism": scenario.privacy.mechanism,
        "privacy.secure_aggregation": scenario.privacy.secure_aggregation,
        "compression.kind": scenario.compression.kind,
    }
    for key, value in where.items():
        if value != "none":
            yield Problem(
                "transfer.batch_norm",
                f"{key} changes what is added up by steps, and running statistics are none",
                f'"{kind}", and {key} = "{value}"',
                '"frozen" or "group"',
            )


def _plain_features(scenario: Scenario) -> Iterator[Problem]:
    if scenario.transfer.mode == "head" or scenario.transfer.cut == 0:
        return
    name, head_only = scenario.strategy.name, 'Set transfer.mode = "head"'
    if name in PLAIN:
        yield Problem(
            "strategy.name",
            f"{PLAIN[name]}, and behind the cut they change",
            f'"{name}"',
            do=head_only,
        )
    if scenario.head.from_statistics:
        yield Problem(
            "head.initial",
            "the closed-form start is for features that stay as they are",
            f'"{scenario.head.initial}"',
            '"zeros"',
            head_only,
        )
    if "ridge" in scenario.evaluation.references:
        yield Problem(
            "evaluation.references",
            '"ridge" solves for a head on features that stay as they are',
            '"ridge"',
            "any others",
        )
    if scenario.privacy.mechanism == "example":
        yield Problem(
            "privacy.mechanism",
            "example-level noise needs the gradient of every example, which is in closed form for "
            "a linear head on frozen features only",
            '"example"',
            '"central" or "local"',
            head_only,
        )
    if scenario.privacy.canaries:
        yield Problem(
            "privacy.canaries",
            "the audit scores examples by a head on frozen features",
            str(scenario.privacy.canaries),
            "0",
        )
    if scenario.adaptation.features != "none":
        yield Problem(
            "adaptation.features",
            "it maps the features that a head stands on, and what is stored lies before them",
            f'"{scenario.adaptation.features}"',
            '"none"',
            head_only,
        )
    if scenario.adaptation.adversarial:
        yield Problem(
            "adaptation.adversarial",
            "domains are told apart on a head's own layers only",
            f"{scenario.adaptation.adversarial:g}",
            "0",
            head_only,
        )
    if scenario.attack.kind == "backdoor":
        yield Problem(
            "attack.kind",
            "its trigger is put into features that a head stands on",
            '"backdoor"',
            do=head_only,
        )


def _mixed(scenario: Scenario) -> Iterator[Problem]:
    """Where activations are mixed or blurred must not hang on whether they fit on a disk."""
    mode, stored = scenario.transfer.mode, scenario.transfer.activations == "store"
    if mode in ("head", "full", "scratch") or scenario.transfer.cut == 0 or stored:
        return
    for key, value in (
        ("training.mixup", scenario.training.mixup),
        ("augmentation.noise", scenario.augmentation.noise),
    ):
        if value:
            yield Problem(
                key,
                "acts on what is stored: activations at the cut, or pixels where these are "
                "recomputed; say which",
                f"{value:g}",
                "0",
                'Set transfer.activations = "store"',
            )


TRANSFER_RULES: tuple[Callable[[Scenario], Iterator[Problem]], ...] = (
    _whole,
    _unused,
    _batch_norm,
    _plain_features,
    _mixed,
)
"""What cannot go together with the cut and with what is trained behind it."""
