import numpy as np

from fedtl import seeding

PERMUTATION = [7, 4, 3, 9, 1, 6, 8, 5, 2, 0]
UNIFORM = [0.943998158615, 0.764067658952]
QUICKSTART_SPLIT = "050730eb6364af77"


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


def test_a_name_has_one_stream_whoever_else_there_is() -> None:
    keys = seeding.named_keys(7, "split", ("a", "b", "c"))
    assert keys[1] == seeding.named_keys(7, "split", ("b",))[0]
    assert len({*keys.tolist(), *seeding.named_keys(8, "split", ("a", "b", "c")).tolist()}) == 6


def test_counted_streams_are_splitmix64() -> None:
    # the first numbers of the published generator from seed 1234567
    keys = np.full(3, 1234567, np.uint64)
    numbers = seeding.counted(keys, np.arange(3)).tolist()
    assert numbers == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    drawn = seeding.fractions(seeding.counted(np.zeros(10_000, np.uint64), np.arange(10_000)))
    assert 0 <= drawn.min() < drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 6 * (1 / 12 / 10_000) ** 0.5


def test_numpys_draws_are_those_that_results_were_made_with() -> None:
    # NumPy may change a method's stream in a new version: then every split changes with it.
    stream = seeding.generator(7, "split")
    assert stream.permutation(10).tolist() == PERMUTATION
    assert stream.random(2).round(12).tolist() == UNIFORM


def test_partitions_are_those_that_results_were_made_with() -> None:
    import hashlib

    from fedtl.data.clients import split_clients
    from fedtl.data.partitions import assign_clients
    from fedtl.data.sources import load_examples
    from fedtl.scenario import schema

    examples = load_examples(schema.Data())
    clients = schema.Clients(num=10, partition="dirichlet", within_domains=True, alpha=0.3)
    split = split_clients(assign_clients(examples, clients, 7), examples, clients, 0.2, 7)
    rows = np.concatenate([split.train.index, split.train.offsets, split.test.index])
    assert hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16] == QUICKSTART_SPLIT
