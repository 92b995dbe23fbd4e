"""The requirements of the program that will serve a run's result, checked before work starts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial

from torch import nn

from shardq.config import DEFAULT_GROUP_SIZES, QuantizeConfig
from shardq.errors import ConfigError
from shardq.export.checkpoint import model_dtype
from shardq.export.chosen import check_installed, formats_of, own_form, served_as
from shardq.formats import compressed_tensors, gptq
from shardq.formats.options import ExportOptions
from shardq.matrix import Matrix, is_linear
from shardq.model.block import BlockPlan
from shardq.model.choice import matrices_to_quantize
from shardq.model.experts import routed_in
from shardq.model.skeleton import Skeleton
from shardq.quant.grid import Grid
from shardq.rundir.plan import Plan

# vLLM 0.32: Marlin's groups, and the multiples that its CPU kernel (16-bit activations) and its CUTLASS kernel (int8
# activations) ask of a linear's sizes.
VLLM_GROUP_SIZES = (None, 32, 64, 128)
VLLM_MULTIPLE = {16: 32, 8: 16}
VLLM_KV = ("k_proj", "v_proj")
VLLM_EXPERTS = {"colwise": (128, 64), "rowwise": (64, 128)}
"""Multiples of inputs and outputs that Marlin asks of experts; Triton takes others, but groups and 16 bits alone."""
# Where the architecture declares nothing for a linear (Qwen3-VL, DeepSeek's attention): vLLM's models have these names.
VLLM_WAYS = {
    **{f"*.{name}_proj": "colwise" for name in ("q", "k", "v", "gate", "up", "q_b", "kv_b")},
    **{f"*.{name}_proj": "rowwise" for name in ("o", "down")},
}
NARROW = 4  # times that a narrow linear's other side is as long, at least: such a linear is a small part of its block


def as_served(target: str | None, options: ExportOptions, skeleton: Skeleton, plan: Plan) -> Plan:
    """The plan of what the options write: with scales in the dtype of the target, or else of the run's own packed
    checkpoint; without encodings beside a packed one.

    Args:
        target: program that serves the result, if one is asked for.

    Raises:
        ConfigError: the plan's grids cannot have scales of that dtype.
    """
    form = served_as(target, options) if target else own_form(options)
    plan = replace(plan, has_encodings=options.checkpoint != "packed")
    if form.rounded_by is None:
        return plan
    dtype = form.scale_dtype(model_dtype(skeleton, next(iter(plan.grids.values()))))
    try:
        return plan.with_scales_in(str(dtype).removeprefix("torch."))
    except ValueError as error:
        keeper = target or "a packed checkpoint"
        raise ConfigError(f"quant.{error}; {keeper} keeps them so, leave out one of the two") from error


def check_served(config: QuantizeConfig, skeleton: Skeleton, plan: Plan) -> None:
    """Check that the formats asked for can be written, and that the target's program can load them.

    Raises:
        ConfigError: naming the rule, and the linear that breaks it.
    """
    own = own_form(config.export)
    asked = formats_of(config.export) | {own.name: own}
    if config.target:  # this run, or an export of it, has to be able to write the target's format
        served = served_as(config.target, config.export)
        asked |= {served.name: served}
    for chosen in asked.values():
        check_installed(chosen)
    for grid in dict.fromkeys(plan.grids.values()):
        if config.target == "vllm" and grid.bits not in compressed_tensors.BITS:
            raise ConfigError(
                f"quant.bits: vLLM has no kernel for {grid.bits} bits, only for 4 and 8; choose one of them, or leave "
                "out target"
            )
    for chosen in asked.values():
        chosen.check(skeleton, plan.grids)
    if config.target == "vllm":
        check_vllm(config, skeleton, plan)


def check_vllm(config: QuantizeConfig, skeleton: Skeleton, plan: Plan) -> None:
    """Check vLLM's rules.

    Raises:
        ConfigError: as `check_served`.
    """
    for grid in dict.fromkeys(plan.grids.values()):
        _check_vllm_grid(config, grid)
    if config.activations.kv_bits:
        raise ConfigError(
            "activations.kv_bits: vLLM takes no integer grids of keys and values from a checkpoint, float8 alone; "
            "leave it out"
        )
    fault_on = partial(_shape_fault, skeleton, plan, VLLM_MULTIPLE[config.export.activation_bits])
    if fault := fault_on(config.tensor_parallel):
        served = [str(degree) for degree in (1, 2, 4, 8) if not fault_on(degree)]
        fault = fault if served else fault_on(1) or fault
        advice = f"on {' or '.join(served)} it is served" if served else _how_to_ignore(skeleton, fault.name)
        raise ConfigError(f"target: {fault.reason}; {advice}")
    for block in plan.blocks:
        _check_fused(block, skeleton.blocks[block.index])
        _check_experts(block, skeleton.blocks[block.index])


def _check_vllm_grid(config: QuantizeConfig, grid: Grid) -> None:
    if grid.group_size not in VLLM_GROUP_SIZES:
        raise ConfigError(
            f"quant.group_size: vLLM has no kernel for groups of {grid.group_size}; choose 32, 64, 128 or -1"
        )
    if grid.has_zero_point and grid.bits != 4:
        raise ConfigError(f"quant.symmetric: vLLM has no kernel for asymmetric grids of {grid.bits} bits, only of 4")
    for chosen in formats_of(config.export).values():
        if chosen.rounded_by == "vllm" and not chosen.is_served(grid):
            raise ConfigError(
                f"export.formats: vLLM takes {chosen.name} on symmetric grids with positive scales only; leave it out"
            )


@dataclass(frozen=True)
class _Fault:
    """A reason why vLLM cannot serve a model, and the linear with the fault, "" if it is in none."""

    reason: str
    name: str = ""


def _shape_fault(skeleton: Skeleton, plan: Plan, multiple: int, degree: int) -> _Fault | None:
    """A fault that keeps vLLM from splitting the quantized linears over `degree` GPUs, or None."""
    heads, kv_heads = _heads(skeleton, degree)
    if degree > 1 and not getattr(skeleton.model, "tp_plan", None):
        return _Fault(f"on {degree} GPUs: {type(skeleton.model).__name__} declares no way to split it")
    if heads % degree:
        return _Fault(f"on {degree} GPUs: {heads} attention heads do not divide")
    if max(kv_heads, degree) % min(kv_heads, degree):
        return _Fault(f"on {degree} GPUs: {kv_heads} heads of keys and values neither divide nor can be repeated")
    fault_of = partial(_linear_fault, _ways(skeleton), kv_heads, multiple, degree)
    every = [(block.full_name(matrix), matrix, grid) for block in plan.blocks for matrix, grid in block.grids.items()]
    return next((fault for entry in every if (fault := fault_of(*entry))), None)


def _ways(skeleton: Skeleton) -> dict[str, str]:
    """Which side of a linear is split, by a pattern of its name; of experts always, else only where any is declared."""
    paths = dict.fromkeys(path for block in skeleton.blocks for path in routed_in(block))
    experts = {
        f"{skeleton.list_name}.*.{path}.*.{name}": f"expert {way}"
        for path in paths
        for name, way in (("gate_proj", "colwise"), ("up_proj", "colwise"), ("down_proj", "rowwise"))
    }
    declared = getattr(skeleton.model, "tp_plan", None)
    return experts | (declared | VLLM_WAYS if declared else {})


def _heads(skeleton: Skeleton, default: int) -> tuple[int, int]:
    """Numbers of attention heads, and of those of keys and values."""
    config = skeleton.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", default)
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _linear_fault(
    ways: dict[str, str], kv_heads: int, multiple: int, degree: int, name: str, matrix: Matrix, grid: Grid
) -> _Fault | None:
    """A fault that keeps vLLM from splitting a linear over `degree` GPUs, or None.

    If there are fewer heads of keys and values than GPUs, they are repeated, not split.
    """
    way = next((way for pattern, way in ways.items() if fnmatchcase(name, pattern)), "")
    over = min(degree, kv_heads) if name.endswith(VLLM_KV) else degree
    parts = {"input": over if "rowwise" in way else 1, "output": over if "colwise" in way else 1}
    needed = dict.fromkeys(parts, multiple)
    if way.startswith("expert") and grid.group_size is None and multiple == VLLM_MULTIPLE[16]:
        needed = dict(zip(needed, VLLM_EXPERTS[way.partition(" ")[2]], strict=True))
    for kind, size in (("input", matrix.shape[1]), ("output", matrix.shape[0])):
        split = f", {size / parts[kind]:g} on each of {degree} GPUs" if degree > 1 else ""
        part = f"{name} has {size} {kind} channels{split}"
        if size % (parts[kind] * needed[kind]):
            return _Fault(f"{part}; vLLM's kernels need a multiple of {needed[kind]}", name)
        if kind == "input" and not grid.divides(size // parts[kind]):
            return _Fault(f"{part}; these must be whole groups of {grid.group_size}", name)
    return None


def with_narrow_left(config: QuantizeConfig, skeleton: Skeleton, say: Callable[[str], None]) -> QuantizeConfig:
    """The options, which now ignore linears too narrow for vLLM's kernels, where the result is for it.

    Of linears that vLLM makes one of, all are narrow or none is ignored.

    Args:
        say: gets a line that names them, if there are any.
    """
    is_packed = config.export.checkpoint != "plain" and config.quant.bits in compressed_tensors.BITS
    if config.target != "vllm" and not is_packed:
        return config
    least = config.quant if config.quant.group_size else replace(config.quant, group_size=DEFAULT_GROUP_SIZES[-1])
    grid, degree = least.grid, config.tensor_parallel
    multiple, kv_heads = VLLM_MULTIPLE[config.export.activation_bits], _heads(skeleton, degree)[1]
    fault_of = partial(_linear_fault, _ways(skeleton), kv_heads, multiple, degree)
    chosen = matrices_to_quantize(skeleton, config.quant.ignored)
    left: set[str] = set()
    for (name, block), matrices in zip(skeleton.named_blocks.items(), chosen, strict=True):
        narrow = {
            matrix.name
            for matrix in matrices
            if NARROW * min(matrix.shape) <= max(matrix.shape) and fault_of(f"{name}.{matrix.name}", matrix, grid)
        }
        parents = {inner.rpartition(".")[0] for inner in narrow}
        wider = [group for parent in parents for group in _fused_groups(block, parent) if not narrow.issuperset(group)]
        left |= narrow.difference(*wider)
    if not left:
        return config
    say(f"{', '.join(sorted(left))}: in float in every block, too narrow for vLLM's kernels")
    return replace(config, quant=replace(config.quant, ignore=(*config.quant.ignored, *sorted(left))))


def _how_to_ignore(skeleton: Skeleton, name: str) -> str:
    """How to ignore a linear in every block, together with the linears that vLLM fuses with it."""
    block_name = next(prefix for prefix in skeleton.names if name.startswith(f"{prefix}."))
    inner = name.removeprefix(f"{block_name}.")
    groups = _fused_groups(skeleton.named_blocks[block_name], inner.rpartition(".")[0])
    together = next((group for group in groups if inner in group), [inner])
    patterns = _last_parts(together, "*.", ",")
    why = ", which vLLM makes one linear of" if len(together) > 1 else ""
    return f"leave {'them' if why else 'it'} as {'they are' if why else 'it is'} with --quant.ignore '{patterns}'{why}"


def _fused_groups(block: nn.Module, parent: str) -> list[list[str]]:
    """Groups of linears below a module of a block, by name within the block, that vLLM fuses into one."""
    present = dict(block.get_submodule(parent).named_children())
    groups = [[part for part in parts if part in present] for parts in gptq.VLLM_FUSED.values()]
    return [[f"{parent}.{part}".removeprefix(".") for part in group] for group in groups if len(group) > 1]


def _last_parts(names: list[str], before: str = "", between: str = ", ") -> str:
    return between.join(before + name.rpartition(".")[2] for name in names)


def _check_experts(block: BlockPlan, module: nn.Module) -> None:
    grids = {matrix.name: grid for matrix, grid in block.grids.items()}
    for path, experts in routed_in(module).items():
        names = [f"{path}.{name}" for name, linear in experts.named_modules() if is_linear(linear)]
        left = [name for name in names if name not in grids]
        if left and len(left) < len(names):
            raise ConfigError(
                f"quant.ignore: vLLM has one scheme for all experts of {block.name}.{path}, so all or none must be "
                f"quantized; {left[0]} is not"
            )
        if not left and any(linear.bias is not None for linear in experts.modules() if is_linear(linear)):
            raise ConfigError(
                f"target: the experts of {block.name}.{path} have biases, which vLLM reads from no packed checkpoint; "
                f"leave them as they are with --quant.ignore '{path}.*', or leave out target"
            )


def _check_fused(block: BlockPlan, module: nn.Module) -> None:
    names = [matrix.name for matrix in block.grids]
    for parent in sorted({name.rpartition(".")[0] for name in names}):
        for together in _fused_groups(module, parent):
            left = [name for name in together if name not in names]
            if left and len(left) < len(together):
                raise ConfigError(
                    f"quant.ignore: vLLM fuses {_last_parts(together)} of {block.name}.{parent}, so all or none must "
                    f"be quantized; {left[0]} is not"
                )
