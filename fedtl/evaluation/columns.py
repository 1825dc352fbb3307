"""What is known of clients only at the end of a run, as columns of the last round's rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedtl.evaluation.advice import FEDERATED, Compared, Counsel
from fedtl.evaluation.calibration import Calibration
from fedtl.evaluation.contributions import Contribution
from fedtl.evaluation.metrics import defined, nullable
from fedtl.evaluation.references import Judgement
from fedtl.results.records import CLASSES, CLIENTS, Complete
from fedtl.types import ClientMetrics, Int64

Values = dict[tuple[str, str], dict[int, Any]]
"""By split and column: each client's value."""


def beside(last_round: int, *known: Values) -> Complete:
    """Fills in columns of the last round's rows; who is not named gets null."""

    def complete(batch: pa.RecordBatch) -> pa.RecordBatch:
        # every batch holds one round and one split: that is how the loop appends them
        if batch.num_rows == 0 or batch["round"][0].as_py() != last_round:
            return batch
        here, clients = batch["split"][0].as_py(), batch["client"].to_pylist()
        for values in known:
            for (split, name), found in values.items():
                if split == here:
                    place = CLIENTS.get_field_index(name)
                    kind = CLIENTS.field(place).type
                    column = pa.array([found.get(client) for client in clients], kind)
                    batch = batch.set_column(place, name, column)
        return batch

    return complete


def of_heads(references: Mapping[str, Judgement]) -> Values:
    """Accuracy and loss of the heads that stand beside the federated one, by name."""
    values: Values = {}
    for name, judgement in references.items():
        for split, each in (("test", judgement.own), ("everyone", judgement.everyone)):
            for metric in ("accuracy", "loss"):
                column = nullable(getattr(each, metric))
                values[split, f"{name}_{metric}"] = _by_client(judgement.clients, column)
    return values


def of_pairs(clients: Int64, compared: Mapping[str, Compared]) -> Values:
    """Discordant answers of heads against the clients' own."""
    values: Values = {}
    for name, found in compared.items():
        before = "" if name == FEDERATED else f"{name}_"
        for split, pairs in (("test", found.home), ("everyone", found.everyone)):
            if pairs is None:
                continue
            judged = pairs.examples > 0
            for word, column in (("beats", pairs.beats), ("loses_to", pairs.loses)):
                values[split, f"{before}{word}_local_only"] = _by_client(
                    clients[judged], column[judged].tolist()
                )
    return values


def of_counsel(told: Counsel) -> Values:
    """p-values, verdict and advice, beside the clients' own tests."""
    columns = {
        "p_value": nullable(told.home.p_value),
        "p_holm": nullable(told.home.p_holm),
        "verdict": told.effects,
        "advice": told.advice,
    }
    return {("test", name): _by_client(told.clients, column) for name, column in columns.items()}


def of_calibration(found: Calibration) -> Values:
    """Calibration error and AUROC, beside the clients' own tests."""
    return {
        ("test", name): _by_client(found.clients, nullable(getattr(found, name)))
        for name in ("calibration_error", "auroc")
    }


def of_contributions(found: Iterable[Contribution]) -> Values:
    """What each client brings, by its statistics."""
    everybody = list(found)
    return {
        ("test", f"contribution_{whose}"): {
            one.client: defined(getattr(one, f"gain_{whose}")) for one in everybody
        }
        for whose in ("own", "others")
    }


def class_table(
    federated: ClientMetrics,
    alone: ClientMetrics | None,
    columns: Mapping[str, Sequence[str]],
    classes: Sequence[str],
    train: npt.NDArray[np.integer] | None,
) -> pa.Table:
    """``classes.parquet``: a row per client and class of which it has an example.

    Args:
        federated: k clients, sorted by id.
        alone: their own heads, or those of some of them; None where there are none.
        columns: the clients' "name" and "domain".
        classes: C names.
        train: training examples [k, C], None where they are not known.
    """
    there = federated.count > 0 if train is None else (federated.count > 0) | (train > 0)
    client, label = np.nonzero(there)
    own: list[int | None] = [None] * len(client)
    if alone is not None:
        places = np.searchsorted(alone.clients, federated.clients[client])
        places = np.minimum(places, len(alone.clients) - 1)
        known = alone.clients[places] == federated.clients[client]
        right = alone.correct[places, label].tolist()
        own = [value if sure else None for value, sure in zip(right, known, strict=True)]
    return pa.Table.from_pydict(
        {
            "client": federated.clients[client],
            **{name: [values[i] for i in client.tolist()] for name, values in columns.items()},
            "class": [classes[c] for c in label.tolist()],
            "train": pa.nulls(len(client), pa.int64()) if train is None else train[client, label],
            "test": federated.count[client, label],
            "correct": federated.correct[client, label],
            "local_only_correct": own,
        },
        schema=CLASSES,
    )


def _by_client(clients: Int64, column: Sequence[Any]) -> dict[int, Any]:
    return dict(zip(clients.tolist(), column, strict=True))
