"""Every combination with kinds of heads and regularisation that cannot work is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtl.planning import local_training
from fedtl.scenario.compatibility import find_conflicts
from fedtl.scenario.schema import Scenario
from fedtl.scenario.strategies import CLOSED_FORMS
from fedtl.strategies import STRATEGIES

NAMES = [name for name in STRATEGIES if name != "flower"]
NEEDS = {
    "krum": {"malicious": 0},
    "multikrum": {"malicious": 0},
    "bulyan": {"malicious": 0},
    "fltrust": {"root": "a"},
}
PLAIN_LOSS = {*CLOSED_FORMS, "lbfgs", "mime", "qfedavg", "pfedme", "apfl"}
WAYS: dict[str, dict[str, Any]] = {
    "training.label_smoothing": {"training": {"label_smoothing": 0.1}},
    "training.mixup": {"training": {"mixup": 0.2}},
    "training.dropout": {"training": {"dropout": 0.2}},
    "training.early_stopping": {"training": {"early_stopping": 2, "validation_fraction": 0.2}},
    "augmentation.noise": {"augmentation": {"noise": 0.1}},
}


def found(**tables: Any) -> dict[str, str]:
    """What is wrong, by key."""
    scenario = Scenario.model_validate({"name": "x", **tables})
    return {one.where: one.what for one in find_conflicts(scenario)}


def strategy(name: str) -> dict[str, Any]:
    return {"name": name, **NEEDS.get(name, {})}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", WAYS)
def test_who_trains_otherwise(name: str, key: str) -> None:
    told = found(strategy=strategy(name), **WAYS[key])
    counts_steps = key == "training.early_stopping" and name in ("scaffold", "fednova")
    assert (key in told) == (name in PLAIN_LOSS or counts_steps), told


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["cosine", "prototype"])
def test_who_needs_a_linear_head(name: str, kind: str) -> None:
    told = found(strategy=strategy(name), head={"kind": kind})
    assert ("head.kind" in told) == (name in (*CLOSED_FORMS, "lbfgs")), told


@pytest.mark.parametrize("key", WAYS)
def test_privacy_of_examples_and_domains_forgotten(key: str) -> None:
    noised = {"mechanism": "example", "epsilon": 8.0}
    assert "gradient" in found(privacy=noised, **WAYS[key])[key]
    central = {"mechanism": "central", "epsilon": 8.0}
    assert key not in found(privacy=central, **WAYS[key])
    adversarial = {"adversarial": 0.1}
    told = found(adaptation=adversarial, head={"kind": "mlp"}, **WAYS[key])
    assert "plain loss only" in told[key]


def test_the_rest() -> None:
    assert "nothing to judge" in found(training={"early_stopping": 2})["training.early_stopping"]
    alone = found(training={"validation_fraction": 0.2})["training.validation_fraction"]
    assert "nothing looks at them" in alone
    both = WAYS["training.early_stopping"]
    told = found(augmentation={"views": 4}, **both)
    assert "views of one image" in told["training.validation_fraction"]
    assert "has no effect" in found(head={"scale": 3.0})["head.scale"]
    assert "head.scale" not in found(head={"kind": "cosine", "scale": 3.0})
    started = found(head={"kind": "cosine", "initial": "fed3r"})
    assert "closed form is a linear head" in started["head.initial"]
    for kind in ("linear", "cosine", "prototype"):
        assert "head.initial" not in found(head={"kind": kind, "initial": "class_means"})
    hidden = found(head={"kind": "mlp", "initial": "class_means"})
    assert "means are of the features" in hidden["head.initial"]
    assert "adaptation.adversarial" in found(
        head={"kind": "prototype"}, adaptation={"adversarial": 0.1}
    )
    nothing = found(
        head={"kind": "cosine"}, strategy=strategy("fedper"), compression={"kind": "int8"}
    )
    assert "sends nothing" in nothing["compression.kind"]


def test_what_is_asked_for_reaches_the_clients() -> None:
    tables = {
        "training": {
            "label_smoothing": 0.1, "mixup": 0.2, "dropout": 0.3, "validation_fraction": 0.25,
            "early_stopping": 4,
        },
        "augmentation": {"noise": 0.5},
    }  # fmt: skip
    own = local_training(Scenario.model_validate({"name": "x", **tables}), 1)
    got = (own.label_smoothing, own.mixup, own.dropout, own.validation_fraction, own.early_stopping)
    assert got == (0.1, 0.2, 0.3, 0.25, 4)
    assert own.noise == 0.5


def test_a_run_says_it_all_at_once(small: Path, fedtl: Callable[..., Any]) -> None:
    settings = [
        "training.early_stopping=2", "training.mixup=-1", "training.dropout=1.0",
        "head.kind=cosin", "head.scale=0",
    ]  # fmt: skip
    done = fedtl("run", "small.toml", *(part for one in settings for part in ("--set", one)))
    assert done.returncode == 2
    for told in ("training.mixup: out of range", "training.dropout: out of range",
                 'Did you mean "cosine"?', "head.scale: out of range"):  # fmt: skip
        assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["cosine", "prototype"])
def test_heads_run_resume_and_personalise(
    kind: str, small: Path, fedtl: Callable[..., Any], tmp_path: Path
) -> None:
    """Whole runs, with every reference, and one that was killed after a commit."""
    from safetensors.numpy import load_file

    sets = ["--set", f"head.kind={kind}", "--set", "training.label_smoothing=0.1",
            "--set", "training.mixup=0.2", "--set", "training.dropout=0.2",
            "--set", "training.early_stopping=1", "--set", "training.validation_fraction=0.2",
            "--set", "augmentation.noise=0.1", "--set", "training.local_epochs=2"]  # fmt: skip
    references = "evaluation.references=['local_only', 'centralised', 'fine_tuned']"
    done = fedtl("run", "small.toml", *sets, "--set", references, "--out", "whole")
    assert done.returncode == 0, done.stderr
    head = load_file(tmp_path / "whole" / "head.safetensors")
    assert set(head) == {"weight", "bias", f"{kind}.scale"}
    personal = fedtl("run", "small.toml", *sets, "--set", "strategy.name=ditto", "--out", "own")
    assert personal.returncode == 0, personal.stderr
