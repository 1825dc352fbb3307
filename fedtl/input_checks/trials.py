"""Changes tried on a sample: the same few hundred examples before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.build import population_of
from fedtl.clients.alignment import aligned_rows
from fedtl.data.clients import ClientSplit
from fedtl.data.examples import Images, Pixels
from fedtl.evaluation.quick_head import Gain, Right, draw_sample, gain_of, quick_answers
from fedtl.ready_features import OpenedData, ReadyFeatures
from fedtl.transfer.backbones import Backbone
from fedtl.transfer.features import FeatureStore
from fedtl.transfer.matching import SAMPLE, match_examples
from fedtl.transfer.pictures import AlteredImages
from fedtl.types import Rows

LOOKED_AT_EACH, LOOKED_AT = 64, 2000
"""Examples of one client, and of all together, that are looked at."""

TRAIN, TEST = 300, 300
"""Examples of all clients together: to fit the quick head, and to judge it."""

Matrix = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Trial:
    """A change that can be tried.

    Attributes:
        name: tells it from other trials on the same data.
        backbone: in place of the scenario's.
        pixels: (client, picture) -> another picture.
        matches: every client's pixels matched to those that the weights were trained on.
        columns: features [m, D] -> other features; for data without pictures.
        standardises: as ``adaptation.features = "standardise"``.
    """

    name: str
    backbone: Backbone | None = None
    pixels: Callable[[int, Pixels], Pixels] | None = None
    matches: bool = False
    columns: Callable[[Matrix], Matrix] | None = None
    standardises: bool = False


class Trials:
    """Tries changes on one seeded sample, each once; new features are kept in the feature store.

    Args:
        opened, features: the scenario's, as it is.
        threads: workers; nothing depends on it.
        check: called often; may raise to stop.
    """

    def __init__(
        self,
        opened: OpenedData,
        features: ReadyFeatures,
        threads: int,
        check: Callable[[], None],
    ) -> None:
        self._opened, self._features = opened, features
        self._threads, self._check = threads, check
        sample = draw_sample(features.split, TRAIN, TEST, opened.scenario.seed, "tried")
        self._sample = sample
        self._known: dict[str, Right] = {}
        self._owner = np.zeros(len(sample.kept), np.int64)
        for rows in (sample.train, sample.test):
            self._owner[rows.index] = np.repeat(np.arange(len(rows.counts)), rows.counts)

    def gain(self, trial: Trial, base: Trial | None = None) -> Gain | None:
        """What a change does to the quick head's answers; None without rows to fit or to judge.

        Args:
            base: what it is compared with; None is everything as it is.
        """
        return gain_of(self._right(base or Trial("as it is")), self._right(trial))

    def words(self, gain: Gain) -> str:
        """One measurement in a sentence."""
        fitted, judged = len(self._sample.train.index), len(self._sample.test.index)
        return (
            f"{100 * gain.before:.1f} to {100 * gain.after:.1f} % of {judged} test examples right "
            f"({gain.won} won, {gain.lost} lost, p = {gain.p_value:.2g}; quick head on {fitted})"
        )

    def _right(self, trial: Trial) -> Right:
        if trial.name not in self._known:
            matrix = self._changed(trial)
            features = self._features
            population = self._sample.population(matrix, features.examples, features.split)
            self._known[trial.name] = quick_answers(population, self._threads)
        return self._known[trial.name]

    def _changed(self, trial: Trial) -> Matrix:
        if trial.backbone is not None or trial.pixels is not None or trial.matches:
            return self._extracted(trial)
        matrix = self._features.matrix[self._sample.kept]
        if trial.standardises:
            people, matrix = population_of(self._features), matrix.astype(np.float32)
            for client in np.unique(self._owner).tolist():
                own = self._owner == client
                rows = self._sample.kept[own]
                matrix[own] = aligned_rows(people, "standardise", client, rows)
        return matrix if trial.columns is None else trial.columns(matrix)

    def _extracted(self, trial: Trial) -> Matrix:
        scenario = self._opened.scenario
        backbone, examples = trial.backbone or self._opened.backbone, self._features.examples
        if trial.matches:
            examples = match_examples(
                examples, self._holders(), backbone.preprocessing, scenario.seed, self._threads
            )
        chosen = examples.subset(self._sample.kept)
        assert chosen.images is not None
        images: Images = chosen.images
        fingerprint, pixels = chosen.fingerprint, trial.pixels
        if pixels is not None:
            images = AlteredImages(images, lambda i, own: pixels(int(self._owner[i]), own))
            fingerprint = f"{fingerprint} {trial.name}"
        stored = FeatureStore().features(
            backbone,
            images,
            fingerprint,
            dtype=scenario.backbone.feature_dtype,
            way=scenario.backbone.extraction,
            device=scenario.engine.device,
            threads=self._threads,
            progress=lambda done, total: self._check(),
        )
        return stored.matrix

    def _holders(self) -> ClientSplit:
        """Whose pictures the clients' maps are made from: of many clients, the sampled only."""
        split, sample = self._features.split, self._sample
        if len(split.names) * SAMPLE <= LOOKED_AT:
            return split
        train, test = (
            Rows(sample.kept[own.index], own.offsets) for own in (sample.train, sample.test)
        )
        return ClientSplit(train, test, split.names, split.domains)
