"""The model in parts, as ONNX graphs that name their weights but do not hold them.

torch.export traces the model's own code, whatever its architecture, with zeros that take no memory in place of the
weights; the sizes of batch and sequence stay open. Blocks that compute alike are traced once.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from shardq.errors import UnsupportedModelError
from shardq.model.arguments import Call
from shardq.model.block import run_block
from shardq.model.ends import prologue
from shardq.model.own_code import own_code
from shardq.model.recorded import record_arguments
from shardq.model.skeleton import Skeleton
from shardq.model.stand_in import to_meta
from shardq.model.weights import COMPUTE_DTYPE, materialised
from shardq.torch_internals import tree_leaves

BATCH, LENGTH = 2, 16  # of the example that is traced; neither is 1, which would be taken for a constant
CPU = torch.device("cpu")


class _Part(nn.Module):
    """A block, or what stands before the first or after the last.

    The model's own forward runs with stand-ins in the blocks' places, which record what it would pass to each block.
    """

    def __init__(self, skeleton: Skeleton, block_index: int | None, from_tokens: bool = False):
        super().__init__()
        self.model = skeleton.runner
        self.block = None if block_index is None else skeleton.blocks[block_index]
        self._stand_ins, self._block_index, self._from_tokens = tuple(skeleton.stand_ins), block_index, from_tokens

    def forward(self, attention_mask: Tensor, entering: Tensor) -> Tensor:
        """Token ids [N, T] or hidden states [N, T, D] to hidden states or logits [N, T, V]."""
        tokens_NT = entering if self._from_tokens else torch.zeros_like(attention_mask)
        if not self._from_tokens and self.block is None:
            self._stand_ins[-1].injected = entering
        output = self.model(input_ids=tokens_NT, attention_mask=attention_mask, use_cache=False).logits
        if self._from_tokens:
            output = self._stand_ins[0].seen[0]
        elif self.block is not None:
            _, args, kwargs = self._stand_ins[self._block_index].seen
            output = run_block(self.block, Call(entering, args, kwargs), COMPUTE_DTYPE)
        for stand_in in self._stand_ins:  # torch.export lets no module keep what was traced
            stand_in.seen = stand_in.injected = None
        return output


@torch.no_grad()
def traced_parts(skeleton: Skeleton, opset: int) -> Iterator[tuple[str, int | None, ir.Model]]:
    """Yield `embedding`, `block-NNNNN` for each block, and `head`, with the block's index and the graph of each.

    Inputs are `attention_mask` int64 [N, T] and `input_ids` int64 [N, T] or `hidden_states` float32 [N, T, D], the
    output is `hidden_states_out` or `logits`. Weights are initializers without a value, by the name that
    `skeleton.tensor` takes.

    Raises:
        UnsupportedModelError: the exporter cannot take the model.
    """
    _check_arguments(skeleton)
    unread = frozenset(tensor.name for tensor in skeleton.tensors.values())
    with materialised(skeleton, skeleton.runner, skeleton.runner_name, CPU, unread):
        ones_NT = torch.ones(BATCH, LENGTH, dtype=torch.long)
        # Where nothing is padded and no window reached, some models pass None in place of masks that differ later.
        padded_NT = ones_NT.index_fill(1, torch.tensor(LENGTH - 1), 0)
        skeleton.runner(input_ids=ones_NT, attention_mask=padded_NT, use_cache=False)
        seen = [stand_in.seen for stand_in in skeleton.stand_ins]
        hidden_NTD = seen[0][0]
        names = {"model": skeleton.runner_name}
        yield "embedding", None, _trace(_Part(skeleton, None, True), ones_NT, names, opset)
        traced: dict[tuple, tuple[str, ir.Model]] = {}
        for number, (name, block) in enumerate(skeleton.named_blocks.items()):
            kind = _computation(block, seen[number])
            with materialised(skeleton, block, name, CPU, unread):
                kind = (*kind, *_computed_buffers(block))
                if kind not in traced:
                    part = _Part(skeleton, number)
                    traced[kind] = name, _trace(part, hidden_NTD, names | {"block": name}, opset)
            yield f"block-{number:05d}", number, _for_block(*traced[kind], name)
        yield "head", None, _trace(_Part(skeleton, None), hidden_NTD, names, opset)


def _check_arguments(skeleton: Skeleton) -> None:
    """Check that a block computes from hidden states and mask alone, which is what its graph takes."""
    with prologue(skeleton, CPU) as embed:
        arguments = record_arguments(skeleton, embed, LENGTH)
    if any(passed.own or passed.lanes or passed.carried_names for passed in arguments):
        raise UnsupportedModelError(
            f"{type(skeleton.model).__name__}: its blocks take more than hidden states and mask (an input of each "
            "token's own, several hidden states, or tensors of earlier blocks), which ONNX in parts does not pass on; "
            "export another format"
        )


def _computation(block: nn.Module, seen: tuple) -> tuple:
    """What a block computes and from which of the model's tensors: equal for blocks that one graph can stand for."""
    hidden_NTD, args, kwargs = to_meta(seen)

    def compute(weights: dict[str, Tensor], hidden_NTD: Tensor, args: tuple, kwargs: dict) -> object:
        return torch.func.functional_call(block, weights, (hidden_NTD, *args), kwargs)

    weights = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    code = make_fx(compute)(weights, hidden_NTD, args, kwargs).code
    shapes = tuple((name, tensor.shape) for name, tensor in weights.items())
    return code, shapes, tuple(id(leaf) for leaf in tree_leaves(seen[1:]) if isinstance(leaf, Tensor))


def _computed_buffers(block: nn.Module) -> Iterator[bytes]:
    stored = block.state_dict().keys()
    yield from (buffer.numpy().tobytes() for name, buffer in block.named_buffers() if name not in stored)


def _trace(part: _Part, entering: Tensor, prefixes: dict[str, str], opset: int) -> ir.Model:
    """Graph of a part whose weights are renamed from `prefix.NAME` to what stands for the prefix in the model."""
    size = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    names = ["attention_mask", "hidden_states" if entering.is_floating_point() else "input_ids"]
    output = "logits" if part.block is None and entering.is_floating_point() else "hidden_states_out"
    try:
        with _quiet():
            program = torch.onnx.export(
                part.eval(),
                (torch.ones(BATCH, LENGTH, dtype=torch.long), entering),
                dynamo=True,
                dynamic_shapes=(size, size),
                input_names=names,
                output_names=[output],
                opset_version=opset,
                optimize=False,
                verbose=False,
            )
            weights = part.state_dict().keys()
            for name, value in program.model.graph.initializers.items():
                if name in weights:
                    value.const_value = None  # or the optimizer would fold the zeros into constants
            program.optimize()
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"{type(part.block or part.model).__name__}: torch's ONNX exporter cannot take it ({reason})"
        ) from error
    _check_sizes(type(part.block or part.model).__name__, program.exported_program.module(), entering)
    for name, value in list(program.model.graph.initializers.items()):
        if name in weights:
            kind, _, rest = name.partition(".")
            value.name = f"{prefixes[kind]}.{rest}".removeprefix(".")
    _forget_places(program.model)
    return program.model


def _check_sizes(name: str, traced: nn.Module, like: Tensor) -> None:
    """Check that a traced part takes any number of samples and tokens; the exporter fixes some sizes without a word.

    Raises:
        UnsupportedModelError: it does not.
    """
    entering = like.new_zeros(BATCH + 1, LENGTH + 5, *like.shape[2:])
    with own_code(name, f"torch's ONNX exporter fixes the number of tokens at {LENGTH}"):
        traced(torch.ones(entering.shape[:2], dtype=torch.long), entering)


def _forget_places(model: ir.Model) -> None:
    """Remove what the exporter notes of each node: stack traces, which name this machine's folders."""
    for graph in (model.graph, *model.functions.values()):
        for node in ir.traversal.RecursiveGraphIterator(graph):
            node.metadata_props.clear()


def _for_block(name: str, model: ir.Model, wanted: str) -> ir.Model:
    """Copy of block `name`'s graph with the weights' names of block `wanted`."""
    graph = model.graph.clone()
    for value in list(graph.initializers.values()):
        if value.name.startswith(f"{name}."):
            value.name = wanted + value.name.removeprefix(name)
    return ir.Model(graph, ir_version=model.ir_version)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks about packages it does not find and weights that have no value."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
