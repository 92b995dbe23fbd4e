#!/usr/bin/env python
"""How near a quantized model's predictions are to the float model's, on held-out token ids.

    python tools/bench/agreement.py --reference FLOAT --ids FILE --column eval_ids MODEL...

Both models are held whole, in float32: for models that fit. One line of JSON a model: `perplexity`,
`reference_perplexity`, `kl` (nats a token, of the model's distribution from the float model's), `top1` (share of tokens
whose likeliest next token is the same), `tokens`.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

POSITIONS = 64  # whose logits are in memory at once: small enough for the allocator to use the memory again


def load_model(folder: Path) -> nn.Module:
    """A checkpoint as transformers loads it, in float32, on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    if getattr(model.config, "final_logit_softcapping", None):
        raise SystemExit(f"agreement: {folder}: caps its logits behind the head, which is not supported here")
    return model


def load_ids(path: Path, column: str, samples: int | None) -> Tensor:
    """Token ids [samples, length]; the first ones of a tensor in a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(column)[:samples].long()


@torch.inference_mode()
def agreement(model: nn.Module, reference: nn.Module, ids_NT: Tensor) -> dict:
    """The figures of the module's docstring, each sequence by itself."""
    total = torch.zeros(4, dtype=torch.float64, device=model.device)
    for ids_T in ids_NT.to(model.device):
        hidden = [m.base_model(ids_T[None]).last_hidden_state[0, :-1].split(POSITIONS) for m in (reference, model)]
        for reference_PD, model_PD, targets_P in zip(*hidden, ids_T[1:].split(POSITIONS), strict=True):
            log_p = reference.get_output_embeddings()(reference_PD).log_softmax(-1)
            log_q = model.get_output_embeddings()(model_PD).log_softmax(-1)
            same = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
            nats, reference_nats = (-logs.gather(1, targets_P[:, None]).sum() for logs in (log_q, log_p))
            kl = functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
            total += torch.stack([nats, reference_nats, kl, same]).double()
    num_tokens = ids_NT.shape[0] * (ids_NT.shape[1] - 1)
    model_nats, reference_nats, kl, same = (total / num_tokens).tolist()
    return {
        "perplexity": math.exp(model_nats),
        "reference_perplexity": math.exp(reference_nats),
        "kl": kl,
        "top1": same,
        "tokens": num_tokens,
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders of quantized models")
    parser.add_argument("--reference", type=Path, required=True, help="folder of the float model")
    parser.add_argument("--ids", type=Path, required=True, help="safetensors file of token ids")
    parser.add_argument("--column", default="eval_ids", help="the file's tensor [samples, length]")
    parser.add_argument("--samples", type=int, help="the first so many (default: all)")
    options = parser.parse_args()
    ids_NT, reference = load_ids(options.ids, options.column, options.samples), load_model(options.reference)
    for folder in options.models:
        figures = agreement(load_model(folder), reference, ids_NT)
        print(json.dumps({"model": str(folder), **figures}), flush=True)


if __name__ == "__main__":
    main()
