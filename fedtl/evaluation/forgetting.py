"""What the trained network has forgotten of the task that its weights were trained for.

On the source task's own images a ridge probe is fitted to the features of the pretrained network.
After the federation the images go through the trained network again, and two questions are asked:

- Does the old probe still read the new features? What it loses is forgotten: whoever had put the
  trained network in the old one's place would see it.
- Can a probe that is fitted anew? What even that loses is no longer there for a linear head.

Both are judged on images that no probe was fitted on. Where only the head is trained the network is
the pretrained one, and nothing is forgotten by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl import seeding
from fedtl.clients.networks import JUDGED_THROUGH, network
from fedtl.data.arrays import load_arrays
from fedtl.data.clients import stratified_test
from fedtl.data.examples import Examples
from fedtl.data.folder import load_folder
from fedtl.errors import InputError
from fedtl.evaluation.ridge import fit_ridge
from fedtl.scenario.schema import Data, Scenario
from fedtl.transfer.backbones import INPUT, Backbone
from fedtl.transfer.features import FeatureStore
from fedtl.types import Float32, Head, Population, Rows, Tail

RIDGE = 1.0
"""Penalty of the probes."""

JUDGED_FRACTION = 0.5
"""Of the source examples that probes are judged on; they are fitted to the others."""


@dataclass(frozen=True)
class Source:
    """The source task as the network sees it.

    Attributes:
        backbone: up to the cut.
        tail: what stands behind the cut, None where nothing does.
        threads: CPU threads.
        check: called between batches; may raise to stop.
    """

    scenario: Scenario
    backbone: Backbone
    tail: Tail | None
    threads: int
    check: Callable[[], None]

    def forgotten(self, first: Head, last: Head) -> dict[str, Any]:
        """Accuracies on the source task, as JSON values.

        Args:
            first, last: what was trained, before and after; what is behind the cut counts.

        Raises:
            InputError: the source's files are missing, broken or not images.
        """
        examples = open_source(str(self.scenario.evaluation.source_path))
        matrix, labels = self._at_cut(examples), examples.labels
        key = seeding.named_keys(self.scenario.seed, "source", ["source"])
        everybody = np.zeros(len(labels), np.int32)
        judged = stratified_test(everybody, key, labels, JUDGED_FRACTION)
        before = self._features(matrix, first)
        old = _probe(before, examples, judged, self.threads)
        facts: dict[str, Any] = {
            "source": Path(str(self.scenario.evaluation.source_path)).name,
            "fitted": int((~judged).sum()),
            "judged": int(judged.sum()),
            "classes": len(examples.classes),
            "by_construction": self.tail is None,
            "before": (found := _accuracy(old, before, labels, judged)),
            "after": found,
            "after_refitted": found,
        }
        if self.tail is not None:
            after = self._features(matrix, last)
            new = _probe(after, examples, judged, self.threads)
            facts["after"] = _accuracy(old, after, labels, judged)
            facts["after_refitted"] = _accuracy(new, after, labels, judged)
        facts["forgotten"] = facts["before"] - facts["after"]
        facts["lost"] = facts["before"] - facts["after_refitted"]
        return facts

    def _at_cut(self, examples: Examples) -> npt.NDArray[np.floating[Any]]:
        section = self.scenario.backbone
        assert examples.images is not None
        return (
            FeatureStore()
            .features(
                self.backbone,
                examples.images,
                examples.fingerprint,
                dtype="float16" if self.backbone.cut == INPUT else section.feature_dtype,
                way=section.extraction,
                device=self.scenario.engine.device,
                threads=self.threads,
                progress=lambda done, total: self.check(),
            )
            .matrix
        )

    def _features(self, matrix: npt.NDArray[np.floating[Any]], tensors: Head) -> Float32:
        """What the head would stand on, float32 [n, D]."""
        if self.tail is None:
            return np.asarray(matrix, np.float32)
        import torch

        from fedtl.clients.batched import one_torch_thread

        own = {name: torch.tensor(tensor) for name, tensor in tensors.items()}
        parts = []
        with one_torch_thread(), network(self.tail) as through, torch.no_grad():
            for low in range(0, len(matrix), JUDGED_THROUGH):
                self.check()
                x = np.array(matrix[low : low + JUDGED_THROUGH], np.float32)  # torch wants to write
                parts.append(through(own, torch.from_numpy(x)).numpy())
        return np.concatenate(parts)


def open_source(path: str) -> Examples:
    """The source task's images. Raises InputError."""
    kind = "arrays" if path.lower().endswith((".npz", ".csv")) else "folder"
    section = Data.model_validate({"source": kind, "path": path})
    examples = load_arrays(section) if kind == "arrays" else load_folder(section)
    if examples.images is None:
        raise InputError(
            "the source task's examples are not images",
            where="evaluation.source_path",
            got=Path(path).name,
            allowed="a folder of <class>/<image>, or an .npz with x uint8 [n, h, w, 3] and y",
        )
    return examples


def _probe(
    features: Float32, examples: Examples, judged: npt.NDArray[np.bool_], threads: int
) -> Head:
    def rows(mask: npt.NDArray[np.bool_]) -> Rows:
        index = np.flatnonzero(mask)
        return Rows(index, np.array([0, len(index)], np.int64))

    classes, labels = examples.classes, examples.labels
    population = Population(
        features, labels, classes, rows(~judged), rows(judged), ("source",), ("",)
    )
    return fit_ridge(population, {"bias": np.zeros(len(classes), np.float32)}, RIDGE, threads)


def _accuracy(
    probe: Head, features: Float32, labels: npt.NDArray[np.int32], judged: npt.NDArray[np.bool_]
) -> float:
    scores = features[judged].astype(np.float64) @ probe["weight"].T.astype(np.float64)
    right = (scores + probe["bias"]).argmax(axis=1) == labels[judged]
    return float(right.mean())
