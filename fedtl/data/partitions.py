"""Which client holds which example: the partitions of a simulated federation.

Every partition is built so that each example goes to exactly one client and so that it ends. A
request that cannot be met is refused with the nearest one that can. Rules with skewed labels or
amounts are in ``skews``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtl import seeding
from fedtl.data.examples import Examples
from fedtl.data.flwr_partitions import assign_flwr_datasets
from fedtl.data.skews import (
    deal_dirichlet,
    deal_dirichlet_capacity,
    deal_label_quantity,
    deal_quantity,
    rows_of_classes,
)
from fedtl.errors import InputError, unknown_name
from fedtl.scenario.schema import Clients
from fedtl.types import Int32, Int64

DEFAULT_CLIENTS = 10
MIXED = "mixed"
"""Domain of a client whose examples come from several domains."""


@dataclass(frozen=True)
class Assignment:
    """Who holds what: ``client`` is the client id of every example, int32 [N].

    A client may hold nothing. ``domains`` has each client's domain, ``""`` where the data have none
    and ``"mixed"`` where a client has several.
    """

    client: Int32
    names: tuple[str, ...]
    domains: tuple[str, ...]


Rule = Callable[[Int32, int, Clients, np.random.Generator], Int64]
"""(labels [n], num, options, generator) -> client id in [0, num) of every row, int64 [n]."""


def deal_iid(labels: Int32, num: int, clients: Clients, generator: np.random.Generator) -> Int64:
    """Rows dealt at random; sizes differ by one at most."""
    client = np.empty(len(labels), dtype=np.int64)
    client[generator.permutation(len(labels))] = np.arange(len(labels)) % num
    return client


def deal_shards(labels: Int32, num: int, clients: Clients, generator: np.random.Generator) -> Int64:
    """Rows sorted by label are cut into equal shards; every client gets the same number of them.

    McMahan et al. 2017, section 3, except that classes come in random order and that no client
    gets two shards of one class where that can be had: on balanced data whose shards are pure, a
    client has exactly ``shards_per_client`` classes.
    """
    each = clients.shards_per_client
    if num * each > len(labels):
        raise InputError(
            "more shards than examples",
            where="clients.shards_per_client",
            got=f"{num} clients x {each} shards for {len(labels)} examples",
            allowed=f"at most {len(labels) // num} shards a client, "
            f"or at most {len(labels) // each} clients",
        )
    rows = np.concatenate(list(rows_of_classes(labels, generator, shuffle_classes=True)))
    starts = np.arange(num * each + 1) * len(rows) // (num * each)
    owner = deal_distinct(labels[rows[starts[:-1]]], num, generator)
    client = np.empty(len(labels), dtype=np.int64)
    client[rows] = np.repeat(owner, np.diff(starts))
    return client


def deal_distinct(kinds: Int32, num: int, generator: np.random.Generator) -> Int64:
    """Deal sorted cards to ``num`` players in full rounds, never two of a kind if avoidable.

    Within a round all players differ. A kind that reaches from one round into the next goes there
    first to players who do not hold it yet.
    """
    owner = np.empty(len(kinds), dtype=np.int64)
    for start in range(0, len(kinds), num):
        order = generator.permutation(num)
        if start:
            holds = owner[start - num : start][kinds[start - num : start] == kinds[start]]
            order = order[np.argsort(np.isin(order, holds), kind="stable")]
        count = int(np.count_nonzero(kinds[start : start + num] == kinds[start]))
        # Only who goes first was constrained; the rest of the round is shuffled again.
        order[count:] = generator.permutation(order[count:])
        owner[start : start + num] = order
    return owner


def assign_by_rule(rule: Rule, examples: Examples, clients: Clients, seed: int) -> Assignment:
    """One rule over all examples, or inside each domain when ``clients.within_domains``."""
    if clients.within_domains:
        return assign_within_domains(rule, examples, clients, seed)
    num = clients.num or DEFAULT_CLIENTS
    if num > len(examples):
        raise too_many_clients(num, len(examples), len(examples))
    client = rule(examples.labels, num, clients, seeding.generator(seed, "partition"))
    width = max(4, len(str(num - 1)))
    names = tuple(f"client-{k:0{width}d}" for k in range(num))
    return finish(client, names, examples)


def assign_within_domains(
    rule: Rule, examples: Examples, clients: Clients, seed: int, one_each: bool = False
) -> Assignment:
    """Clients dealt to domains as evenly as possible, then ``rule`` inside each domain.

    The first domains get the clients that are left over. Without ``clients.num`` there is one
    client per domain if ``one_each``, else ten, or as many as there are domains if those are more.
    """
    if examples.domains is None:
        raise InputError(
            "these data have no domains",
            where="clients.within_domains" if clients.within_domains else "clients.partition",
            do="Use partition = 'iid', or data.domains = true for a folder of domain folders",
        )
    present, rows_each = np.unique(examples.domains, return_counts=True)
    num = clients.num or (len(present) if one_each else max(DEFAULT_CLIENTS, len(present)))
    if num < len(present):
        raise InputError(
            "fewer clients than domains",
            where="clients.num",
            got=num,
            allowed=f"at least {len(present)}, one per domain",
        )
    clients_each = num // len(present) + (np.arange(len(present)) < num % len(present))
    if (clients_each > rows_each).any():
        smallest = int(rows_each.min())
        feasible = len(present) * smallest + int(rows_each.argmin())
        raise too_many_clients(num, len(examples), feasible)
    client = np.empty(len(examples), dtype=np.int64)
    names: list[str] = []
    for domain, count in zip(present.tolist(), clients_each.tolist(), strict=True):
        rows = np.flatnonzero(examples.domains == domain)
        generator = seeding.generator(seed, "partition", domain)
        client[rows] = len(names) + rule(examples.labels[rows], count, clients, generator)
        name = examples.domain_names[domain]
        names += [name] if count == 1 else [f"{name}-{k}" for k in range(count)]
    return finish(client, tuple(names), examples)


def too_many_clients(num: int, rows: int, feasible: int) -> InputError:
    """The error for more clients than can have an example each."""
    return InputError(
        "more clients than examples to give them",
        where="clients.num",
        got=f"{num} clients for {rows} examples",
        allowed=f"at most {feasible}",
        do=f"Try --set clients.num={feasible}",
    )


def assign_domain(examples: Examples, clients: Clients, seed: int) -> Assignment:
    """Every client in one domain, IID inside it; by default one client per domain."""
    return assign_within_domains(deal_iid, examples, clients, seed, one_each=True)


def assign_natural(examples: Examples, clients: Clients, seed: int) -> Assignment:
    """The clients that came with the data, or that a split file named (see ``split_files``)."""
    if examples.clients is None:
        raise InputError(
            "these data do not say whose each example is",
            where="clients.partition",
            got="'natural'",
            allowed="iid, dirichlet, shards, quantity, domain",
            do="Give the file a column named 'client', or set data.client_pattern for a folder",
        )
    present, client = np.unique(examples.clients, return_inverse=True)
    # A split file does not know of clients that hold nothing.
    fits = clients.num is None or (len(present) <= clients.num and clients.partition == "file")
    if not fits and clients.num != len(present):
        raise InputError(
            "another number of clients than the data or the split file have",
            where="clients.num",
            got=clients.num,
            allowed=f"{len(present)}, or leave it out",
        )
    names = tuple(examples.client_names[k] for k in present.tolist())
    return finish(client.astype(np.int64), names, examples)


def finish(client: Int64, names: tuple[str, ...], examples: Examples) -> Assignment:
    """An assignment with each client's domain; names must be unique."""
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InputError(
            "two clients would have the same name",
            where="clients.partition",
            got=", ".join(twice[:5]),
            do="Rename the domains or clients, or change clients.num",
        )
    return Assignment(client.astype(np.int32), names, client_domains(client, len(names), examples))


def client_domains(client: Int64, num: int, examples: Examples) -> tuple[str, ...]:
    """The one domain of each client's examples, ``"mixed"``, or ``""`` without any."""
    if examples.domains is None:
        return ("",) * num
    low: npt.NDArray[np.int32] = np.full(num, len(examples.domain_names), dtype=np.int32)
    high: npt.NDArray[np.int32] = np.full(num, -1, dtype=np.int32)
    np.minimum.at(low, client, examples.domains)
    np.maximum.at(high, client, examples.domains)
    return tuple(
        "" if b < 0 else examples.domain_names[a] if a == b else MIXED
        for a, b in zip(low.tolist(), high.tolist(), strict=True)
    )


def assign_flwr(examples: Examples, clients: Clients, seed: int) -> Assignment:
    """Any partitioner of flwr-datasets, by name."""
    client, num = assign_flwr_datasets(examples, clients, seeding.key(seed, "partition"))
    width = max(4, len(str(num - 1)))
    return finish(client, tuple(f"client-{k:0{width}d}" for k in range(num)), examples)


def _by(rule: Rule) -> Callable[[Examples, Clients, int], Assignment]:
    return lambda examples, clients, seed: assign_by_rule(rule, examples, clients, seed)


PARTITIONS: Mapping[str, Callable[[Examples, Clients, int], Assignment]] = {
    "iid": _by(deal_iid),
    "dirichlet": _by(deal_dirichlet),
    "dirichlet_capacity": _by(deal_dirichlet_capacity),
    "label_quantity": _by(deal_label_quantity),
    "shards": _by(deal_shards),
    "quantity": _by(deal_quantity),
    "domain": assign_domain,
    "natural": assign_natural,
    "file": assign_natural,
    "flwr_datasets": assign_flwr,
}


def assign_clients(examples: Examples, clients: Clients, seed: int) -> Assignment:
    """Give every example to exactly one client.

    Args:
        examples: N examples.
        clients: which partition, and its options.
        seed: the scenario's; the same seed gives the same assignment.

    Raises:
        InputError: the request cannot be met; the message has the nearest one that can.
    """
    if clients.partition not in PARTITIONS:
        raise unknown_name("partition", clients.partition, PARTITIONS, where="clients.partition")
    return PARTITIONS[clients.partition](examples, clients, seed)
