"""What compressed updates save and what they cost, on the quickstart.

    uv run python benchmarks/compression.py [--seeds 3] [--rounds 20]

Each row is `fedtl run quickstart` with the settings it shows: bytes that all clients send, and the
share of test examples that the last round's head gets right, mean and range over the seeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS = (
    ("none", None, True),
    ("int8", None, True),
    ("int8", None, False),
    ("sign", None, True),
    ("sign", None, False),
    ("top_k", 0.1, True),
    ("top_k", 0.1, False),
    ("top_k", 0.01, True),
    ("top_k", 0.01, False),
)
"""kind, fraction of entries sent, error feedback."""


def main() -> None:
    """Run them all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    print("| kind | feedback | bytes up | share | accuracy | from .. to | seconds in rounds |")
    print("|---|---|---|---|---|---|---|")
    full = None
    for kind, fraction, feedback in ROWS:
        settings = {"compression.kind": kind, "compression.error_feedback": str(feedback).lower()}
        if fraction is not None:
            settings["compression.fraction"] = str(fraction)
        runs = [run(settings, 7 + seed, options.rounds) for seed in range(options.seeds)]
        right = [found["final"]["accuracy"] for found in runs]
        sent = runs[0]["bytes_up"]
        full = full or sent
        seconds = sorted(found["seconds"]["train"] for found in runs)[len(runs) // 2]
        name = kind if fraction is None else f"{kind} {fraction:g}"
        word = "-" if kind == "none" else "yes" if feedback else "no"
        print(
            f"| {name} | {word} | {sent:,} | {sent / full:.3f} | {sum(right) / len(right):.3f} "
            f"| {min(right):.3f} .. {max(right):.3f} | {seconds:.2f} |",
            flush=True,
        )


def run(settings: dict[str, str], seed: int, rounds: int) -> dict[str, Any]:
    """The summary of one run, in a process of its own."""
    own = {**settings, "seed": seed, "rounds": rounds, "evaluation.references": "[]"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "fedtl.cli", "run", "quickstart", "--json"]
            + ["--out", str(Path(folder) / "run")]
            + [word for name, value in own.items() for word in ("--set", f"{name}={value}")],
            stdout=subprocess.PIPE,
            check=True,
            stderr=subprocess.DEVNULL,
        )
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    main()
