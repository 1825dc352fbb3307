"""From a TOML file and ``--set`` overrides to a Scenario, or to every problem at once."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, TypeAdapter, ValidationError

from fedtl.errors import EnvironmentFault, InputError, Problem, ScenarioError, nearest
from fedtl.scenario import strategies
from fedtl.scenario.compatibility import find_conflicts
from fedtl.scenario.schema import Scenario

MAX_SCENARIO_BYTES = 1_000_000
"""A scenario is a page of text; a larger file is a mistake (a data file, say)."""

PATH_KEYS = (
    ("data", "path", r"$."),
    ("clients", "split_file", r"$."),
    ("backbone", "weights", r"default|none|[A-Z][A-Z0-9_]*"),
    ("backbone", "path", r"$."),
    ("evaluation", "source_path", r"$."),
)
"""Keys that may hold a path, with a pattern of the words that are none."""

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(?<!\.pth|.\.pt|onnx|sors)")
"""Weights that are no path where no such file is: the name of a model on the hub."""


def scenario_folders() -> list[Path]:
    """Where a scenario's bare name is looked up: here, then what came with fedtl."""
    package = Path(__file__).resolve().parents[1]
    return [Path.cwd() / "scenarios", package.parent / "scenarios", package / "scenarios"]


def list_scenarios() -> dict[str, Path]:
    """Scenario files by name; a name found here hides one that came with fedtl."""
    found: dict[str, Path] = {}
    for folder in scenario_folders():
        for path in sorted(folder.glob("*.toml")):
            found.setdefault(path.stem, path)
    return found


def find_scenario(name: str) -> Path:
    """The file behind a scenario's name or path. Raises InputError naming the nearest one."""
    path, known = Path(name), list_scenarios()
    try:
        if path.is_file():
            return path
    except (OSError, ValueError):  # too long for a path, or with a character that no path has
        pass
    if name in known:
        return known[name]
    if path.is_dir():
        raise InputError("a scenario is a .toml file, this is a folder", where=name)
    if path.suffix == ".toml":
        raise InputError("no such scenario file", where=name, do="'fedtl list' shows scenarios")
    hint = nearest(name, known)
    raise InputError(
        "no scenario of this name",
        got=repr(name),
        allowed=", ".join(known) or "a path to a .toml file",
        do=f"Try 'fedtl run {hint}'" if hint else "Give a name or a path to a .toml file",
    )


def load_scenario(
    name: str, overrides: Sequence[str] = (), *, engine: str | None = None
) -> Scenario:
    """Read, override and validate one scenario.

    Args:
        name: a name from ``scenarios/`` or a path to a .toml file.
        overrides: ``key.path=value`` with TOML values; a bare word is a string.
        engine: replaces ``engine.kind``.

    Raises:
        InputError: no such file, not TOML, a malformed override.
        ScenarioError: every unknown key, wrong value and impossible combination.
    """
    path = find_scenario(name)
    text = _read_text(path)
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"not valid TOML: {error}", where=path, do="Mend that line") from error
    _make_absolute(raw, path.resolve().parent)
    overrides = [*overrides, *([f'engine.kind="{engine}"'] if engine else [])]
    origin = _line_numbers(text, path.name)
    for override in overrides:
        key, value = _parse_override(override)
        _assign(raw, key, value, [told for told, place in origin.items() if place == "--set"])
        origin[".".join(key)] = "--engine" if key == ["engine", "kind"] and engine else "--set"
    return validate(raw, str(path), origin)


def validate(raw: Mapping[str, Any], source: str, origin: Mapping[str, str]) -> Scenario:
    """A Scenario from plain data, or a ScenarioError with every problem.

    Args:
        raw: the tables as TOML gives them.
        source: what is shown as the scenario's name in the error.
        origin: key path -> where it was written (``file:line`` or ``--set``).
    """
    problems: list[Problem] = []
    content = copy.deepcopy(dict(raw))
    if isinstance(content.get("strategy"), dict):
        content["strategy"].setdefault("name", strategies.FedAvg().name)
    for _ in range(8):  # each pass takes out what is wrong; more layers than these do not exist
        try:
            scenario = Scenario.model_validate(content)
            break
        except ValidationError as error:
            seen = {p.where for p in problems}
            for detail in error.errors():
                problem = _explain(dict(detail), content)
                if problem.where not in seen:
                    problems.append(problem)
                _remove(content, _key_path(detail["loc"]), detail["type"])
            if any(detail["type"] == "missing" for detail in error.errors()):
                content.setdefault("name", "unnamed")
    else:
        raise ScenarioError(source, problems)
    broken = {p.where.partition(".")[0] for p in problems}  # conflicts of these would mislead
    problems += [p for p in find_conflicts(scenario) if p.where.partition(".")[0] not in broken]
    if problems:
        raise ScenarioError(source, [_located(problem, origin) for problem in problems])
    return scenario


def with_seed(scenario: Scenario, seed: int) -> Scenario:
    """The same scenario with another seed, validated."""
    content = {**scenario.model_dump(), "seed": seed}
    return validate(content, scenario.name, {"seed": "--seeds"})


def dump_scenario(scenario: Scenario) -> str:
    """The resolved scenario as TOML that ``load_scenario`` reads back to an equal one."""
    return tomli_w.dumps(scenario.model_dump(mode="json", exclude_none=True))


def json_schema() -> str:
    """The JSON Schema of a scenario file, for editors' completion and checks."""
    content = Scenario.model_json_schema()
    content["title"] = "fedtl scenario"
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_SCENARIO_BYTES:
            raise InputError("too large for a scenario", where=path, allowed="at most 1 MB")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("not a text file in UTF-8", where=path) from error
    except OSError as error:
        raise EnvironmentFault(f"cannot read it: {error.strerror}", where=path) from error


def _parse_override(text: str) -> tuple[list[str], Any]:
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts) or "\n" in text:
        raise InputError(
            "not a setting", where="--set", got=repr(text), allowed="key.path=value",
            do="e.g. --set training.learning_rate=0.1",
        )  # fmt: skip
    try:
        parsed: Any = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    for table, entry, words in PATH_KEYS:
        if parts == [table, entry]:
            parsed = _absolute(parsed, words, Path.cwd(), f"{table}.{entry}")
    return parts, parsed


REPLACED: Mapping[tuple[str, object], tuple[str, ...]] = {
    ("privacy.epsilon", None): ("noise_multiplier",),
    ("privacy.noise_multiplier", None): ("epsilon",),
    ("privacy.mechanism", "none"): ("epsilon", "noise_multiplier", "budget"),
}
"""By key and value (None: a number) the keys of the same table that an override takes out."""


def _assign(raw: dict[str, Any], key: Sequence[str], value: Any, told: Sequence[str]) -> None:
    """Set one value; what the file says of it in another way no longer holds.

    What was ``told`` the same way stays, so that two answers to one question are refused.

    Another strategy keeps of the file's parameters only those it knows; noise replaces an epsilon
    it would follow from, and the other way round; without a mechanism neither is left.
    """
    named = (".".join(key), value if isinstance(value, str) else None)
    for other in REPLACED.get(named, ()):
        again = named[1] is None and f"{key[0]}.{other}" in told
        if not again and isinstance(inner := raw.get(key[0]), dict):
            inner.pop(other, None)
    old = raw.get("strategy")
    if list(key) == ["strategy", "name"] and isinstance(old, dict) and value in strategy_names():
        known = _keys(_strategy_models()[value])
        raw["strategy"] = {name: given for name, given in old.items() if name in known}
    table = raw
    for part in key[:-1]:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise InputError("is a value, not a table", where=f"--set {'.'.join(key)}")
        table = inner
    table[key[-1]] = value


def _make_absolute(raw: dict[str, Any], folder: Path) -> None:
    """Paths in a file are meant relative to that file."""
    for table, entry, words in PATH_KEYS:
        inner = raw.get(table)
        if isinstance(inner, dict) and entry in inner:
            inner[entry] = _absolute(inner[entry], words, folder, f"{table}.{entry}")


def _absolute(value: Any, words: str, folder: Path, where: str) -> Any:
    """A path made absolute; what is no path is left for the schema to judge."""
    if not isinstance(value, str) or not value or re.fullmatch(words, value):
        return value
    try:
        path = (folder / Path(value).expanduser()).resolve()
        hub = where == "backbone.weights" and HUB_NAME.fullmatch(value) and not path.exists()
        return value if hub else str(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"not a path: {error}", where=where, got=repr(value[:80])) from error


def _line_numbers(text: str, name: str) -> dict[str, str]:
    """``file:line`` of every table header and key in plain TOML, for error messages."""
    origin: dict[str, str] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w.\-]+)\s*\]", line):
            table = header[1]
            origin.setdefault(table, f"{name}:{number}")
        elif entry := re.match(r"\s*([\w.\-]+)\s*=", line):
            origin.setdefault(f"{table}.{entry[1]}".strip("."), f"{name}:{number}")
    return origin


def _located(problem: Problem, origin: Mapping[str, str]) -> Problem:
    place = origin.get(problem.where) or origin.get(problem.where.rpartition(".")[0])
    where = f"{place} {problem.where}" if place else problem.where
    return Problem(where, problem.what, problem.got, problem.allowed, problem.do)


def _key_path(loc: Sequence[str | int]) -> list[str]:
    """pydantic's location as the user's key path: without the strategy's tag."""
    parts = [str(part) for part in loc]
    if parts[:1] == ["strategy"] and len(parts) > 1 and parts[1] in strategy_names():
        del parts[1]
    return parts


def _remove(content: dict[str, Any], path: Sequence[str], kind: str) -> None:
    """Take one wrong entry out, so that the rest can be checked on its own."""
    if kind.startswith("union_tag"):
        path = ["strategy"]
    table: Any = content
    for part in path[:-1]:
        if not isinstance(table, dict) or part not in table:
            return
        if not isinstance(table[part], dict):  # inside a list: the whole entry goes
            del table[part]
            return
        table = table[part]
    if isinstance(table, dict):
        table.pop(path[-1], None)


def _explain(detail: dict[str, Any], raw: Mapping[str, Any]) -> Problem:
    """One pydantic error in our words: what, what was given, what is allowed, nearest name."""
    kind, context = detail["type"], detail.get("ctx", {})
    path = _key_path(detail["loc"])
    where, got = ".".join(path) or "scenario", repr(detail["input"])[:80]
    if kind == "extra_forbidden":
        names = _siblings(path, raw)
        hint = nearest(path[-1], names)
        do = f"Did you mean '{hint}'?" if hint else None
        return Problem(where, "unknown key", None, ", ".join(names), do)
    if kind.startswith("union_tag"):
        names = strategy_names()
        given = raw.get("strategy")
        tag = given.get("name") if isinstance(given, dict) else given
        hint = nearest(str(tag), names)
        return Problem(
            "strategy.name", "unknown strategy", repr(tag), ", ".join(names),
            f'Did you mean "{hint}"?' if hint else None,
        )  # fmt: skip
    if kind in ("literal_error", "enum"):
        names = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        hint = nearest(str(detail["input"]), names)
        do = f'Did you mean "{hint}"?' if hint else None
        return Problem(where, "not one of the known names", got, ", ".join(names), do)
    if kind == "missing":
        return Problem(where, "is required", None, "a value")
    return Problem(where, *_bounds(kind, context, str(detail["msg"]), got))


def _bounds(kind: str, context: Mapping[str, Any], message: str, got: str) -> tuple[str, str, str]:
    """What was violated, what was given, and the allowed range or type in words."""
    signs = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    limits = [f"{word} {context[sign]}" for sign, word in signs.items() if sign in context]
    if kind == "finite_number":
        return "not a finite number", got, "a finite number"
    if limits:
        return "out of range", got, " and ".join(limits)
    types = {
        "int_type": "a whole number", "int_from_float": "a whole number",
        "float_type": "a number", "string_type": "a text in quotes",
        "bool_type": "true or false", "list_type": "a list [..]",
        "model_type": "a table", "dict_type": "a table", "model_attributes_type": "a table",
    }  # fmt: skip
    if kind in types:
        return "wrong type", got, types[kind]
    return "not accepted", got, message.replace("String should", "should")


def _siblings(path: Sequence[str], raw: Mapping[str, Any]) -> list[str]:
    """The keys that are known where an unknown one was written."""
    model: type[BaseModel] | None = Scenario
    if len(path) > 1:
        if path[0] == "strategy":
            given = raw.get("strategy")
            name = given.get("name") if isinstance(given, dict) else None
            model = _strategy_models().get(str(name), strategies.FedAvg)
        else:
            annotation = Scenario.model_fields[path[0]].annotation
            model = annotation if isinstance(annotation, type) else None
    return _keys(model) if model is not None else []


def _keys(model: type[BaseModel]) -> list[str]:
    """A table's keys as they are written in a file: ``class``, where the code says ``class_``."""
    return [field.alias or name for name, field in model.model_fields.items()]


def _strategy_models() -> dict[str, type[BaseModel]]:
    """Strategy names and their tables, read off the schema itself."""
    content = TypeAdapter(strategies.Strategy).json_schema()
    mapping: dict[str, str] = content["discriminator"]["mapping"]
    return {name: getattr(strategies, ref.rsplit("/", 1)[1]) for name, ref in mapping.items()}


def strategy_names() -> list[str]:
    """All strategy names a scenario may give."""
    return list(_strategy_models())
