"""When a certificate says "equal"."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtl.parity import COMPARED, Attempt, Certificate, ways
from fedtl.scenario.schema import Scenario


def attempt(engine: str, **changes: object) -> Attempt:
    return Attempt(engine, {**dict.fromkeys(COMPARED, "same"), **changes}, 1.0)


def certificate(*attempts: Attempt) -> Certificate:
    return Certificate("x", "0" * 64, attempts, {}, "cpu")


def test_equal_means_that_all_that_ran_agree_in_everything() -> None:
    missing = Attempt("ray", {}, 0.0, "not installed")
    assert certificate(attempt("local"), attempt("flower"), missing).equal
    assert not certificate(attempt("local"), missing).equal
    for key in COMPARED:
        assert not certificate(attempt("local"), attempt("ray", **{key: "other"})).equal, key


def test_every_engine_is_tried_with_one_worker_and_with_all() -> None:
    found = ways(Scenario(name="x"))
    assert {way["kind"] for way in found} == {"local", "ray", "flower"}
    assert {way["threads"] for way in found if way["kind"] == "local"} >= {1}
    assert {way["num_cpus"] for way in found if way["kind"] == "ray"} >= {1}


def test_no_way_is_tried_twice() -> None:
    found = ways(Scenario.model_validate({"name": "x", "engine": {"num_cpus": 1}}))
    assert [way["num_cpus"] for way in found if way["kind"] == "ray"] == [1]


def test_one_engine_alone_is_no_parity(fedtl, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtl import parity

    monkeypatch.setattr(parity, "NEEDS", dict.fromkeys(("ray", "flower"), ("no_such_package",)))
    done = fedtl("parity", str(small))
    assert done.returncode == 3
    assert "ray: no_such_package is not installed; flower: no_such_package" in done.stderr


def test_an_interrupted_certificate_names_no_run_to_resume(
    fedtl, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTL_FAIL", "after_commit:interrupt:1")
    done = fedtl("parity", str(small))
    assert done.returncode == 130
    assert "no certificate" in done.stderr
    assert "resume" not in done.stderr


def test_engines_that_do_not_agree_end_with_1(
    fedtl, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtl import parity

    sections = [{"kind": "local", "threads": 1}, {"kind": "local", "threads": 2}]
    monkeypatch.setattr(parity, "ways", lambda scenario: sections)
    good = fedtl("parity", str(small), "--json")
    assert good.returncode == 0, good.stderr
    facts = json.loads(good.stdout)
    assert facts["equal"] is True
    assert [one["engine"] for one in facts["engines"]] == ["local, 1 thread", "local, 2 threads"]
    seen: list[str] = []
    run = parity.run_scenario

    def tampered(scenario, *rest):
        summary = run(scenario, *rest)
        seen.append(summary["head_sha256"])
        return {**summary, "head_sha256": f"{len(seen)}{summary['head_sha256'][1:]}"}

    monkeypatch.setattr(parity, "run_scenario", tampered)
    bad = fedtl("parity", str(small))
    assert bad.returncode == 1
    assert "not equal" in bad.stdout
    assert "do not agree" in bad.stderr
