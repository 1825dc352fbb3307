"""Plausible run folders that nobody trained: for tests of what is made from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedtl.results.records import BESIDE, CLASSES, CLIENTS, ROUNDS
from fedtl.scenario.load import dump_scenario
from fedtl.scenario.schema import Scenario

HOSTILE = ("<script>alert(1)</script>", 'Ärzte & Söhne "A"', "$x^2$ {{ 7*7 }}", "日本\u202e\n病院")

ADVICE = ("join", "personalise", "stay alone", "not enough evidence")

VERDICT = {"join": "gains", "personalise": "no evidence", "stay alone": "harmed"}


def names_of(clients: int) -> list[str]:
    return [*HOSTILE, *(f"client-{i}" for i in range(len(HOSTILE), clients))][:clients]


def write_run(
    path: Path,
    *,
    clients: int = 12,
    rounds: int = 8,
    seed: int = 0,
    classes: int = 4,
    references: bool = True,
    gap: bool = True,
    better: float = 0.0,
    scenario: dict[str, Any] | None = None,
) -> Path:
    """Write a finished run.

    Args:
        references: whether there are heads beside the federated one.
        better: added to the federated head's accuracy.
        scenario: keys laid over the scenario.
    """
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True)
    content = {"name": "made", "seed": seed, "rounds": rounds, **(scenario or {})}
    asked = Scenario.model_validate(content)
    (path / "scenario.toml").write_text(dump_scenario(asked))
    names = names_of(clients)
    domains = [("photo", "<b>sketch</b>", "cartoon")[i % 3] for i in range(clients)]
    examples = np.random.default_rng(99).integers(8, 120, clients)
    skill = np.clip(rng.normal(0.75, 0.12, clients), 0.3, 0.97) + better
    beside = BESIDE if references else ()
    last = _last_rows(rng, names, domains, examples, skill, beside)
    rows = {name: [] for name in CLIENTS.names}
    for round in range(1, rounds + 1):
        share = 1 - 0.7 * np.exp(-round / (rounds / 4))
        for split in ("train", "test"):
            block = dict.fromkeys(CLIENTS.names, [None] * clients)
            block |= {
                "round": [round] * clients,
                "client": list(range(clients)),
                "name": names,
                "domain": domains,
                "split": [split] * clients,
                "examples": (examples * (4 if split == "train" else 1)).tolist(),
                "loss": (1.5 - skill * share).tolist(),
                "status": ["ok"] * clients,
            }
            if split == "test":
                noise = rng.normal(0, 0.01, clients)
                block["accuracy"] = np.clip(skill * share + noise, 0, 1).tolist()
                block |= last["test"] if round == rounds else {}
            elif round == 2:
                block["status"] = ["unused: <i>answered late</i>", *["ok"] * (clients - 1)]
            for name in CLIENTS.names:
                rows[name].extend(block[name])
    everyone = {**dict.fromkeys(CLIENTS.names, [None] * clients), **last["everyone"]}
    for name in CLIENTS.names:
        rows[name].extend({**everyone, "round": [rounds] * clients}[name])
    frame = pa.Table.from_pydict(rows, schema=CLIENTS)
    pq.write_table(frame, path / "clients.parquet")
    _write_rounds(path, frame, rounds, clients)
    _write_classes(path, rng, names, domains, examples, classes)
    _write_summary(path, asked, last, references, clients)
    (path / "events.jsonl").write_text(json.dumps({"time": 1.0, "event": "started"}) + "\n")
    if gap:
        (path / "gap.json").write_text(json.dumps(gap_facts(names, domains, classes, seed)))
    return path


def _last_rows(rng, names, domains, examples, skill, beside) -> dict[str, dict[str, list]]:
    clients = len(names)
    base = {
        "client": list(range(clients)),
        "name": names,
        "domain": domains,
        "status": ["ok"] * clients,
    }
    correct = rng.binomial(examples, np.clip(skill, 0, 1))
    test: dict[str, list] = {
        **base,
        "split": ["test"] * clients,
        "examples": examples.tolist(),
        "accuracy": (correct / examples).tolist(),
        "balanced_accuracy": (correct / examples * 0.97).tolist(),
        "loss": (1.5 - skill).tolist(),
        "calibration_error": np.abs(rng.normal(0.05, 0.03, clients)).tolist(),
        "auroc": [None if i == 1 else 0.9 for i in range(clients)],
    }
    shared = float(correct.sum() / examples.sum())
    everyone = {
        **base,
        "split": ["everyone"] * clients,
        "examples": [int(examples.sum())] * clients,
        "accuracy": [shared] * clients,
    }
    for head in beside:
        lift = {"local_only": 0.05, "fine_tuned": 0.07, "personal": 0.06, "centralised": 0.02}
        own = np.clip(
            correct / examples + lift.get(head, -0.02) + rng.normal(0, 0.03, clients), 0, 1
        )
        far = {"local_only": 0.42, "fine_tuned": 0.6, "personal": 0.55}.get(head, shared)
        test[f"{head}_accuracy"] = (np.round(own * examples) / examples).tolist()
        everyone[f"{head}_accuracy"] = (np.full(clients, far)).tolist()
        if head in ("local_only", "fine_tuned", "personal"):
            test[f"{head}_accuracy"][0] = None  # a client without a head of its own
    if beside:
        alone = np.array(test["local_only_accuracy"], float)
        more = np.nan_to_num(np.round((correct / examples - alone) * examples)).astype(int)
        losses = np.maximum(rng.integers(0, 5, clients), -more)
        wins = losses + more
        advice = [ADVICE[i % 4] for i in range(clients)]
        test |= {
            "beats_local_only": wins.tolist(),
            "loses_to_local_only": losses.tolist(),
            "p_value": rng.random(clients).tolist(),
            "p_holm": [None, *np.minimum(1, rng.random(clients - 1) * 2).tolist()],
            "advice": advice,
            "verdict": [VERDICT.get(word, "no evidence") for word in advice],
        }
    return {"test": test, "everyone": everyone}


def _write_rounds(path: Path, frame: pa.Table, rounds: int, clients: int) -> None:
    judged = frame.to_pandas().query("split == 'test'").groupby("round")["accuracy"]
    columns = {
        **dict.fromkeys(ROUNDS.names, [None] * rounds),
        "round": list(range(1, rounds + 1)),
        "cohort": [clients] * rounds,
        "accepted": [clients] * rounds,
        "abandoned": [False] * rounds,
        "accuracy": judged.mean().tolist(),
        "accuracy_client_mean": judged.mean().tolist(),
        "worst_decile_accuracy": judged.quantile(0.05).tolist(),
        "bytes_up": [1000 * clients] * rounds,
        "bytes_down": [1000 * clients] * rounds,
        "seconds": [0.1] * rounds,
    }
    pq.write_table(pa.Table.from_pydict(columns, schema=ROUNDS), path / "rounds.parquet")


def _write_classes(path, rng, names, domains, examples, classes) -> None:
    rows: dict[str, list] = {name: [] for name in CLASSES.names}
    for client, name in enumerate(names):
        shares = rng.dirichlet([0.5] * classes)
        for one in range(classes):
            test = int(examples[client] * shares[one])
            correct = int(rng.binomial(test, 0.8))
            values = (client, name, domains[client], f"class <{one}>", 4 * test, test, correct)
            for column, value in zip(CLASSES.names, (*values, correct // 2), strict=True):
                rows[column].append(value)
    pq.write_table(pa.Table.from_pydict(rows, schema=CLASSES), path / "classes.parquet")


def _write_summary(path, scenario, last, references, clients) -> None:
    own, everyone = last["test"], last["everyone"]
    weights = np.array(own["examples"])

    def facts(column: str) -> dict[str, Any]:
        values = np.array(own[column], float)
        there = np.isfinite(values)
        everywhere = np.array(everyone[column], float)
        return {
            "accuracy": float((values * weights)[there].sum() / weights[there].sum()),
            "accuracy_everyone": float(np.nanmean(everywhere)),
            "worst_decile_accuracy": float(np.sort(values[there])[0]),
            "spread": float(values[there].std()),
        }

    heads = ("local_only", "centralised", "fine_tuned") if references else ()
    summary = {
        "name": scenario.name,
        "scenario_hash": scenario.hash(),
        "engine": "local",
        "seed": scenario.seed,
        "strategy": scenario.strategy.name,
        "rounds_completed": scenario.rounds,
        "num_clients": clients,
        "head_sha256": "ab" * 32,
        "final": facts("accuracy"),
        "personal": None,
        "references": {head: facts(f"{head}_accuracy") for head in heads},
        "bytes_up": 1000 * clients * scenario.rounds,
        "bytes_down": 1000 * clients * scenario.rounds,
        "epsilon": None,
        "verdict": {"headline": "It depends.", "lines": ["One <line>."], "better": 1},
        "data": {"train": 4000, "test": 1000, "classes": 4, "fingerprint": "cd" * 32},
        "backbone": {"name": "efficientnet_lite0", "weights_sha256": "ef" * 32},
        "seconds": {"extract": 1.0, "train": 2.0, "references": 3.0, "total": 6.5},
        "peak_rss_mib": 800.0,
        "versions": {"python": "3.11.7", "fedtl": "0.1.0"},
        "cpu": "a processor",
        "device": "cpu",
        "threads": 2,
    }
    (path / "summary.json").write_text(json.dumps(summary))


def gap_facts(names: list[str], domains: list[str], classes: int, seed: int = 0) -> dict[str, Any]:
    """What ``fedtl gap`` gives, with made-up figures and some that are undefined."""
    rng = np.random.default_rng(seed)
    clients = len(names)
    kinds = {
        "js": ("labels: Jensen-Shannon", "0 to 1", "summed statistics"),
        "coral": ("features: CORAL", "0 and more", "summed statistics"),
        "a_distance": ("features: proxy A-distance", "0 to 2", "sampled rows"),
    }
    pairs = {}
    for kind in kinds:
        values = rng.random((clients, clients))
        values = (values + values.T) / 2
        np.fill_diagonal(values, 0)
        pairs[kind] = [[float(v) for v in row] for row in values]
    if clients > 2:
        pairs["a_distance"][1][2] = pairs["a_distance"][2][1] = None
    return {
        "format": 1,
        "name": "made",
        "scenario_hash": "00" * 32,
        "backbone": {"name": "efficientnet_lite0", "cut": "penultimate", "weights": "packaged"},
        "clients": names,
        "domains": domains,
        "examples": rng.integers(20, 400, clients).tolist(),
        "classes": [f"class <{i}>" for i in range(classes)],
        "counts": rng.integers(0, 80, (clients, classes)).tolist(),
        "kinds": {
            kind: {"title": title, "range": span, "made_from": made, "note": "larger is further"}
            for kind, (title, span, made) in kinds.items()
        },
        "pairs": pairs,
        "rest": {
            kind: [None if i == 1 else float(v) for i, v in enumerate(rng.random(clients))]
            for kind in kinds
        },
        "transferability": {
            "all": {"h_score": 3.1, "logme": 0.4, "nce": None, "leep": None},
            "clients": [
                {"h_score": float(v), "logme": 0.2, "nce": None, "leep": None}
                for v in rng.random(clients)
            ],
        },
        "checks": [
            {
                "severity": "warning",
                "what": "the images are grey & go into an RGB trunk",
                "clients": names[:2],
                "change": "Set adaptation.input = 'match'",
                "gain": 0.021,
                "gain_note": "ridge head, 5 folds",
            }
        ],
        "sampling": {"a_distance": "at most 500 rows a client"},
        "notes": ["nce and leep: the source classes are not known"],
        "seconds": 1.25,
    }


def split_facts(names: list[str], domains: list[str], classes: int) -> dict[str, Any]:
    """What ``fedtl split`` gives."""
    rng = np.random.default_rng(1)
    clients = len(names)
    spread = {"min": 0.01, "median": 0.2, "mean": 0.25, "max": 0.8}
    return {
        "clients": names,
        "domains": domains,
        "classes": [f"class <{i}>" for i in range(classes)],
        "train": rng.integers(0, 50, (clients, classes)).tolist(),
        "test": rng.integers(0, 12, (clients, classes)).tolist(),
        "distances": {
            name: {"to_all": [None, *rng.random(clients - 1).tolist()], "pairs": spread}
            for name in ("js", "hellinger", "emd")
        },
        "warnings": ["3 of 40 clients lack 6 of 10 classes"],
        "excluded": [["tiny <client>", 1]],
    }


def backbone_facts() -> dict[str, Any]:
    """What ``fedtl gap --backbones`` gives."""
    return {
        "format": 1,
        "backbones": [
            {
                "name": name,
                "accuracy": accuracy,
                "h_score": 2.0,
                "logme": None,
                "images_per_second": speed,
                "feature_bytes": 5120,
                "weights_bytes": 18_000_000,
                "pareto": pareto,
                "note": None,
            }
            for name, accuracy, speed, pareto in (
                ("efficientnet_lite0", 0.9, 120.0, True),
                ("<mobile>", 0.85, 300.0, True),
                ("resnet18", 0.84, 90.0, False),
                ("broken", None, None, False),
            )
        ],
        "notes": ["measured on 500 images"],
    }
