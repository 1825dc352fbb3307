"""The page is one file that asks nobody for anything, and nobody's name can change it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from fedtl.results import page, pages
from fedtl.results.page import run_page
from fedtl.results.tables import read_run

VOID = {"meta", "link", "img", "br", "input"}


class Reader(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def text(made: Path) -> str:
    return run_page(read_run(made))


def all_pages(run: str, made_runs: ModuleType) -> dict[str, str]:
    names = made_runs.names_of(6)
    domains = ["a", "<b>", "c"] * 2
    return {
        "run": run,
        "split": pages.split_page(made_runs.split_facts(names, domains, 3)),
        "gap": pages.gap_page(made_runs.gap_facts(names, domains, 3)),
        "backbones": pages.backbones_page(made_runs.backbone_facts()),
    }


def test_pages_are_whole_and_ask_nobody(text: str, made_runs: ModuleType) -> None:
    for name, one in all_pages(text, made_runs).items():
        found = Reader(one)
        for tag, attributes in found.tags:
            for key in ("src", "href", "action", "srcset", "data", "poster"):
                value = attributes.get(key) or "#"
                assert value.startswith(("#", "data:image/")), (name, tag, value)
            assert not any(key.startswith("on") for key in attributes), (name, tag)
        scripts = [tag for tag, _ in found.tags if tag == "script"]
        assert scripts == ["script"], name  # ours alone
        assert "<b>" not in re.sub("<body>", "", one), name
        ids = [a["id"] for _, a in found.tags if "id" in a]
        assert len(ids) == len(set(ids)), name
        assert not re.search("nan|None|inf%", re.sub(r"<script.*|<style.*?</style>", "", one)), name


def test_the_policy_lets_our_script_run_and_nothing_else(text: str) -> None:
    policy = re.search('Content-Security-Policy" content="([^"]*)"', text)
    script = re.search("<script>(.*?)</script>", text, re.S)
    assert policy is not None
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy[1].replace("&#39;", "'")
    assert policy[1].startswith("default-src 'none'")


def test_names_are_escaped(text: str) -> None:
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "Ärzte &amp; Söhne" in text
    assert "{{ 7*7 }}" in text
    assert "\u202e" not in text
    assert "\\u202e" in text


def test_undefined_is_never_a_zero(text: str, made: Path) -> None:
    row = re.search(r"<tr><th scope=\"row\" title=\"&lt;script.*?</tr>", text, re.S)
    assert row is not None
    assert row[0].count("undefined</td>") >= 4
    assert ">0.0" not in row[0]


def test_the_tables_figures_are_on_the_page(text: str, made: Path) -> None:
    for row in read_run(made).own.itertuples():
        assert f'data-v="{row.accuracy:.12g}"' in text
        assert f"{100 * row.accuracy:.1f}\u00a0%" in text
        if row.p_holm is not None and not math.isnan(row.p_holm):
            assert f'data-v="{row.p_holm:.12g}"' in text


def test_a_run_without_references_says_so(made_runs: ModuleType, tmp_path: Path) -> None:
    run = made_runs.write_run(tmp_path / "bare", references=False, gap=False)
    found = Reader(run_page(read_run(run), notes=["A note & more."]))
    assert "No verdict: the shared model was not compared" in found.text
    assert "fedtl report bare --gap" in found.text
    assert "A note & more." in found.text


def test_one_client_and_one_round(made_runs: ModuleType, tmp_path: Path) -> None:
    run = read_run(made_runs.write_run(tmp_path / "one", clients=2, rounds=1, classes=1))
    found = Reader(run_page(run))
    assert "clients are too few to tell" in found.text


def test_real_clients_need_no_pooled_reference(made: Path, tmp_path: Path) -> None:
    real = shutil.copytree(made, tmp_path / "real")
    (real / "party.json").write_text(json.dumps({"run": "x", "clients": []}))
    found = Reader(run_page(read_run(real)))
    assert "stayed with the clients" in found.text
    assert "--gap" not in found.text
    assert "can be made again only with them" in found.text


def test_example_images_are_shown(made: Path) -> None:
    images = [{"source": "data:image/jpeg;base64,AAAA", "label": "<dog>"}]
    found = Reader(run_page(read_run(made), [{"name": "<a>", "images": images}]))
    shown = [a for tag, a in found.tags if tag == "img"]
    assert shown == [{"src": "data:image/jpeg;base64,AAAA", "alt": "<dog>"}]


def test_split_page_shows_the_counts(made_runs: ModuleType) -> None:
    facts = made_runs.split_facts(["a", "b"], ["x", "x"], 3)
    found = Reader(pages.split_page(facts))
    total = sum(map(sum, facts["train"])) + sum(map(sum, facts["test"]))
    assert f"2 clients hold {total} examples of 3 classes." in found.text
    assert "3 of 40 clients lack 6 of 10 classes" in found.text
    assert "tiny <client> (1)" in found.text


def test_gap_page_shows_scores_and_checks(made_runs: ModuleType) -> None:
    facts = made_runs.gap_facts(["a", "b", "c"], ["x"] * 3, 2)
    facts["transferability"]["clients"][0]["h_score"] = 1.23456
    found = Reader(pages.gap_page(facts))
    assert "1.235" in found.text
    assert "grey & go into an RGB trunk" in found.text
    assert "+2.1 points" in found.text
    many = pages.gap_page({**facts, "pairs": None, "notes": ["too many clients"]})
    assert "too many clients" in many


def test_backbones_page_names_the_best(made_runs: ModuleType) -> None:
    found = Reader(pages.backbones_page(made_runs.backbone_facts()))
    assert "efficientnet_lite0 has the best quick head: 90.0" in found.text
    none = {"backbones": [], "notes": ["nothing to see"]}
    assert "No backbone could be judged" in pages.backbones_page(none)


def test_holdings_are_summed_by_domain() -> None:
    import numpy as np

    counts = np.arange(12_000).reshape(3000, 4)
    names, domains = [str(i) for i in range(3000)], ["a", "b", "b"] * 1000
    found = pages.holdings(names, domains, list("wxyz"), counts)
    assert found["by"] == "domain"
    assert found["rows"] == ["a", "b"]
    assert [value for _, value in found["cells"][0]] == counts[::3].sum(axis=0).tolist()


def test_a_thousand_clients_fit(made_runs: ModuleType, tmp_path: Path) -> None:
    run = made_runs.write_run(tmp_path / "big", clients=1000, rounds=2, classes=20, gap=False)
    assert len(run_page(read_run(run)).encode()) < 5_000_000


def test_many_pairs_are_left_to_the_file(made_runs: ModuleType) -> None:
    names = made_runs.names_of(61)
    page = pages.gap_page(made_runs.gap_facts(names, ["x"] * 61, 2))
    assert "61 clients are too many for a page" in page


def test_numbers_in_words() -> None:
    assert page.p_text(0.0004) == "< 0.001"
    assert page.p_text(0.0123) == "0.012"
    assert page.decimals(1234.5, 2) == "1,234.50"
    assert page.decimals(0.00012, 3) == "0.00012"
    assert page.decimals(-0.5, 1) == "−0.5"
    assert page.decimals(None, 1) == page.p_text(None) == page.count(float("nan")) == "undefined"
    assert page.raw(None) == ""
    assert page.shades([[1, None], [4, 0]]) == [[(25, 1), (0, None)], [(100, 4), (0, 0)]]
    assert page.shades([[0, 0]]) == [[(0, 0), (0, 0)]]
