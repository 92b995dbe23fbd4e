"""AIMET's AdaScale on the decoder linears of a Hugging Face model, symmetric; run by `peers.py` and `accuracy.py`.

The last line of standard output is JSON.
"""

import argparse
from importlib.metadata import version
from pathlib import Path

import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.adascale import apply_adascale
from peer_worker import (
    StepClock,
    linears_of,
    make_tuning_parser,
    peak_rss_bytes,
    read_samples,
    report,
    step_statistics,
    write_checkpoint,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


class LogitsModel(nn.Module):
    """A causal language model from token ids alone to logits, as AIMET's tracing needs it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.causal_lm = model

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits of every position."""
        mask = None
        if torch.jit.is_tracing():  # transformers cannot build its mask then; one with four axes it takes as it is
            length = ids_BT.shape[1]
            mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        return self.causal_lm(input_ids=ids_BT, attention_mask=mask, use_cache=False).logits


def main() -> None:
    """Tune, write the checkpoint, report."""
    options = make_tuning_parser(__doc__.splitlines()[0]).parse_args()
    if options.group_size != -1:
        raise SystemExit("aimet_adascale: AIMET's AdaScale runs per channel only; leave --group-size at -1")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    samples = read_samples(options.ids, options.column, options.samples)
    sim, linears = simulate(options.model, samples[0], options.bits)
    with StepClock("Adam") as clock:
        tune(sim, samples, options)
    clock.check(sim.model.causal_lm.config.num_hidden_layers, options.iterations)
    peak = peak_rss_bytes()  # before this script's own copies
    weights = {name: linear.param_quantizers["weight"](linear.weight) for name, linear in linears.items()}
    write_checkpoint(options.model, options.output, {name: weight.detach() for name, weight in weights.items()})
    facts = {"peak_rss_bytes": peak, "dtype": "float32", "torch": torch.__version__}
    report(facts | {"version": version("aimet-torch")} | step_statistics(clock.blocks))


def simulate(folder: Path, ids_BT: Tensor, bits: int) -> tuple[QuantizationSimModel, dict[str, nn.Linear]]:
    """AIMET's simulation of a model whose decoder linears alone are quantized, and these by checkpoint name."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sim = QuantizationSimModel(LogitsModel(model), ids_BT, default_param_bw=bits, in_place=True)
    linears = linears_of(sim.model.causal_lm.model.layers, "model.layers")
    quantized = {id(linear) for linear in linears.values()}
    for module in sim.model.modules():
        if hasattr(module, "param_quantizers") and id(module) not in quantized:
            for name in module.param_quantizers:
                module.param_quantizers[name] = None
    return sim, linears


def tune(sim: QuantizationSimModel, samples: list[Tensor], options: argparse.Namespace) -> None:
    """AdaScale with AIMET's own learning rates, input mix and loss."""
    loader = DataLoader(torch.cat(samples), batch_size=1)
    apply_adascale(sim, loader, forward_fn=lambda model, ids: model(ids), num_iterations=options.iterations)


if __name__ == "__main__":
    main()
