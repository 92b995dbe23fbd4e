"""Which rank has which sample: the ranks together see what one rank would see."""

import pytest

from shardq.calib.partition import chunks, largest_part, owned_samples, step_samples, watched_samples

LAYOUTS = [
    # samples, batch, world size
    (8, 4, 2), (8, 2, 2), (8, 8, 4), (12, 4, 4), (12, 6, 3), (12, 12, 2), (6, 6, 6), (10, 4, 2),
]  # fmt: skip
UNEVEN_BATCHES = [(8, 3, 2), (8, 2, 4), (8, 1, 8), (12, 5, 3), (6, 4, 3)]  # a part of each step's batch may be empty
UNEVEN_SAMPLES = [(9, 2, 2), (7, 4, 4), (7, 3, 3), (5, 5, 4), (11, 3, 8)]


def naive_batches(num_samples: int, batch_size: int, num_iterations: int) -> list[list[int]]:
    """Neighbours in order, wrapping around."""
    endless = list(range(num_samples)) * (batch_size * num_iterations // num_samples + 1)
    return [endless[number * batch_size : (number + 1) * batch_size] for number in range(num_iterations)]


@pytest.mark.parametrize(("num_samples", "batch_size"), [(8, 4), (8, 3), (5, 5), (7, 2), (1, 1)])
def test_one_rank_sees_neighbours_in_order_and_wraps_around(num_samples: int, batch_size: int):
    steps = list(step_samples(num_samples, batch_size, 20, rank=0, world_size=1))
    assert [iteration for iteration, _ in steps] == list(range(20))
    assert [samples for _, samples in steps] == naive_batches(num_samples, batch_size, 20)


@pytest.mark.parametrize(("num_samples", "batch_size", "world_size"), LAYOUTS + UNEVEN_BATCHES)
def test_ranks_together_see_the_batches_of_one_rank(num_samples: int, batch_size: int, world_size: int):
    ranks = [list(step_samples(num_samples, batch_size, 25, rank, world_size)) for rank in range(world_size)]
    for number, expected in enumerate(naive_batches(num_samples, batch_size, 25)):
        assert {steps[number][0] for steps in ranks} == {number}
        assert sorted(sample for steps in ranks for sample in steps[number][1]) == sorted(expected)


@pytest.mark.parametrize(("num_samples", "batch_size", "world_size"), LAYOUTS)
def test_every_rank_has_the_same_share_of_every_step(num_samples: int, batch_size: int, world_size: int):
    """Otherwise ranks would wait for one another."""
    for rank in range(world_size):
        for _, samples in step_samples(num_samples, batch_size, 25, rank, world_size):
            assert len(samples) == batch_size // world_size


@pytest.mark.parametrize(("num_samples", "batch_size", "world_size"), LAYOUTS + UNEVEN_BATCHES + UNEVEN_SAMPLES)
def test_parts_make_up_the_batch_and_differ_by_one_at_most(num_samples: int, batch_size: int, world_size: int):
    ranks = [list(step_samples(num_samples, batch_size, 25, rank, world_size)) for rank in range(world_size)]
    parts = [[len(steps[number][1]) for steps in ranks] for number in range(25)]
    assert all(sum(sizes) == batch_size and max(sizes) - min(sizes) <= 1 for sizes in parts)
    assert max(map(max, parts)) == largest_part(batch_size, world_size)


@pytest.mark.parametrize(("num_samples", "batch_size", "world_size"), UNEVEN_BATCHES + UNEVEN_SAMPLES)
def test_a_rank_goes_through_its_samples_in_turn(num_samples: int, batch_size: int, world_size: int):
    for rank in range(world_size):
        seen = [s for _, samples in step_samples(num_samples, batch_size, 200, rank, world_size) for s in samples]
        own = list(owned_samples(num_samples, rank, world_size))
        assert seen == [own[number % len(own)] for number in range(len(seen))] and set(seen) == set(own)


@pytest.mark.parametrize(("num_samples", "batch_size", "world_size"), LAYOUTS + UNEVEN_BATCHES + UNEVEN_SAMPLES)
def test_a_rank_trains_only_on_samples_that_it_owns(num_samples: int, batch_size: int, world_size: int):
    for rank in range(world_size):
        owned = set(owned_samples(num_samples, rank, world_size))
        seen = {s for _, samples in step_samples(num_samples, batch_size, 25, rank, world_size) for s in samples}
        assert seen <= owned


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_samples", [0, 1, 7, 12])
def test_every_sample_has_one_owner(num_samples: int, world_size: int):
    owned = [sample for rank in range(world_size) for sample in owned_samples(num_samples, rank, world_size)]
    assert sorted(owned) == list(range(num_samples))


@pytest.mark.parametrize("size", [1, 3, 5, 100])
def test_chunks_are_all_samples_in_order(size: int):
    owned = owned_samples(11, rank=1, world_size=2)
    parts = chunks(owned, size)
    assert [sample for part in parts for sample in part] == [1, 3, 5, 7, 9]
    assert all(len(part) == size for part in parts[:-1])
    assert all(1 <= len(part) <= size for part in parts)


@pytest.mark.parametrize(("num_held_out", "expected"), [(0, 8), (4, 4), (12, 12)])
def test_watched_samples_are_the_last_ones_whatever_the_number_of_ranks(num_held_out: int, expected: int):
    for world_size in (1, 2, 4):
        parts = [watched_samples(30, num_held_out, rank, world_size) for rank in range(world_size)]
        assert sorted(sum(parts, [])) == list(range(30))[-expected:]
        owned = [owned_samples(30, rank, world_size) for rank in range(world_size)]
        assert all(set(part) <= set(own) for part, own in zip(parts, owned, strict=True))


def test_few_samples_are_all_watched():
    assert watched_samples(3, 0, 0, 1) == [0, 1, 2]
