"""Commands that do not run a scenario, and what they print."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_help_does_not_import_heavy_packages() -> None:
    code = (
        "import sys; from fedtl.cli import run_command; run_command(['--help']); "
        "heavy = {'torch', 'numpy', 'numba', 'pydantic', 'pyarrow'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fedtl run quickstart" in done.stdout


def test_version(fedtl) -> None:
    done = fedtl("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "fedtl")


def test_list_names_everything_a_scenario_can_name(fedtl) -> None:
    found = json.loads(fedtl("list", "--json").stdout)
    assert {"quickstart"} <= set(found["scenarios"])
    assert {"fedavg", "fedprox", "fedadam"} <= set(found["strategies"])
    assert {"efficientnet_lite0", "mobilenet_v2", "identity"} <= set(found["backbones"])
    assert {"CIFAR10", "MNIST"} <= set(found["torchvision data sets"])
    shown = fedtl("list").stdout
    assert all(name in shown for name in found["partitions"])


def test_doctor_says_this_machine_will_do(fedtl) -> None:
    done = fedtl("doctor")
    assert done.returncode == 0, done.stdout
    for what in ("python", "packages", "cores", "memory", "feature store", "offline assets"):
        assert what in done.stdout


def test_doctor_ends_with_3_where_something_is_missing(
    fedtl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtl.machine.available_memory_bytes", lambda: 1000)
    done = fedtl("doctor")
    assert done.returncode == 3
    assert "memory" in done.stderr


def test_check_prints_the_plan_and_trains_nothing(fedtl, small: Path) -> None:
    done = fedtl("check", str(small), "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["clients"], plan["cohort"], plan["rounds"]) == (5, 3, 4)
    assert plan["bytes_up"] == 4 * 3 * 4 * (3 * 6 + 3)
    assert "privacy" in done.stderr
    assert sorted(p.name for p in small.parent.iterdir()) == ["small.npz", "small.toml"]


def test_several_seeds_are_several_runs(fedtl, small: Path, tmp_path: Path) -> None:
    done = fedtl("run", str(small), "--seeds", "3", "--out", "runs", "--json")
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)["runs"]
    assert [run["seed"] for run in runs] == [3, 4, 5]
    assert len({run["head_sha256"] for run in runs}) == 3
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["seed-3", "seed-4", "seed-5"]
    assert "Mean over seeds 3, 4, 5" in done.stderr


def test_json_is_alone_on_standard_output(fedtl, small: Path) -> None:
    done = fedtl("run", str(small), "--out", "run", "--json")
    written = json.loads((small.parent / "run" / "summary.json").read_text())
    assert json.loads(done.stdout) == written


def test_the_last_run_can_be_named(fedtl, small: Path, tmp_path: Path) -> None:
    assert fedtl("run", str(small)).returncode == 0
    assert "finished" in fedtl("resume", "last").stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("small-")
    assert "finished" in fedtl("resume", run.name).stderr


def test_unknown_engines_are_named(fedtl, small: Path) -> None:
    done = fedtl("run", str(small), "--engine", "loca")
    assert done.returncode == 2
    assert 'Did you mean "local"?' in done.stderr


def test_the_cache_can_be_listed_and_emptied(fedtl, tmp_path: Path) -> None:
    env = {"FEDTL_CACHE": str(tmp_path / "cache")}
    assert "empty" in fedtl("cache", "ls", env=env).stdout
    assert json.loads(fedtl("cache", "ls", "--json", env=env).stdout) == []
    assert fedtl("cache", "rm", "--all", env=env).returncode == 0
    missing = fedtl("cache", "rm", "abc", env=env)
    assert missing.returncode == 2
    assert "fedtl cache ls" in missing.stderr


def test_without_debug_a_bug_is_one_line(fedtl, small: Path, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("fedtl.scenario.load.load_scenario", broken)
    done = fedtl("run", str(small))
    assert done.returncode == 1
    assert "bug in fedtl: RuntimeError: boom" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(RuntimeError):
        fedtl("run", str(small), "--debug")


def test_names_with_markup_are_shown_as_they_are(fedtl, small: Path) -> None:
    import numpy as np

    content = dict(np.load(small.parent / "small.npz"))
    names = np.array(["[bold]x[/]", "<script>", "plain"])[np.arange(200) % 3]
    np.savez(small.parent / "small.npz", **content, client=names)
    small.write_text(small.read_text().replace("num = 5\n", 'partition = "natural"\n'))
    done = fedtl("run", str(small), "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "[bold]x[/]" in done.stdout + str(fedtl("check", str(small)).stdout)


@pytest.mark.parametrize("rate", ["0.1", "1e38"])
def test_the_engine_is_closed_however_a_run_ends(
    fedtl, small: Path, monkeypatch: pytest.MonkeyPatch, rate: str
) -> None:
    closed: list[int] = []
    monkeypatch.setattr("fedtl.engines.LocalEngine.close", lambda self: closed.append(1))
    done = fedtl("run", str(small), "--set", f"training.learning_rate={rate}")
    assert done.returncode == (0 if rate == "0.1" else 4)
    assert closed == [1]
