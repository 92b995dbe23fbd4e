"""Prints how the float and the quantized model of tools/demo.sh continue a prompt, and how the quantized one is served.

Usage: python tools/demo_prompt.py --model MODEL --output OUT
"""

import argparse
import os

os.environ["TQDM_DISABLE"] = "1"  # bars of loading would stand between the lines

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

PROMPT = "The capital of France is"
NEW_TOKENS = 24


def continuation(folder: str, tokenizer_folder: str) -> str:
    """What a model says after the prompt, each token the likeliest one."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    given = tokenizer(PROMPT, return_tensors="pt")
    tokens_NT = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
    said = tokenizer.decode(tokens_NT[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(said.split())


def main(arguments: list[str] | None = None) -> None:
    """Command line: --model, the source folder, and --output, the quantized folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the source model")
    parser.add_argument("--output", required=True, help="folder of the quantized model")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"prompt: {PROMPT}")
    for name, folder in {"float": options.model, "quantized": options.output}.items():
        print(f"{name}: ... {continuation(folder, options.model)}")
    print(f"serve it: vllm serve {options.output}")


if __name__ == "__main__":
    main()
