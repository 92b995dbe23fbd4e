"""Records what AIMET's LPBQ quantizer makes of a small weight, for the tests to compare with.

    python tests/golden/record_lpbq.py

In an environment of its own: `pip install torch==2.14.1 torchvision==0.29.1 aimet-torch==2.42.0`. Writes one
`.safetensors` file a case and `lpbq.json` beside this script.
"""

import json
from pathlib import Path

import torch
from aimet_torch.quantization.affine import GroupedBlockQuantizeDequantize
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parent
CASES = {"w4_group16_lpbq8": (4, 16, 8), "w3_group8_lpbq8": (3, 8, 8)}  # bits, group size, decompressed bits
VERSIONS = ("0.6.1", "1.0.0", "2.0.0", "2.1.0")


def awkward_weight() -> Tensor:
    """A weight [12, 64] whose groups differ in size, some by more than the multipliers reach."""
    weight = torch.randn(12, 64) * torch.rand(12, 64).mul(4).sub(4).exp()
    weight[1] = 0
    weight[2, :16] = 0
    weight[3, 16:32] *= 1e-6
    weight[4, 40] = 40
    weight[5] *= 1e-9
    weight[6] = 0.25
    return weight


def record(bits: int, group_size: int, decompressed_bits: int) -> tuple[dict[str, Tensor], dict]:
    """AIMET's grid, fake-quantized weight and encoding dictionaries of the weight, rounded to nearest."""
    weight = awkward_weight()
    quantizer = GroupedBlockQuantizeDequantize(
        shape=(len(weight), weight.shape[1] // group_size), bitwidth=bits, symmetric=True,
        decompressed_bw=decompressed_bits, block_size=(1, group_size), block_grouping=(1, -1),
    )  # fmt: skip
    with quantizer.compute_encodings():
        quantizer(weight)
    with torch.no_grad():
        output = quantizer(weight)
    encoding = quantizer.get_encodings()._hint_input_shape(weight.shape)
    tensors = {
        "weight": weight,
        "min": quantizer.min,
        "max": quantizer.max,
        "scale": quantizer.get_scale(),
        "channel_scale": quantizer.get_per_channel_scale(),
        "multiplier": encoding.per_block_int_scale,
        "output": output.as_subclass(Tensor),
    }
    encodings = {version: encoding.to_qnn_encoding_dict(version) for version in VERSIONS}
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, encodings


def main() -> None:
    """Record every case."""
    described = {}
    for name, (bits, group_size, decompressed_bits) in CASES.items():
        torch.manual_seed(0)
        tensors, encodings = record(bits, group_size, decompressed_bits)
        save_file(tensors, FOLDER / f"{name}.safetensors")
        described[name] = {
            "bits": bits, "group": group_size, "decompressed": decompressed_bits, "encodings": encodings,
        }  # fmt: skip
    (FOLDER / "lpbq.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
