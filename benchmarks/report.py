"""The page of a large run: seconds and bytes, beside the limits it must keep.

python benchmarks/report.py --clients 1000 --rounds 200
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMITS = (5.0, 5 * 2**20)
"""Seconds and bytes, for 1,000 clients and 200 rounds."""

MEASURE = """
import sys, time
began = time.perf_counter()
from pathlib import Path
from fedtl.results.page import run_page
from fedtl.results.tables import read_run
imported = time.perf_counter()
run = read_run(Path(sys.argv[1]))
page = run_page(run)
Path(sys.argv[1], "report.html").write_text(page)
ended = time.perf_counter()
print(imported - began, ended - imported, len(page.encode()))
"""


def main() -> None:
    """Make a run folder, then its page in a process of its own, imports included."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--clients", type=int, default=1000)
    options.add_argument("--rounds", type=int, default=200)
    options.add_argument("--classes", type=int, default=100)
    chosen = options.parse_args()
    path = Path(__file__).resolve().parents[1] / "tests" / "made_runs.py"
    spec = importlib.util.spec_from_file_location("made_runs", path)
    assert spec is not None
    assert spec.loader is not None
    made_runs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made_runs)
    with tempfile.TemporaryDirectory() as folder:
        run = made_runs.write_run(
            Path(folder) / "run",
            clients=chosen.clients,
            rounds=chosen.rounds,
            classes=chosen.classes,
            gap=False,
        )
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(run)], capture_output=True, text=True, check=True
        )
        whole = time.perf_counter() - began
        imports, making, size = map(float, done.stdout.split())
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{chosen.clients} clients, {chosen.rounds} rounds, {chosen.classes} classes")
    print(f"whole process {whole:.2f} s (imports {imports:.2f}, page {making:.2f})")
    print(f"the limit is {LIMITS[0]} s")
    print(f"of a processor {used.ru_utime + used.ru_stime:.2f} s: what counts on a busy machine")
    print(f"{size / 2**20:.2f} MiB; limit {LIMITS[1] / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
