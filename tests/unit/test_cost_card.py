"""The cost card: operations as torch counts them, passes as they were, an estimate that says so."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedtl.cost_card import Meter, Work, cost_card, cost_line, flops_text, training_flops
from fedtl.scenario.schema import Scenario

SUMMARY: dict[str, Any] = {
    "seconds": {"extract": 0.0, "total": 10.0},
    "bytes_up": 30,
    "bytes_down": 12,
    "device": "cpu",
    "threads": 2,
}
LINEAR = {"weight": np.zeros((3, 8), np.float32), "bias": np.zeros(3, np.float32)}


def head_of(hidden: list[int]) -> dict[str, np.ndarray]:
    widths = [8, *hidden]
    head = {"weight": np.zeros((3, widths[-1]), np.float32), "bias": np.zeros(3, np.float32)}
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        head[f"hidden.{i}.weight"] = np.zeros((after, before), np.float32)
        head[f"hidden.{i}.bias"] = np.zeros(after, np.float32)
    return head


@pytest.mark.parametrize("hidden", [[], [16], [16, 5]])
def test_training_a_head_takes_what_torch_counts(hidden: list[int]) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from fedtl.clients.batched import forward

    tensors = {name: torch.tensor(t, requires_grad=True) for name, t in head_of(hidden).items()}
    with FlopCounterMode(display=False) as counter:
        forward(tensors, torch.zeros(7, 8)).sum().backward()
    assert training_flops(head_of(hidden), None) == counter.get_total_flops() / 7


def card(scenario: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    values = {"backbone": {"through_trunk": 5, "flops": 2e9, "num_bytes": 77}, "rows": 9}
    work = Work(**{**values, "tail": None, "head": LINEAR, "asked": 100, **changes})
    asked = Scenario.model_validate({"name": "x", **(scenario or {})})
    return cost_card(asked, work, Meter(), SUMMARY)


def test_every_figure_follows_from_what_was_counted() -> None:
    found = card({"training": {"local_epochs": 3}})
    assert found["passes"] == {
        "trunk": 5, "trunk_when_made": 9, "epochs": 3, "examples_trained": 300,
    }  # fmt: skip
    assert found["flops"] == {"trunk": 1e10, "trunk_when_made": 1.8e10, "training": 300 * 4 * 24}
    assert (found["seconds"], found["bytes"], found["bytes_on_disk"]) == (10.0, 42, 77)
    # ten seconds before this call on two threads, and next to nothing since
    assert found["core_seconds"] == pytest.approx(20, abs=1)
    assert found["energy_wh"] == pytest.approx(found["core_seconds"] * 12 / 3600)
    assert found["co2_g"] == pytest.approx(found["energy_wh"] * 0.475)
    assert any("12 W" in line for line in found["assumptions"])


def test_what_a_core_takes_is_the_users_to_say() -> None:
    found = card({"report": {"watts_per_core": 5, "grams_per_kwh": 0}})
    assert found["energy_wh"] == pytest.approx(found["core_seconds"] * 5 / 3600)
    assert found["co2_g"] == 0


def test_stored_features_cost_nothing_now_and_say_what_they_cost() -> None:
    found = card(backbone={"through_trunk": 0, "flops": 2e9})
    assert found["flops"]["trunk"] == 0
    assert found["flops"]["trunk_when_made"] == 1.8e10
    unknown = card(backbone={"through_trunk": 5, "flops": None})
    assert unknown["flops"]["trunk"] is None
    assert any("not known" in line for line in unknown["assumptions"])


def test_a_warm_up_is_said_to_be_counted_too_dear() -> None:
    warm = card({"transfer": {"mode": "last_blocks", "warmup_rounds": 2}})
    assert any("rests behind the cut" in line for line in warm["assumptions"])
    assert not any("rests behind the cut" in line for line in card()["assumptions"])


def test_of_real_clients_only_what_the_server_knows_is_told() -> None:
    found = card(backbone={}, rows=None)
    assert found["passes"]["trunk"] is None
    assert found["energy_wh"] is None
    assert found["co2_g"] is None
    assert found["flops"]["training"] == 100 * 5 * 4 * 24
    assert any("clients' machines" in line for line in found["assumptions"])
    assert "Wh" not in str(cost_line(found))


def test_a_tail_that_only_clients_have_is_not_counted_as_if_it_were_nothing() -> None:
    head = {**LINEAR, "tail.block.weight": np.zeros((8, 8), np.float32)}
    assert card(backbone={}, rows=None, head=head)["flops"]["training"] is None


def test_sums_of_statistics_are_not_counted() -> None:
    found = card({"strategy": {"name": "fed3r"}})
    assert found["flops"]["training"] is None
    assert found["passes"]["examples_trained"] == 100


def test_a_sentence_and_its_units() -> None:
    assert [flops_text(x) for x in (1.5e6, 2e9, 3.25e12, 4e18)] == [
        "1.5 MFLOP", "2 GFLOP", "3.2 TFLOP", "4,000 PFLOP",
    ]  # fmt: skip
    line = str(cost_line(card()))
    assert line.startswith("Cost: 5 examples through the trunk, 10 GFLOP in trunk and training")
    assert "estimates" in line
    assert cost_line(None) is None


def test_a_trunk_takes_what_is_published(tmp_path: Path) -> None:
    from torchvision.models import SqueezeNet1_1_Weights

    from fedtl.data.examples import ArrayImages
    from fedtl.transfer.backbones import open_backbone
    from fedtl.transfer.features import FeatureStore

    section = Scenario.model_validate(
        {"name": "x", "backbone": {"name": "squeezenet1_1", "weights": "none", "image_size": 224}}
    ).backbone
    images = ArrayImages(np.zeros((1, 224, 224, 3), np.uint8))
    store, backbone = FeatureStore(tmp_path), open_backbone(section, 0)
    made = store.features(backbone, images, "one", device="cpu")
    published = 2e9 * SqueezeNet1_1_Weights.DEFAULT.meta["_ops"]
    # the last convolution to 1,000 classes, 13 x 13 x 512 x 1000 multiply-adds, is no trunk's
    assert made.flops == pytest.approx(published - 2 * 13 * 13 * 512 * 1000, rel=0.02)
    assert store.features(backbone, images, "one", device="cpu").flops == made.flops


def test_a_run_counts_whom_it_asked(fedtl, small) -> None:
    done = fedtl("run", "small.toml", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "Cost: " in done.stdout
    summary = json.loads((small.parent / "out" / "summary.json").read_text())
    frame = pd.read_parquet(small.parent / "out" / "clients.parquet")
    asked = int(frame.loc[frame["split"] == "train", "examples"].sum())
    assert summary["cost"]["passes"]["examples_trained"] == asked  # of one local epoch
    assert summary["cost"]["flops"]["training"] == asked * 4 * 3 * 6
