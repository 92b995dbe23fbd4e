"""What the program that is to serve a run's result asks of it, checked before work starts."""

import torch
from torch import nn

from shardq.config import QuantizeConfig
from shardq.errors import ConfigError
from shardq.formats import compressed_tensors
from shardq.model.skeleton import Skeleton
from shardq.pipeline.export import check_installed, stored_dtype
from shardq.pipeline.plan import Plan

# vLLM 0.32: Marlin's groups, and the multiples that its CPU kernel (16-bit activations) and its CUTLASS kernel (int8
# activations) ask of a linear's sizes.
VLLM_GROUP_SIZES = (None, 32, 64, 128)
VLLM_MULTIPLE = {16: 32, 8: 16}
VLLM_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # one matrix, and one scheme, there


def scale_dtype(config: QuantizeConfig, skeleton: Skeleton, plan: Plan) -> str | None:
    """Name of the dtype that the target keeps scales in: float16 in GGUF, else the model's, bfloat16 for float32."""
    if config.target is None:
        return None
    return (
        "float16" if config.target == "gguf" or stored_dtype(skeleton, plan, "source") is torch.float16 else "bfloat16"
    )


def check_served(config: QuantizeConfig, skeleton: Skeleton, plan: Plan) -> None:
    """Check that the formats asked for can be written, and that the target will take them.

    Raises:
        ConfigError: naming the rule, and the linear that breaks it.
    """
    spec, activation_bits = config.quant.spec, config.export.activation_bits
    for kind in config.export.asked:
        check_installed(kind)
    if config.target == "vllm" or "compressed-tensors" in config.export.asked:
        compressed_tensors.check_grid(spec, activation_bits)
    if config.target == "gguf" or "gguf" in config.export.asked:
        check_installed("gguf")
        from shardq.pipeline.gguf_export import check_gguf  # its package is an extra

        linears = zip(plan.names, plan.linears, strict=True)
        check_gguf(skeleton, {f"{block}.{name}": spec for block, names in linears for name in names})
    if config.target != "vllm":
        return
    if spec.decompressed_bits:
        raise ConfigError(
            "quant.decompressed_bits: vLLM keeps scales in the model's dtype, in which they are no whole multiples; "
            "leave out quant.decompressed_bits or target"
        )
    if spec.group_size not in VLLM_GROUP_SIZES:
        raise ConfigError(
            f"quant.group_size: vLLM has no kernel for groups of {spec.group_size}; choose 32, 64, 128 or -1"
        )
    if not spec.symmetric and spec.bits != 4:
        raise ConfigError(f"quant.symmetric: vLLM has no kernel for asymmetric grids of {spec.bits} bits, only of 4")
    for block_name, block, names in zip(skeleton.names, skeleton.blocks, plan.linears, strict=True):
        _check_shapes(block_name, block, names, VLLM_MULTIPLE[activation_bits])
        _check_fused(block_name, block, names)


def _check_shapes(block_name: str, block: nn.Module, names: list[str], multiple: int) -> None:
    for name in names:
        linear = block.get_submodule(name)
        for size, kind in ((linear.in_features, "input"), (linear.out_features, "output")):
            if size % multiple:
                raise ConfigError(
                    f"target: {block_name}.{name} has {size} {kind} channels, vLLM's kernels need a multiple of "
                    f"{multiple}; leave it as it is with --quant.ignore"
                )


def _check_fused(block_name: str, block: nn.Module, names: list[str]) -> None:
    parents = {name.rpartition(".")[0] for name in names}
    for parent in sorted(parents):
        present = dict(block.get_submodule(parent).named_children())
        for parts in VLLM_FUSED:
            together = [f"{parent}.{part}".removeprefix(".") for part in parts if part in present]
            left = [name for name in together if name not in names]
            if left and len(left) < len(together):
                raise ConfigError(
                    f"quant.ignore: vLLM fuses {', '.join(parts)} of {block_name}.{parent}, so all or none must be "
                    f"quantized; {left[0]} is not"
                )
