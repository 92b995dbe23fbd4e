"""The mix of two streams: which share comes from each, and what the draw depends on."""

import numpy as np
import pytest
import torch
from torch import Tensor

from shardq.optimize.inputs import generator_for, mixed

KEY = (0, 3, 250, 7)  # seed, block, iteration, sample
QUANT_TD, FP_TD = torch.zeros(128, 64), torch.ones(128, 64)


def drawn(fp_mix: float, *key: object) -> Tensor:
    """1 where the fp stream was taken, 0 where the quantized one was."""
    return mixed(QUANT_TD, FP_TD, fp_mix, generator_for(*key))


def test_share_one_takes_the_fp_stream_alone():
    assert torch.equal(drawn(1.0, *KEY), FP_TD)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_share_is_kept_over_all_positions_and_channels(share: float):
    chosen_TD = drawn(share, *KEY)
    # Five standard deviations of a fair draw, over the whole and over each row and column.
    assert abs(chosen_TD.mean() - share) < 5 * (share * (1 - share) / chosen_TD.numel()) ** 0.5
    for axis in (0, 1):
        spread = (share * (1 - share) / chosen_TD.shape[axis]) ** 0.5
        assert (chosen_TD.mean(axis) - share).abs().max() < 5 * spread


def test_every_element_is_one_of_the_two():
    quant_TD, fp_TD = torch.randn(32, 16), torch.randn(32, 16)
    chosen_TD = mixed(quant_TD, fp_TD, 0.5, generator_for(*KEY))
    assert ((chosen_TD == quant_TD) | (chosen_TD == fp_TD)).all()


def test_same_key_gives_the_same_mix_whatever_was_drawn_before():
    first = drawn(0.5, *KEY)
    torch.rand(1000)
    torch.manual_seed(99)
    drawn(0.5, 1, 2, 3, 4)
    assert torch.equal(drawn(0.5, *KEY), first)


def test_drawing_leaves_the_global_generator_alone():
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    drawn(0.5, *KEY)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == before_numpy).all()


@pytest.mark.parametrize("part", range(len(KEY)), ids=["seed", "block", "iteration", "sample"])
def test_each_part_of_the_key_gives_an_independent_mix(part: int):
    other = tuple(value + (number == part) for number, value in enumerate(KEY))
    agreement = (drawn(0.5, *KEY) == drawn(0.5, *other)).float().mean()
    assert 0.45 < agreement < 0.55


def test_digits_of_neighbouring_parts_do_not_run_together():
    assert not torch.equal(drawn(0.5, 0, 1, 23, 4), drawn(0.5, 0, 12, 3, 4))
