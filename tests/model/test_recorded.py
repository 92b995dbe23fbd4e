"""What blocks are passed: what varies from sample to sample is kept with it, what cannot be is refused by name."""

from collections import UserDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

import tiny
from shardq.errors import UnsupportedModelError
from shardq.model.arguments import BlockArguments, Call, Entering
from shardq.model.compared import differing
from shardq.model.ends import prologue
from shardq.model.hidden import lanes_of
from shardq.model.recorded import record_arguments
from shardq.model.skeleton import Skeleton, open_skeleton

CPU = torch.device("cpu")
LENGTH = 20


def recorded(skeleton: Skeleton) -> list[BlockArguments]:
    with prologue(skeleton, CPU) as embed:
        return record_arguments(skeleton, embed, LENGTH)


def test_what_every_sample_is_passed_is_held_once(llama: Path):
    for passed in recorded(open_skeleton(llama)):
        assert passed.is_fixed and not passed.own and not passed.carried_names
        hidden_NTD = torch.randn(3, LENGTH, 8)
        call = passed.bound(hidden_NTD)
        assert call.hidden is hidden_NTD and call.args is passed.args and call.kwargs is passed.kwargs
        assert passed.leaving(hidden_NTD, call, hidden_NTD) is hidden_NTD


@pytest.fixture(scope="module", name="gemma4")
def _gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("gemma4"), tiny.GEMMA4)


def test_arguments_of_a_sample_are_the_models_own(gemma4: Path):
    skeleton, tokens_NT = open_skeleton(gemma4), torch.randint(3, 211, (3, LENGTH))
    with prologue(skeleton, CPU) as embed:
        arguments = record_arguments(skeleton, embed, LENGTH)
        embed(tokens_NT)
        together = [Call(*stand_in.seen) for stand_in in skeleton.stand_ins]
        embed(tokens_NT[1:2])
        alone = [Call(*stand_in.seen) for stand_in in skeleton.stand_ins]
    for passed, all_of_them, one in zip(arguments, together, alone, strict=True):
        (own_NKTP,) = passed.own_of(all_of_them)
        assert own_NKTP.shape == (3, 1, LENGTH, 8) and len(passed.own) == 1
        carried = tuple(torch.empty(1, 2, LENGTH, 12) for _ in passed.carried_names)
        bound = passed.bound(Entering(one.hidden, (own_NKTP[1:2],), carried))
        torch.testing.assert_close(bound.args[0], one.args[0])
    assert not torch.equal(*(together[0].args[0][sample] for sample in (0, 1)))


def test_what_blocks_leave_for_later_ones_goes_on_with_the_hidden_states(gemma4: Path):
    arguments = recorded(open_skeleton(gemma4))
    # The last blocks of each kind that have keys and values of their own leave them: 2 (sliding) and 3 (full).
    of_two = ("sliding_attention0", "sliding_attention1")
    of_three = (*of_two, "full_attention0", "full_attention1")
    assert [passed.carried_names for passed in arguments] == [(), (), (), of_two, of_three, of_three]
    keys, values = torch.randn(2, 2, LENGTH, 12), torch.randn(2, 2, LENGTH, 12)
    entering = Entering(torch.randn(2, LENGTH, 48), (torch.randn(2, 1, LENGTH, 8),), (keys, values))
    call = arguments[3].bound(entering)
    mapping = arguments[3].shared_in(call)
    assert mapping["sliding_attention"][0] is keys and mapping["sliding_attention"][1] is values
    mapping["full_attention"] = (keys + 1, values + 1)
    left = arguments[3].leaving(entering.hidden + 1, call, entering)
    assert torch.equal(left.hidden, entering.hidden + 1) and len(left.carried) == 4
    assert torch.equal(left.carried[2], keys + 1) and left.carried[0] is keys
    # Each call has a mapping of its own: nothing stays in one for other samples.
    assert "full_attention" not in arguments[3].shared_in(arguments[3].bound(entering))


def test_what_enters_is_cut_by_samples():
    entering = Entering(torch.arange(6.0).view(3, 2, 1), (torch.arange(3.0).view(3, 1),), (torch.arange(3.0),))
    part = entering[1:]
    assert len(entering) == 3 and len(part) == 2
    assert part.hidden[0, 0, 0] == 2 and part.own[0].tolist() == [[1], [2]] and part.carried[0].tolist() == [1, 2]


def passing(monkeypatch: pytest.MonkeyPatch, run: Callable) -> None:
    """Have Llama's blocks called by `run`, given the model, the tokens, the hidden states and what blocks need."""

    def forward(self, input_ids: Tensor, use_cache: bool | None = None, **others: object):
        hidden_NTD = self.embed_tokens(input_ids)
        position_ids = torch.arange(input_ids.shape[1])[None]
        needed = {"position_embeddings": self.rotary_emb(hidden_NTD, position_ids), "attention_mask": None}
        return run(self, input_ids, hidden_NTD, needed) or BaseModelOutputWithPast(last_hidden_state=hidden_NTD[:, :0])

    monkeypatch.setattr(LlamaModel, "forward", forward)


def twice(model, input_ids, hidden, needed):
    for layer in (*model.layers, model.layers[0]):
        hidden = layer(hidden, **needed)


def skipping(model, input_ids, hidden, needed):
    for layer in model.layers[1:]:
        hidden = layer(hidden, **needed)


def leaving_out_the_last(model, input_ids, hidden, needed):
    for layer in model.layers[:-1]:
        hidden = layer(hidden, **needed)


def on_other_hidden_states(model, input_ids, hidden, needed):
    for layer in model.layers:
        hidden = layer(hidden, **needed) * 0.5


def from_earlier_blocks(model, input_ids, hidden, needed):
    for layer in model.layers:
        hidden = layer(hidden, **needed, position_ids=hidden.mean(-1))


def of_the_whole_batch(model, input_ids, hidden, needed):
    for layer in model.layers:
        hidden = layer(hidden, **needed, position_ids=input_ids.float().mean())


def an_object(model, input_ids, hidden, needed):
    for layer in model.layers:
        hidden = layer(hidden, **needed, position_ids=object())


def another_number(model, input_ids, hidden, needed):
    for layer in model.layers:
        hidden = layer(hidden, **needed, position_ids=int(input_ids[0, 0]))


def tokens_first(model, input_ids, hidden, needed):
    hidden = hidden.transpose(0, 1)
    for layer in model.layers:
        hidden = layer(hidden, **needed)


def two_mappings(model, input_ids, hidden, needed):
    for layer in model.layers:
        hidden = layer(hidden, **needed, position_ids=UserDict(), cache_position=UserDict())


def depending_on_tokens_at_the_end(model, input_ids, hidden, needed):
    for layer in model.layers:
        hidden = layer(hidden, **needed)
    return BaseModelOutputWithPast(last_hidden_state=model.norm(hidden) + model.embed_tokens(input_ids))


def depending_on_the_first_at_the_end(model, input_ids, hidden, needed):
    first = hidden = model.layers[0](hidden, **needed)
    for layer in model.layers[1:]:
        hidden = layer(hidden, **needed)
    return BaseModelOutputWithPast(last_hidden_state=model.norm(hidden) + first)


@pytest.mark.parametrize(
    "run, words",
    [
        (twice, "model.layers.0 is called several times"),
        (skipping, "model.layers.0 is not called where there are tokens alone"),
        (leaving_out_the_last, "model.layers.2 is not called where there are tokens alone"),
        (on_other_hidden_states, "model.layers.1 is called on other hidden states"),
        (from_earlier_blocks, "model.layers.1 is passed position_ids, which is computed from what earlier blocks give"),
        (of_the_whole_batch, "model.layers.0 is passed position_ids, which differs between samples"),
        (an_object, "model.layers.0 is passed position_ids (object), which may differ"),
        (another_number, "model.layers.0 is passed position_ids (int), which may differ"),
        (tokens_first, "model.layers.0 takes hidden states [16, 1, 64] for 1 x 16 tokens"),
        (two_mappings, "model.layers.0 is passed two mappings"),
        (depending_on_tokens_at_the_end, "what follows its blocks computes from the tokens, or from earlier blocks"),
        (depending_on_the_first_at_the_end, "what follows its blocks computes from the tokens, or from earlier blocks"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_that_cannot_be_streamed_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, llama: Path, run: Callable, words: str
):
    passing(monkeypatch, run)
    with pytest.raises(UnsupportedModelError) as caught:
        recorded(open_skeleton(llama))
    message = str(caught.value)
    assert f"LlamaForCausalLM: {words}" in message and "\n" not in message


def test_a_tensor_that_several_blocks_are_passed_is_kept_once(monkeypatch: pytest.MonkeyPatch, llama: Path):
    def the_embedding_again(model, input_ids, hidden, needed):
        embedded = hidden + 1
        for layer in model.layers:
            hidden = layer(hidden, **needed, first=embedded, other=embedded * 2)

    passing(monkeypatch, the_embedding_again)
    arguments = recorded(open_skeleton(llama))
    kept = [{(own.block, own.name) for own in passed.own} for passed in arguments]
    assert len(kept[0]) == 2 and len(kept[0] & kept[1] & kept[2]) == 1 and len(kept[0] | kept[1] | kept[2]) == 4
    assert arguments[2].own_bytes.keys() == kept[2] and set(arguments[2].own_bytes.values()) == {4 * LENGTH * 64}


def test_what_an_earlier_block_gave_goes_on_until_the_last_block_that_is_passed_it(
    monkeypatch: pytest.MonkeyPatch, llama: Path
):
    def the_first_blocks_output(model, input_ids, hidden, needed):
        first = hidden = model.layers[0](hidden, **needed)
        hidden = model.layers[1](hidden, **needed)
        model.layers[2](hidden, **needed, residual=first)

    passing(monkeypatch, the_first_blocks_output)
    first, second, third = recorded(open_skeleton(llama))
    assert first.carried_names == () and second.carried_names == third.carried_names == ("returned0.0",)
    assert not first.is_fixed and not second.received
    hidden_NTD = torch.randn(2, LENGTH, 64)
    left = first.leaving(hidden_NTD, first.bound(hidden_NTD), hidden_NTD)
    passed_on = second.leaving(hidden_NTD * 2, second.bound(left), left)
    call = third.bound(passed_on)
    assert torch.equal(call.kwargs["residual"], hidden_NTD) and torch.equal(call.hidden, hidden_NTD * 2)
    assert torch.is_tensor(third.leaving(hidden_NTD, call, passed_on))


@pytest.mark.parametrize(("shape", "dim"), [((4, 3, 5, 6), 1), ((3, 5, 4, 6), 0), ((2, 3, 5, 4, 6), 1)])
def test_lanes_are_channels_of_one_hidden_state(shape: tuple[int, ...], dim: int):
    hidden = torch.randn(shape)
    lanes = lanes_of(hidden, 3, 5, "it")
    flat_NTD = lanes.flat(hidden)
    assert lanes.dim == dim and flat_NTD.shape == (3, 5, hidden.numel() // 15)
    assert torch.equal(flat_NTD[2, 4], hidden.select(dim, 2).select(dim, 4).flatten())
    assert torch.equal(lanes.spread(flat_NTD), hidden) and lanes.spread(flat_NTD).is_contiguous()
    with pytest.raises(UnsupportedModelError, match="for 3 x 7 tokens"):
        lanes_of(hidden, 3, 7, "it")


def test_an_argument_that_follows_the_tokens_may_have_any_batch_dimension(monkeypatch: pytest.MonkeyPatch, llama: Path):
    def tokens_first(model, input_ids, hidden, needed):
        for layer in model.layers:
            hidden = layer(hidden, **needed, cache_position=input_ids.T.repeat_interleave(2, 1))

    passing(monkeypatch, tokens_first)
    skeleton, tokens_NT = open_skeleton(llama), torch.randint(0, 100, (3, LENGTH))
    passed = recorded(skeleton)[1]
    call = Call(torch.empty(3, LENGTH, 4), (), passed.kwargs | {"cache_position": tokens_NT.T.repeat_interleave(2, 1)})
    (own_NKT,) = passed.own_of(call)
    assert own_NKT.shape == (3, 2, LENGTH)
    bound = passed.bound(Entering(torch.empty(2, LENGTH, 4), (own_NKT[1:],)))
    assert torch.equal(bound.kwargs["cache_position"], tokens_NT[1:].T.repeat_interleave(2, 1))


def test_arguments_that_differ_are_named(llama: Path):
    skeleton = open_skeleton(llama)
    passed = recorded(skeleton)[0]
    whole = Call(torch.empty(0), passed.args, passed.kwargs)
    rotated = tuple(part.clone() for part in passed.kwargs["position_embeddings"])
    shorter = tuple(part[:, :5] for part in rotated)
    assert differing(skeleton, 0, whole._replace(kwargs=whole.kwargs | {"position_embeddings": shorter}), whole) == []
    rotated[1][0, 3] += 1
    other = whole._replace(kwargs=whole.kwargs | {"position_embeddings": rotated})
    assert differing(skeleton, 0, other, whole) == ["position_embeddings[1]"]
