"""Which matrices of a model's blocks are quantized."""

import fnmatch
import re

from torch import nn

from shardq.errors import ConfigError, UnsupportedModelError
from shardq.matrix import Matrix, matrices_in
from shardq.model.experts import routed_in
from shardq.model.skeleton import Skeleton
from shardq.quant.options import DEFAULT_IGNORE


def matrices_to_quantize(skeleton: Skeleton, ignore: tuple[str, ...]) -> list[list[Matrix]]:
    """The matrices of each block that are to be quantized; not those that blocks share, nor those that weigh experts.

    Args:
        ignore: full names, names within a block, or last parts of a name; shell patterns (`*.down_proj`) or, after
            `re:`, regular expressions.

    Raises:
        ConfigError: a pattern is no regular expression, or one that is not a default matches no linear of the model.
        UnsupportedModelError: no linear would be quantized.
    """
    _check_expressions(ignore)
    used: set[str] = set()
    chosen = []
    for block_name, block in skeleton.named_blocks.items():
        matrices = matrices_in(block)
        matches = {matrix: patterns_of(f"{block_name}.{matrix.name}", matrix.name, ignore) for matrix in matrices}
        used.update(*matches.values())
        own = [matrix for matrix in matrices if len(_users(skeleton, block_name, matrix)) == 1]
        chosen.append([matrix for matrix in own if not matches[matrix] and not weighs_experts(block, matrix.name)])
    unused = [pattern for pattern in ignore if pattern not in used and pattern not in DEFAULT_IGNORE]
    if unused:
        raise ConfigError(f"quant.ignore: {unused[0]!r} matches no linear of the blocks; give a name such as "
                          f"{skeleton.names[0]}.{matrices[0].name if matrices else 'mlp.down_proj'}")  # fmt: skip
    if not any(chosen):
        raise UnsupportedModelError(f"{type(skeleton.model).__name__}: no linear would be quantized: "
                                    f"{_why_none(skeleton, ignore)}")  # fmt: skip
    return chosen


def weighs_experts(block: nn.Module, name: str) -> bool:
    """Whether a linear chooses among a block's experts or weighs them: small, and a change of choice changes a lot.

    Most routers are no linears. The others are told by their names, a shared expert's gate by its only output.
    """
    if not routed_in(block):
        return False
    words = name.split(".")
    return any(word == "gate" or "router" in word for word in words) or block.get_submodule(name).out_features == 1


def shared_linears(skeleton: Skeleton) -> list[str]:
    """Full names of the linears whose weight is another block's too, by their first block."""
    return [
        f"{name}.{matrix.name}"
        for number, (name, block) in enumerate(skeleton.named_blocks.items())
        for matrix in matrices_in(block)
        if len(users := _users(skeleton, name, matrix)) > 1 and users[0] == number
    ]


def _users(skeleton: Skeleton, block_name: str, matrix: Matrix) -> list[int]:
    """The blocks that compute with a block's matrix: trained for one of several, it would be another's, too."""
    return skeleton.users[skeleton.layout[f"{block_name}.{matrix.tensor}"][0].source]


def _why_none(skeleton: Skeleton, ignore: tuple[str, ...]) -> str:
    if any(matrices_in(block) for block in skeleton.blocks):
        return f"quant.ignore leaves out all of them ({', '.join(ignore)})"
    modules = [module for block in skeleton.blocks for module in block.modules()]
    kinds = sorted({type(module).__name__ for module in modules if any(p.dim() > 1 for p in module.parameters(False))})
    return f"the matrices of its blocks are in modules of other kinds ({', '.join(kinds)}), which are not supported yet"


def _check_expressions(patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern[3:] if pattern.startswith("re:") else "")
        except re.error as error:
            raise ConfigError(f"quant.ignore: {pattern!r} is no regular expression ({error})") from error


def patterns_of(full_name: str, name: str, patterns: tuple[str, ...]) -> set[str]:
    """The patterns that match a linear, by its name in the model or within its block."""
    candidates = (full_name, name, name.rpartition(".")[2])
    return {
        pattern
        for pattern in patterns
        if any(
            re.fullmatch(pattern[3:], candidate)
            if pattern.startswith("re:")
            else fnmatch.fnmatchcase(candidate, pattern)
            for candidate in candidates
        )
    }
