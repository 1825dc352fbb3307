import json
from pathlib import Path

import jsonschema
import pytest

from fedtl.errors import InputError, ScenarioError
from fedtl.scenario.load import (
    dump_scenario,
    find_scenario,
    json_schema,
    list_scenarios,
    load_scenario,
)

ROOT = Path(__file__).resolve().parents[3]


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def problems(folder: Path, text: str, *overrides: str) -> dict[str, str]:
    with pytest.raises(ScenarioError) as caught:
        load_scenario(write(folder, text), overrides)
    return {p.where.rsplit(" ", 1)[-1]: p.line() for p in caught.value.problems}


@pytest.mark.parametrize("name", list(list_scenarios()))
def test_every_scenario_loads_survives_a_round_trip_and_obeys_the_schema(
    name: str, tmp_path: Path
) -> None:
    scenario = load_scenario(name)
    assert load_scenario(write(tmp_path, dump_scenario(scenario))) == scenario
    jsonschema.validate(scenario.model_dump(mode="json"), json.loads(json_schema()))


def test_noise_on_the_command_line_replaces_the_files_epsilon(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'name = "mine"\n[strategy]\nname = "fedavg"\nweighting = "uniform"\n'
        '[privacy]\nmechanism = "central"\nepsilon = 8.0\n',
    )
    noise = load_scenario(path, ["privacy.noise_multiplier=1.5"]).privacy
    assert (noise.epsilon, noise.noise_multiplier) == (None, 1.5)
    none = load_scenario(path, ["privacy.mechanism=none"]).privacy
    assert (none.mechanism, none.epsilon) == ("none", None)
    assert load_scenario(path, ["evaluation.references=[]"]).privacy.epsilon == 8
    for both in (["epsilon=4", "noise_multiplier=0"], ["noise_multiplier=0", "epsilon=4"]):
        with pytest.raises(ScenarioError, match="epsilon = 4 and noise_multiplier = 0"):
            load_scenario(path, [f"privacy.{one}" for one in both])


def test_the_schema_for_editors_is_up_to_date() -> None:
    written = (ROOT / "scenarios" / "scenario.schema.json").read_text()
    assert written == json_schema(), "run: fedtl schema > scenarios/scenario.schema.json"


def test_all_problems_are_told_at_once_with_line_given_allowed_and_nearest(tmp_path: Path) -> None:
    text = """name = "x"
rounds = -1
[training]
learning_rate = nan
batchsize = 3
[strategy]
name = "fedprx"
[clients]
partition = "dirichle"
[data]
source = "folder"
"""
    found = problems(tmp_path, text, "training.lr=1", "clients.alpha=-2")
    assert set(found) == {
        "rounds",
        "training.learning_rate",
        "training.batchsize",
        "training.lr",
        "strategy.name",
        "clients.partition",
        "clients.alpha",
        "data.path",
    }
    assert found["rounds"] == "mine.toml:2 rounds: out of range (got -1; allowed: at least 1)"
    assert "Did you mean 'batch_size'?" in found["training.batchsize"]
    assert 'Did you mean "fedprox"?' in found["strategy.name"]
    assert 'Did you mean "dirichlet"?' in found["clients.partition"]
    assert found["training.lr"].startswith("--set training.lr")
    assert "a finite number" in found["training.learning_rate"]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("rounds=0", "rounds"),
        ("rounds=1.5", "rounds"),
        ("seed=-1", "seed"),
        ("rounds='many'", "rounds"),
        ("data.test_fraction=0", "data.test_fraction"),
        ("data.test_fraction=1", "data.test_fraction"),
        ("clients.fraction=1.01", "clients.fraction"),
        ("clients.num=0", "clients.num"),
        ("training.learning_rate=inf", "training.learning_rate"),
        ("training.momentum=1", "training.momentum"),
        ("head.hidden=[]", "head.hidden"),
        ("head.hidden=[0]", "head.hidden.0"),
        ("head.hidden=[1000000000]", "head.hidden.0"),
        ("training.local_epochs=1000000000000000000000000000000", "training.local_epochs"),
        ("data.path=", "data.path"),
        ("evaluation.references=['local_only', 'local_only']", "evaluation.references"),
        ("evaluation.references=['x']", "evaluation.references.0"),
        ("engine.kind=cloud", "engine.kind"),
        ("data=3", "data"),
        ("backbone.sha256=xyz", "backbone.sha256"),
        ("name='../evil'", "name"),
    ],
)
def test_wrong_values_are_refused_by_key(tmp_path: Path, override: str, key: str) -> None:
    assert set(problems(tmp_path, 'name = "x"', override)) == {key}


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (["data.source=folder"], "data.path"),
        (["data.source=torchvision"], "data.name"),
        (["data.name=MNIST"], "data.name"),
        (["data.path=/tmp"], "data.path"),
        (["data.domains=true"], "data.domains"),
        (["clients.partition=natural"], "clients.partition"),
        (["backbone.name=identity"], "backbone.name"),
        (["backbone.weights=none", "backbone.sha256='0123456789'"], "backbone.sha256"),
        (["clients.partition=flwr_datasets"], "clients.partitioner"),
        (["clients.partitioner=LinearPartitioner"], "clients.partitioner"),
        (["data.source=folder", "data.path=x", "clients.partition=domain"], "clients.partition"),
    ],
)
def test_impossible_combinations_are_refused_with_the_reason(
    tmp_path: Path, override: list[str], key: str
) -> None:
    assert set(problems(tmp_path, 'name = "x"', *override)) == {key}


def test_a_strategys_parameters_are_its_own(tmp_path: Path) -> None:
    named = ["strategy.name=fedavg", "strategy.mu=1"]
    assert set(problems(tmp_path, 'name = "x"', *named)) == {"strategy.mu"}
    assert set(problems(tmp_path, 'name = "x"', "strategy.mu=1")) == {"strategy.mu"}


def test_another_strategy_keeps_only_what_it_knows() -> None:
    changed = load_scenario("label-skew", ["strategy.name=fedavg"])
    assert changed.strategy == load_scenario("quickstart").strategy
    kept = load_scenario("label-skew", ["strategy.weighting=uniform", "strategy.name=fedadam"])
    assert (kept.strategy.name, kept.strategy.weighting) == ("fedadam", "uniform")


def test_a_folder_of_the_same_name_does_not_hide_a_scenario(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_scenario("quickstart").name == "quickstart"


@pytest.mark.parametrize("value", ['"a\\u0000b"', "~nosuchuser/x"])
def test_what_cannot_be_a_path_is_refused(value: str) -> None:
    with pytest.raises(InputError, match="not a path"):
        load_scenario("quickstart", [f"data.path={value}"])


def test_conflicts_of_broken_tables_are_not_told(tmp_path: Path) -> None:
    found = problems(tmp_path, 'name = "x"', "data.source=foldr", "data.path=p")
    assert set(found) == {"data.source"}


def test_set_takes_toml_values_and_bare_words() -> None:
    scenario = load_scenario(
        "quickstart",
        ["training.learning_rate=0.1", "strategy.name=fedprox", "strategy.mu=1", "head.kind=mlp"],
    )
    assert scenario.training.learning_rate == 0.1
    assert scenario.strategy.name == "fedprox"
    assert scenario.head.kind == "mlp"
    assert scenario != load_scenario("quickstart")


@pytest.mark.parametrize("bad", ["x", "=3", ".a=1", ""])
def test_a_malformed_override_is_refused(bad: str) -> None:
    with pytest.raises(InputError, match=r"key\.path=value"):
        load_scenario("quickstart", [bad])


def test_the_hash_changes_with_the_question_and_not_with_the_engine(tmp_path: Path) -> None:
    base = load_scenario("quickstart")
    assert base.hash() == load_scenario("quickstart", ["engine.threads=1"]).hash()
    assert base.hash() != load_scenario("quickstart", ["seed=8"]).hash()
    assert base.hash() != load_scenario("quickstart", ["training.momentum=0.5"]).hash()
    at = 'name = "x"\ndata.source = "folder"\ndata.path = "pictures"\n'
    (tmp_path / "other").mkdir()
    here, there = load_scenario(write(tmp_path, at)), load_scenario(write(tmp_path / "other", at))
    assert here.data.path != there.data.path
    assert here.hash() == there.hash()


def test_paths_are_meant_from_the_file_and_from_here_with_set(tmp_path: Path) -> None:
    text = 'name = "x"\n[data]\nsource = "folder"\npath = "pictures"\n'
    assert load_scenario(write(tmp_path, text)).data.path == str(tmp_path / "pictures")
    moved = load_scenario(write(tmp_path, text), ["data.path=elsewhere"])
    assert moved.data.path == str(Path.cwd() / "elsewhere")


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"name = ", "not valid TOML"), (b"\xff\xfe", "UTF-8"), (b"#" * 1_000_001, "too large")],
)
def test_a_file_that_is_no_scenario(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        load_scenario(str(path))


def test_a_name_that_is_no_scenario(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fedtl run quickstart"):
        find_scenario("quickstrt")
    with pytest.raises(InputError, match="folder"):
        find_scenario(str(tmp_path))
    with pytest.raises(InputError, match="no such scenario file"):
        find_scenario("nowhere.toml")


def test_a_scenario_is_frozen() -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError):
        load_scenario("quickstart").seed = 3  # type: ignore[misc]
