"""AutoRound on the decoder linears of a Hugging Face model, symmetric; run by `peers.py` and `accuracy.py`.

The last line of standard output is JSON.
"""

import argparse
from importlib.metadata import version

import torch
from auto_round import AutoRound
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
from transformers import AutoTokenizer


def main() -> None:
    """Tune, write the checkpoint, report."""
    parser = make_tuning_parser(__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("default", "float32"), default="default", help="default: AutoRound's own")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tuner = make_tuner(options)
    with StepClock("SignSGD") as clock:
        model, _ = tuner.quantize()
    clock.check(model.config.num_hidden_layers, options.iterations)
    peak = peak_rss_bytes()  # before this script's own copies
    linears = linears_of(model.model.layers, "model.layers")
    write_checkpoint(options.model, options.output, {name: linear.weight for name, linear in linears.items()})
    facts = {"peak_rss_bytes": peak, "dtype": dtype_of(tuner), "torch": torch.__version__}
    facts |= {"version": version("auto-round"), "compiled": tuner.enable_torch_compile}
    report(facts | step_statistics(clock.blocks))


def make_tuner(options: argparse.Namespace) -> AutoRound:
    """AutoRound with its own learning rates, one sample an iteration."""
    samples = read_samples(options.ids, options.column, options.samples)
    # Its own data sets have masks of ones, which transformers drops; for samples given without a mask it makes one
    # that hides the last token, and attention with a mask is slower.
    dataset = [{"input_ids": ids_BT, "attention_mask": None} for ids_BT in samples]
    return AutoRound(
        str(options.model),
        AutoTokenizer.from_pretrained(options.model),
        bits=options.bits,
        group_size=options.group_size,
        sym=True,
        iters=options.iterations,
        nsamples=len(samples),
        seqlen=samples[0].shape[1],
        batch_size=1,
        gradient_accumulate_steps=1,
        dataset=dataset,
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        **({} if options.dtype == "default" else {"amp": False}),
    )


def dtype_of(tuner: AutoRound) -> str:
    """The dtype that blocks are tuned in, as it was resolved for this processor."""
    context = tuner.model_context
    return str(context.amp_dtype if context.amp else context.model.dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
