"""``fedtl gap``: what is printed, what is written, and what a user can get wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedtl.evaluation import gaps
from fedtl.evaluation.gap_words import expectation


@pytest.fixture
def domains(tmp_path: Path) -> Path:
    """Two wards whose features differ, three clients in each."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 600)
    domain = np.repeat([0, 1], 300)
    x = rng.normal(size=(600, 6)).astype(np.float32)
    x[np.arange(600), y] += 2
    x[domain == 1, 5] += 4
    np.savez(tmp_path / "wards.npz", x=x, y=y, domain=np.array(["east", "west"])[domain])
    path = tmp_path / "wards.toml"
    path.write_text(
        'name = "wards"\nseed = 3\n[data]\nsource = "arrays"\npath = "wards.npz"\n'
        '[clients]\nnum = 6\npartition = "iid"\nwithin_domains = true\n'
        '[backbone]\nname = "identity"\n'
    )
    return path


def test_gap_prints_the_gaps_and_keeps_them(fedtl, domains: Path, tmp_path: Path) -> None:
    done = fedtl("gap", str(domains), "--out", "gap.json", "--html", "gap.html")
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "gap.json").read_text())
    features = np.array(facts["pairs"]["conditional"])
    assert features[:3, 3:].min() > 1
    assert features[:3, :3].max() < 0.1
    mean = features[:3, 3:].mean()
    assert f"between {mean:.2f}" in done.stdout
    for words in (
        "Feature gap",
        "Label gap",
        "What to expect",
        "Next: fedtl run",
        "simulation only",
    ):
        assert words in done.stdout
    assert facts["expectation"] in " ".join(done.stdout.split())
    assert "<html" in (tmp_path / "gap.html").read_text()


def test_gap_as_json_is_the_same(fedtl, domains: Path, tmp_path: Path) -> None:
    fedtl("gap", str(domains), "--out", "gap.json")
    facts = json.loads((tmp_path / "gap.json").read_text())
    printed = json.loads(fedtl("gap", str(domains), "--json").stdout)
    assert {**printed, "seconds": 0} == {**facts, "seconds": 0}
    assert (facts["format"], facts["name"], facts["clients"][0]) == (1, "wards", "east-0")
    assert facts["domains"] == ["east"] * 3 + ["west"] * 3
    assert np.array(facts["counts"]).sum() == sum(facts["examples"]) == 480


@pytest.mark.parametrize("limit", [gaps.PAIRS_LIMIT, 10])
def test_many_clients_are_summarised(
    fedtl, domains: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gaps, "PAIRS_LIMIT", limit)
    done = fedtl("gap", str(domains), "--set", "clients.num=20")
    assert done.returncode == 0, done.stderr
    assert "and 8 more" in done.stdout
    assert ("farthest:" in done.stdout) == (limit >= 20)
    assert ("to the rest only" in " ".join(done.stdout.split())) == (limit < 20)


def test_checks_of_what_goes_in_are_told_with_what_to_change(fedtl, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 200)
    x = rng.normal(size=(200, 4)).astype(np.float32)
    x[:, 0] *= 10_000
    x[:, 1] = 7
    np.savez(tmp_path / "x.npz", x=x, y=y)
    (tmp_path / "units.toml").write_text(
        'name = "units"\n[data]\nsource = "arrays"\npath = "x.npz"\n'
        '[clients]\nnum = 2\n[backbone]\nname = "identity"\n'
    )
    done = fedtl("gap", "units.toml", "--out", "gap.json")
    assert done.returncode == 0, done.stderr
    checks = json.loads((tmp_path / "gap.json").read_text())["checks"]
    assert len(checks) >= 2
    printed = " ".join(done.stdout.split())
    assert "What goes into the backbone" in printed
    for found in checks:
        assert f"{found['severity']} {found['what']}" in printed
        assert found["change"] in printed


def test_one_client_is_told_that_nothing_can_be_said(fedtl, domains: Path) -> None:
    one = ("--set", "clients.num=1", "--set", "clients.within_domains=false")
    done = fedtl("gap", str(domains), *one)
    assert done.returncode == 0, done.stderr
    assert "nothing can be said" in done.stdout


def test_a_page_that_cannot_be_written_is_said_so(fedtl, domains: Path) -> None:
    done = fedtl("gap", str(domains), "--out", "missing/gap.json")
    assert done.returncode == 2
    assert "no such folder" in done.stderr
    assert done.stdout == ""


def test_whatever_is_undefined_is_a_dash(fedtl, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = np.r_[np.zeros(30, int), np.ones(30, int), [0, 1, 0, 2, 2, 2]]
    names = ["zeros"] * 30 + ["ones"] * 30 + ["[red]pair"] * 2 + ["dots"] * 4
    for path, x in (("x.npz", rng.normal(size=(66, 4))), ("same.npz", np.full((66, 4), 0.3))):
        np.savez(tmp_path / path, x=x.astype(np.float32), y=y, domain=np.array(names))
        (tmp_path / "odd.toml").write_text(
            f'name = "odd"\n[data]\nsource = "arrays"\npath = "{path}"\nleakage = "allow"\n'
            '[clients]\npartition = "domain"\nmin_examples = 2\n[backbone]\nname = "identity"\n'
        )
        done = fedtl("gap", "odd.toml", "--out", "odd.json", "--html", "odd.html")
        assert done.returncode == 0, done.stderr
        assert "[red]pair" in done.stdout
        assert "nan" not in done.stdout.lower()
        found = json.loads((tmp_path / "odd.json").read_text())
        row = found["clients"].index("[red]pair"), found["clients"].index("zeros")
        assert found["pairs"]["coral"][row[0]][row[1]] is None
        assert found["rest"]["a_distance"][row[0]] is None
        assert found["transferability"]["clients"][row[1]]["logme"] is None


def facts(features: list[float | None], mix: list[float]) -> dict:
    names, rest = [f"ward {k}" for k in range(len(mix))], {"conditional": features, "js": mix}
    return {"clients": names, "examples": [50] * len(mix), "rest": rest, "pairs": None}


def test_what_to_expect_follows_from_the_gaps() -> None:
    alike = expectation(facts([0.0, 0.01], [0.0, 0.0]))
    assert "look much alike" in alike
    assert "only a run shows it" in alike
    far = expectation(facts([0.2, 1.5, None], [0.0, 0.5, 0.0]))
    assert "at 2 of 3 clients, most at ward 1" in far
    assert "mixed differently at 1 of 3" in far
    pairs = {"conditional": [[0, 0.1, 3], [0.1, 0, None], [3, None, 0]]}
    domains = {**facts([1, 1, 2], [0, 0, 0]), "domains": ["x", "x", "y"], "pairs": pairs}
    assert "from domain to domain (3.00) and much alike within one (0.10)" in expectation(domains)
    few = {**facts([0.0, 9.0], [0.0, 1.0]), "examples": [50, 3]}
    assert expectation(few) == expectation(facts([0.0, 0.0], [0.0, 0.0]))
    assert "can serve all" in expectation(facts([0.0, 0.0], [0.5, 0.5]))
