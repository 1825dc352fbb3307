"""What stored views and noise on features cost and bring: PACS at 96 px, MobileNetV2, four domains.

    python benchmarks/views.py OUT.json [--shots 20] [--seeds 3]

The settings of a seed share one feature store, as a user's do: further views are made once, and
four of them find the first two. Results: docs/views.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import fedtl

SCENARIO = Path(__file__).parent.parent / "scenarios" / "pacs-domains.toml"
EPOCHS = 5
"""Of a round, in ``SCENARIO``."""

SETTINGS: dict[str, dict[str, Any]] = {
    "as they are": {},
    **{f"{k} views": {"augmentation": {"views": k}} for k in (2, 4, 8)},
    # as many examples in a round as with the views, so that what is left is the views' own
    **{
        f"1 view, {k * EPOCHS} epochs": {"training": {"local_epochs": k * EPOCHS}}
        for k in (2, 4, 8)
    },
    **{f"noise {s}": {"augmentation": {"noise": s}} for s in (0.1, 0.3, 1.0)},
    **{
        f"4 views, {kind} alone": {"augmentation": {"views": 4, "kinds": [kind]}}
        for kind in ("flip", "crop", "colour", "randaugment")
    },
}


def measure(setting: dict[str, Any], shots: int, seed: int, out: Path) -> dict[str, float]:
    """One run: accuracies, and what it cost beside what was in the store."""
    run = fedtl.run(
        SCENARIO,
        out=out,
        seed=seed,
        data={"shots": shots},
        **setting,
        evaluation={"references": []},
        report={"examples": 0},
    )
    summary = json.loads((run.path / "summary.json").read_text())
    return {
        "home": summary["final"]["accuracy"],
        "worst": summary["final"]["worst_decile_accuracy"],
        "trunk_seconds": summary["seconds"]["extract"],
        "train_seconds": summary["seconds"]["train"],
        "through_trunk": summary["cost"]["passes"]["trunk"],
        "rows": summary["cost"]["passes"]["trunk_when_made"],
        "bytes_on_disk": summary["backbone"]["num_bytes"],
    }


def main() -> None:
    """Every setting with every seed; the table as it grows, and one line a setting at the end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shots", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    for seed in range(1, asked.seeds + 1):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["FEDTL_CACHE"] = f"{folder}/cache"
            for i, (name, setting) in enumerate(SETTINGS.items()):
                one = measure(setting, asked.shots, seed, Path(folder) / str(i))
                found[name].append(one)
                print(json.dumps({"seed": seed, "setting": name, **one}), flush=True)
                asked.out.write_text(json.dumps(found, indent=1))
    for name, seeds in found.items():
        told = [
            f"{key} {np.mean(values):.4g} +-{np.std(values, ddof=1) if len(values) > 1 else 0:.2g}"
            for key in seeds[0]
            for values in [[one[key] for one in seeds]]
        ]
        print(f"{name}: {', '.join(told)}")


if __name__ == "__main__":
    main()
