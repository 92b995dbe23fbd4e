"""The plan of a run, with the options that depend on the model's shapes."""

from dataclasses import replace
from pathlib import Path

from shardq.config import DEFAULT_GROUP_SIZES, QuantizeConfig
from shardq.errors import ConfigError
from shardq.export.form import why_not_in_vllm, with_form
from shardq.export.target import as_served, check_served, with_narrow_left
from shardq.formats.checkpoint import companions
from shardq.logs import Display
from shardq.model.ends import prologue
from shardq.model.recorded import record_arguments
from shardq.model.skeleton import Skeleton, open_skeleton
from shardq.parallel.ranks import Ranks
from shardq.rundir.plan import Plan, group_size_of, make_plan
from shardq.training.activation_grids import plan_activations


def planned(
    config: QuantizeConfig, folder: Path, ranks: Ranks, display: Display
) -> tuple[Skeleton, Plan, QuantizeConfig]:
    """The model, its plan, and options in which every value that depends on the model's shapes is filled in."""
    skeleton, length = open_skeleton(folder), config.calib.sequence_length
    config = with_narrow_left(config, skeleton, display.line)
    companions(folder)  # copied after the last block; one that must not be copied is refused now
    quant = replace(config.quant, group_size=group_size_of(skeleton, config.quant))
    if quant.group_size not in (config.quant.group_size, DEFAULT_GROUP_SIZES[0]):
        kind = "per-channel" if quant.group_size == -1 else f"groups of {quant.group_size}"
        display.line(f"grid: {kind}, as {DEFAULT_GROUP_SIZES[0]} does not divide every width of the model")
    plan = make_plan(skeleton, quant)
    export, why_plain = with_form(config, skeleton, plan)
    config = replace(config, quant=quant, export=export)
    plan = as_served(config.target, export, skeleton, plan)
    check_served(config, skeleton, plan)
    if why_plain:
        display.line(f"checkpoint: plain weights ({why_plain})")
    elif fault := why_not_in_vllm(config, skeleton, plan):
        display.line(f"checkpoint: packed, for transformers; vLLM: {fault}")
    if not config.uses_data:
        return skeleton, plan, config
    _check_length(skeleton, length)
    with prologue(skeleton, ranks.device) as embed:
        plan = plan.with_arguments(record_arguments(skeleton, embed, length))
    return skeleton, plan_activations(skeleton, plan, length, config.activations), config


def _check_length(skeleton: Skeleton, sequence_length: int) -> None:
    limit = getattr(skeleton.model.config.get_text_config(), "max_position_embeddings", None)
    if limit and sequence_length > limit:
        raise ConfigError(f"calib.sequence_length: {sequence_length} is beyond the model's {limit} positions; lower it")
