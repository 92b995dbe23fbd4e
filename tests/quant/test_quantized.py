"""The result of quantizing a linear, on grids that describe the same weight."""

import pytest
import torch

from shardq.quant.quantized import QuantizedLinear
from shardq.quant.spec import QuantSpec


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_positive_scales_describe_the_same_weight(bits: int, group_size: int | None):
    spec = QuantSpec(bits=bits, group_size=group_size, full_range=True)
    scale = torch.randn(6, 32 // (group_size or 32))
    codes = torch.randint(spec.qmin, spec.qmax + 1, (6, 32), dtype=torch.int8)
    linear = QuantizedLinear(codes, scale, torch.zeros_like(scale), spec)
    positive = linear.with_positive_scales()
    assert (scale < 0).any() and (positive.scale_OG > 0).all()
    assert torch.equal(positive.dequantized(), linear.dequantized())
    assert positive.codes_OI.dtype == torch.int8
    assert positive.spec == QuantSpec(bits=bits, group_size=group_size, symmetric=False)
    assert positive.codes_OI.min() >= spec.qmin and positive.codes_OI.max() <= spec.qmax
    assert set(positive.zero_point_OG.flatten().tolist()) <= {0, -1}


@pytest.mark.parametrize("symmetric", [True, False])
def test_grids_with_positive_scales_are_left_as_they_are(symmetric: bool):
    linear = QuantizedLinear(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 1), torch.zeros(2, 1),
                             QuantSpec(bits=4, symmetric=symmetric))  # fmt: skip
    assert linear.with_positive_scales() is linear
