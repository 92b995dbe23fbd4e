"""Does GPTQModel compute what was exported? Its perplexity and logits beside those of transformers on the same run.

    GPTQ/bin/python tools/gptq_check.py --gptq runs/mine/gptq --plain runs/mine/hf --tokens ids.safetensors

GPTQ/bin/python is the interpreter of an environment of its own (`pip install gptqmodel`). The plain weights are those
of `launch/export.py RUN --format hf --dtype source`. Prints one JSON line.
"""

import argparse
import json
import math
from importlib.metadata import version

import torch
from gptqmodel import BACKEND, GPTQModel
from serve_check import add_token_options, read_tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


def main() -> None:
    """Measure both, and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gptq", required=True, help="folder of the GPTQ checkpoint")
    parser.add_argument("--plain", required=True, help="folder of the same run's plain weights")
    add_token_options(parser)
    options = parser.parse_args()
    loaded = GPTQModel.load(options.gptq, device="cpu", backend=BACKEND.GPTQ_TORCH)
    plain = AutoModelForCausalLM.from_pretrained(options.plain, dtype="auto").eval()
    losses, largest = {"gptqmodel": 0.0, "transformers": 0.0}, 0.0
    tokens_NT = torch.tensor(read_tokens(options))
    for tokens_T in tokens_NT:
        found, expected = logits(loaded.model, tokens_T), logits(plain, tokens_T)
        losses["gptqmodel"] += loss(found, tokens_T)
        losses["transformers"] += loss(expected, tokens_T)
        largest = max(largest, (found - expected).abs().max().item())
    num_predicted = tokens_NT[:, 1:].numel()
    summary = {f"perplexity_{name}": math.exp(total / num_predicted) for name, total in losses.items()}
    versions = {name: version(name) for name in ("gptqmodel", "transformers", "torch")}
    print(json.dumps(summary | {"tokens": num_predicted, "logits_differ_by": largest, "versions": versions}))


@torch.inference_mode()
def logits(model: nn.Module, tokens_T: Tensor) -> Tensor:
    """[T, vocabulary], float32."""
    return model(tokens_T.unsqueeze(0)).logits[0].float()


def loss(logits_TV: Tensor, tokens_T: Tensor) -> float:
    """Summed over each token but the first, in nats."""
    return nn.functional.cross_entropy(logits_TV[:-1], tokens_T[1:], reduction="sum").item()


if __name__ == "__main__":
    main()
