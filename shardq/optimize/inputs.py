"""AdaScale's training input: the quantized stream with elements of the fp stream mixed in."""

import hashlib

import torch
from torch import Tensor


def generator_for(device: torch.device, *key: object) -> torch.Generator:
    """A generator whose numbers depend on `key` alone: not on the rank, nor on what was drawn before."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def mixed(quant_TD: Tensor, fp_TD: Tensor, fp_mix: float, generator: torch.Generator) -> Tensor:
    """Take each element from the fp stream with probability `fp_mix`, else from the quantized stream.

    Source: QDrop, arXiv 2203.05740, as AIMET's AdaScale uses it (there 0.5, drawn anew on every visit).
    """
    if fp_mix == 0:
        return quant_TD
    chosen_TD = torch.rand(quant_TD.shape, generator=generator, device=quant_TD.device) < fp_mix
    return torch.where(chosen_TD, fp_TD, quant_TD)
