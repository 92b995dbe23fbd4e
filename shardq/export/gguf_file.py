"""A finished run as one GGUF file, for llama.cpp: models of the Llama architecture."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as BlockType
from torch import Tensor

from shardq.errors import UnsupportedModelError
from shardq.files import write_whole
from shardq.formats import gguf_tensors
from shardq.formats.block_file import read_block
from shardq.formats.gguf_tokenizer import add_tokenizer
from shardq.formats.shards import DTYPES
from shardq.formats.source import SourceTensor, WeightSource
from shardq.model.skeleton import Skeleton
from shardq.model.weights import materialised
from shardq.quant.grid import Grid
from shardq.quant.quantized import QuantizedLinear
from shardq.rundir.folder import RunFolder

MODEL_TYPES = ("llama", "mistral")  # transformers' model types that GGUF has as architecture llama
ROPE_TYPES = ("default", "linear", "llama3")  # those that scale each frequency by a constant
FILE_TYPES = {
    BlockType.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    BlockType.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    BlockType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
STORED = {torch.float32: BlockType.F32, torch.float16: BlockType.F16, torch.bfloat16: BlockType.BF16}


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: GGUF's name, the shape of its values, their block type, and a function that reads it."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType
    read: Callable[[], Tensor]


def check_gguf(skeleton: Skeleton, grids: dict[str, Grid]) -> None:
    """Check that GGUF can hold a model with its linears on some grids, by full name of the linear.

    Raises:
        ConfigError: a grid does not fit.
        UnsupportedModelError: another architecture, or a tokenizer that llama.cpp does not know.
    """
    config = skeleton.model.config
    facts = {
        "model type": (config.model_type, MODEL_TYPES),
        "activation": (getattr(config, "hidden_act", None), ("silu",)),
        "sliding window": (getattr(config, "sliding_window", None), (None,)),
        "positions of type": ((getattr(config, "rope_parameters", None) or {}).get("rope_type"), ROPE_TYPES),
    }
    for what, (found, allowed) in facts.items():
        if found not in allowed:
            raise UnsupportedModelError(
                f"{skeleton.folder}: {what} {found}: GGUF is written of models of Llama's architecture alone; export hf"
            )
    add_tokenizer(gguf.GGUFWriter(None, "llama"), skeleton.folder, config.vocab_size)
    for name, grid in grids.items():
        gguf_tensors.block_type(grid)
        gguf_tensors.check_width(name, skeleton.tensor(f"{name}.weight").shape[1])


def write_gguf(skeleton: Skeleton, folder: Path, grids: dict[str, Grid]) -> float:
    """Write `model.gguf`, with one block's codes in memory at a time.

    Returns:
        The largest change of a weight by rounding to float16, relative to the largest of its 32.

    Raises:
        ConfigError, UnsupportedModelError: as `check_gguf`.
        QuantizationError: a scale is too large or too small for float16.
    """
    check_gguf(skeleton, grids)
    changes = [0.0]
    entries = list(_entries(skeleton, grids, changes))

    def write(aside: Path) -> None:
        writer = gguf.GGUFWriter(aside, "llama")
        _add_metadata(writer, skeleton, grids)
        for entry in entries:
            num_bytes = gguf_tensors.num_bytes(entry.shape, entry.kind)
            writer.add_tensor_info(entry.name, entry.shape, np.dtype("float32"), num_bytes, entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.read().contiguous().view(torch.uint8).numpy())
        writer.close()

    write_whole(folder / "model.gguf", write)
    return max(changes)


def _add_metadata(writer: gguf.GGUFWriter, skeleton: Skeleton, grids: dict[str, Grid]) -> None:
    config = skeleton.model.config
    head_dim = _head_dim(config)
    [(most, _)] = Counter(map(gguf_tensors.block_type, grids.values())).most_common(1)
    writer.add_file_type(FILE_TYPES[most])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, skeleton.folder, config.vocab_size)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _entries(skeleton: Skeleton, grids: dict[str, Grid], changes: list[float]) -> Iterator[_Entry]:
    """The tensors of the file; reading a quantized linear appends its change by rounding to `changes`."""
    config, codes_of = skeleton.model.config, lru_cache(1)(read_block)
    gguf_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    rotated = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    if config.rope_parameters["rope_type"] != "default":
        yield _Entry("rope_freqs.weight", (_head_dim(config) // 2,), BlockType.F32, partial(_rope_divisors, skeleton))
    for name, block_index in _names(skeleton):
        tensor, linear = skeleton.tensor(name), name.removesuffix(".weight")
        gguf_name = gguf_names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise UnsupportedModelError(f"{skeleton.folder}: GGUF has no name for {name}; export hf instead")
        if block_index is not None and linear in grids and name.endswith(".weight"):
            kind = gguf_tensors.block_type(grids[linear])
            path = RunFolder(skeleton.folder).block(block_index)
            read = partial(_packed, codes_of, path, linear, changes)
        else:
            # llama.cpp computes norms and biases only in float32.
            kind = STORED.get(DTYPES[tensor.dtype], BlockType.F32) if len(tensor.shape) > 1 else BlockType.F32
            read = partial(_plain, skeleton.source, tensor, kind)
        heads = next((heads for part, heads in rotated.items() if part in gguf_name), None)
        if heads is not None:
            read = partial(_for_rope, read, heads)
        yield _Entry(gguf_name, tensor.shape, kind, read)


def _names(skeleton: Skeleton) -> Iterator[tuple[str, int | None]]:
    """Parameters, each with its block's index; of tied parameters only the first."""
    ends: dict[str, str] = {}
    for name in skeleton.model.state_dict():
        ends.setdefault(skeleton.tensor(name).name, name)
    yield from ((name, None) for name in ends.values())
    for number, block_name in enumerate(skeleton.names):
        yield from ((f"{block_name}.{name}", number) for name in skeleton.block_tensors(number))


def _packed(
    codes_of: Callable[[Path], dict[str, QuantizedLinear]], path: Path, name: str, changes: list[float]
) -> Tensor:
    linear = codes_of(path)[name]
    packed_OX = gguf_tensors.pack(name, linear)
    changes.append(gguf_tensors.largest_change(packed_OX, linear))
    return packed_OX


def _plain(source: WeightSource, tensor: SourceTensor, kind: BlockType) -> Tensor:
    values = source.read_unchecked(tensor)
    return values.float() if kind == BlockType.F32 else values


def _for_rope(read: Callable[[], Tensor], num_heads: int) -> Tensor:
    return gguf_tensors.rows_for_rope(read(), num_heads)


def _rope_divisors(skeleton: Skeleton) -> Tensor:
    """Divisors with which llama.cpp gets the model's own frequencies from those of its base."""
    config, model = skeleton.model.config, skeleton.model
    rotary = getattr(model, model.base_model_prefix).rotary_emb
    with materialised(skeleton, rotary, "", torch.device("cpu")):
        own = rotary.inv_freq.clone()
    exponents = torch.arange(0, _head_dim(config), 2, dtype=torch.float32) / _head_dim(config)
    return config.rope_parameters["rope_theta"] ** -exponents / own
