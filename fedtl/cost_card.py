"""What a run cost: passes over the data, float operations, bytes, and an estimate of its energy.

Passes and operations are counted, of the federated training alone; seconds and energy are of the
whole run, with whatever it was compared with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedtl.results.records import RecordStream
from fedtl.scenario.schema import Scenario
from fedtl.strategies import tasks_of
from fedtl.transfer.flops import tail_flops
from fedtl.types import TAIL, Head, Tail

JOULES_PER_WH = 3600


@dataclass(frozen=True)
class Meter:
    """Runs from the first round on.

    Attributes:
        wall, cpu: when it was started, seconds; ``cpu`` of all threads of this process.
    """

    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)

    def core_seconds(self, scenario: Scenario, threads: int, seconds: Mapping[str, float]) -> float:
        """Cores times seconds that a simulation was at work.

        Args:
            seconds: ``extract`` and ``total`` of the summary; what ``total`` has beside this call
                was spent before the run was resumed.
        """
        here = time.perf_counter() - self.wall
        before = max(0.0, seconds["total"] - here)
        measured = time.process_time() - self.cpu if scenario.engine.kind == "local" else None
        return before * threads + (here * threads if measured is None else measured)


@dataclass(frozen=True)
class Work:
    """What there was to do.

    Attributes:
        backbone: of the summary; ``through_trunk`` and ``flops`` where they are known.
        rows: examples with features, with all their views; None where nobody knows.
        tail: what stood between cut and head.
        head: all that was trained.
        asked: training examples of the clients that were asked, over all rounds.
    """

    backbone: Mapping[str, Any]
    rows: int | None
    tail: Tail | None
    head: Head
    asked: int


def asked_examples(clients: RecordStream) -> int:
    """Training examples of the clients asked in each round, over all rounds of a run's records."""
    table = clients.read()
    train = table.column("split").to_numpy(zero_copy_only=False) == "train"
    return int(table.column("examples").to_numpy(zero_copy_only=False)[train].sum())


def training_flops(head: Head, tail: Tail | None) -> float:
    """Of one example, forward and backward, a multiply-add being two.

    A layer's backward pass is two forward ones: a gradient for its weights, one for what it is
    given. The first trained layer needs no gradient for what it is given.
    """
    own = {name: t for name, t in head.items() if not name.startswith(TAIL)}
    sizes = [t.size for name, t in own.items() if t.ndim == 2]
    first = next((t.size for name, t in own.items() if name == "hidden.0.weight"), sum(sizes))
    spared = 2.0 * first if tail is None else 0.0
    return 6.0 * sum(sizes) - spared + 3.0 * tail_flops(tail)


def cost_card(
    scenario: Scenario,
    work: Work,
    meter: Meter,
    summary: Mapping[str, Any],
) -> dict[str, Any]:
    """The summary's ``cost``, as JSON values; what is not known is None, and said.

    Args:
        summary: with ``seconds``, ``bytes_up``, ``bytes_down``, ``device`` and ``threads``.
    """
    report, real = scenario.report, work.rows is None
    through, trunk = work.backbone.get("through_trunk"), work.backbone.get("flops")
    trains = "train" in tasks_of(scenario)
    epochs = scenario.training.local_epochs
    # what stands behind the cut at real clients is not here to be counted
    counted = trains and (work.tail is not None or not any(n.startswith(TAIL) for n in work.head))
    training = work.asked * epochs * training_flops(work.head, work.tail) if counted else None
    now = None if through is None or (trunk is None and through) else (trunk or 0.0) * through
    cores: float | None = None
    if not real and summary["device"] == "cpu":
        cores = meter.core_seconds(scenario, int(summary["threads"]), summary["seconds"])
    energy = None if cores is None else cores * report.watts_per_core / JOULES_PER_WH
    return {
        "passes": {
            "trunk": through,
            "trunk_when_made": work.rows if through is not None else None,
            "epochs": epochs if trains else None,
            "examples_trained": work.asked * epochs if trains else work.asked,
        },
        "flops": {
            "trunk": now,
            "trunk_when_made": None if trunk is None or real else trunk * int(work.rows or 0),
            "training": training,
        },
        "seconds": summary["seconds"]["total"],
        "core_seconds": cores,
        "bytes": summary["bytes_up"] + summary["bytes_down"],
        "bytes_on_disk": work.backbone.get("num_bytes"),
        "energy_wh": energy,
        "co2_g": None if energy is None else energy / 1000 * report.grams_per_kwh,
        "assumptions": _assumptions(scenario, real, trains, trunk, cores),
    }


def _assumptions(
    scenario: Scenario, real: bool, trains: bool, trunk: float | None, cores: float | None
) -> list[str]:
    report = scenario.report
    lines = [
        "operations are those of products of matrices and convolutions, a multiply-add is two; "
        "of the federated training, not of the models it is compared with"
    ]
    if trains:
        lines.append(
            "every client that was asked is taken to train all its examples in every local epoch"
        )
        if scenario.transfer.warmup_rounds or scenario.transfer.unfreeze_every:
            lines.append("what rests behind the cut in a round is counted as if it were trained")
    else:
        lines.append("what sums of statistics or gradients take is not counted")
    if trunk is None:
        lines.append(
            "the trunk's operations are not known: they were not counted with these weights"
        )
    if real:
        lines.append("what the clients' machines took is not known here")
    elif cores is None:
        lines.append("energy is not estimated where a GPU works")
    else:
        busy = (
            "core seconds are this process's own, but for features and what was done before a "
            "resume, where all threads are taken to be busy"
            if scenario.engine.kind == "local"
            else "all workers are taken to be busy all the time"
        )
        lines += [
            busy,
            f"energy is core seconds x {report.watts_per_core:g} W (report.watts_per_core); "
            "memory, disks, network and cooling are left out",
            f"CO2 is energy x {report.grams_per_kwh:g} g/kWh (report.grams_per_kwh)",
        ]
    return lines


def cost_line(cost: Mapping[str, Any] | None) -> str | None:
    """The card in a sentence; None where there is none."""
    if not cost:
        return None
    flops, told = cost["flops"], []
    if cost["passes"]["trunk"] is not None:
        told.append(f"{cost['passes']['trunk']:,} examples through the trunk")
    known = {name: flops[name] for name in ("trunk", "training") if flops[name]}
    if known:
        told.append(f"{flops_text(sum(known.values()))} in {' and '.join(known)}")
    if cost["energy_wh"] is not None:
        energy, co2 = figures(cost["energy_wh"]), figures(cost["co2_g"])
        told.append(f"about {energy} Wh and {co2} g of CO2 (estimates)")
    return "Cost: " + ", ".join(told) if told else None


def flops_text(count: float) -> str:
    """Float operations in a unit that reads well."""
    for unit in ("MFLOP", "GFLOP", "TFLOP", "PFLOP"):
        count /= 1e6 if unit == "MFLOP" else 1e3
        if count < 1000 or unit == "PFLOP":
            return f"{figures(count)} {unit}"
    raise AssertionError("unreachable")


def figures(value: float) -> str:
    """Two figures of small numbers, all before the point of large ones."""
    return f"{value:,.0f}" if value >= 100 else f"{float(f'{value:.2g}'):g}"
