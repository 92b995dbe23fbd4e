"""llm-compressor's GPTQ on the decoder linears of a Hugging Face model, symmetric; run by `peers.py` and `accuracy.py`.

The last line of standard output is JSON.
"""

from importlib.metadata import version

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from peer_worker import (
    check_grids,
    linears_of,
    make_parser,
    peak_rss_bytes,
    read_samples,
    report,
    step_statistics,
    write_checkpoint,
)
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def main() -> None:
    """Quantize, write the checkpoint, report."""
    options = make_parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    samples = [{"input_ids": ids_BT} for ids_BT in read_samples(options.ids, options.column, options.samples)]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    oneshot(
        model=model, dataset=DataLoader(samples, batch_size=None), recipe=make_recipe(options.bits, options.group_size)
    )
    peak = peak_rss_bytes()  # before this script's own copies
    linears = linears_of(model.model.layers, "model.layers")
    weights = {name: linear.weight for name, linear in linears.items()}
    check_grids(weights, options.bits, options.group_size)
    write_checkpoint(options.model, options.output, weights)
    facts = {"peak_rss_bytes": peak, "dtype": "float32", "torch": torch.__version__}
    report(facts | {"version": version("llmcompressor")} | step_statistics([]))  # GPTQ takes no steps


def make_recipe(bits: int, group_size: int) -> GPTQModifier:
    """GPTQ with its own block size, dampening, order of the columns and min-max grids."""
    grid = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    weights = {"num_bits": bits, "type": "int", "symmetric": True, **grid}
    return GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])


if __name__ == "__main__":
    main()
