"""Perplexity of a model, block by block, in the memory of one block."""

import math
import time
from pathlib import Path

from torch import Tensor, nn

from shardq.cache.store import open_store
from shardq.calib.partition import owned_samples
from shardq.calib.tokens import load_tokens
from shardq.config import EvaluateConfig, check_evaluate
from shardq.logs import Display, peak_rss_bytes
from shardq.model.ends import block_forward, epilogue, prologue, record_arguments
from shardq.model.hub import local_folder
from shardq.model.skeleton import Skeleton, open_skeleton
from shardq.model.weights import stream_blocks
from shardq.optimize.attach import attach, fold
from shardq.parallel.collectives import max_over_ranks, on_rank_zero, sum_over_ranks, together
from shardq.parallel.ranks import Ranks
from shardq.pipeline.passes import Activations, advance, embed_samples
from shardq.pipeline.plan import Plan, make_plan

LOGITS_TOKENS = 256  # positions whose logits are in memory at once


def evaluate(config: EvaluateConfig, ranks: Ranks) -> dict:
    """Perplexity over non-overlapping sequences, each token predicted from those before it in its sequence.

    Returns:
        `perplexity`, `tokens` (predicted), `seconds`, `peak_rss_bytes` (of the largest rank).
    """
    start = time.perf_counter()
    display = Display(ranks.rank)
    together(ranks, lambda: check_evaluate(config))
    folder = on_rank_zero(ranks, lambda: local_folder(config.model))
    skeleton, plan = together(ranks, lambda: _open(folder, config))
    vocabulary_size = skeleton.model.get_input_embeddings().num_embeddings
    tokens_NT = on_rank_zero(ranks, lambda: load_tokens(config.eval, folder, vocabulary_size))
    display.line(f"{config.model}: {len(tokens_NT)} sequences of {tokens_NT.shape[1]} tokens, {plan.num_blocks} blocks")

    samples = owned_samples(len(tokens_NT), ranks.rank, ranks.world_size)
    store = open_store(config.cache, Path(config.output or "") / "cache")
    activations = Activations(store, samples, tokens_NT.shape[1], ranks.device)
    together(ranks, lambda: _through_blocks(config, skeleton, plan, tokens_NT, activations, display))
    loss = together(ranks, lambda: _summed_loss(skeleton, tokens_NT, activations, plan.num_blocks))
    activations.drop(plan.num_blocks)
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
        return skeleton, Plan(skeleton.names, [[] for _ in skeleton.names], [])
    return skeleton, make_plan(skeleton, config.quant)


def _through_blocks(
    config: EvaluateConfig,
    skeleton: Skeleton,
    plan: Plan,
    tokens_NT: Tensor,
    activations: Activations,
    display: Display,
) -> None:
    with prologue(skeleton, activations.device) as embed:
        arguments = record_arguments(skeleton, embed, tokens_NT.shape[1])
        embed_samples(activations, tokens_NT, embed)
    with display.bars(plan.num_blocks, 0, 0):
        for block_index, block in stream_blocks(skeleton, range(plan.num_blocks), activations.device):
            _round_to_nearest(block, plan.linears[block_index], config)
            advance(activations, "fp", block_index, block_forward(block, arguments[block_index]))
            activations.drop(block_index)
            display.advance_block()


def _round_to_nearest(block: nn.Module, linear_names: list[str], config: EvaluateConfig) -> None:
    attach(block, linear_names, config.quant.spec, "rtn")
    fold(block, linear_names, stored=lambda weight: weight)


def _summed_loss(skeleton: Skeleton, tokens_NT: Tensor, activations: Activations, num_blocks: int) -> float:
    """Negative log-likelihood summed over this rank's predicted tokens, in nats."""
    total = 0.0
    with epilogue(skeleton, activations.device) as to_logits:
        for sample in activations.samples:
            hidden_NTD = activations.load("fp", num_blocks, [sample])
            targets_T = tokens_NT[sample, 1:].to(activations.device)
            for first in range(0, len(targets_T), LOGITS_TOKENS):
                targets = targets_T[first : first + LOGITS_TOKENS]
                logits = to_logits(hidden_NTD[:, first : first + len(targets)])[0].float()
                total += nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    return total
