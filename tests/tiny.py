"""Small seeded models, token files and launches that the tests share; nothing is downloaded."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    Gemma4TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear

# Of AIMET's tensors in golden/, by the names of their files.
GOLDEN_GRIDS = {
    "w2_channel": IntegerGrid(bits=2),
    "w3_channel": IntegerGrid(bits=3),
    "w4_channel": IntegerGrid(bits=4),
    "w8_channel": IntegerGrid(bits=8),
    "w4_group16": IntegerGrid(bits=4, group_size=16),
}

LAUNCH_TIMEOUT_SECONDS = 600

# Files of published checkpoints that every output has, beside config.json and weights.
COMPANIONS = [
    "tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "added_tokens.json", "tekken.json", "spiece.model",
    "sentencepiece.bpe.model", "source.spm", "qwen.tiktoken", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/tool_use.jinja", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "image_processor_config.json", "configuration_x.py",
    "modeling_x.py", "tokenization_x.py", "LICENSE", "LICENSE.txt", "license.txt", "NOTICE", "Notice", "USE_POLICY.md",
    "Model LICENSE AGREEMENT",
]  # fmt: skip

# Each token has an input of its own for every block, and the last two blocks take keys and values of earlier ones.
GEMMA4 = Gemma4TextConfig(
    vocab_size=211, vocab_size_per_layer_input=211, hidden_size=48, intermediate_size=80, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=2, head_dim=12, global_head_dim=24, sliding_window=7,
    layer_types=["sliding_attention", "full_attention"] * 3, hidden_size_per_layer_input=8, num_kv_shared_layers=2,
    initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def save_model(
    folder: Path,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "60KB",
    seed: int = 0,
) -> Path:
    """Save a randomly initialised model of any architecture in several shards; give its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        is_wrapper = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
        factory = AutoModelForMultimodalLM if is_wrapper else AutoModelForCausalLM
        model = factory.from_config(copy.deepcopy(config), dtype=torch.float32)
        _fill_biases(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return Path(folder)


def whole_model(folder: Path, **options: object) -> PreTrainedModel:
    """The model of a folder as transformers loads it, of the class that config.json names.

    Args:
        options: those of `from_pretrained`; float32 if they name no dtype.
    """
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, **{"dtype": torch.float32} | options).eval()


@torch.no_grad()
def _fill_biases(model: torch.nn.Module) -> None:
    """Biases and norms start as constants; with these a test would not see that one is dropped or exchanged."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)


def save_llama(
    folder: Path,
    *,
    num_blocks: int = 3,
    hidden: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = True,
    max_shard_size: str = "60KB",
    vocab: int = 300,
    seed: int = 0,
    **options: object,
) -> Path:
    """Save a random Llama in several shards; give its folder.

    Weights are drawn wide (standard deviation 0.2), so that every block changes the hidden states visibly.

    Args:
        options: further fields of `LlamaConfig`, in place of those chosen here.
    """
    fields = {
        "num_hidden_layers": num_blocks, "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": vocab, "tie_word_embeddings": tied,
        "max_position_embeddings": 128, "initializer_range": 0.2,
    }  # fmt: skip
    return save_model(folder, LlamaConfig(**(fields | options)), dtype=dtype, max_shard_size=max_shard_size, seed=seed)


def save_tokens(path: Path, num: int = 8, length: int = 64, vocab: int = 300, seed: int = 0) -> Path:
    """Write random token ids [num, length] to a safetensors file; give its path."""
    generator = torch.Generator().manual_seed(seed)
    save_file({"tokens": torch.randint(vocab, (num, length), generator=generator)}, path)
    return Path(path)


def torchrun(
    num_ranks: int, script_or_args: str | Path | list[str | Path], **env: object
) -> subprocess.CompletedProcess:
    """Run a script, alone or with its arguments, on several ranks of this machine; text output, any exit code.

    Args:
        env: environment variables to set beside the present ones.
    """
    arguments = script_or_args if isinstance(script_or_args, list) else [script_or_args]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [*launcher, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in env.items()}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=LAUNCH_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # not killed: torchrun passes a termination on to its ranks, which would outlive it
            stdout, stderr = process.communicate()
            raise AssertionError(f"still running after {LAUNCH_TIMEOUT_SECONDS} s: {command}\n{stderr}") from None
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def random_linear(grid: IntegerGrid, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    """A linear [O, I] of random codes, zero points and scales of either sign, as its grid has them.

    Args:
        dtype: one that holds the scales exactly.
    """
    grid_shape = shape[0], shape[1] // (grid.group_size or shape[1])
    scale_OG = (torch.rand(grid_shape) * 0.01 + 0.001).to(dtype).float()
    if grid.full_range:
        scale_OG *= torch.randint(2, grid_shape) * 2 - 1
    zero_point_OG = torch.zeros(grid_shape)
    if not grid.symmetric:
        zero_point_OG = torch.randint(grid.qmin, grid.qmax + 1, grid_shape).float()
    codes_OI = torch.randint(grid.qmin, grid.qmax + 1, shape, dtype=torch.int8)
    return QuantizedLinear(codes_OI, scale_OG, zero_point_OG, grid)
