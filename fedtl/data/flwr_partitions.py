"""The partitioners of flwr-datasets over labels, domains and natural clients in memory."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedtl.data.examples import Examples
from fedtl.errors import InputError, unknown_name
from fedtl.scenario.schema import Clients
from fedtl.types import Int64

WHERE = "clients.partitioner"
DEFAULT_CLIENTS = 10
SPLITS_COLUMNS = ("VerticalEvenPartitioner", "VerticalSizePartitioner")
"""They give clients other columns of the same rows, which is another problem."""
NOT_BY_NAME = ("Partitioner", "IdToSizeFncPartitioner", *SPLITS_COLUMNS)


def assign_flwr_datasets(examples: Examples, clients: Clients, key: int) -> tuple[Int64, int]:
    """Run one partitioner and read back who got which row.

    The partitioner sees a data set with the columns ``label``, ``domain`` and ``client`` (as far as
    the data have them). ``num_partitions``, ``partition_by`` and ``seed`` are filled in where it
    takes them and ``clients.parameters`` does not give them. Its own retries are bounded (ten).

    Returns:
        Client id of every row, int64 [N], and the number of clients.

    Raises:
        InputError: unknown partitioner, wrong parameters, it gave up, or it left rows over.
    """
    from datasets import Dataset
    from flwr_datasets import partitioner as flwr

    usable = [name for name in flwr.__all__ if name not in NOT_BY_NAME]
    name = str(clients.partitioner)
    if name not in usable:
        raise unknown_name("flwr-datasets partitioner", name, usable, WHERE)
    kind = getattr(flwr, name)
    arguments = complete(inspect.signature(kind).parameters, clients, key)
    if arguments.get("num_partitions", 1) > len(examples):
        raise InputError(
            "more clients than examples",
            where="clients.num",
            got=arguments["num_partitions"],
            allowed=f"at most {len(examples)}",
        )
    # Several of them cut the rows as they come: FederatedDataset shuffles first, and so do we.
    rows = np.random.Generator(np.random.Philox(key=key)).permutation(len(examples))
    columns: dict[str, Any] = {"row": rows, "label": examples.labels[rows]}
    if examples.domains is not None:
        columns["domain"] = np.asarray(examples.domain_names)[examples.domains[rows]]
    if examples.clients is not None:
        columns["client"] = np.asarray(examples.client_names)[examples.clients[rows]]
    try:
        # It warns at every retry; the last one is an error and is shown.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            partitioner = kind(**arguments)
            partitioner.dataset = Dataset.from_dict(columns)
            num = int(partitioner.num_partitions)
            parts = [np.asarray(partitioner.load_partition(k)["row"][:]) for k in range(num)]
    except Exception as error:  # another package's code: any kind of error is the user's answer
        raise InputError(
            f"{clients.partitioner} of flwr-datasets gave up: {str(error) or type(error).__name__}",
            where=WHERE,
            got=f"clients.parameters = {clients.parameters}",
            do="Change clients.parameters",
        ) from error
    dealt = np.concatenate(parts).astype(np.int64)
    times = np.bincount(dealt, minlength=len(examples))
    if (times != 1).any():
        raise InputError(
            f"{clients.partitioner} does not give every example to exactly one client",
            where=WHERE,
            got=f"{(times == 0).sum()} to nobody, {(times > 1).sum()} to several",
            do="Change clients.parameters, or use one of fedtl's own partitions",
        )
    client = np.empty(len(examples), dtype=np.int64)
    client[dealt] = np.repeat(np.arange(num), [len(part) for part in parts])
    return client, num


def complete(
    accepted: Mapping[str, inspect.Parameter], clients: Clients, key: int
) -> dict[str, Any]:
    """The partitioner's keyword arguments: the user's, and what the scenario already says."""
    given = dict(clients.parameters)
    for name in given:
        if name not in accepted:
            raise unknown_name("parameter", name, accepted, f"clients.parameters.{name}")
    if clients.num not in (None, given.get("num_partitions", clients.num)):
        raise InputError(
            "two different numbers of clients",
            where="clients.parameters.num_partitions",
            got=f"{given['num_partitions']}, and clients.num = {clients.num}",
            do="Leave one of them out",
        )
    natural = "NaturalId" in str(clients.partitioner)
    defaults = {
        "num_partitions": clients.num or DEFAULT_CLIENTS,
        "partition_by": "client" if natural else "label",
        "seed": key % 2**32,
    }
    arguments = {name: value for name, value in defaults.items() if name in accepted} | given
    if "distribution_array" in arguments:  # the one parameter that may not be a list
        arguments["distribution_array"] = np.asarray(arguments["distribution_array"])
    missing = [
        name
        for name, parameter in accepted.items()
        if parameter.default is inspect.Parameter.empty and name not in arguments
    ]
    if missing:
        raise InputError(
            f"{clients.partitioner} needs more parameters",
            where="clients.parameters",
            got=", ".join(sorted(given)) or "none",
            allowed=", ".join(missing),
        )
    return arguments
