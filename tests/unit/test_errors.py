import errno

import pytest

from fedtl import errors


def test_one_line_says_what_where_got_allowed_and_what_to_do() -> None:
    error = errors.InputError("wrong", where="a.toml:3 x", got="1", allowed="2", do="Type y")
    assert error.line() == "a.toml:3 x: wrong (got 1; allowed: 2). Type y"


def test_exit_codes_are_those_of_the_design() -> None:
    codes = {
        errors.FedtlError: 1,
        errors.InputError: 2,
        errors.ScenarioError: 2,
        errors.EnvironmentFault: 3,
        errors.PolicyStop: 4,
        errors.SecurityRefusal: 5,
        errors.Interrupted: 130,
    }
    assert {kind: kind.exit_code for kind in codes} == codes
    assert errors.Interrupted("x", exit_code=143).exit_code == 143


@pytest.mark.parametrize(("number", "word"), [(errno.ENOSPC, "full"), (errno.EACCES, "denied")])
def test_the_systems_refusal_to_write_becomes_an_environment_fault(number: int, word: str) -> None:
    import os

    with (
        pytest.raises(errors.EnvironmentFault, match=word) as caught,
        errors.writing("the thing", "/somewhere"),
    ):
        raise OSError(number, os.strerror(number))
    assert "/somewhere" in caught.value.line()


def test_nearest_name() -> None:
    assert errors.nearest("fedprx", ["fedavg", "fedprox"]) == "fedprox"
    assert errors.nearest("cifar10", ["CIFAR10", "MNIST"]) == "CIFAR10"
    assert errors.nearest("zzz", ["fedavg"]) is None
    assert (
        "Did you mean 'resnet18'?" in errors.unknown_name("model", "resnet81", ["resnet18"]).line()
    )


def test_how_often() -> None:
    assert [errors.times(count) for count in (0, 1, 2, 1200)] == [
        "0 times", "once", "2 times", "1,200 times",
    ]  # fmt: skip
