"""Examples on which an exported file is held to the run: what goes in, and what the run answers.

Those are the clients' own tests where the data are at hand; else inputs made up by chance, which
the trunk itself answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl import seeding
from fedtl.build import open_data, population_of
from fedtl.clients.batched import one_torch_thread
from fedtl.clients.networks import JUDGED_THROUGH, network, scores
from fedtl.data.examples import Examples
from fedtl.errors import FedtlError, InputError, Interrupted
from fedtl.export.opened import Model
from fedtl.export.rows import is_inside, raw_rows
from fedtl.ready_features import ExtractionProgress, ReadyFeatures, make_features
from fedtl.transfer.matching import match_examples
from fedtl.types import Float32, Int32, Int64, Population

EXAMPLES = 256
"""Tests on which a file is compared with the run, spread over all clients."""

MADE_UP = 8

Inputs = Mapping[str, npt.NDArray[Any]]
"""What a file takes, by the name of its inputs; all of the same length n."""


@dataclass(frozen=True)
class Sample:
    """Some examples.

    Attributes:
        inputs: as the exported file takes them.
        scores: what the run answers, float32 [n, C]; none of examples to calibrate with.
        labels: the truth, int32 [n]; None of what is made up.
        note: why they are made up; "" of the run's own tests.
    """

    inputs: Inputs
    scores: Float32
    labels: Int32 | None = None
    note: str = ""

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True)
class Source:
    """The data of a run, opened again; nothing where they are not at hand.

    Attributes:
        model: whose.
        features: what its trunk makes of them; None where there are none.
        note: why there are none.
    """

    model: Model
    features: ReadyFeatures | None
    note: str = ""

    def tests(self, count: int = EXAMPLES) -> Sample:
        """So many test examples, every client's in its turn."""
        if self.features is None:
            return _made_up(self.model, self.note)
        population = population_of(self.features)
        rows = _spread(population.test.index, count)
        if not len(rows):
            return _made_up(self.model, "no client of the run has test examples")
        found = run_scores(self.model, population, rows)
        return Sample(self._inputs(rows), found, population.labels[rows])

    def training(self, count: int) -> Sample | None:
        """So many training examples, to calibrate with; None where there are none."""
        if self.features is None:
            return None
        rows = _spread(population_of(self.features).train.index, count)
        return Sample(self._inputs(rows), np.zeros((0, len(self.model.labels)), np.float32))

    def _inputs(self, rows: Int64) -> Inputs:
        assert self.features is not None
        examples, preprocessing = self.features.examples, self.model.front.preprocessing
        if self.model.takes == "images":
            scenario = self.model.scenario
            if scenario.adaptation.input == "match":
                split = self.features.split
                examples = match_examples(examples, split, preprocessing, scenario.seed, 1)
            assert examples.images is not None
            crops = [preprocessing.apply(examples.images.load(row)) for row in rows.tolist()]
            return {"pixels": np.ascontiguousarray(np.stack(crops))}
        if self.model.takes == "texts":
            return encoded(self.model, texts_of(examples, rows))
        if self.model.front.embed is not None and is_inside(self.model):
            return {"rows": raw_rows(self.model, self.features)[rows]}
        return {"rows": np.asarray(self.features.matrix[rows], np.float32)}


def open_source(model: Model, progress: ExtractionProgress | None = None) -> Source:
    """The run's data and their features; says why there are none where there are none."""
    if model.tables.real:
        return Source(model, None, "the clients' data are with the clients")
    try:
        opened = open_data(model.scenario)
        features = make_features(opened, progress)
    except Interrupted:
        raise
    except FedtlError as error:  # its place may be a private path
        return Source(model, None, f"the run's data could not be opened: {error.what}")
    known = ((model.tables.summary or {}).get("data") or {}).get("fingerprint")
    if known not in (None, features.examples.identity):
        return Source(model, None, "the data are no more those that the run was made with")
    if model.takes == "rows":
        model = replace(model, columns=raw_rows(model, features).shape[1])
    return Source(model, features)


def run_scores(model: Model, population: Population, rows: Int64) -> Float32:
    """What the run itself answers: its stored features through its head, float32 [n, C]."""
    import torch

    tensors = {name: torch.tensor(tensor) for name, tensor in model.head.items()}
    found = []
    with one_torch_thread(), network(population.tail) as through, torch.no_grad():
        for low in range(0, len(rows), JUDGED_THROUGH):
            part = population.features[rows[low : low + JUDGED_THROUGH]].astype(np.float32)
            found.append(scores(tensors, torch.from_numpy(part), through).numpy())
    return np.concatenate(found)


def encoded(model: Model, texts: Sequence[str]) -> Inputs:
    """Texts as numbers of tokens and which of them count, int64 [n, t] each."""
    from fedtl.export.texts import encode

    return encode(model.front, texts, model.tokens)


def texts_of(examples: Examples, rows: Int64) -> list[str]:
    """Some texts of a source."""
    assert examples.texts is not None
    return [examples.texts[row] for row in rows.tolist()]


def made_up_inputs(model: Model, count: int) -> Inputs:
    """Inputs of the right form that nobody's data went into."""
    stream = seeding.generator(0, "export")
    if model.takes == "images":
        side = model.front.image_size
        return {"pixels": stream.integers(0, 256, (count, side, side, 3), np.uint8)}
    if model.takes == "texts":
        return encoded(model, [f"{'a few words ' * (i % 3 + 1)}in a row" for i in range(count)])
    width = model.columns if model.columns is not None and is_inside(model) else model.width
    return {"rows": stream.standard_normal((count, width)).astype(np.float32)}


def _made_up(model: Model, note: str) -> Sample:
    """Answers of the trunk itself, run as torch runs it, and of the head behind it."""
    from fedtl.export.build import torch_model
    from fedtl.export.joined import runner

    inputs = made_up_inputs(model, MADE_UP)
    joined = torch_model(model)
    if joined is None:
        raise InputError(
            "there is nothing to hold the exported file to: the data are not at hand, and this "
            "trunk runs in ONNX Runtime alone",
            where=model.path,
            got=note,
            do="Put the data back as they were",
        )
    return Sample(inputs, runner(joined)(inputs)[0], None, note)


def _spread(index: Int64, count: int) -> Int64:
    """``count`` of some rows at equal distances, so that every client has its share."""
    if len(index) <= count:
        return index
    return np.asarray(index[np.linspace(0, len(index) - 1, count).astype(np.int64)])
