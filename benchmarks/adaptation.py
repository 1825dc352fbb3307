"""Every way of adapting on real gaps: what it wins, and what it costs.

    uv run python benchmarks/adaptation.py --out DIR [SPLIT ...]     # runs what DIR lacks
    uv run python benchmarks/adaptation.py --out DIR --table         # the table of adaptation.md

Each row is a scenario of ``SPLITS`` with some settings, FedAvg, ``ROUNDS`` rounds, three seeds.
Each run leaves a line in DIR/results.jsonl, and a finished one is not repeated. Aligned features
have another scale, so each kind gets the learning rate of ``RATES`` with the least training loss of
the shared head over everybody on seed 1; the others get that of the plain run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fedtl.build import make_federation, open_data
from fedtl.clients.evaluation import evaluate_clients
from fedtl.errors import FedtlError
from fedtl.interrupts import Interrupts
from fedtl.scenario.load import load_scenario
from fedtl.scenario.schema import Scenario
from fedtl.simulation import run_scenario
from fedtl.terminal import PatientConsole, Terminal

ROUNDS = 15
SEEDS = (1, 2, 3)
RATES = (0.003, 0.01, 0.03)
SPLITS = {
    "pacs-domains": "PACS, four domains",
    "pacs-domains-skew": "PACS, domain x label skew",
    "two-domains": "digits, two domains",
}
ALLOWED = "adaptation.allow_label_skew=true"
MLP = ("head.kind=mlp", "head.hidden=[64]")
ROWS: dict[str, tuple[str, ...]] = {
    "none": (),
    "standardise": ("adaptation.features=standardise",),
    "whiten": ("adaptation.features=whiten",),
    "coral": ("adaptation.features=coral",),
    "standardise, allowed": ("adaptation.features=standardise", ALLOWED),
    "whiten, allowed": ("adaptation.features=whiten", ALLOWED),
    "coral, allowed": ("adaptation.features=coral", ALLOWED),
    "balanced_softmax": ("adaptation.prior=balanced_softmax",),
    "logit_adjustment": ("adaptation.prior=logit_adjustment",),
    "bbse": ("adaptation.prior=bbse",),
    "match": ("adaptation.input=match",),
    "mlp": MLP,
    "mlp, adversarial 0.1": (*MLP, "adaptation.adversarial=0.1"),
    "mlp, adversarial 1": (*MLP, "adaptation.adversarial=1"),
}
ONE_SEED = ("mlp", "mlp, adversarial 0.1", "mlp, adversarial 1")
"""Rows that take minutes: only seed 1; and so ``match`` on PACS, where the trunk runs anew."""


class Study:
    """The results folder."""

    def __init__(self, out: Path) -> None:
        self.path = out / "results.jsonl"
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.done = {tuple(found["key"]): found for found in map(json.loads, lines)}

    def run(self, split: str, row: str, seed: int, sets: Sequence[str]) -> dict[str, Any]:
        """One run's figures, from the file or from a run now."""
        key = (split, row, seed)
        if key not in self.done:
            began = time.perf_counter()
            told = (f"seed={seed}", f"rounds={ROUNDS}", "evaluation.every=1000", *sets)
            wanted = '["local_only"]' if row == "none, chosen" else "[]"
            scenario = load_scenario(split, (f"evaluation.references={wanted}", *told))
            found = {"key": key, "sets": sets, **measured(scenario, self.path.parent / "run")}
            with open(self.path, "a") as file:
                file.write(json.dumps(found) + "\n")
            self.done[key] = json.loads(json.dumps(found))
            print(*key, found.get("refused", found), f"{time.perf_counter() - began:.0f} s")
        return self.done[key]

    def rate(self, split: str, row: str, sets: Sequence[str]) -> str:
        """The learning rate with the least training loss on seed 1."""
        losses = {}
        for rate in RATES:
            setting = f"training.learning_rate={rate}"
            found = self.run(split, f"{row}, {rate:g}", 1, (*sets, setting))
            losses[setting] = found.get("loss", float("inf"))
        return min(losses, key=lambda setting: losses[setting])


def measured(scenario: Scenario, folder: Path) -> dict[str, Any]:
    """Run it and read off what the table needs; refused: why."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with Terminal(PatientConsole(quiet=True)) as silent:
            summary = run_scenario(scenario, folder, silent, Interrupts())
    except FedtlError as error:
        if error.exit_code not in (2, 4):
            raise
        return {"refused": error.line()}
    people = make_federation(open_data(scenario)).population
    head, everybody = load_file(folder / "head.safetensors"), np.arange(people.num_clients)
    trained = evaluate_clients(people, head, everybody, split="train", threads=2)
    final = summary["personal"] or summary["final"]
    alone = summary["references"].get("local_only", {})
    shutil.rmtree(folder)
    return {
        "home": final["accuracy_client_mean"],
        "worst": final["worst_decile_accuracy"],
        "everywhere": final["accuracy_everyone"],
        "alone_home": alone.get("accuracy_client_mean"),
        "alone_worst": alone.get("worst_decile_accuracy"),
        "alone_everywhere": alone.get("accuracy_everyone"),
        "loss": float(trained.loss_sum.sum() / trained.count.sum()),
    }


def study_split(study: Study, split: str) -> None:
    """All rows on one split."""
    plain = study.rate(split, "none", ())
    for row, sets in ROWS.items():
        aligns = "adaptation.features" in "".join(sets)
        if aligns and refused_or_idle(study, split, row, (*sets, plain)):
            continue
        tuned = study.rate(split, row, sets) if aligns else plain
        slow = row in ONE_SEED or (row == "match" and split != "two-domains")
        seeds = SEEDS[:1] if slow else SEEDS
        for seed in seeds:
            study.run(split, f"{row}, chosen", seed, (*sets, tuned))


def refused_or_idle(study: Study, split: str, row: str, sets: Sequence[str]) -> bool:
    """Whether the gate refuses a row, or would not have and need not be told to let it pass."""
    if row.endswith(", allowed"):
        return row.removesuffix(", allowed") not in refusals(study, split)
    return "refused" in study.run(split, row, 1, sets)


def refusals(study: Study, split: str) -> list[str]:
    """Rows that the split's gate refuses."""
    return [row for row in ROWS if "refused" in study.done.get((split, row, 1), {})]


def difference(study: Study, split: str, row: str, figure: str) -> str:
    """Points gained against none (mlp) on the same seeds: mean, and range over several."""
    points = []
    for seed in SEEDS:
        found = study.done.get((split, f"{row}, chosen", seed))
        if found is not None:
            base = "mlp" if row.startswith("mlp, ") else "none"
            before = study.done[split, f"{base}, chosen", seed][figure]
            points.append(100 * (found[figure] - before))
    text = f"{np.mean(points):+.1f}"
    return text + (f" ({min(points):+.1f} to {max(points):+.1f})" if len(points) > 1 else "")


def level(study: Study, split: str, figure: str) -> str:
    """A figure of the plain runs, mean over the seeds, in per cent."""
    found = [study.done[split, "none, chosen", seed][figure] for seed in SEEDS]
    return f"{100 * np.mean(found):.1f}"


FIGURES = ("home", "worst", "everywhere")


def print_table(study: Study, splits: Sequence[str]) -> None:
    """The tables in Markdown."""
    for split in splits:
        print(f"\n### {SPLITS[split]} (`{split}`)\n")
        print("| | at home, mean of clients | worst tenth of clients | everybody's tests |")
        print("|---|---|---|---|")
        alone = (level(study, split, f"alone_{figure}") for figure in FIGURES)
        print(f"| each alone | {' | '.join(alone)} |")
        print(f"| **none** | {' | '.join(level(study, split, figure) for figure in FIGURES)} |")
        for row in list(ROWS)[1:]:
            if (split, f"{row}, chosen", 1) in study.done:
                cells = [difference(study, split, row, figure) for figure in FIGURES]
                print(f"| {row} | {' | '.join(cells)} |")
            elif row in refusals(study, split):
                skew = study.done[split, row, 1]["refused"].partition("label distance of ")[2][:5]
                print(f"| {row} | refused at a label distance of {skew} | | |")


def main() -> None:
    """Run, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("splits", nargs="*", default=list(SPLITS), metavar="SPLIT")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    study = Study(options.out)
    if options.table:
        print_table(study, options.splits)
        return
    for split in options.splits:
        study_split(study, split)


if __name__ == "__main__":
    main()
