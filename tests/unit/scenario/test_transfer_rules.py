"""What goes with a cut: each refusal where it belongs, and nothing refused that works."""

from __future__ import annotations

from typing import Any

import pytest

from fedtl.scenario.compatibility import find_conflicts
from fedtl.scenario.schema import Scenario

CUT = {"mode": "last_blocks", "cut": 1}


def where(**sections: Any) -> set[str]:
    """The keys that are refused."""
    content = {
        "name": "cut",
        "rounds": 5,
        "data": {"source": "folder", "path": "pictures"},
        "backbone": {"name": "mobilenet_v2", "weights": "none"},
        "transfer": CUT,
        **sections,
    }
    return {problem.where for problem in find_conflicts(Scenario.model_validate(content))}


@pytest.mark.parametrize("mode", ["last_blocks", "lora", "full"])
def test_plain_averages_go_with_every_cut(mode: str) -> None:
    cut = {"mode": mode} if mode == "full" else {**CUT, "mode": mode}
    for name in ("fedavg", "fedadam", "scaffold", "ditto", "fedper", "median"):
        assert where(transfer=cut, strategy={"name": name}) == set()


@pytest.mark.parametrize(
    "name", ["fed3r", "afl", "fedncm", "fedlda", "ccvr", "lbfgs", "mime", "knnper"]
)
def test_what_needs_plain_features_is_refused(name: str) -> None:
    assert "strategy.name" in where(strategy={"name": name})
    assert "strategy.name" not in where(strategy={"name": name}, transfer={**CUT, "cut": 0})


@pytest.mark.parametrize(
    ("section", "content", "key"),
    [
        ("head", {"initial": "fed3r"}, "head.initial"),
        ("head", {"initial": "class_means", "kind": "prototype"}, "head.initial"),
        ("evaluation", {"references": ["ridge"]}, "evaluation.references"),
        ("privacy", {"mechanism": "example", "epsilon": 8.0}, "privacy.mechanism"),
        ("privacy", {"canaries": 10}, "privacy.canaries"),
        ("adaptation", {"features": "coral"}, "adaptation.features"),
        ("adaptation", {"adversarial": 0.1}, "adaptation.adversarial"),
        ("attack", {"kind": "backdoor", "fraction": 0.2}, "attack.kind"),
    ],
)
def test_what_knows_only_a_head_is_refused(section: str, content: dict[str, Any], key: str) -> None:
    assert key in where(**{section: content})


@pytest.mark.parametrize(
    ("transfer", "key"),
    [
        ({"cut": 2}, "transfer.cut"),
        ({"batch_norm": "group"}, "transfer.batch_norm"),
        ({"warmup_rounds": 1}, "transfer.warmup_rounds"),
        ({"unfreeze_every": 1}, "transfer.unfreeze_every"),
        ({"rate_factor": 0.1}, "transfer.rate_factor"),
        ({"l2_pretrained": 0.1}, "transfer.l2_pretrained"),
        ({"activations": "store"}, "transfer.activations"),
        ({**CUT, "warmup_rounds": 5}, "transfer.warmup_rounds"),
        ({"mode": "full", "cut": "features.1"}, "transfer.cut"),
        ({"mode": "scratch", "l2_pretrained": 0.1}, "transfer.l2_pretrained"),
    ],
)
def test_keys_without_an_effect_are_refused(transfer: dict[str, Any], key: str) -> None:
    assert where(transfer=transfer) == {key}


def test_local_batch_norm_goes_with_plain_averages_only() -> None:
    local = {**CUT, "batch_norm": "local"}
    for name in ("fedavg", "fedprox", "fedadam"):
        assert where(transfer=local, strategy={"name": name}) == set()
    for name in ("scaffold", "fedper", "ditto", "median"):
        assert where(transfer=local, strategy={"name": name}) == {"transfer.batch_norm"}


def test_averaged_statistics_go_only_where_a_variance_stays_one() -> None:
    aggregated = {**CUT, "batch_norm": "aggregated"}
    for name in ("fedavg", "fedper", "median", "ditto"):
        assert where(transfer=aggregated, strategy={"name": name}) == set()
    for name in ("fedavgm", "fedadam", "scaffold", "fednova", "qfedavg"):
        assert where(transfer=aggregated, strategy={"name": name}) == {"transfer.batch_norm"}
    fast = {"name": "fedavg", "server_learning_rate": 1.5}
    assert where(transfer=aggregated, strategy=fast) == {"strategy.server_learning_rate"}
    packed = {"kind": "int8"}
    assert where(transfer=aggregated, compression=packed) == {"transfer.batch_norm"}


def test_where_activations_are_mixed_is_said() -> None:
    for section, values in (("training", {"mixup": 0.2}), ("augmentation", {"noise": 0.1})):
        assert where(**{section: values}) == {f"{section}.{next(iter(values))}"}
        assert where(**{section: values}, transfer={**CUT, "activations": "store"}) == set()
        assert where(**{section: values}, transfer={"mode": "full"}) == set()
        assert where(**{section: values}, transfer={"mode": "head"}) == set()
