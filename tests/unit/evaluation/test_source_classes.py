"""The layer that was cut off, applied to features, gives the whole model's own answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedtl.evaluation.source_classes import SourceClassifier, source_classifier
from fedtl.scenario import schema
from fedtl.transfer.backbones import open_backbone


def test_source_probabilities_are_those_of_the_whole_model(tmp_path: Path) -> None:
    import torch
    from torchvision import models

    torch.manual_seed(0)
    model = models.mobilenet_v2(weights=None).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    section = schema.Backbone(name="mobilenet_v2", weights=str(tmp_path / "w.pth"), image_size=32)
    backbone = open_backbone(section, 0)
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        features = backbone.trunk()(pixels).numpy()
        p = backbone.preprocessing
        images = (pixels.permute(0, 3, 1, 2) - torch.tensor(p.mean).view(3, 1, 1)) / torch.tensor(
            p.std
        ).view(3, 1, 1)
        expected = model(images).softmax(dim=1).numpy()
    found = source_classifier(backbone, features.shape[1])
    assert isinstance(found, SourceClassifier)
    assert found.probabilities(features) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert found.probabilities(features.astype(np.float16)).dtype == np.float32


def test_the_packaged_weights_have_a_thousand_source_classes() -> None:
    found = source_classifier(open_backbone(schema.Backbone(), 0), 1280)
    assert isinstance(found, SourceClassifier)
    assert found.weight.shape == (1000, 1280)


def test_without_source_classes_it_is_said_why() -> None:
    for section in (
        schema.Backbone(name="identity"),
        schema.Backbone(name="squeezenet1_1", weights="none"),
    ):
        assert "no weights" in str(source_classifier(open_backbone(section, 0), 10))
    other = source_classifier(open_backbone(schema.Backbone(), 0), 64)
    assert "no linear layer" in str(other)
