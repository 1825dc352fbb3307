"""The studies of docs/tables-and-sound.md: hospitals, machines, speakers, three seeds each.

Domains are left out in turn on the first seed only.

    uv run python benchmarks/tables_and_sound.py --out DIR [STUDY ...]   # runs what DIR lacks
    uv run python benchmarks/tables_and_sound.py --out DIR --table       # the tables

Every row is a scenario with some settings, run as anybody can type it. ``heart-flamby`` are the
rows, columns and split of FLamby's Fed-Heart-Disease, written to DIR from the same csv.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from sklearn.model_selection import train_test_split

ROOT = Path(__file__).resolve().parents[1]
HEART = ROOT.parent / "shared/data/heart/heart.csv"
SEEDS = 3
FLAMBY_NUMBERS = ["age", "trestbps", "chol", "thalach", "oldpeak"]
FLAMBY_NAMES = ["sex", "cp", "fbs", "restecg", "exang"]

ROWS: dict[str, dict[str, tuple[str, ...]]] = {
    "heart-hospitals": {
        "each by its own means": (),
        "by everybody's means": ("data.scaling=federated",),
        "own means, Fourier features": ("backbone.name=fourier", "training.learning_rate=0.1"),
        "own means, Fed3R": ("strategy.name=fed3r", "rounds=1"),
    },
    "heart-flamby": {
        "each by its own means": (),
        "by everybody's means": ("data.scaling=federated",),
    },
    "machine-maintenance": {
        "Fourier features": (),
        "columns as they are": ("backbone.name=identity", "training.learning_rate=0.1"),
        "Fourier, balanced softmax": ("adaptation.prior=balanced_softmax",),
        "Fourier, everybody's means": ("data.scaling=federated",),
    },
    "spoken-digits": {"linear head": ()},
}
LEFT_OUT = ("heart-hospitals", "machine-maintenance", "spoken-digits")


def write_flamby(path: Path) -> None:
    """FLamby's 740 patients: three columns dropped, then every row with a gap; its own split."""
    patients = pd.read_csv(HEART).drop(columns=["slope", "ca", "thal"]).dropna()
    parts = []
    for _, hospital in patients.groupby("hospital", sort=False):
        counts = hospital["disease"].value_counts()
        enough = len(counts) > 1 and (counts > 2).all()
        _, test = train_test_split(
            range(len(hospital)),
            test_size=1 - 0.66,
            train_size=0.66,
            random_state=43,
            stratify=hospital["disease"] if enough else None,
        )
        marked = hospital.assign(split="train")
        marked.iloc[test, -1] = "test"
        parts.append(marked)
    pd.concat(parts).to_csv(path, index=False)


def scenario_of(study: str, out: Path) -> tuple[str, list[str]]:
    """The file of a study, and what is set in all its rows."""
    if study != "heart-flamby":
        return str(ROOT / "scenarios" / f"{study}.toml"), []
    table = out / "heart-flamby.csv"
    write_flamby(table)
    text = (ROOT / "scenarios/heart-hospitals.toml").read_text()
    kept = [line for line in text.splitlines() if line.split(" ")[0] not in ("slope", "thal")]
    path = out / "heart-flamby.toml"
    path.write_text("\n".join(kept) + "\n")
    names = f"data.categorical={json.dumps(FLAMBY_NAMES)}"
    return str(path), [
        f"data.path={table}",
        f"data.numeric={json.dumps(FLAMBY_NUMBERS)}",
        names,
        "name=heart-flamby",
    ]


def run(study: str, out: Path) -> None:
    """Every row of a study that is not there yet."""
    scenario, common = scenario_of(study, out)
    for number, sets in enumerate(ROWS[study].values()):
        place = out / study / str(number)
        words = [word for one in (*common, *sets) for word in ("--set", one)]
        if not (place / f"seed-{SEEDS}" / "summary.json").is_file():
            fedtl("run", scenario, *words, "--seeds", str(SEEDS), "--out", str(place))
    if study in LEFT_OUT:
        found = out / study / "lodo.json"
        if not found.is_file():
            place = out / study / "lodo"
            told = fedtl("lodo", scenario, "--out", str(place), "--json")
            found.write_text(told)


def fedtl(*words: str) -> str:
    """What a command prints."""
    command = [sys.executable, "-m", "fedtl.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stderr}")
    return done.stdout


def tables(study: str, out: Path) -> None:
    """A study as Markdown: means over seeds, and their deviation."""
    print(
        "\n| "
        + study
        + " | federated | balanced | AUROC | tuned at home | alone, home | alone, everywhere"
        + " | pooled | pooled, balanced |\n|"
        + "---|" * 9
    )
    for number, name in enumerate(ROWS[study]):
        seeds = [out / study / str(number) / f"seed-{s}" for s in range(1, SEEDS + 1)]
        if not all((seed / "summary.json").is_file() for seed in seeds):
            continue
        found = [json.loads((seed / "summary.json").read_text()) for seed in seeds]
        cells = [
            shown([one["final"]["accuracy"] for one in found]),
            shown([one["final"]["balanced_accuracy"] for one in found]),
            shown([auroc(seed) for seed in seeds]),
            shown([reference(one, "fine_tuned", "accuracy") for one in found]),
            shown([reference(one, "local_only", "accuracy") for one in found]),
            shown([reference(one, "local_only", "accuracy_everyone") for one in found]),
            shown([reference(one, "centralised", "accuracy") for one in found]),
            shown([reference(one, "centralised", "balanced_accuracy") for one in found]),
        ]
        print("| " + " | ".join([name, *cells]) + " |")
    left = out / study / "lodo.json"
    if left.is_file():
        print("\n| left out | accuracy on all its examples | own tests | with it | its own |")
        print("|---|---|---|---|---|")
        for row in json.loads(left.read_text())["domains"]:
            heads = row["references"]
            values = [row["accuracy"], *(heads[k] for k in ("left_out", "with_domain", "own"))]
            print("| " + " | ".join([row["domain"], *(f"{100 * v:.1f}" for v in values)]) + " |")


def reference(facts: dict[str, Any], name: str, key: str) -> float | None:
    """A figure of a reference head, None where it was not made."""
    found = facts["references"].get(name)
    return None if found is None else found[key]


def auroc(run: Path) -> float | None:
    """Of the shared head, mean over clients; of two classes only."""
    rows = pd.read_parquet(run / "clients.parquet")
    values = rows[(rows["split"] == "test") & (rows["round"] == rows["round"].max())]["auroc"]
    return None if values.dropna().empty else float(values.dropna().mean())


def shown(values: list[float | None]) -> str:
    """Mean and deviation in percent."""
    if any(value is None for value in values):
        return "-"
    percent = [100 * value for value in values if value is not None]
    return f"{statistics.mean(percent):.1f} ± {statistics.stdev(percent):.1f}"


def main() -> None:
    """Run or show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join(ROWS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for study in arguments.studies or ROWS:
        if not arguments.table:
            run(study, arguments.out)
        tables(study, arguments.out)


if __name__ == "__main__":
    main()
