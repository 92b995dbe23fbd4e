"""The form of a run's own checkpoint: packed codes or plain weights."""

from dataclasses import replace

from shardq.config import QuantizeConfig
from shardq.errors import ConfigError, ShardQError, UnsupportedModelError
from shardq.export.chosen import own_form
from shardq.export.target import as_served, check_vllm
from shardq.formats.options import ExportOptions
from shardq.model.experts import routed_in
from shardq.model.skeleton import Skeleton
from shardq.rundir.plan import Plan


def with_form(config: QuantizeConfig, skeleton: Skeleton, plan: Plan) -> tuple[ExportOptions, str]:
    """Options in which the form of the run's own checkpoint is decided; and why it is not packed, where that is asked
    of the default.

    Raises:
        ConfigError: packed is asked for, and has no place for the codes of a matrix.
    """
    if config.export.checkpoint is not None:
        if config.export.checkpoint == "packed":
            _check_places(skeleton, plan)
        return config.export, ""
    packed = replace(config.export, checkpoint="packed")
    try:
        own_form(packed).check(skeleton, as_served(config.target, packed, skeleton, plan).grids)
        _check_places(skeleton, plan)
    except (ConfigError, UnsupportedModelError) as error:
        return replace(config.export, checkpoint="plain"), _without_advice(error).removeprefix("export.checkpoint: ")
    return packed, ""


def why_not_in_vllm(config: QuantizeConfig, skeleton: Skeleton, plan: Plan) -> str:
    """Why vLLM would not serve the run's own checkpoint; empty if it would."""
    if config.target == "vllm" or config.export.checkpoint == "plain":
        return ""
    try:
        check_vllm(config, skeleton, plan)
    except ConfigError as error:
        return _without_advice(error).removeprefix("target: ")
    return ""


def _without_advice(error: ShardQError) -> str:
    return str(error).rpartition(";")[0] or str(error)


def _check_places(skeleton: Skeleton, plan: Plan) -> None:
    """Check that codes have a place in a checkpoint: that every matrix is a tensor of its own in the source, or one of
    an expert's where transformers joins experts.

    Raises:
        ConfigError: one is stored as a part of another tensor, or in parts.
    """
    for block in plan.blocks:
        paths = routed_in(skeleton.blocks[block.index]) if skeleton.joins_experts else ()
        experts = tuple(f"{path}." for path in paths)
        for matrix in block.grids:
            stored = skeleton.tensor(f"{block.name}.{matrix.tensor}").name
            if not matrix.name.startswith(experts) and stored not in skeleton.source.tensors:
                raise ConfigError(
                    f"export.checkpoint: packed has no place for codes of {block.full_name(matrix)}, which the source "
                    "does not store as a tensor of its own; choose plain, and --export.formats compressed-tensors"
                )
