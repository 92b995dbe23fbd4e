"""Perplexity of a GGUF file in llama.cpp, and whether it splits text as the run's own tokenizer does.

    LLAMA/bin/python tools/gguf_check.py --gguf runs/mine/gguf/model.gguf --tokens ids.safetensors --column eval_ids

LLAMA/bin/python is the interpreter of an environment of its own (`pip install llama-cpp-python safetensors tokenizers`,
which builds llama.cpp: cmake, a compiler and some minutes). Prints one JSON line.
"""

import argparse
import json
import math

import llama_cpp
import numpy as np
from serve_check import add_token_options, read_tokens
from tokenizers import Tokenizer


def main() -> None:
    """Measure what is asked for, and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True, help="the file")
    add_token_options(parser)
    parser.add_argument("--text", default=None, help="text file to split")
    parser.add_argument("--tokenizer", default=None, help="tokenizer.json of the model, to split it too")
    options = parser.parse_args()
    llama = llama_cpp.Llama(
        options.gguf, n_ctx=options.length, n_batch=options.length, logits_all=True, n_threads=1, verbose=False
    )
    losses = [loss for ids in read_tokens(options) for loss in negative_log_likelihoods(llama, ids)]
    summary = {"perplexity": math.exp(sum(losses) / len(losses)), "tokens": len(losses)}
    if options.text:
        with open(options.text, encoding="utf-8") as file:
            text = file.read()
        expected = Tokenizer.from_file(options.tokenizer).encode(text, add_special_tokens=False).ids
        found = llama.tokenize(text.encode(), add_bos=False, special=True)
        summary |= {"text_tokens": len(expected), "same_tokens": found == expected}
    print(json.dumps(summary | {"llama_cpp_python": llama_cpp.__version__}))


def negative_log_likelihoods(llama: llama_cpp.Llama, ids: list[int]) -> list[float]:
    """Of each token but the first, in nats."""
    llama.reset()
    llama.eval(ids)
    logits_TV = np.asarray(llama.scores[: len(ids) - 1], dtype=np.float64)
    largest_T1 = logits_TV.max(1, keepdims=True)
    log_sums_T = np.log(np.exp(logits_TV - largest_T1).sum(1)) + largest_T1[:, 0]
    return (log_sums_T - logits_TV[np.arange(len(ids) - 1), ids[1:]]).tolist()


if __name__ == "__main__":
    main()
