"""Who judges a trial: a part of each client's training examples stands in for its tests.

Tests decide what a paper or a hospital believes; a hyper-parameter that was chosen by them would
make them part of the training. Here they are left out altogether: they are in neither part.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedtl import seeding
from fedtl.build import make_federation, open_data
from fedtl.clients.batches import batch_order
from fedtl.clients.personal_store import PersonalStore
from fedtl.data.clients import ClientSplit
from fedtl.errors import InputError
from fedtl.interrupts import Interrupts
from fedtl.ready_features import OpenedData, ReadyFeatures
from fedtl.results.runs import RunFolder
from fedtl.rounds import Federation, RoundObserver, run_rounds
from fedtl.scenario.load import dump_scenario, validate
from fedtl.scenario.schema import Scenario
from fedtl.types import Int64, LocalTraining, Rows

FRACTION = 0.2
"""Of each client's training examples, that it judges trials by."""


def validation_split(features: ReadyFeatures, seed: int, fraction: float = FRACTION) -> ClientSplit:
    """The split with a part of each client's training rows in place of its tests.

    Which rows these are follows from the seed, the client's name and how many it has. Further views
    of an image are trained on where the image is, and judge nothing.

    Raises:
        InputError: no client has two training examples.
    """
    split, count = features.split, len(features.examples) - features.views
    plain = np.sort(split.train.index[split.train.index < count])
    keys = seeding.named_keys(seed, "tune", split.names)
    sizes = LocalTraining(0, 1, 0.0, validation_fraction=fraction)
    train, judged = [], []
    for client, key in enumerate(keys.tolist()):
        rows = split.train.of(client)
        sources = rows.copy()
        further = rows >= count
        sources[further] = plain[(rows[further] - count) % len(plain)]
        own = rows[~further]
        kept = int(sizes.trains_on(np.array([len(own)]))[0])
        held = np.sort(own[batch_order(key, len(own), 0)[kept:]])
        train.append(rows[~np.isin(sources, held)])
        judged.append(held)
    if not sum(map(len, judged)):
        raise InputError(
            "no client has two training examples, one to train on and one to judge by",
            where="clients",
        )
    return replace(split, train=_rows(train), test=_rows(judged))


def _rows(parts: list[Int64]) -> Rows:
    return Rows(np.concatenate(parts), np.cumsum([0, *map(len, parts)]).astype(np.int64))


def plain(scenario: Scenario, **training: Any) -> Scenario:
    """The scenario without references, every round judged, with changes to ``[training]``."""
    content = scenario.model_dump(exclude_none=True)
    content["evaluation"] = {**content["evaluation"], "references": [], "every": 1}
    content["training"] = {**content["training"], **training}
    return validate(content, scenario.name, {})


class Trials:
    """Runs scenarios on the clients' training examples alone, one after the other.

    Args:
        folder: where a running trial keeps its commits; they are gone when it ends.
        extracting: told images done and images in all.
    """

    def __init__(
        self,
        folder: Path,
        interrupts: Interrupts,
        extracting: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._path, self._interrupts, self._extracting = folder / "trial", interrupts, extracting
        self._opened: OpenedData | None = None

    def open(self, scenario: Scenario) -> OpenedData:
        """The scenario's data, read again only where they, or the trunk, are others."""
        known = self._opened
        if known is not None and _same_data(known.scenario, scenario):
            return replace(known, scenario=scenario)
        self._opened = open_data(scenario)
        return self._opened

    def run(
        self,
        scenario: Scenario,
        observe: RoundObserver,
        changed: Callable[[Federation], Federation] = lambda federation: federation,
    ) -> None:
        """All rounds of a scenario; ``observe`` may raise to end them.

        Args:
            changed: gives the federation that runs in place of the scenario's own.
        """

        def progress(done: int, total: int) -> None:
            self._extracting(done, total)
            self._interrupts.check("interrupted while examples went through the trunk")

        shutil.rmtree(self._path, ignore_errors=True)  # of a trial that was killed
        folder = RunFolder.create(self._path, dump_scenario(scenario))
        try:
            store = PersonalStore(self._path / "personal")
            judged_on = partial(validation_split, seed=scenario.seed)
            built = make_federation(self.open(scenario), progress, store, judged_on)
            federation = changed(built.federation)
            with closing(federation.engine):
                federation.engine.start(federation.head)
                run_rounds(federation, folder, observe, self._interrupts)
        finally:
            folder.release()
            shutil.rmtree(self._path, ignore_errors=True)


def _same_data(one: Scenario, other: Scenario) -> bool:
    tables = ("seed", "data", "clients", "shift", "backbone", "transfer")
    return all(getattr(one, name) == getattr(other, name) for name in tables)
