"""What compressed-tensors itself makes of a weight, as a checkpoint of one linear `l`."""

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor


def compressed(args: QuantizationArgs, stored_as: str, state: dict[str, Tensor]) -> tuple[dict, dict, Tensor]:
    """Tensors and config of a weight that the library compresses, and what it decompresses.

    Args:
        state: the weight, its scales, and zero points where it has them, by their names in the library.
    """
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=stored_as)
    compressor = BaseCompressor.get_value_from_registry(stored_as)
    stored = compressor.compress(dict(state), scheme)
    decompressed = compressor.decompress(dict(stored), scheme)["weight"]
    config = {"quant_method": "compressed-tensors", "format": stored_as,
              "config_groups": {"group_0": scheme.model_dump(mode="json", exclude_none=True)}}  # fmt: skip
    return {f"l.{name}": tensor for name, tensor in stored.items()}, config, decompressed
