"""The account of a checkpoint's tensors: what is quantized, and what is left as it is, by kind and with the reason."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import nn

from shardq.formats.source import SourceTensor
from shardq.matrix import is_linear
from shardq.model.build import text_decoder
from shardq.model.choice import patterns_of, weighs_experts
from shardq.model.layout import Piece
from shardq.model.skeleton import Skeleton
from shardq.rundir.room import readable

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FURTHER_TOKENS = re.compile(r"(^|[._])(mtp|nextn)|multi_token")  # in names of layers that predict further tokens
ROUTERS = re.compile(r"router|gat(e|ing)$")  # in names of classes, in small letters
OUTSIDE = "outside the text decoder"
KINDS = {
    "embedding": "looked up, not multiplied",
    "head": "the model's output",
    "norm": "vectors",
    "bias": "vectors",
    "convolution": "not a linear",
    "router": "chooses the experts",
    "state": "vectors and matrices of a block's own code",
    "linear outside the blocks": "only the decoder's blocks are quantized",
    "further tokens": "layers that predict further tokens (MTP), which transformers does not build",
    "unused": "no part of the model takes them",
}


@dataclass(frozen=True, kw_only=True)
class Left:
    """Tensors of one kind that are left as they are.

    Attributes:
        kind: such as `embedding`, `norm`, or the name of a part outside the text decoder, such as `vision tower`.
        reason: in words.
        names: the tensors' names in the checkpoint.
        num_parameters: their values.
        num_bytes: their bytes, decoded where they are stored encoded.
    """

    kind: str
    reason: str
    names: tuple[str, ...]
    num_parameters: int
    num_bytes: int

    @property
    def is_of_text(self) -> bool:
        """Whether the text decoder computes with them."""
        return self.reason not in (OUTSIDE, KINDS["further tokens"], KINDS["unused"])


@dataclass(frozen=True, kw_only=True)
class Account:
    """What became of every tensor of a checkpoint.

    Attributes:
        num_quantized: values that are quantized.
        left: all others, by kind, the largest kind first.
    """

    num_quantized: int
    left: tuple[Left, ...]

    @property
    def num_parameters(self) -> int:
        """Values of all tensors."""
        return self.num_quantized + sum(left.num_parameters for left in self.left)

    def lines(self) -> Iterator[str]:
        """The account in words: the share that is quantized, then a line for each kind that is not."""
        total = self.num_parameters
        yield f"quantized: {self.num_quantized / total:.1%} of {_counted(total)} parameters; left as they are:"
        for left in self.left:
            yield (
                f"{left.kind}: {_counted(left.num_parameters)} parameters in {len(left.names)} tensor(s), "
                f"{readable(left.num_bytes)} ({left.reason})"
            )

    def beside_text(self) -> str:
        """In words, what a format of the text decoder alone lacks; empty if that is nothing."""
        kinds = [f"{left.kind} ({len(left.names)} tensor(s))" for left in self.left if not left.is_of_text]
        return ", ".join(kinds)

    def facts(self) -> dict:
        """The account as a verb's summary has it, without the tensors' names."""
        return {
            "parameters": self.num_parameters,
            "quantized_parameters": self.num_quantized,
            "left": [
                {
                    "kind": left.kind, "reason": left.reason, "tensors": len(left.names),
                    "parameters": left.num_parameters, "bytes": left.num_bytes,
                }
                for left in self.left
            ],
        }  # fmt: skip


def account_of(skeleton: Skeleton, quantized: Collection[str], ignored: tuple[str, ...]) -> Account:
    """Account for every tensor of a checkpoint.

    Args:
        skeleton: of a run's source or of its result.
        quantized: full names of the linears that are quantized.
        ignored: the patterns of linears that were to be left.
    """
    owned = _owned(skeleton)
    pieces_of: dict[str, dict[str, Piece]] = defaultdict(dict)
    for name in owned:
        for piece in skeleton.layout[name]:
            pieces_of[piece.source][name] = piece
    kinds = _Kinds(skeleton, owned, ignored)
    num_quantized, left = 0, defaultdict(list)
    for tensor in skeleton.source.tensors.values():
        # A tensor that the model takes in parts, such as one of fused experts, may be quantized in some of them.
        pieces, size = pieces_of[tensor.name], prod(tensor.shape)
        taken = [name for name in pieces if name.removesuffix(".weight") in quantized]
        num_taken = sum(pieces[name].num_values for name in taken)
        num_quantized += num_taken
        if num_taken < size or not taken:
            others = [name for name in pieces if name not in taken]
            left[kinds.of(tensor, others)].append((tensor, size - num_taken))
    parts = [_left(kind, reason, tensors) for (kind, reason), tensors in left.items()]
    return Account(num_quantized=num_quantized, left=tuple(sorted(parts, key=lambda part: -part.num_bytes)))


def _left(kind: str, reason: str, tensors: list[tuple[SourceTensor, int]]) -> Left:
    return Left(
        kind=kind,
        reason=reason,
        names=tuple(tensor.name for tensor, _ in tensors),
        num_parameters=sum(number for _, number in tensors),
        num_bytes=sum(tensor.num_bytes * number // max(1, prod(tensor.shape)) for tensor, number in tensors),
    )


def _owned(skeleton: Skeleton) -> dict[str, nn.Module]:
    """The module that has each parameter and persistent buffer of the model, by the tensor's full name."""
    modules = dict(skeleton.model.named_modules(remove_duplicate=False))
    names = list(skeleton.model.state_dict())
    for block_name, block in skeleton.named_blocks.items():
        modules |= {f"{block_name}.{name}".removesuffix("."): module for name, module in block.named_modules()}
        names += [f"{block_name}.{name}" for name in block.state_dict()]
    return {name: modules[name.rpartition(".")[0]] for name in names}


class _Kinds:
    """The kind of a tensor that is left, and the reason, from the modules that take it."""

    def __init__(self, skeleton: Skeleton, owned: Mapping[str, nn.Module], ignored: tuple[str, ...]):
        self._owned, self._ignored, self._users = owned, ignored, skeleton.users
        self._list_name, self._blocks = skeleton.list_name, skeleton.blocks
        decoder, self._head = text_decoder(skeleton.model), skeleton.head
        paths = {id(module): name for name, module in skeleton.model.named_modules()}
        self._decoder = paths.get(id(decoder), "")

    def of(self, tensor: SourceTensor, names: Iterable[str]) -> tuple[str, str]:
        """Kind and reason of a tensor, by the names under which the model takes it."""
        is_shared = len(self._users.get(tensor.name, ())) > 1
        found = [self._of_owned(name, self._owned[name], is_shared) for name in names]
        if not found:
            kind = "further tokens" if self._predicts_further(tensor.name) else "unused"
            return kind, KINDS[kind]
        # A tied head is the embedding, which the model names first or last.
        return next((each for each in found if each[0] == "embedding"), found[0])

    def _of_owned(self, name: str, module: nn.Module, is_shared: bool) -> tuple[str, str]:
        path, _, parameter = name.rpartition(".")
        outside = self._part_outside(path)
        if module is not self._head and outside:
            return outside, OUTSIDE
        if is_linear(module) and parameter == "weight" and module is not self._head:
            return self._of_linear(path, is_shared)
        kind = self._kind(module, parameter)
        return kind, KINDS[kind]

    def _kind(self, module: nn.Module, parameter: str) -> str:
        words = type(module).__name__.lower()
        if module is self._head:
            return "head"
        if isinstance(module, nn.Embedding) or "embedding" in words:
            return "embedding"
        if isinstance(module, CONVOLUTIONS):
            return "convolution"
        if parameter.endswith("bias"):
            return "bias"
        if "norm" in words:
            return "norm"
        return "router" if ROUTERS.search(words) and getattr(module, parameter).dim() > 1 else "state"

    def _of_linear(self, path: str, is_shared: bool) -> tuple[str, str]:
        number, _, inner = path.removeprefix(f"{self._list_name}.").partition(".")
        if not path.startswith(f"{self._list_name}."):
            return "linear outside the blocks", KINDS["linear outside the blocks"]
        if patterns := sorted(patterns_of(path, inner, self._ignored)):
            return "linear", f"quant.ignore {patterns[0]!r}"
        if weighs_experts(self._blocks[int(number)], inner):
            return "router", KINDS["router"]
        return "linear", "several blocks share it" if is_shared else "left by the rules of the target"

    def _part_outside(self, path: str) -> str:
        """Name of a model's part that is not of its text decoder, such as a vision tower, in words; "" if it is."""
        decoder, parts = self._decoder.split("."), path.split(".")
        common = next((n for n, (one, other) in enumerate(zip(decoder, parts, strict=False)) if one != other), None)
        return "" if not self._decoder or common is None else parts[common].replace("_", " ")

    def _predicts_further(self, name: str) -> bool:
        number = name.removeprefix(f"{self._list_name}.").partition(".")[0]
        is_behind = name.startswith(f"{self._list_name}.") and number.isdigit() and int(number) >= len(self._blocks)
        return is_behind or FURTHER_TOKENS.search(name) is not None


def _counted(number: int) -> str:
    """A number of values for people, such as `7.2 M`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
