"""AdaScale's training input: the quantized stream with elements of the fp stream mixed in."""

import hashlib

import numpy as np
import torch
from torch import Tensor


def generator_for(*key: object) -> np.random.Generator:
    """A generator whose numbers depend only on `key`: not on the rank, the device or earlier draws."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    # Several times as fast as torch's on a CPU, where drawing takes a core from the training.
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))


def mixed(quant_TD: Tensor, fp_TD: Tensor, fp_mix: float, generator: np.random.Generator) -> Tensor:
    """Take each element from the fp stream with probability `fp_mix`, else from the quantized stream.

    Source: QDrop, arXiv 2203.05740, as AIMET's AdaScale uses it (there 0.5, drawn again on every visit).
    """
    chosen_TD = torch.from_numpy(generator.random(quant_TD.shape, dtype=np.float32) < fp_mix)
    return torch.where(chosen_TD.to(quant_TD.device), fp_TD, quant_TD)
