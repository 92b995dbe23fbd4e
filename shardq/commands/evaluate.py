"""Perplexity of a model, block by block, in the memory of one block."""

import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from shardq.cache.store import open_store
from shardq.calib.partition import owned_samples
from shardq.calib.tokens import load_tokens
from shardq.checks import check_evaluate
from shardq.config import EvaluateConfig
from shardq.errors import ConfigError
from shardq.formats.quantized_source import rounds_activations
from shardq.logs import Display, peak_rss_bytes
from shardq.model.block import LoadedBlock, block_plans
from shardq.model.ends import epilogue, prologue
from shardq.model.hub import local_folder
from shardq.model.recorded import record_arguments
from shardq.model.skeleton import Skeleton, open_skeleton
from shardq.model.weights import stream_blocks
from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.optimize.loss import LOGITS_TOKENS
from shardq.parallel.collectives import max_over_ranks, on_every_host, on_rank_zero, sum_over_ranks, together
from shardq.parallel.ranks import Ranks
from shardq.quant.activation import ActivationGrid
from shardq.quant.adascale import Kernels
from shardq.rundir.folder import RunFolder
from shardq.rundir.plan import Plan, make_plan
from shardq.summaries import EvaluateSummary
from shardq.training.activation_grids import simulated, written_grids
from shardq.training.passes import Activations, advance, embed_samples
from shardq.training.self_check import Check, say_if_unchecked, self_check


def evaluate(config: EvaluateConfig, ranks: Ranks) -> EvaluateSummary:
    """Perplexity over non-overlapping sequences, each token predicted from those before it in its sequence."""
    start = time.perf_counter()
    display = Display(ranks.rank)
    together(ranks, lambda: check_evaluate(config))
    folder = on_every_host(ranks, lambda: local_folder(config.model, config.revision, display.line))
    skeleton, plan = together(ranks, lambda: _open(folder, config))
    vocabulary_size = skeleton.embeddings.num_embeddings
    display.line(f"evaluation: reading {config.eval.dataset}")
    tokens_NT = on_rank_zero(ranks, lambda: load_tokens(config.eval, folder, vocabulary_size))
    display.line(f"{config.model}: {len(tokens_NT)} sequences of {tokens_NT.shape[1]} tokens, {plan.num_blocks} blocks")
    if rounds_activations(folder):
        display.line(f"{config.model}: programs also round its activations; this evaluates its weights only")
    say_if_unchecked(config.self_check, display)

    samples = owned_samples(len(tokens_NT), ranks.rank, ranks.world_size)
    scratch = Path(config.cache.folder or "", f"shardq-{uuid4().hex}")
    store = open_store(config.cache, scratch, ranks.device)
    activations = Activations(store, samples, tokens_NT.shape[1], ranks.device, pace=ranks.pace)
    plan = together(ranks, lambda: _embedded(skeleton, plan, tokens_NT, activations))
    activations = replace(activations, blocks=plan.blocks)
    grids = together(ranks, lambda: _activation_grids(skeleton, plan, config))
    num_checked_of = config.self_check * len(samples) * tokens_NT.shape[1]
    with self_check(skeleton, tokens_NT, activations, ranks, torch.float32, num_checked_of) as check:
        together(ranks, lambda: _through_blocks(skeleton, plan, grids, activations, check, display))
    loss = together(ranks, lambda: _summed_loss(skeleton, tokens_NT, activations, plan.num_blocks))
    shutil.rmtree(scratch, ignore_errors=True)
    num_tokens = len(tokens_NT) * (tokens_NT.shape[1] - 1)
    return {
        "perplexity": math.exp(sum_over_ranks(ranks, [loss])[0] / num_tokens),
        "tokens": num_tokens,
        "seconds": round(time.perf_counter() - start, 3),
        "peak_rss_bytes": int(max_over_ranks(ranks, peak_rss_bytes())),
    }


def _open(folder: Path, config: EvaluateConfig) -> tuple[Skeleton, Plan]:
    skeleton = open_skeleton(folder)
    if config.quant.method == "none":
        return skeleton, Plan(blocks=block_plans(skeleton), rest=[])
    return skeleton, make_plan(skeleton, config.quant)


def _embedded(skeleton: Skeleton, plan: Plan, tokens_NT: Tensor, activations: Activations) -> Plan:
    """Write generation 0; return the plan with the blocks' arguments."""
    with prologue(skeleton, activations.device) as embed:
        plan = plan.with_arguments(record_arguments(skeleton, embed, tokens_NT.shape[1]))
        embed_samples(replace(activations, blocks=plan.blocks), tokens_NT, skeleton, embed)
    return plan


def _activation_grids(skeleton: Skeleton, plan: Plan, config: EvaluateConfig) -> list[dict[str, ActivationGrid]]:
    """For each block the grids that its activations are rounded to, by name within the block."""
    if config.activations == "float":
        return [{} for _ in plan.blocks]
    is_run = all(RunFolder(skeleton.folder).block(block.index).is_file() for block in plan.blocks)
    grids = [written_grids(skeleton.folder, block) for block in plan.blocks] if is_run else []
    if not any(grids):
        raise ConfigError(
            f"activations: {skeleton.folder} holds no grids of activations to simulate; quantize with "
            "--activations.bits, or leave them float"
        )
    return grids


def _through_blocks(
    skeleton: Skeleton,
    plan: Plan,
    grids: list[dict[str, ActivationGrid]],
    activations: Activations,
    check: Check,
    display: Display,
) -> None:
    with display.bars(plan.num_blocks, 0):
        for loaded in stream_blocks(skeleton, plan.blocks, activations.device):
            _round_to_nearest(loaded)
            with simulated(loaded.module, grids[loaded.index]):
                advance(activations, "fp", loaded.index, loaded)
            check(loaded, loaded if grids[loaded.index] else None)
            activations.drop(loaded.index)
            display.advance_block()
            del loaded  # frees the block's source before the block after the next is read


def _round_to_nearest(loaded: LoadedBlock) -> None:
    quantizer = BlockQuantizer(loaded.module, loaded.plan.grids, "rtn", Kernels(), torch.float32)
    quantizer.start(loaded.source)
    quantizer.serve(quantizer.folded(), as_written=lambda weight: weight)


def _summed_loss(skeleton: Skeleton, tokens_NT: Tensor, activations: Activations, num_blocks: int) -> float:
    """Negative log-likelihood summed over this rank's predicted tokens, in nats.

    The vocabulary comes in slices, each for all samples; log-sum-exp and the target's logit are accumulated over them.
    """
    targets_NT = tokens_NT[:, 1:].to(activations.device)
    log_sums_NT = torch.full(targets_NT.shape, -torch.inf, device=activations.device)
    logits_NT = torch.zeros_like(log_sums_NT)
    with epilogue(skeleton, activations.device) as vocabulary_slices:
        for first_token, to_logits in vocabulary_slices:
            for sample in activations.samples:
                hidden_NTD = activations.load("fp", num_blocks, [sample])
                for start in range(0, targets_NT.shape[1], LOGITS_TOKENS):
                    where = (sample, slice(start, min(start + LOGITS_TOKENS, targets_NT.shape[1])))
                    logits_TV = to_logits(hidden_NTD[:, where[1]])[0].float()
                    log_sums_NT[where] = torch.logaddexp(log_sums_NT[where], logits_TV.logsumexp(1))
                    logits_NT[where] += _target_logits(logits_TV, targets_NT[where] - first_token)
    samples = list(activations.samples)
    return (log_sums_NT - logits_NT)[samples].sum(dtype=torch.float64).item()


def _target_logits(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Each target's logit, 0 for a target outside the slice."""
    inside_T = (targets_T >= 0) & (targets_T < logits_TV.shape[1])
    chosen_T = logits_TV.gather(1, torch.where(inside_T, targets_T, 0).unsqueeze(1)).squeeze(1)
    return torch.where(inside_T, chosen_T, 0.0)
