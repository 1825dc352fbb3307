"""Every strategy on real pictures: accuracy, worst clients, rounds, bytes and seconds.

    uv run python benchmarks/strategies.py --out DIR             # runs what DIR lacks
    uv run python benchmarks/strategies.py --out DIR --table     # the tables of strategies.md

Three splits (``scenarios/strategies-*.toml``), seeds 1, 2 and 3, all runs in one process, one after
the other; each leaves a line in DIR/results.jsonl, and a finished one is not repeated. CIFAR-10 is
written as .npz where the scenario looks for it, from ``--cifar``: data_batch_1.png and
test_batch.png (rows are images) with train_lables.json and test_lables.json beside them.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file
from scipy.special import logsumexp

from fedtl import machine
from fedtl.build import open_data, population_of
from fedtl.errors import FedtlError
from fedtl.interrupts import Interrupts
from fedtl.ready_features import make_features
from fedtl.scenario.compatibility import CLOSED_FORMS
from fedtl.scenario.load import load_scenario
from fedtl.scenario.schema import Scenario
from fedtl.simulation import run_scenario
from fedtl.strategies import STRATEGIES
from fedtl.terminal import PatientConsole, Terminal
from fedtl.types import Head, Population

SEEDS = (1, 2, 3)
SPLITS = {
    "domains": "strategies-pacs-domains",
    "skew": "strategies-pacs-skew",
    "cifar10": "strategies-cifar10",
}
RATES = (0.001, 0.003, 0.01, 0.03)
"""Tried with FedAvg on seed 1 of each split; the least pooled training loss after all rounds wins,
so no test example has a say. Every strategy gets that rate, but for those of OWN."""
OWN: dict[str, tuple[str, tuple[float, ...]]] = {
    "mime": ("training.learning_rate", (0.0001, 0.0003, 0.001, 0.003)),
    "fedadagrad": ("strategy.server_learning_rate", (0.003, 0.01, 0.03, 0.1)),
    "fedadam": ("strategy.server_learning_rate", (0.003, 0.01, 0.03, 0.1)),
    "fedyogi": ("strategy.server_learning_rate", (0.003, 0.01, 0.03, 0.1)),
    "feddyn": ("strategy.alpha", (0.1, 1.0, 10.0)),
}
"""Strategies with a parameter that is chosen the same way, and what it is chosen from."""
LIARS = {"domains": 1, "skew": 20, "cifar10": 20}
"""f of the robust rules; a fifth of the clients, or one of four."""
RULES = (
    "fedavg", "krum", "multikrum", "bulyan", "median", "trimmed_mean", "geometric_median",
    "fltrust", "norm_clip",
)  # fmt: skip
ATTACKS = {
    "sign flip": ("attack.kind=sign_flip", "attack.scale=5.0"),
    "ALIE": ("attack.kind=alie",),
    "label flip": ("attack.kind=label_flip",),
    "backdoor": ("attack.kind=backdoor",),
}
ALONG = ("fed3r", "fedavg", "scaffold")
MLP = ("head.kind=mlp", "head.hidden=[64]", "rounds=10")
SHARED_LAYERS = ("fedavg", "finetune", "ditto", "fedper", "fedrep", "lgfedavg", "fedbabu")
REACHED = 0.95
"""Of the pooled optimum's accuracy."""
FULL_BATCH = (
    "training.batch_size=100000", "training.local_epochs=10", "training.weight_decay=0.01",
    "evaluation.every=1000",
)  # fmt: skip
LENGTHS = (30, 100, 300, 1000)
STEP = "training.learning_rate=0.01"
"""At 0.03 FedAvg is faster at first, but some client overshoots: SCAFFOLD and FedDyn stall."""
TOWARDS: dict[str, tuple[str, ...]] = {
    "FedAvg": (),
    "FedProx, mu 1": ("strategy.name=fedprox", "strategy.mu=1.0"),
    "SCAFFOLD": ("strategy.name=scaffold",),
    "FedDyn, alpha 0.1": ("strategy.name=feddyn", "strategy.alpha=0.1"),
    "FedDyn, alpha 1": ("strategy.name=feddyn", "strategy.alpha=1.0"),
    "L-BFGS": ("strategy.name=lbfgs",),
}


@dataclass(frozen=True)
class Case:
    """One run: a row of a table and a seed, with what is set in the split's scenario."""

    part: str
    split: str
    row: str
    seed: int
    sets: tuple[str, ...] = ()
    references: bool = False

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What a finished run is known by."""
        return self.part, self.split, self.row, self.seed

    def scenario(self) -> Scenario:
        """As a user would have typed it."""
        wanted = '["local_only", "centralised", "ridge"]' if self.references else "[]"
        sets = (f"seed={self.seed}", f"evaluation.references={wanted}", *self.sets)
        return load_scenario(SPLITS[self.split], sets)


class Study:
    """The results folder, and what follows from the results that are there."""

    def __init__(self, out: Path) -> None:
        self.path = out / "results.jsonl"
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.done: dict[tuple[Any, ...], dict[str, Any]] = {}
        for line in lines:
            found = json.loads(line)
            self.done[tuple(found["key"])] = found

    def run(self, case: Case) -> dict[str, Any]:
        """The case's result, from the file or from a run now."""
        if case.key in self.done:
            return self.done[case.key]
        began = time.perf_counter()
        found = {"key": case.key, "sets": case.sets, **measured(case, self.path.parent / "run")}
        with open(self.path, "a") as file:
            file.write(json.dumps(found) + "\n")
        self.done[case.key] = json.loads(json.dumps(found))
        told = found.get("refused") or f"{100 * found['accuracy']:.1f} %"
        print(f"{' '.join(map(str, case.key))}: {told}, {time.perf_counter() - began:.1f} s")
        return self.done[case.key]

    def chosen(
        self, split: str, row: str, key: str, values: tuple[float, ...], sets: tuple[str, ...]
    ) -> str:
        """The setting with the least pooled training loss on seed 1."""
        losses = {}
        for value in values:
            case = Case("tuning", split, f"{row} {key}={value:g}", 1, (*sets, f"{key}={value}"))
            loss = self.run(case).get("loss")
            losses[f"{key}={value}"] = float("inf") if loss is None else float(loss)
        return min(losses, key=lambda setting: losses[setting])

    def rate(self, split: str) -> str:
        """The split's learning rate."""
        return self.chosen(split, "fedavg", "training.learning_rate", RATES, ())


def measured(case: Case, folder: Path) -> dict[str, Any]:
    """Run it and read off the folder what the tables need; refused or stopped: why."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        scenario = case.scenario()
        with Terminal(PatientConsole(quiet=True)) as silent:
            summary = run_scenario(scenario, folder, silent, Interrupts())
    except FedtlError as error:
        if error.exit_code not in (2, 4):
            raise
        return {"refused": error.line()}
    rounds = pq.read_table(folder / "rounds.parquet").to_pydict()
    seconds = summary["seconds"]
    personal = summary["personal"] or {}
    found = {
        "accuracy": summary["final"]["accuracy"],
        "everyone": summary["final"]["accuracy_everyone"],
        "worst": summary["final"]["worst_decile_accuracy"],
        "backdoor": summary["final"].get("backdoor_success"),
        "personal": personal.get("accuracy"),
        "personal_everyone": personal.get("accuracy_everyone"),
        "personal_worst": personal.get("worst_decile_accuracy"),
        "references": summary["references"],
        "curve": rounds["accuracy"],
        "moved": [a + b for a, b in zip(rounds["bytes_up"], rounds["bytes_down"], strict=True)],
        "train_seconds": seconds["train"],
        "judge_seconds": None if case.references else seconds["references"],
    }
    head = load_file(folder / "head.safetensors")
    if set(head) == {"weight", "bias"}:
        found["loss"] = pooled_loss(people_of(scenario), head, scenario.training.weight_decay)
    shutil.rmtree(folder)
    return found


@functools.lru_cache(maxsize=1)
def _people(name: str, seed: int, alpha: float) -> Population:
    chosen = load_scenario(name, [f"seed={seed}", f"clients.alpha={alpha}"])
    return population_of(make_features(open_data(chosen)))


def people_of(scenario: Scenario) -> Population:
    """Everybody's features; those of the last split and seed are at hand."""
    return _people(scenario.name, scenario.seed, scenario.clients.alpha)


def pooled_loss(people: Population, head: Head, decay: float) -> float:
    """What ``centralised`` minimises: mean cross-entropy + decay / 2 |w|^2, over everybody."""
    total, rows = 0.0, np.sort(people.train.index)
    for first in range(0, len(rows), 4096):
        part = rows[first : first + 4096]
        x = people.features[part].astype(np.float64)
        scores = x @ head["weight"].T.astype(np.float64) + head["bias"]
        right = scores[np.arange(len(part)), people.labels[part]]
        total += float((logsumexp(scores, axis=1) - right).sum())
    squares = sum(float(np.square(tensor, dtype=np.float64).sum()) for tensor in head.values())
    return total / len(rows) + decay / 2 * squares


def settings(name: str, split: str, people: Population) -> tuple[str, ...]:
    """What a strategy needs to be told on a split."""
    sets = [f"strategy.name={name}"]
    if name in ("krum", "multikrum", "bulyan"):
        sets.append(f"strategy.malicious={LIARS[split]}")
    elif name == "trimmed_mean":
        sets.append(f"strategy.trim={LIARS[split] / people.num_clients}")
    elif name == "fltrust":
        sets.append(f"strategy.root={people.names[int(np.argmax(people.train.counts))]}")
    elif name in ("fed3r", "afl"):
        sets.append("strategy.keep_statistics=false")
    return tuple(sets)


def main_cases(study: Study, split: str) -> Iterator[Case]:
    """All strategies on one split."""
    rate = study.rate(split)
    tuned = {
        name: study.chosen(split, name, key, values, (rate, f"strategy.name={name}"))
        for name, (key, values) in OWN.items()
    }
    adam = tuned["fedadam"].partition("=")[2]
    for seed in SEEDS:
        people = people_of(Case("", split, "", seed).scenario())
        yield Case("main", split, "fedavg", seed, (rate,), references=True)
        for name in STRATEGIES:
            own = (tuned[name],) if name in tuned else ()
            sets = (rate, *settings(name, split, people), *own)
            if name == "flower":
                parameters = f"strategy.parameters={{eta = {adam}, beta_1 = 0.9, tau = 0.001}}"
                sets = (*sets, "strategy.class=FedAdam", parameters)
            if name != "fedavg":
                row = "flower, FedAdam" if name == "flower" else name
                yield Case("main", split, row, seed, sets)
        yield Case("main", split, "fed3r, then fedavg", seed, (rate, "head.initial=fed3r"))
        for kind in ("top_k", "int8", "sign"):
            yield Case("main", split, f"fedavg, {kind}", seed, (rate, f"compression.kind={kind}"))


def attack_cases(study: Study) -> Iterator[Case]:
    """Every robust rule under every attack, one seed."""
    rate, people = study.rate("skew"), people_of(Case("", "skew", "", 1).scenario())
    for name in RULES:
        for attack, sets in ATTACKS.items():
            told = (rate, *settings(name, "skew", people), *sets)
            yield Case("attacks", "skew", f"{name}, {attack}", 1, told)


def optimum_cases(study: Study) -> Iterator[Case]:
    """The way to the pooled optimum, in full batches."""
    yield Case("optimum", "skew", "references", 1, (*FULL_BATCH, "rounds=1"), references=True)
    for rounds in LENGTHS:
        for row, sets in TOWARDS.items():
            told = (STEP, *FULL_BATCH, *sets, f"rounds={rounds}")
            yield Case("optimum", "skew", f"{row}, {rounds}", 1, told)


def alpha_cases(study: Study) -> Iterator[Case]:
    """Clients less and less alike."""
    rate = study.rate("cifar10")
    for seed in SEEDS:
        for alpha in (1.0, 0.1, 0.01):
            for name in ALONG:
                sets = (rate, f"strategy.name={name}", f"clients.alpha={alpha}")
                kept = ("strategy.keep_statistics=false",) if name == "fed3r" else ()
                yield Case("alpha", "cifar10", f"{name}, {alpha:g}", seed, (*sets, *kept))


def mlp_cases(study: Study) -> Iterator[Case]:
    """Strategies that share some layers, and those beside them; half a minute each, so one seed."""
    rate = study.rate("domains")
    for name in SHARED_LAYERS:
        yield Case("mlp", "domains", name, 1, (*MLP, rate, f"strategy.name={name}"))


PARTS: dict[str, Callable[[Study], Iterator[Case]]] = {
    **{split: functools.partial(main_cases, split=split) for split in SPLITS},
    "attacks": attack_cases,
    "optimum": optimum_cases,
    "alpha": alpha_cases,
    "mlp": mlp_cases,
}


def write_cifar10(source: Path, target: Path) -> None:
    """The first 10,000 training and 5,000 test images as one .npz, unless it is there."""
    if target.is_file():
        return
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    x, y = [], []
    for images, labels, count in (
        ("data_batch_1.png", "train_lables.json", 10_000),
        ("test_batch.png", "test_lables.json", 5_000),
    ):
        x.append(np.asarray(Image.open(source / images)).reshape(-1, 32, 32, 3)[:count])
        y.append(np.array(json.loads((source / labels).read_text())[:count]))
    split = np.repeat(["train", "test"], [len(part) for part in y])
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez(target, x=np.concatenate(x), y=np.concatenate(y), split=split)


def values(found: list[dict[str, Any]], name: str) -> list[float]:
    """One figure of all seeds that have it."""
    return [one[name] for one in found if one.get(name) is not None]


def spread(numbers: list[float]) -> str:
    """Mean and range, in per cent."""
    if not numbers:
        return "-"
    mean = f"{100 * np.mean(numbers):.1f}"
    if len(numbers) == 1:
        return mean
    return f"{mean} ({100 * min(numbers):.1f} to {100 * max(numbers):.1f})"


def reached(one: dict[str, Any], bar: float) -> tuple[int, float] | None:
    """Rounds and megabytes, up and down, after which the shared head is that accurate."""
    for place, accuracy in enumerate(one["curve"]):
        if accuracy is not None and accuracy >= bar:
            return place + 1, sum(one["moved"][: place + 1]) / 1e6
    return None


def amount(megabytes: float) -> str:
    """Two or three digits."""
    return f"{megabytes:,.0f}" if megabytes >= 10 else f"{megabytes:.2g}"


def main_table(study: Study, split: str) -> None:
    """All strategies on one split."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for key, found in study.done.items():
        if key[:2] == ("main", split):
            rows.setdefault(key[2], []).append(found)
    base = {one["key"][3]: one for one in rows["fedavg"]}
    pooled = {seed: one["references"]["centralised"] for seed, one in base.items()}
    print("| | own tests | worst tenth | own heads | excess loss | rounds | MB | time |")
    print("|---|---|---|---|---|---|---|---|")
    for name in ("local_only", "centralised", "ridge"):
        found = [one["references"][name] for one in base.values()]
        own, worst = values(found, "accuracy"), values(found, "worst_decile_accuracy")
        shown = {"local_only": "each alone", "centralised": "**pooled optimum**"}
        print(f"| {shown.get(name, 'pooled ridge')} | {spread(own)} | {spread(worst)} | | | | | |")
    for row, found in rows.items():
        if "refused" in found[0]:
            why = found[0]["refused"].partition(". ")[0].partition(": ")[2]
            print(f"| {row} | not possible: {why} | | | | | | |")
            continue
        cells = [spread(values(found, "accuracy")), spread(values(found, "worst"))]
        whole = found[0]["curve"][-1] is not None  # else only clients have something to judge
        cells = cells if whole else ["-", "-"]
        cells.append(spread(values(found, "personal")) if found[0]["personal"] else "")
        # a closed form minimises another loss
        excess = [
            one["loss"] - pooled[one["key"][3]]["train_loss"] for one in found if "loss" in one
        ]
        cells.append(
            f"{np.mean(excess):.2g}" if whole and excess and row not in CLOSED_FORMS else ""
        )
        ends = [reached(one, REACHED * pooled[one["key"][3]]["accuracy"]) for one in found]
        if all(end is not None for end in ends):
            cells.append(f"{np.mean([end[0] for end in ends if end]):.3g}")
            cells.append(amount(float(np.mean([end[1] for end in ends if end]))))
        else:
            never = sum(end is None for end in ends)
            missed = (
                "not reached" if never == len(ends) else f"not reached in {never} of {len(ends)}"
            )
            cells += [missed if whole else "-", ""]
        taken = min(one["train_seconds"] + (one["judge_seconds"] or 0) for one in found)
        cells.append(f"{taken / min(one['train_seconds'] for one in base.values()):.2g}")
        print(f"| {row} | {' | '.join(cells)} |")


def print_tables(study: Study) -> None:
    """Everything, as markdown."""
    print(f"{machine.cpu_model()}, {machine.allowed_cores()} cores\n")
    for split in SPLITS:
        print(f"\n## {split}: {study.rate(split)}")
        for name, (key, grid) in OWN.items():
            sets = (study.rate(split), f"strategy.name={name}")
            print(f"{name}: {study.chosen(split, name, key, grid, sets)}")
        main_table(study, split)
    print("\n## mlp\n\n| | shared head | own heads | own heads, everybody's |\n|---|---|---|---|")
    for name in SHARED_LAYERS:
        found = [study.done["mlp", "domains", name, 1]]
        shared = spread(values(found, "accuracy")) if found[0]["curve"][-1] is not None else "-"
        own, abroad = values(found, "personal"), values(found, "personal_everyone")
        print(f"| {name} | {shared} | {spread(own)} | {spread(abroad)} |")
    print(f"\n## attacks\n\n| | no liars | {' | '.join(ATTACKS)} | backdoor's success |")
    print("|---|---|---|---|---|---|---|")
    for name in RULES:
        calm = study.done["main", "skew", name, 1]
        found = [study.done["attacks", "skew", f"{name}, {attack}", 1] for attack in ATTACKS]
        cells = [f"{100 * one['accuracy']:.1f}" for one in (calm, *found)]
        print(f"| {name} | {' | '.join(cells)} | {100 * found[-1]['backdoor']:.1f} |")
    print("\n## alpha\n\n| | 1 | 0.1 | 0.01 |\n|---|---|---|---|")
    for name in ALONG:
        cells = [
            spread([study.done["alpha", "cifar10", f"{name}, {a}", s]["accuracy"] for s in SEEDS])
            for a in ("1", "0.1", "0.01")
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    best = study.done["optimum", "skew", "references", 1]["references"]["centralised"]["train_loss"]
    print(f"\n## optimum: pooled loss {best:.6f}\n\n| | {' | '.join(map(str, LENGTHS))} |")
    print("|---|---|---|---|---|")
    for row in TOWARDS:
        keys = [("optimum", "skew", f"{row}, {rounds}", 1) for rounds in LENGTHS]
        found = [study.done.get(key, {}) for key in keys]
        cells = [f"{one['loss'] - best:.1e}" if "loss" in one else "-" for one in found]
        print(f"| {row} | {' | '.join(cells)} |")


def main() -> None:
    """Run what is missing, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl")
    parser.add_argument("--cifar", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default all")
    parser.add_argument("--table", action="store_true", help="print the tables")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    study = Study(arguments.out)
    if arguments.table:
        print_tables(study)
        return
    wanted = arguments.part or list(PARTS)
    if set(wanted) & {"cifar10", "alpha"}:
        path = load_scenario(SPLITS["cifar10"]).data.path
        assert path is not None
        write_cifar10(arguments.cifar, Path(path))
    for part in wanted:
        for case in PARTS[part](study):
            study.run(case)


if __name__ == "__main__":
    main()
