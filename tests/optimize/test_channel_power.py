"""Input channels' power against the inputs themselves."""

import torch
from torch import nn

from shardq.matrix import matrices_in
from shardq.optimize.channel_power import channel_power


def test_power_is_the_sum_of_squares_over_all_calls_and_positions():
    block = nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3)).requires_grad_(False)
    first, second = torch.randn(2, 5, 6), torch.randn(1, 5, 6)
    with channel_power(block, matrices_in(block)) as power:
        block(first)
        block(second)
    block(first)  # after the body: not counted
    inner = torch.cat([nn.functional.gelu(block[0](part)).flatten(0, 1) for part in (first, second)])
    torch.testing.assert_close(power["0"], torch.cat([first.flatten(0, 1), second.flatten(0, 1)]).square().sum(0))
    torch.testing.assert_close(power["2"], inner.square().sum(0))


def test_linear_that_nothing_reached_has_no_power():
    block = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(5, 2)})
    with torch.no_grad(), channel_power(block, matrices_in(block)) as power:
        block["used"](torch.ones(2, 3))
    assert power["used"].tolist() == [2, 2, 2] and power["idle"].tolist() == [0] * 5
