"""Classes by name: which there are, in what order, and which look like slips."""

from __future__ import annotations

import pytest

from fedtl.deployment.class_table import Held, agree_on_classes
from fedtl.errors import InputError


def held(numbered: bool = False, **clients: str) -> dict[str, Held]:
    return {name: Held(tuple(classes.split()), numbered) for name, classes in clients.items()}


@pytest.mark.parametrize(
    ("clients", "classes"),
    [
        (held(a="cat dog", b="dog élan"), "cat dog élan"),
        (held(a="zoo cat", b="zoo cat"), "zoo cat"),  # all the same: as it is
        (held(a="zoo cat", b="zoo cat bat"), "bat cat zoo"),
        (held(True, a="1 2 10", b="2 11"), "1 2 10 11"),
        (held(True, a="-3 0 2", b="-10 0"), "-10 -3 0 2"),
        (held(True, a="1 10 2", b="2 11"), "1 10 11 2"),  # text, as its own order shows
        (held(True, a="1 2 10", b="2 eleven"), "1 10 2 eleven"),
        (held(False, a="1 2", b="10 2"), "1 10 2"),  # folders: as a folder of all has them
    ],
)
def test_order(clients: dict[str, Held], classes: str) -> None:
    table = agree_on_classes(clients)
    assert table.classes == tuple(classes.split())
    assert agree_on_classes(dict(reversed(clients.items()))).classes == table.classes


def test_the_table_says_who_lacks_what() -> None:
    table = agree_on_classes(held(c="cat dog", a="cat", b="cat cow dog"))
    assert table.clients == ("a", "b", "c")
    assert table.held.astype(int).tolist() == [[1, 1, 1], [0, 1, 0], [0, 1, 1]]
    assert table.differs
    assert table.lines() == [
        "cow: held by b; missing at a, c",
        "dog: held by b, c; missing at a",
    ]
    assert not agree_on_classes(held(a="cat dog", b="cat dog")).differs


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        (held(a="giraffe dog", b="giraffe dog", c="girafe dog"), "did you mean 'giraffe'"),
        (held(a="Dog cat", b="dog cat"), "differ only in case"),
        (held(a="\u00e9lan cat", b="e\u0301lan cat"), "differ only in case or accent encoding"),
    ],
)
def test_slips(clients: dict[str, Held], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        agree_on_classes(clients)
    assert caught.value.exit_code == 2
    assert "held by" in caught.value.line()
    assert "missing at" in caught.value.line()


def test_names_that_meet_in_a_client_are_two() -> None:
    clients = held(a="giraffe girafe", b="girafe dog", c="giraffe dog")
    assert len(agree_on_classes(clients).classes) == 3


def test_one_class_is_none() -> None:
    with pytest.raises(InputError, match="only one class"):
        agree_on_classes(held(a="cat", b="cat"))


def test_hostile_names_are_escaped() -> None:
    with pytest.raises(InputError) as caught:
        agree_on_classes({"a": Held(("x\x1b[31m", "y")), "b": Held(("X\x1b[31m", "y"))})
    assert "\x1b" not in caught.value.line()
