"""Does onnxruntime compute what was exported? Its perplexity and logits beside those of transformers on the run.

    python tools/onnx_check.py --run runs/mine --onnx runs/mine/onnx --tokens ids.safetensors --column eval_ids

Prints one JSON line. `exact` keeps activations in float32, `default` is what onnxruntime does unasked.
"""

import argparse
import json
import math
import time
from pathlib import Path

import onnxruntime
import torch
from serve_check import add_token_options, read_tokens
from transformers import AutoModelForCausalLM

ACCURACY_LEVELS = {"exact": "1", "default": None}


def main() -> None:
    """Compare the two on the tokens asked for, and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="output folder of the run")
    parser.add_argument("--onnx", required=True, help="folder of its export")
    add_token_options(parser)
    options = parser.parse_args()
    tokens_NT = torch.tensor(read_tokens(options))
    model = AutoModelForCausalLM.from_pretrained(options.run, dtype=torch.float32).eval()
    summary: dict = {"run": options.run, "tokens": tokens_NT[:, 1:].numel(), "onnxruntime": onnxruntime.__version__}
    for name, level in ACCURACY_LEVELS.items():
        summary[name] = compare(open_session(Path(options.onnx, "model.onnx"), level), model, tokens_NT)
    print(json.dumps(summary))


def open_session(path: Path, accuracy_level: str | None) -> onnxruntime.InferenceSession:
    """A session on the CPU, with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if accuracy_level is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", accuracy_level)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def compare(session: onnxruntime.InferenceSession, model: torch.nn.Module, tokens_NT: torch.Tensor) -> dict:
    """Perplexities, the mean and largest difference of a logit, and onnxruntime's seconds."""
    losses, differences, seconds = {"onnxruntime": 0.0, "transformers": 0.0}, [], 0.0
    for tokens_1T in tokens_NT.split(1):
        expected_TV = model(tokens_1T).logits[0]
        start = time.perf_counter()
        inputs = {"input_ids": tokens_1T.numpy(), "attention_mask": torch.ones_like(tokens_1T).numpy()}
        found_TV = torch.from_numpy(session.run(None, inputs)[0])[0]
        seconds += time.perf_counter() - start
        for name, logits_TV in (("onnxruntime", found_TV), ("transformers", expected_TV)):
            losses[name] += torch.nn.functional.cross_entropy(logits_TV[:-1], tokens_1T[0, 1:], reduction="sum").item()
        difference_TV = (found_TV - expected_TV).abs()
        differences.append((difference_TV.mean().item(), difference_TV.max().item()))
    return {
        **{name: math.exp(loss / tokens_NT[:, 1:].numel()) for name, loss in losses.items()},
        "logit_difference_mean": sum(mean for mean, _ in differences) / len(differences),
        "logit_difference_max": max(largest for _, largest in differences),
        "seconds": round(seconds, 2),
    }


if __name__ == "__main__":
    main()
