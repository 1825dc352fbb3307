import numpy as np

from fedtl import seeding


def test_a_key_depends_on_every_part_and_nothing_else() -> None:
    base = seeding.key(7, "batches", 3, 4)
    assert base == seeding.key(7, "batches", 3, 4)
    others = {
        seeding.key(8, "batches", 3, 4),
        seeding.key(7, "cohort", 3, 4),
        seeding.key(7, "batches", 4, 3),
        seeding.key(7, "batches", 34),
    }
    assert len(others | {base}) == 5
    assert 0 <= base < 2**64


def test_client_keys_do_not_depend_on_the_cohort() -> None:
    all_keys = seeding.client_keys(1, "batches", 2, np.arange(10))
    some = seeding.client_keys(1, "batches", 2, np.array([3, 7]))
    assert some.tolist() == all_keys[[3, 7]].tolist()
    assert all_keys.dtype == np.uint64


def test_generators_repeat_and_differ() -> None:
    first = seeding.generator(7, "split").random(4)
    assert (first == seeding.generator(7, "split").random(4)).all()
    assert (first != seeding.generator(7, "split", 1).random(4)).all()


def test_streams_are_fixed_for_ever() -> None:
    # A change here changes every published result: it needs a new major version.
    assert seeding.key(7, "batches", 1, 2) == 16097588028831941773
