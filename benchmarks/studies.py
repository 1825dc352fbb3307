"""The studies of docs/studies.md: what the gap predicted, what training showed, what held.

    uv run --extra studies python benchmarks/study_data.py           # once: the data
    uv run python benchmarks/studies.py --out DIR [STUDY ...]        # runs what DIR lacks
    uv run python benchmarks/studies.py --out DIR --tables           # the tables

Predicted and shown are what the commands say that anybody can type (``commands``). Checked is
this: each client's test examples are dealt into two halves, at random within its classes. fedtl
judges the same training twice, once with each half as the only test examples, and what it says of
one half is held against the accuracies on the other, which had no part in it. Both are ordinary
runs, on files of the features with the columns client and split; their shared heads are the same to
the bit.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file
from scipy.stats import spearmanr

from fedtl import seeding
from fedtl.build import open_data, population_of
from fedtl.data.clients import stratified_test
from fedtl.interrupts import Interrupts
from fedtl.ready_features import make_features
from fedtl.scenario import schema
from fedtl.scenario.load import load_scenario, with_seed
from fedtl.scenario.schema import Scenario
from fedtl.simulation import run_scenario
from fedtl.terminal import PatientConsole, Terminal
from fedtl.types import Population

SEEDS = 3
HEADS = {"join": "federated", "personalise": "fine_tuned", "stay alone": "local_only"}
"""Which head a client uses that follows the advice; without enough evidence it stays alone."""


@dataclass(frozen=True)
class Study:
    """One scenario, perhaps changed: a row of the tables.

    Attributes:
        name: of its folder.
        scenario, sets: as they are typed.
        lodo: whether its domains are also left out in turn.
    """

    name: str
    scenario: str
    sets: tuple[str, ...] = ()
    lodo: bool = False

    def commands(self, folder: Path) -> Iterator[tuple[Path, list[str]]]:
        """What is typed for it, and the file that shows that it was done."""
        again = [self.scenario, *(word for one in self.sets for word in ("--set", one))]
        run = folder / "run"
        yield folder / "split.html", ["split", *again, "--html", str(folder / "split.html")]
        out = ["--html", str(folder / "gap.html"), "--out", str(folder / "gap.json")]
        yield folder / "gap.json", ["gap", *again, *out]
        seeds = ["--seeds", str(SEEDS), "--out", str(run)]
        yield run / f"seed-{SEEDS}" / "summary.json", ["run", *again, *seeds]
        yield run / "seed-1" / "report.html", ["report", str(run / "seed-1")]
        if self.lodo:
            left = ["--seeds", str(SEEDS), "--out", str(folder / "lodo"), "--json"]
            yield folder / "lodo.json", ["lodo", *again, *left]

    def load(self, seed: int) -> Scenario:
        """The scenario at one seed."""
        return with_seed(load_scenario(self.scenario, self.sets), seed)


STUDIES = (
    Study("pacs-domains", "pacs-domains", lodo=True),
    Study("pacs-domains-skew", "pacs-domains-skew"),
    Study("pacs-domains-at-224", "pacs-domains", ("backbone.image_size=224",)),
    Study("pacs-227", "pacs-227"),
    Study("pacs-227-at-96", "pacs-227", ("backbone.image_size=96",)),
    Study("digits-three-sensors", "digits-three-sensors"),
    Study("omniglot-drawers", "omniglot-drawers"),
    Study("pneumonia-hospitals", "pneumonia-hospitals"),
    Study("solar-plants", "solar-plants"),
)


def carry_out(study: Study, folder: Path) -> None:
    """Everything of one study that its folder lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    for product, words in study.commands(folder):
        if not product.is_file():
            print("fedtl", *words, flush=True)
            done = subprocess.run(
                [sys.executable, "-m", "fedtl.cli", *words], capture_output=True, text=True
            )
            if done.returncode:
                print(done.stderr.strip()[-2000:], flush=True)
            else:
                text = product if words[-1] == "--json" else folder / f"{words[0]}.txt"
                text.write_text(done.stdout)
    if not (folder / "checked.json").is_file():
        cases = [case for seed in range(1, SEEDS + 1) for case in check(study, seed, folder)]
        (folder / "checked.json").write_text(json.dumps(cases, indent=1))


def check(study: Study, seed: int, folder: Path) -> list[dict[str, Any]]:
    """What fedtl says of each half of the tests, and how the heads do on the other half."""
    scenario = study.load(seed)
    features = make_features(open_data(scenario))
    people = population_of(features)
    judged = []
    for number, rows in enumerate(halves(people, seed)):
        place = folder / "checked" / f"seed-{seed}-{'ab'[number]}"
        shutil.rmtree(place, ignore_errors=True)  # of a check that was interrupted
        place.mkdir(parents=True)
        write_half(people, rows, place / "data.npz")
        half = judged_on(scenario, place / "data.npz")
        with Terminal(PatientConsole(quiet=True)) as silent:
            run_scenario(half, place / "run", silent, Interrupts())
        (place / "data.npz").unlink()
        judged.append((load_file(place / "run" / "head.safetensors"), last_rows(place / "run")))
    (head, first), (other_head, second) = judged
    if not all(np.array_equal(head[name], other_head[name]) for name in head):
        raise RuntimeError(f"{study.name}: the halves were not judged after the same training")
    return [
        {"seed": seed, "client": client, "said": said[client], "held": held[client]}
        for said, held in ((first, second), (second, first))
        for client in sorted(set(said) & set(held))
    ]


def halves(people: Population, seed: int) -> tuple[Any, Any]:
    """Each client's test rows in two halves, dealt within its classes; each bool [test rows]."""
    rows = people.test.index
    owner = np.repeat(np.arange(people.num_clients), people.test.counts).astype(np.int32)
    keys = seeding.named_keys(seed, "halves", people.names)
    second = stratified_test(owner, keys, people.labels[rows], 0.5)
    return ~second, second


def write_half(people: Population, half: Any, path: Path) -> None:
    """Everybody's training rows and the chosen test rows: features, and who holds them."""
    train, test = people.train, people.test
    rows = np.concatenate([train.index, test.index[half]])
    clients = np.arange(people.num_clients)
    owner = np.concatenate(
        [np.repeat(clients, train.counts), np.repeat(clients, test.counts)[half]]
    )
    # numbers in front keep the clients' order, which their random streams are keyed by
    names = np.array([f"{k:04d} {name}" for k, name in enumerate(people.names)])
    np.savez(
        path,
        x=np.asarray(people.features[rows], np.float32),
        y=people.labels[rows],
        classes=np.array(people.classes),
        client=names[owner],
        split=np.repeat(["train", "test"], [len(train.index), int(half.sum())]),
    )


def judged_on(scenario: Scenario, path: Path) -> Scenario:
    """The same question on a file of features that says who holds what."""
    return scenario.model_copy(
        update={
            # copies were looked for when the images were there
            "data": schema.Data(source="arrays", path=str(path), leakage="allow"),
            "clients": schema.Clients(partition="natural", min_examples=1),
            "backbone": schema.Backbone(name="identity"),
        }
    )


def last_rows(run: Path) -> dict[str, dict[str, Any]]:
    """By client, what the last round's rows say: verdict, advice, and each head's accuracies.

    ``home`` is on the client's own tests, ``everywhere`` on everybody's.
    """
    table = pq.read_table(run / "clients.parquet").to_pylist()
    last = max(row["round"] for row in table)
    found: dict[str, dict[str, Any]] = {}
    for split, place in (("test", "home"), ("everyone", "everywhere")):
        for row in table:
            if row["round"] == last and row["split"] == split and row["accuracy"] is not None:
                one = found.setdefault(row["name"], {})
                beside = {head: row[f"{head}_accuracy"] for head in ("local_only", "fine_tuned")}
                one[place] = {"federated": row["accuracy"], **beside}
                if place == "home":
                    one |= {key: row[key] for key in ("examples", "verdict", "advice")}
    return {name: one for name, one in found.items() if "home" in one}


def fate(case: dict[str, Any]) -> str:
    """What became of a verdict on the other half: "right", "wrong", "equal", "missed", "quiet"."""
    said, held = case["said"]["verdict"], case["held"]
    difference = held["home"]["federated"] - held["home"]["local_only"]
    if said in ("gains", "harmed"):
        towards = difference if said == "gains" else -difference
        return "equal" if towards == 0 else "right" if towards > 0 else "wrong"
    return "missed" if held["verdict"] in ("gains", "harmed") else "quiet"


def worth(cases: Sequence[dict[str, Any]], choose: str, place: str) -> float:
    """Mean accuracy on the other half, over cases, of clients that choose their head so.

    Args:
        choose: "advice", "best" (in hindsight), or the name of a head.
        place: "home" or "everywhere".
    """

    def one(case: dict[str, Any]) -> float:
        held = case["held"][place]
        if choose == "best":
            return max(held[head] for head in HEADS.values())
        head = HEADS.get(case["said"]["advice"], "local_only") if choose == "advice" else choose
        return float(held[head])

    return float(np.mean([one(case) for case in cases]))


def print_tables(out: Path) -> None:
    """The tables of docs/studies.md, from what is there."""
    found = [study for study in STUDIES if (out / study.name / "checked.json").is_file()]
    for title, lines in (
        ("Predicted", predicted),
        ("Shown", shown),
        ("Verdicts held against the other half", checked),
        ("What following the advice is worth", advised),
        ("Client by client, seed 1", clients),
        ("One domain left out", left_out),
    ):
        print(f"\n## {title}\n")
        for study in found:
            for line in lines(out / study.name):
                print(f"| {study.name} | {line} |")


@functools.cache
def gap_of(folder: Path) -> dict[str, Any]:
    """What ``fedtl gap --out`` wrote."""
    return dict(json.loads((folder / "gap.json").read_text()))


def predicted(folder: Path) -> list[str]:
    """Label and feature distance of each client to the rest, and the checks, in ``gap``'s words."""
    facts = gap_of(folder)
    cells = []
    for name in ("js", "conditional", "a_distance"):
        rest = [value for value in facts["rest"].get(name) or [] if value is not None]
        cells.append(f"{min(rest):.2f} to {max(rest):.2f}" if rest else "undefined")
    said = "; ".join(f"{one['severity']}: {one['what']}" for one in facts["checks"]) or "none"
    return [" | ".join([*cells, said])]


def shown(folder: Path) -> list[str]:
    """Each head at home and everywhere: mean over seeds; verdicts and advice, counted."""
    runs = [folder / "run" / f"seed-{seed}" for seed in range(1, SEEDS + 1)]
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    cells = []
    for head in ("federated", "local_only", "fine_tuned", "centralised"):
        facts = [
            one["final"] if head == "federated" else one["references"][head] for one in summaries
        ]
        pairs = [[one["accuracy"], one["accuracy_everyone"]] for one in facts]
        home, everywhere = 100 * np.mean(pairs, axis=0)
        cells.append(f"{home:.1f} / {everywhere:.1f}")
    rows = [row for run in runs for row in last_rows(run).values()]
    for column in ("verdict", "advice"):
        counted = Counter(str(row[column]) for row in rows)
        cells.append(", ".join(f"{count} {word}" for word, count in counted.most_common()))
    return [" | ".join(cells)]


def checked(folder: Path) -> list[str]:
    """How verdicts fared on the other half, and how the gap's prediction did."""
    cases = json.loads((folder / "checked.json").read_text())
    fates = Counter((str(case["said"]["verdict"]), fate(case)) for case in cases)
    cells = [str(len(cases))]
    for verdict in ("gains", "harmed"):
        right, equal, wrong = (fates[verdict, word] for word in ("right", "equal", "wrong"))
        cells.append(f"{right} / {equal} / {wrong}")
    cells.append(f"{sum(n for (_, word), n in fates.items() if word in ('missed', 'quiet'))}")
    cells.append(str(sum(n for (_, word), n in fates.items() if word == "missed")))
    return [" | ".join(cells)]


def advised(folder: Path) -> list[str]:
    """Mean accuracy on the other half, home / everywhere, under each way to choose a head."""
    cases = json.loads((folder / "checked.json").read_text())
    ways = ("advice", *HEADS.values(), "best")
    pairs = [[100 * worth(cases, way, place) for place in ("home", "everywhere")] for way in ways]
    return [" | ".join(f"{home:.1f} / {everywhere:.1f}" for home, everywhere in pairs)]


def clients(folder: Path) -> list[str]:
    """Each client's distances, the heads at home, the verdict; do the distances rank the gains?"""
    facts, rows = gap_of(folder), last_rows(folder / "run" / "seed-1")
    lines, gains = [], []
    distances: dict[str, list[float]] = {"js": [], "conditional": []}
    for place, name in enumerate(facts["clients"]):
        if name not in rows:
            continue
        row, home = rows[name], rows[name]["home"]
        gains.append(home["federated"] - home["local_only"])
        told = []
        for kind, known in distances.items():
            distance = facts["rest"][kind][place]
            known.append(np.nan if distance is None else distance)  # one NaN makes the rank NaN
            told.append("undefined" if distance is None else f"{distance:.2f}")
        heads = [f"{100 * home[head]:.1f}" for head in HEADS.values()]
        cells = [name, str(row["examples"]), *told, *heads, str(row["verdict"]), str(row["advice"])]
        lines.append(" | ".join(cells))
    for kind, known in distances.items():
        if len(gains) >= 5 and np.ptp(known) > 0:  # of fewer, a rank correlation says nothing
            rank = spearmanr(known, gains)
            lines.append(f"rank correlation of {kind} and gain {rank[0]:+.2f} (p {rank[1]:.2f})")
    return lines


def left_out(folder: Path) -> list[str]:
    """Accuracy on each domain that had no part in training."""
    if not (folder / "lodo.json").is_file():
        return []
    facts = json.loads((folder / "lodo.json").read_text())
    lines = []
    for one in facts["domains"]:
        low, high = (100 * bound for bound in one["interval"])
        lines.append(f"{one['domain']} | {100 * one['accuracy']:.1f} | {low:.1f} to {high:.1f}")
    return lines


def main() -> None:
    """Run what is missing, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of all results")
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="default all")
    parser.add_argument("--tables", action="store_true", help="print the tables")
    arguments = parser.parse_args()
    known = {study.name: study for study in STUDIES}
    if unknown := set(arguments.studies) - set(known):
        parser.error(f"no such study: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if arguments.tables:
        print_tables(arguments.out)
        return
    for name in arguments.studies or known:
        carry_out(known[name], arguments.out / name)


if __name__ == "__main__":
    main()
