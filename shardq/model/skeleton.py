"""A model without weights: its decoder blocks on the meta device and stand-ins where they stood.

Works for any architecture of transformers: the blocks are the `ModuleList` whose children's class stands in the
model's own `_no_split_modules`. No table of models.
"""

import fnmatch
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import logging as transformers_logging

from shardq.errors import CheckpointError, ConfigError, UnsupportedModelError
from shardq.files import storage_errors
from shardq.formats.shards import Index, TensorInfo, inside, open_index
from shardq.model.attention import use_pieces

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
DEFAULT_IGNORE = ("lm_head", "*embed*")


class StandIn(nn.Module):
    """Takes a block's place in the model: records what the model passes, returns the hidden states unchanged.

    They are returned as the block would return them, alone or first of a tuple. Plain attributes of the block are
    copied, because some models read them (such as `attention_type`). If `injected` is set, that is returned instead:
    so the model's own code turns given hidden states into logits.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        own = {"training"}
        self.__dict__.update({k: v for k, v in vars(block).items() if not k.startswith("_") and k not in own})
        self.injected: Tensor | None = None
        self.seen: tuple[Tensor, tuple, dict] | None = None
        self._block = (block,)  # in a tuple: not a submodule, whose weights the model would expect
        self._returns_tuple: bool | None = None

    def forward(self, hidden, *args, **kwargs):
        """Record the call."""
        self.seen = (hidden, args, kwargs)
        if self._returns_tuple is None:
            self._returns_tuple = isinstance(self.on_meta(), tuple)
        returned = hidden if self.injected is None else self.injected
        return (returned,) if self._returns_tuple else returned

    @torch.no_grad()
    def on_meta(self, times: int = 1) -> object:
        """What the block returns for the call that was seen: structure and shapes, without computing.

        Args:
            times: how many times as many sequences to pass, with the arguments of the call.

        Raises:
            UnsupportedModelError: the block does not take that.
        """
        block = self._block[0]
        hidden, args, kwargs = to_meta(self.seen)
        try:
            return block(hidden.repeat(times, 1, 1), *args, **kwargs)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UnsupportedModelError(
                f"{type(block).__name__}: a decoder block must take any number of sequences with the arguments that "
                f"the model passes it for one; it does not take {times} ({_first_line(error)})"
            ) from error


def to_meta(values: Any) -> Any:
    """The same tuples and dicts with every tensor in them on the meta device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), values)


@dataclass(frozen=True)
class Skeleton:
    """A checkpoint opened for streaming.

    Attributes:
        folder: the checkpoint's folder.
        index: where every stored tensor lies.
        model: the transformers model on the meta device, a StandIn in each block's place.
        blocks: the decoder blocks, on the meta device, in order.
        names: each block's name in the checkpoint, such as `model.layers.0`.
        aliases: names of tied parameters -> the name under which the checkpoint stores them.
    """

    folder: Path
    index: Index
    model: nn.Module
    blocks: list[nn.Module]
    names: list[str]
    aliases: dict[str, str]

    @property
    def stand_ins(self) -> nn.ModuleList:
        """The stand-ins, in the order of the blocks."""
        return self.model.get_submodule(self.names[0].rpartition(".")[0])

    def stored(self, name: str) -> TensorInfo:
        """Where the parameter or buffer `name` is stored.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        stored_name = self.aliases.get(name, name)
        if stored_name not in self.index:
            raise CheckpointError(
                f"{self.folder}: tensor {stored_name} is missing although config.json asks for it; "
                "the checkpoint is incomplete or in another layout"
            )
        return self.index[stored_name]

    def block_tensors(self, block_index: int) -> dict[str, TensorInfo]:
        """Where block `block_index`'s parameters and persistent buffers are stored, by name within the block."""
        return {
            name: self.stored(f"{self.names[block_index]}.{name}") for name in self.blocks[block_index].state_dict()
        }


def open_skeleton(folder: Path) -> Skeleton:
    """Open a checkpoint folder: read config.json and the shards' headers, build the model without weights, check both.

    Raises:
        CheckpointError: files are missing or do not fit config.json.
        UnsupportedModelError: a kind of model that cannot be quantized block by block.
    """
    index = open_index(folder)
    config = _read_config(folder)
    model = _build_on_meta(folder, config)
    list_name, block_list = _find_blocks(model)
    blocks = list(block_list)
    aliases = _aliases(folder, index, model)
    for number, block in enumerate(blocks):
        block_list[number] = StandIn(block)
    names = [f"{list_name}.{number}" for number in range(len(blocks))]
    skeleton = Skeleton(folder, index, model, blocks, names, aliases)
    _check_tensors(skeleton)
    return skeleton


def _aliases(folder: Path, index: Index, model: nn.Module) -> dict[str, str]:
    """Names of tied parameters, and of those that transformers renames as it loads -> names in the checkpoint."""
    tied = model._tied_weights_keys if getattr(model.config, "tie_word_embeddings", False) else None
    # A head that is stored beside the embedding is a matrix of its own, whatever the config says.
    aliases = {name: source for name, source in tied.items() if name not in index} if isinstance(tied, dict) else {}
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    expected = model.state_dict()
    for stored in index:
        name, converter = rename_source_key(stored, renamings, converters, model.base_model_prefix, expected)
        if converter is not None:
            raise UnsupportedModelError(
                f"{folder}: tensor {stored} is stored in parts that {type(model).__name__} fuses into {name}; "
                "such blocks (fused experts) are not supported yet"
            )
        if name != stored and name in expected:
            aliases[name] = stored
    return aliases


def _read_config(folder: Path):
    path = inside(folder, "config.json")
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; --model takes a Hugging Face checkpoint folder")
    try:
        with storage_errors(path, "read"):
            raw = json.loads(path.read_text(encoding="utf-8"))
        quantization = raw.get("quantization_config")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a JSON object ({error}); download it again") from error
    if quantization:
        method = quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(
            f"{folder}: already quantized ({method}); pass the unquantized checkpoint it was made from"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        raise UnsupportedModelError(f"{path}: transformers cannot read it ({_first_line(error)})") from error


def _build_on_meta(folder: Path, config) -> nn.Module:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            # float32, not the config's dtype: buffers computed from the config would be rounded to that.
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
            use_pieces(model)
            return model.eval().requires_grad_(False)
    except (ValueError, ImportError) as error:
        raise UnsupportedModelError(
            f"{folder}: transformers has no causal language model for it ({_first_line(error)})"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    kinds = set(model._no_split_modules or ())
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and type(module[0]).__name__ in kinds:
            return name, module
    raise UnsupportedModelError(
        f"{type(model).__name__}: no list of decoder blocks found (its `_no_split_modules` names {sorted(kinds)})"
    )


def _check_tensors(skeleton: Skeleton) -> None:
    expected = [
        (f"{name}.{inner}", tensor)
        for name, block in zip(skeleton.names, skeleton.blocks, strict=True)
        for inner, tensor in block.state_dict().items()
    ]
    for name, tensor in [*skeleton.model.state_dict().items(), *expected]:
        info = skeleton.stored(name)
        if info.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{info.file}: tensor {info.name} has shape {list(info.shape)}, config.json asks for "
                f"{list(tensor.shape)}; config.json and weights belong to different models"
            )
        if tensor.is_floating_point() and info.dtype not in FLOAT_DTYPES:
            raise UnsupportedModelError(
                f"{info.file}: tensor {info.name} has dtype {info.dtype}, supported are {', '.join(FLOAT_DTYPES)}; "
                "convert the checkpoint to bfloat16 first"
            )
        if tensor.dim() > 2 and (name, tensor) in expected:
            raise UnsupportedModelError(
                f"{type(skeleton.model).__name__}: parameter {name} is {tensor.dim()}-dimensional (fused experts or "
                "convolutions); such blocks are not supported yet"
            )


def linears_to_quantize(skeleton: Skeleton, ignore: tuple[str, ...]) -> list[list[str]]:
    """Names, within each block, of the linears that are to be quantized.

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
    for block_name, block in zip(skeleton.names, skeleton.blocks, strict=True):
        linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        matches = {name: _matching(f"{block_name}.{name}", name, ignore) for name in linears}
        used.update(*matches.values())
        chosen.append([name for name in linears if not matches[name]])
    unused = [pattern for pattern in ignore if pattern not in used and pattern not in DEFAULT_IGNORE]
    if unused:
        raise ConfigError(f"quant.ignore: {unused[0]!r} matches no linear of the blocks; give a name such as "
                          f"{skeleton.names[0]}.{linears[0] if linears else 'mlp.down_proj'}")  # fmt: skip
    if not any(chosen):
        kinds = sorted({type(module).__name__ for module in skeleton.blocks[0].modules()})
        raise UnsupportedModelError(
            f"{type(skeleton.model).__name__}: no linear would be quantized; the blocks hold {', '.join(kinds)}, "
            f"quant.ignore is {list(ignore)}"
        )
    return chosen


def _check_expressions(patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern[3:] if pattern.startswith("re:") else "")
        except re.error as error:
            raise ConfigError(f"quant.ignore: {pattern!r} is no regular expression ({error})") from error


def _matching(full_name: str, name: str, patterns: tuple[str, ...]) -> set[str]:
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
