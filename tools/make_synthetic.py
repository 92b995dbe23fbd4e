"""Write a Llama checkpoint of any size with random weights, one block in memory at a time.

    python tools/make_synthetic.py OUT --blocks 32 --hidden 1024

For measuring memory and time where no real checkpoint of that shape is at hand; its text is noise.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig


def main() -> None:
    """Parse the command line and write the checkpoint and a file of random token ids beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--blocks", type=int, default=4, help="decoder blocks (default 4)")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size (default 1024)")
    parser.add_argument("--intermediate", type=int, help="MLP size (default 4 x hidden)")
    parser.add_argument("--heads", type=int, default=16, help="attention heads (default 16)")
    parser.add_argument("--kv-heads", type=int, default=4, help="key-value heads (default 4)")
    parser.add_argument("--vocab", type=int, default=2048, help="vocabulary (default 2048)")
    parser.add_argument("--samples", type=int, default=256, help="random token sequences (default 256)")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence (default 256)")
    torch.manual_seed(0)
    write_checkpoint(parser.parse_args())


def write_checkpoint(options: argparse.Namespace) -> None:
    """Write config, one bfloat16 shard a block and one for the rest, the index, and tokens.safetensors."""
    config = LlamaConfig(
        num_hidden_layers=options.blocks, hidden_size=options.hidden,
        intermediate_size=options.intermediate or 4 * options.hidden, num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads, vocab_size=options.vocab, tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(options.output)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    del shapes["lm_head.weight"]  # tied
    groups: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        group = name.split(".")[2] if ".layers." in name else "rest"
        groups.setdefault(f"model-{group}.safetensors", {})[name] = shape
    for file, members in groups.items():
        save_file({name: random_tensor(name, shape) for name, shape in members.items()}, options.output / file)
    weight_map = {name: file for file, members in groups.items() for name in members}
    index = {"metadata": {"total_size": 2 * sum(map(torch.Size.numel, shapes.values()))}, "weight_map": weight_map}
    (options.output / "model.safetensors.index.json").write_text(json.dumps(index))
    tokens = torch.randint(options.vocab, (options.samples, options.length))
    save_file({"tokens": tokens}, options.output / "tokens.safetensors")


def random_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    """Norms are ones, matrices normal with standard deviation 1 / sqrt(inputs), seeded by name."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(hash_of(name))
    return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).bfloat16()


def hash_of(name: str) -> int:
    """A seed that is the same in every process, unlike Python's own hash."""
    return int.from_bytes(name.encode(), "little") % (1 << 63)


if __name__ == "__main__":
    main()
