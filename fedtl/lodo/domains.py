"""The data of one seed, by domain: whom to leave out, and what then is left."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedtl.build import open_data
from fedtl.data.clients import ClientSplit
from fedtl.data.examples import content_hash
from fedtl.data.leakage import check_leaks, find_leaks
from fedtl.errors import InputError
from fedtl.ready_features import ExtractionProgress, OpenedData, ReadyFeatures, make_features
from fedtl.scenario.load import validate
from fedtl.scenario.schema import Scenario
from fedtl.strategies import make_strategy
from fedtl.strategies.base import personal_of
from fedtl.transfer.heads import initial_head
from fedtl.types import Int64, Rows


@dataclass(frozen=True)
class Study:
    """One seed's data, ready for every run.

    Attributes:
        domains: those that examples have.
        of: the domain of each client, as a place in ``domains``, int64 [K].
    """

    opened: OpenedData
    ready: ReadyFeatures
    domains: tuple[str, ...]
    of: Int64

    def rows(self, domain: int) -> Int64:
        """All examples of a domain, as they are."""
        codes, examples = self.ready.examples.domains, self.ready.examples
        assert codes is not None
        codes = codes[: len(codes) - self.ready.views]
        return np.flatnonzero(codes == examples.domain_names.index(self.domains[domain]))

    def split(self, domain: int) -> ClientSplit:
        """The clients of a domain."""
        return _only(self.ready.split, np.flatnonzero(self.of == domain))

    def classes(self, domain: int) -> tuple[Int64, Int64]:
        """Classes of a domain's examples, and those that the others train on."""
        labels, split = self.ready.examples.labels, self.ready.split
        others = [split.train.of(k) for k in np.flatnonzero(self.of != domain).tolist()]
        return np.unique(labels[self.rows(domain)]), np.unique(labels[np.concatenate(others)])

    def without(self, domain: int | None) -> OpenedData:
        """Everybody's features but a domain's, as data to run on.

        They have a fingerprint of their own, so that no other command goes on with the run.
        """
        examples, kept, left = self.ready.examples, np.arange(len(self.of)), "nobody"
        if domain is not None:
            kept, left = np.flatnonzero(self.of != domain), self.domains[domain]
        fingerprint = content_hash("without", examples.fingerprint, left)
        ready = replace(
            examples,
            images=None,
            texts=None,
            table=None,
            features=self.ready.matrix,
            channels=None,
            fingerprint=fingerprint,
            notes=(),
        )
        through = replace(self.opened.backbone, embed=None)  # they went through it already
        return replace(
            self.opened,
            examples=ready,
            split=_only(self.ready.split, kept),
            backbone=through,
        )


def open_study(scenario: Scenario, progress: ExtractionProgress) -> Study:
    """Data and features of one seed.

    Raises:
        InputError: fewer than two domains, clients of several domains, a domain without a class in
            common with the others, or a strategy without a whole shared head.
    """
    content = scenario.model_dump()
    content["evaluation"]["references"] = []
    content["data"]["leakage"] = "allow"  # looked for here, over pictures
    opened = open_data(validate(content, scenario.name, {}))
    if opened.examples.domains is None:
        raise InputError(
            "these data have no domains to leave out",
            where="data.domains",
            do="Lay the folder out as <domain>/<class>/<image>, or give the arrays a `domain`",
        )
    ready = make_features(opened, progress)
    check_leaks(find_leaks(ready.content, ready.split, ready.examples), scenario.data.leakage)
    codes, split = ready.examples.domains, ready.split
    assert codes is not None
    each = [np.unique(codes[_held(split, k)]) for k in range(len(split.names))]
    if mixed := [split.names[k] for k, own in enumerate(each) if len(own) > 1]:
        raise InputError(
            "clients with examples of several domains cannot be left out with one of them",
            where="clients",
            got=", ".join(mixed[:5]) + (", ..." if len(mixed) > 5 else ""),
            do='Set clients.partition = "domain", or clients.within_domains = true',
        )
    present, of = np.unique(np.concatenate(each), return_inverse=True)
    if len(present) < 2:
        raise InputError(
            "there is one domain only, and nothing to train on without it",
            where="data.domains",
            got=ready.examples.domain_names[int(present[0])],
        )
    domains = tuple(ready.examples.domain_names[code] for code in present.tolist())
    study = Study(opened, ready, domains, of.astype(np.int64))
    for domain, name in enumerate(domains):
        if not len(np.intersect1d(*study.classes(domain))):
            raise InputError(
                "a domain has no class in common with the others: nothing can be right there",
                where=f"domain {name}",
                do="Leave that domain out of the data",
            )
    _refuse_personal(opened, ready)
    return study


def _refuse_personal(opened: OpenedData, ready: ReadyFeatures) -> None:
    scenario, names = opened.scenario, ready.split.names
    strategy = make_strategy(scenario, names)
    classes = len(ready.examples.classes)
    head = initial_head(scenario.head, ready.matrix.shape[1], classes, scenario.seed)
    own = personal_of(strategy, strategy.init(head, len(names)))
    if own is not None and own.completes:
        raise InputError(
            "this strategy makes no shared head that somebody new could use",
            where="strategy.name",
            got=repr(scenario.strategy.name),
            do="Use one with a whole shared head, e.g. fedavg or finetune",
        )


def _only(split: ClientSplit, clients: Int64) -> ClientSplit:
    """Some of the clients, renumbered."""

    def rows(of: Rows) -> Rows:
        parts = [of.of(k) for k in clients.tolist()]
        ends = np.cumsum([0, *map(len, parts)]).astype(np.int64)
        return Rows(np.concatenate(parts), ends)

    names = tuple(split.names[k] for k in clients.tolist())
    domains = tuple(split.domains[k] for k in clients.tolist())
    return ClientSplit(rows(split.train), rows(split.test), names, domains)


def _held(split: ClientSplit, client: int) -> Int64:
    return np.concatenate([split.train.of(client), split.test.of(client)])
