"""A tiny random model of any family, streamed and quantized by shardq, beside the same model in transformers."""

import copy
import math
import multiprocessing
import re
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

import tiny
from shardq.cli import parse
from shardq.commands.evaluate import evaluate
from shardq.commands.quantize import quantize
from shardq.errors import ShardQError, Stopped
from shardq.model.skeleton import open_skeleton
from shardq.parallel.ranks import Ranks
from shardq.rundir.folder import RunFolder
from tiny_config import FIRST_SPECIAL_TOKEN, VARIANTS, tiny_config

ONE_RANK = Ranks(0, 1, torch.device("cpu"))
TOLERANCE = 1e-5  # of the loss; sums in another order change it by less than 1e-7
WEIGHT_STD = 0.15  # so wide that every block changes the hidden states visibly
MAX_PARAMETERS = 9_000_000
LIMIT_SECONDS = 240.0  # for one family
TABLE = Path(__file__).with_name("support.tsv")

# Wrappers around text decoders that transformers has only in its list of encoders with decoders.
WITH_SOUND = ("audioflamingo3", "musicflamingo")

# Samples and their length: a few; several chunks of passes, which take 1024 tokens each; longer than a chunk.
TEXTS = {"few": (6, 48), "many": (40, 64), "long": (3, 1040)}

# equal: as transformers computes it, before and after quantization. refused: by one line. different: other numbers,
# without a word. traceback: any other exception. not built: transformers makes no such model from a small config.
# no decoder: a token's logits depend on what comes after it. too slow: not done within the limit.
OUTCOMES = ("equal", "refused", "different", "traceback", "too slow", "not built", "no decoder")


class _NotBuilt(Exception):
    """Transformers makes no model of the family that could be looked at."""


@dataclass(frozen=True)
class Row:
    """What came of one family.

    Attributes:
        family: `model_type`, and after a comma the name of a variant.
        outcome: one of `OUTCOMES`.
        stage: where that was seen: a name of `TEXTS`, `quantize` or `quantized`; "" where the model was not streamed.
        share: percent of the blocks' parameters that are quantized; 0 where nothing was.
        detail: one line that says more.
    """

    family: str
    outcome: str
    stage: str = ""
    share: int = 0
    detail: str = ""

    @classmethod
    def parsed(cls, line: str) -> "Row":
        """A row from its line in the table."""
        family, outcome, stage, share, detail = line.rstrip("\n").split("\t")
        return cls(family, outcome, stage, int(share), detail)

    def __str__(self) -> str:
        """The row's line in the table."""
        return "\t".join((self.family, self.outcome, self.stage, str(self.share), " ".join(self.detail.split())))


def kept_rows() -> list[Row]:
    """The rows that the repository keeps, in the order of their families' names."""
    return [Row.parsed(line) for line in TABLE.read_text().splitlines()]


def families() -> list[str]:
    """Every family and variant that the sweep knows, those that are text alone first."""
    wrappers = [name for name in (*MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, *WITH_SOUND) if name not in _causal()]
    return [*_causal(), *VARIANTS, *wrappers]


def sweep_apart(family: str) -> Row:
    """The same as `sweep`, in a process of its own that is ended after `LIMIT_SECONDS`."""
    context = multiprocessing.get_context("fork")
    ours, its = context.Pipe(duplex=False)
    process = context.Process(target=lambda: its.send(sweep(family)), daemon=True)
    process.start()
    its.close()
    try:
        return ours.recv() if ours.poll(LIMIT_SECONDS) else Row(family, "too slow")
    except EOFError:
        return Row(family, "traceback", detail="its process died")
    finally:
        process.kill()
        process.join()


def sweep(family: str) -> Row:
    """Build a family's tiny model, stream it and quantize it; give the first thing that was not as it should be."""
    with tempfile.TemporaryDirectory() as name, torch.random.fork_rng():
        torch.manual_seed(0)
        folder = Path(name)
        try:
            reference = save_family(folder / "model", family)
        except _NotBuilt as error:
            return Row(family, "not built", detail=str(error))
        if not is_decoder(reference):
            return Row(family, "no decoder")
        row = _streamed(family, folder, reference)
        return _quantized(family, folder, row, type(reference)) if row.outcome == "equal" else row


def _streamed(family: str, folder: Path, reference: PreTrainedModel) -> Row:
    """Stream a model over all texts that transformers can compute."""
    row = Row(family, "not built", detail="transformers computes none of the texts")
    for stage, (num, length) in TEXTS.items():
        tokens = tiny.save_tokens(folder / f"{stage}.safetensors", num, length, vocab=FIRST_SPECIAL_TOKEN)
        try:
            expected = whole_loss(reference, _tokens(tokens))
        except Exception as error:
            return replace(row, detail=f"transformers computes no text of {length} tokens: {told(error)}")
        row = _compared(family, stage, expected, lambda tokens=tokens: streamed_loss(folder / "model", tokens))
        if row.outcome != "equal":
            return row
    return row


def save_family(folder: Path, family: str) -> PreTrainedModel:
    """Save a family's tiny random model; give it as transformers loads it again, in float32.

    Raises:
        _NotBuilt: transformers cannot build, save or load it, or computes nothing that could be compared.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model = build(family)
        model.save_pretrained(folder, max_shard_size="200KB")
        loaded = type(model).from_pretrained(folder, dtype=torch.float32).eval()
        tokens_NT = torch.randint(FIRST_SPECIAL_TOKEN, (2, 48))
        built, again = logits(model, tokens_NT), logits(loaded, tokens_NT)
    except _NotBuilt:
        raise
    except Exception as error:
        raise _NotBuilt(told(error)) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if not built.isfinite().all():
        raise _NotBuilt("logits are not finite")
    if not torch.allclose(built, again, atol=1e-3):
        raise _NotBuilt("transformers computes other logits once it has saved and loaded it")
    return loaded


def build(family: str) -> PreTrainedModel:
    """A family's tiny random model in which no parameter is a constant."""
    model_type = family.split(",")[0]
    config = tiny_config(model_type, **VARIANTS.get(family, {}))
    with torch.device("meta"):
        empty = _auto_class(family).from_config(copy.deepcopy(config))
    num_parameters = sum(parameter.numel() for parameter in empty.parameters())
    if num_parameters > MAX_PARAMETERS:
        raise _NotBuilt(f"not small: {num_parameters} parameters")
    model = _auto_class(family).from_config(config, dtype=torch.float32).eval()
    _fill(model)
    return model


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Noise on all that starts as a constant, wide matrices: else a test would not see that one is dropped."""
    for parameter in model.parameters():
        std = parameter.std().item() if parameter.numel() > 1 else 0.0
        if parameter.dim() < 2 or std == 0:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        elif std < WEIGHT_STD:
            parameter.mul_(WEIGHT_STD / std)
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point() and not buffer.any():
            buffer.add_(torch.rand_like(buffer) * 0.1)


def is_decoder(model: nn.Module) -> bool:
    """Whether logits stay as they are when a later token changes."""
    tokens_NT = torch.randint(FIRST_SPECIAL_TOKEN, (1, 48))
    changed_NT = tokens_NT.clone()
    changed_NT[:, -1] = (changed_NT[:, -1] + 1) % FIRST_SPECIAL_TOKEN
    before, after = (logits(model, tokens)[:, : tokens.shape[1] - 1] for tokens in (tokens_NT, changed_NT))
    return torch.allclose(before, after, atol=1e-3)


@torch.no_grad()
def logits(model: nn.Module, tokens_NT: Tensor) -> Tensor:
    """Logits [N, T, V] of the whole model."""
    return model(input_ids=tokens_NT, use_cache=False).logits


def whole_loss(model: nn.Module, tokens_NT: Tensor) -> float:
    """Mean negative log-likelihood of each next token, one sample at a time."""
    losses = [
        nn.functional.cross_entropy(logits(model, sample_NT)[0, :-1].float(), sample_NT[0, 1:]).item()
        for sample_NT in tokens_NT.split(1)
    ]
    return sum(losses) / len(losses)


def streamed_loss(model: Path, tokens: Path) -> float:
    """The same by shardq's `evaluate`."""
    length = _tokens(tokens).shape[1]
    arguments = ["--model", model, "--eval.dataset", tokens, "--eval.sequence_length", length, "--device", "cpu"]
    return math.log(evaluate(parse("evaluate", list(map(str, arguments))), ONE_RANK)["perplexity"])


def _compared(family: str, stage: str, expected: float, measure: Callable[[], float]) -> Row:
    """What comes of a measurement that is to give the expected loss."""
    try:
        measured = measure()
    except ShardQError as error:
        return Row(family, "refused", stage, detail=_first_line(error))
    except Exception as error:
        return Row(family, "traceback", stage, detail=told(error))
    if math.isclose(measured, expected, rel_tol=TOLERANCE):
        return Row(family, "equal", stage)
    return Row(family, "different", stage, detail=f"loss {measured:.5f}, transformers has {expected:.5f}")


def _quantized(family: str, folder: Path, streamed: Row, model_class: type[PreTrainedModel]) -> Row:
    """Quantize a model that streams as it should, and again with a stop after the first block: the same bytes.

    The result must load without a strange tensor, and be in transformers what `evaluate` says.
    """
    output, stopped, tokens = folder / "output", folder / "stopped", folder / "few.safetensors"
    try:
        summary = _quantize(folder, output)
        with suppress(Stopped):
            _quantize(folder, stopped, lambda block: RunFolder(stopped).stop.touch() if block == 0 else None)
        _quantize(folder, stopped)
        share = round(100 * summary["quantized_parameters"] / _block_parameters(output))
        loaded, info = model_class.from_pretrained(output, dtype=torch.float32, output_loading_info=True)
    except ShardQError as error:
        return Row(family, "refused", "quantize", detail=_first_line(error))
    except Exception as error:
        return Row(family, "traceback", "quantize", detail=told(error))
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    strange = [f"{kind}: {key}" for kind in kinds for key in info[kind]]
    if other := _differing(output, stopped):
        return Row(family, "different", "quantize", detail=f"a run that was stopped and went on has another {other}")
    if strange:
        return Row(family, "different", "quantize", detail=f"transformers loads it with {strange[0]}")
    expected = whole_loss(loaded.eval(), _tokens(tokens))
    row = _compared(family, "quantized", expected, lambda: streamed_loss(output, tokens))
    return replace(row, share=share, detail=row.detail or streamed.detail)


def _quantize(folder: Path, output: Path, on_commit: Callable[[int | None], None] = lambda block: None) -> dict:
    arguments = ["--model", folder / "model", "--output", output, "--calib.dataset", folder / "few.safetensors",
                 "--calib.samples", 4, "--calib.sequence_length", 48, "--quant.bits", 2, "--optimize.iterations", 2,
                 "--optimize.batch_size", 2, "--optimize.compile", "off", "--optimize.precision", "float32",
                 "--device", "cpu"]  # fmt: skip
    return quantize(parse("quantize", list(map(str, arguments))), ONE_RANK, on_commit)


def _block_parameters(model: Path) -> int:
    """Parameters of a model's blocks; what several blocks share counts once for each."""
    return sum(parameter.numel() for block in open_skeleton(model).blocks for parameter in block.parameters())


def _differing(output: Path, other: Path) -> str:
    """The first file of weights or codes that two runs do not both have, with the same bytes; "" if there is none."""
    names = {path.relative_to(folder) for folder in (output, other) for path in folder.rglob("*.safetensors")}
    for name in sorted(names):
        if not all((folder / name).exists() for folder in (output, other)):
            return str(name)
        if (output / name).read_bytes() != (other / name).read_bytes():
            return str(name)
    return ""


def told(error: Exception) -> str:
    """An exception in one line: what, its first line, where it was raised, and by which line of shardq."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/shardq/" in frame.filename]
    places = [_place(frames[-1])] + ([_place(ours[-1])] if ours and ours[-1] is not frames[-1] else [])
    cause = f" ({_first_line(error.__cause__)})" if error.__cause__ else ""
    return f"{type(error).__name__}: {_first_line(error)}{cause} [{' < '.join(places)}]"


def _place(frame: traceback.FrameSummary) -> str:
    return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return re.sub(rf"{tempfile.gettempdir()}/[^/ ]+/", "", line)[:300]


def _causal() -> list[str]:
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _auto_class(family: str) -> type:
    model_type, _, variant = family.partition(", ")
    if model_type in WITH_SOUND:
        return AutoModelForSeq2SeqLM
    return AutoModelForCausalLM if model_type in _causal() and variant != "wrapper" else AutoModelForMultimodalLM


def _tokens(file: Path) -> Tensor:
    return load_file(file)["tokens"]
