"""The laws of the house, read off the code: imports go down, names are public, rooms are small."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fedtl"

FLOORS = (
    {"errors", "seeding", "types", "plans", "failpoints", "interrupts", "machine"},
    {"scenario", "results"},
    {"data"},
    {"transfer"},
    {"clients", "privacy"},
    {"strategies", "engines", "evaluation"},
    {"planning", "rounds", "round_training", "secure_rounds", "spending", "checkpoints"},
    {"build", "ready_features"},
    {"conduct", "judging", "unprotected", "privacy_card", "cost_card"},
    {"forecast", "simulation", "doctor", "choices", "terminal", "listings"},
    {
        "check",
        "backbone_choice",
        "input_checks",
        "split",
        "gap",
        "gap_terminal",
        "lodo",
        "report",
        "audit",
        "privacy_plan",
        "tune",
        "modules",
        "export",
        "few_shot",
    },
    {"deployment", "parity", "api", "serve"},
    {
        "cli",
        "tune_commands",
        "module_commands",
        "export_commands",
        "server_commands",
        "client_commands",
        "study_commands",
        "privacy_commands",
        "options",
    },
)
"""Rooms by floor, lowest first; a room imports from its own floor and from below."""

LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}

ONLY_IN = {
    "flwr": ("engines/flower", "strategies/flower", "data/flwr"),
    "ray": ("engines/ray",),
    "rich": (
        "terminal",
        "listings",
        "check",
        "split",
        "gap",
        "lodo",
        "audit",
        "privacy_plan",
        "cli",
        "server_commands",
        "client_commands",
        "tune_commands",
        "module_commands",
        "export_commands",
        "few_shot",
    ),
    "typer": (
        "cli",
        "server_commands",
        "client_commands",
        "study_commands",
        "privacy_commands",
        "tune_commands",
        "module_commands",
        "export_commands",
        "options",
    ),
}
"""Where a package may be imported at all; flwr_datasets counts as flwr."""

FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    own = room(path)
    if own in ("__init__", "_version"):
        return
    for name in imports(path):
        if name.startswith("fedtl."):
            other = name.split(".")[1]
            assert LEVEL[other] <= LEVEL[own], f"{own} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_stay_where_they_belong(path: Path) -> None:
    place = str(path.relative_to(PACKAGE))
    for name in imports(path):
        top = name.split(".")[0].replace("flwr_datasets", "flwr")
        if top in ONLY_IN:
            assert place.startswith(ONLY_IN[top]), f"{place} must not import {top}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_global_randomness_no_mutable_globals(path: Path) -> None:
    tree = ast.parse(path.read_text())
    text = path.read_text()
    assert not re.search(r"np\.random\.(seed|rand|randn|randint|shuffle|permutation)\(", text)
    assert not re.search(r"^import random|^from random", text, re.M)
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Set):
            names = [getattr(target, "id", "") for target in node.targets]
            assert names == ["__all__"], f"{path}: mutable global {names}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 80, f"{path}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_room_without_a_purpose(path: Path) -> None:
    assert path.stem not in {"utils", "helpers", "manager", "misc", "common"}
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_exported_names_exist() -> None:
    from importlib import import_module

    for path in FILES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name == "fedtl.cli" or not re.search("^__all__", path.read_text(), re.M):
            continue
        module = import_module(name)
        assert list(module.__all__) == sorted(module.__all__)
        assert all(hasattr(module, exported) for exported in module.__all__)


def test_every_room_has_a_floor() -> None:
    rooms = {room(path) for path in FILES} - {"__init__"}
    assert rooms <= set(LEVEL)


def test_readme_commands_exist() -> None:
    from typer.main import get_command

    from fedtl.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    used = set(re.findall(r"(?:uv run |`)fedtl ([a-z]+)\b", (ROOT / "README.md").read_text()))
    assert {"run", "check", "resume", "list", "cache"} <= used <= known


def test_no_trace_of_registries_or_machines() -> None:
    names = ("pypi", "pythonhosted")
    hosts = re.compile("|".join(rf"{name}\.org" for name in names))
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if not path.is_file() or parts[0] in {".git", ".venv"} or path.suffix in {".pyc", ".png"}:
            continue
        if any(part.startswith(".") and part != ".ci" for part in parts) or path.name == "uv.lock":
            continue
        try:
            assert not hosts.search(path.read_text()), path
        except UnicodeDecodeError:
            continue


def test_tested_versions_are_written_down() -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pinned = {line.split("==")[0] for line in content["tool"]["uv"]["constraint-dependencies"]}
    named = {
        re.split(r"[\[<>=!~]", line)[0]
        for line in (
            *content["project"]["dependencies"],
            *content["dependency-groups"]["dev"],
            *(
                line
                for extra in content["project"]["optional-dependencies"].values()
                for line in extra
            ),
        )
    }
    assert named - {"fedtl"} <= pinned, named - pinned
