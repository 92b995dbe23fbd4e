"""Blockwise distillation against a training loop written out in plain autograd."""

import copy
import weakref
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shardq.matrix import matrices_in
from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.optimize.distill import accumulate, distill
from shardq.optimize.linear_quantizer import Method
from shardq.optimize.loss import distillation_loss
from shardq.optimize.options import OptimizeOptions
from shardq.optimize.stepper import LocalStepper
from shardq.quant.adascale import Kernels, trained_weight
from shardq.quant.integer_grid import IntegerGrid

METHODS = ("adascale", "flexround", "lwc")
STEPS, GRID_LR, WEIGHT_LR = 20, 5e-3, 2e-3
NAMES = ["0", "2"]
OPTIONS = OptimizeOptions(iterations=STEPS, grid_lr=GRID_LR, weight_lr=WEIGHT_LR, optimizer="adam")
GRIDS = [
    IntegerGrid(bits=bits, symmetric=symmetric, group_size=group_size)
    for bits, symmetric, group_size in ((2, True, None), (3, True, None), (3, False, 8), (4, True, 8), (4, False, None))
]

PLAIN = Kernels()

Parameters = dict[str, Tensor]


def make_block() -> nn.Sequential:
    """Two linears with a nonlinearity between them."""
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)).requires_grad_(False)


def make_batches(block: nn.Module, num_samples: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Inputs [N, 10, 16] with the unquantized block's outputs on slightly different ones as targets."""
    inputs = torch.randn(STEPS, num_samples, 10, 16)
    return [(some, block(some + 0.05 * torch.randn_like(some))) for some in inputs]


def round_through(values: Tensor) -> Tensor:
    """Rounding that passes the gradient on."""
    return values + (values.round() - values).detach()


class NaiveLinear:
    """One fake-quantized linear as the papers write it, with autograd doing all the work."""

    def __init__(self, linear: nn.Linear, grid: IntegerGrid, method: Method):
        self.linear, self.grid = linear, grid
        self.rows = linear.weight.reshape(-1, grid.group_size or linear.in_features)
        low = self.rows.min(1, keepdim=True).values.clamp(max=0)
        high = self.rows.max(1, keepdim=True).values.clamp(min=0)
        if grid.symmetric:
            step = torch.maximum(high / (2 if grid.bits == 2 else grid.qmax), low / grid.qmin)
            low, high = grid.qmin * step, grid.qmax * step
        self.low, self.high = low, high
        shapes = {"beta": low, "gamma": low, "step": low, "s2": self.rows, "s3": low}
        self.trained = {
            "adascale": ("beta", "gamma", "s2", "s3"), "flexround": ("step", "s2", "s3"), "lwc": ("beta", "gamma"),
        }[method]  # fmt: skip
        self.parameters = {
            name: torch.zeros_like(like, requires_grad=name in self.trained) for name, like in shapes.items()
        }

    def __call__(self, inputs: Tensor) -> Tensor:
        grid, p = self.grid, self.parameters
        low = (p["beta"] + p["step"]).exp() * self.low
        high = (p["gamma"] + p["step"]).exp() * self.high
        scale = (high - low) / (2**grid.bits - 1)
        zero = 0.0 if grid.symmetric else round_through((grid.qmin - low / scale).clamp(grid.qmin, grid.qmax))
        divided = self.rows / p["s2"].exp() / p["s3"].exp()
        codes = (round_through(divided / scale) + zero).clamp(grid.qmin, grid.qmax)
        weight = ((codes - zero) * scale).reshape(self.linear.weight.shape)
        return nn.functional.linear(inputs, weight, self.linear.bias)


def train_naively(block: nn.Sequential, batches: list, grid: IntegerGrid, method: Method) -> dict[str, Parameters]:
    """The reference loop; trained parameters by the name of their linear."""
    first, last = NaiveLinear(block[0], grid, method), NaiveLinear(block[2], grid, method)
    named = [(name, linear.parameters[name]) for linear in (first, last) for name in linear.trained]
    ends = [parameter for name, parameter in named if name in ("beta", "gamma", "step")]
    weight = [parameter for name, parameter in named if name in ("s2", "s3")]
    groups = [{"params": ends, "lr": GRID_LR}, {"params": weight, "lr": WEIGHT_LR}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], foreach=False, fused=False)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS, eta_min=0)
    for inputs, targets in batches:
        optimizer.zero_grad()
        ((last(block[1](first(inputs))) - targets) ** 2).sum(dim=1).mean().backward()
        optimizer.step()
        schedule.step()
    return {"0": trained_of(first), "2": trained_of(last)}


def trained_of(linear: NaiveLinear) -> Parameters:
    """Trained parameters of one naive linear."""
    return {name: linear.parameters[name].detach() for name in linear.trained}


class Trainer:
    """What is tested, on a block whose weights are not yet quantized."""

    def __init__(self, block: nn.Module, grid: IntegerGrid, method: Method, kernels: Kernels = PLAIN):
        self.block = block
        self.quantizer = BlockQuantizer(block, dict.fromkeys(matrices_in(block), grid), method, kernels, torch.float32)
        self.stepper = LocalStepper(self.quantizer, OPTIONS)
        self.stepper.start(OPTIONS.iterations)

    def train(self, source: dict[str, Tensor], batches: list, micro_batch: int = 2) -> dict[str, Parameters]:
        """Train for the weights in `source` from the start; parameters by the name of their linear."""
        self.quantizer.start(source)
        self.stepper.start(OPTIONS.iterations)
        self.losses = list(self.steps(batches, micro_batch))
        return {name: dict(linear.named_parameters()) for name, linear in self.linears()}

    def steps(self, batches: Iterable, micro_batch: int = 2) -> Iterator[Tensor]:
        """The training loop from where quantizers and stepper are."""
        return distill(self.loss_of, self.quantizer, self.stepper, batches, micro_batch)

    def loss_of(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return distillation_loss(self.block(inputs), targets)

    def linears(self) -> list[tuple[str, nn.Module]]:
        return list(zip(NAMES, self.quantizer.quantizers, strict=True))

    def storage(self) -> dict[tuple, int]:
        """Addresses of the trained parameters, their grids and Adam's moments."""
        addresses = {name: tensor.data_ptr() for name, tensor in self.quantizer.state_dict().items()}
        states = self.stepper._optimizer.state.values()
        moments = {(i, name): value.data_ptr() for i, state in enumerate(states) for name, value in state.items()}
        assert len(moments) == 3 * len(list(self.quantizer.parameters())), "two moments and a count each"
        return addresses | moments


def weights_of(block: nn.Module) -> dict[str, Tensor]:
    """A copy of the block's tensors."""
    return {name: tensor.clone() for name, tensor in block.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_training_gives_the_parameters_of_the_naive_loop(grid: IntegerGrid, method: Method):
    block = make_block()
    batches = make_batches(block)
    expected = train_naively(copy.deepcopy(block), batches, grid, method)
    source = weights_of(block)
    trained = Trainer(block, grid, method).train(source, batches)
    for linear in expected:
        assert trained[linear].keys() == expected[linear].keys()
        for name, parameter in expected[linear].items():
            assert parameter.abs().max() > WEIGHT_LR, f"{name} has hardly moved, so nothing is compared"
            torch.testing.assert_close(
                trained[linear][name].detach(), parameter, rtol=1e-3, atol=1e-5, msg=f"{linear}.{name}"
            )


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_change_neither_parameters_nor_losses(micro_batch: int):
    block = make_block()
    source, batches = weights_of(block), make_batches(block, num_samples=4)
    whole, parts = (Trainer(copy.deepcopy(block), IntegerGrid(bits=4), "adascale") for _ in range(2))
    expected, actual = whole.train(source, batches[:8], 4), parts.train(source, batches[:8], micro_batch)
    for linear in NAMES:
        for name, parameter in expected[linear].items():
            torch.testing.assert_close(actual[linear][name], parameter, rtol=1e-4, atol=1e-6, msg=f"{linear}.{name}")
    torch.testing.assert_close(torch.stack(parts.losses), torch.stack(whole.losses), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sizes", [(2, 1), (3, 0), (2, 2, 1)])
def test_mean_of_the_ranks_gradients_is_the_batchs_however_it_is_split(sizes: tuple[int, ...]):
    block = make_block()
    inputs, targets = make_batches(block, num_samples=sum(sizes))[0]
    source, trainer = weights_of(block), Trainer(block, IntegerGrid(bits=3), "adascale")
    trainer.quantizer.start(source)

    def gradients(inputs: Tensor, targets: Tensor, mean_over: float) -> list[Tensor]:
        weights = [weight.detach().requires_grad_() for weight in trainer.quantizer()]
        trainer.quantizer.load(weights)
        accumulate(trainer.loss_of, (inputs, targets), 2, mean_over)
        trainer.quantizer.collected().backward()
        return [weight.grad for weight in weights]

    expected = gradients(inputs, targets, sum(sizes))
    parts = zip(inputs.split(sizes), targets.split(sizes), strict=True)
    ranks = [gradients(*part, mean_over=sum(sizes) / len(sizes)) for part in parts]
    for number, gradient in enumerate(expected):
        assert gradient.abs().max() > 0
        mean = sum(rank[number] for rank in ranks) / len(sizes)
        torch.testing.assert_close(mean, gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_weights_are_quantized_once_a_step(micro_batch: int):
    calls: list[torch.Size] = []

    def counting(rows_Rg: Tensor, *others) -> Tensor:
        calls.append(rows_Rg.shape)
        return trained_weight(rows_Rg, *others)

    block = make_block()
    batches = make_batches(block, num_samples=4)[:3]
    kernels = PLAIN._replace(forward=counting)
    source = weights_of(block)
    Trainer(block, IntegerGrid(bits=4), "adascale", kernels).train(source, batches, micro_batch)
    assert calls == [(24, 16), (16, 24)] * 3


@pytest.mark.parametrize("method", METHODS)
def test_training_for_a_second_block_is_that_of_a_fresh_trainer_in_the_same_memory(method: Method):
    grid, first, second = IntegerGrid(bits=3, symmetric=False, group_size=8), make_block(), make_block()
    (first_source, second_source), batches = map(weights_of, (first, second)), make_batches(second)
    reused = Trainer(copy.deepcopy(first), grid, method)
    reused.train(first_source, make_batches(first))
    storage = reused.storage()
    reused.quantizer.serve(reused.quantizer.folded(), lambda weight: weight)
    reused.quantizer.release()
    for tensor, value in zip(reused.block.state_dict().values(), second_source.values(), strict=True):
        tensor.copy_(value)
    actual = reused.train(second_source, batches)
    fresh = Trainer(second, grid, method)
    expected = fresh.train(second_source, batches)
    assert reused.storage() == storage
    for linear in NAMES:
        assert all(torch.equal(actual[linear][name], value) for name, value in expected[linear].items())
    assert torch.equal(torch.stack(reused.losses), torch.stack(fresh.losses))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_brings_the_output_nearer_to_the_target(dtype: torch.dtype, method: Method):
    block = make_block()
    inputs, source = torch.randn(4, 32, 16), weights_of(block)
    targets = block(inputs)
    quantizer = BlockQuantizer(block, dict.fromkeys(matrices_in(block), IntegerGrid(bits=2)), method, PLAIN, dtype)
    stepper = LocalStepper(quantizer, OptimizeOptions(grid_lr=5e-3, weight_lr=5e-3, optimizer="rms"))
    stepper.start(100)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs = block(inputs)
        return distillation_loss(outputs.float(), targets)

    quantizer.start(source)
    quantizer.load(quantizer())
    before = loss_of(inputs, targets).item()
    assert len(list(distill(loss_of, quantizer, stepper, [(inputs, targets)] * 100, 4))) == 100
    assert block[0].weight.dtype == dtype
    quantizer.serve(quantizer.folded(), lambda weight: weight)
    assert loss_of(inputs, targets).item() < 0.8 * before


def test_every_batch_is_one_step_and_is_reported_after_it():
    block = make_block()
    batches = iter(make_batches(block)[:3])
    source, trainer = weights_of(block), Trainer(block, IntegerGrid(bits=4), "lwc")
    trainer.quantizer.start(source)
    beta = trainer.quantizer.quantizers[0].beta
    seen = [beta[0].item() for _ in trainer.steps(batches, 1)]
    assert len(seen) == len(set(seen)) == 3 and 0.0 not in seen


def test_loss_that_is_reported_is_the_batchs_before_its_step():
    block = make_block()
    inputs, targets = make_batches(block)[0]
    source, trainer = weights_of(block), Trainer(block, IntegerGrid(bits=2), "adascale")
    trainer.train(source, [(inputs, targets)], micro_batch=1)
    trainer.quantizer.start(source)
    trainer.quantizer.load(trainer.quantizer())
    expected = (block(inputs).detach().double() - targets).square().mean() * inputs.shape[1]
    assert trainer.losses[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_frozen_tensors_are_left_alone():
    block = make_block()
    kept, source = weights_of(block), weights_of(block)
    Trainer(block, IntegerGrid(bits=4), "adascale").train(source, make_batches(block))
    assert all(torch.equal(source[name], tensor) for name, tensor in kept.items())
    assert torch.equal(block[0].bias, kept["0.bias"]) and torch.equal(block[2].bias, kept["2.bias"])


class NeverWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a device: values read from it, tensors moved off it."""

    WAITS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.item, torch.ops.aten.is_nonzero, torch.ops.aten.equal}

    def __init__(self):
        super().__init__()
        self.seen: set = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.seen.add(func.overloadpacket)
        is_move = (
            func.overloadpacket is torch.ops.aten._to_copy and kwargs.get("device", args[0].device) != args[0].device
        )
        if is_move or func.overloadpacket in self.WAITS:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    "wait",
    [Tensor.item, bool, lambda some: torch.equal(some, some), lambda some: some.to("meta")],
    ids=["item", "bool", "equal", "to"],
)
def test_waiting_would_be_seen(wait):
    with NeverWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        wait(torch.ones(()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_no_step_waits_for_the_device(symmetric: bool, method: Method):
    block = make_block()
    source, batches = weights_of(block), make_batches(block)[:3]
    trainer = Trainer(block, IntegerGrid(bits=4, symmetric=symmetric), method)
    with NeverWaiting() as mode:
        trainer.train(source, batches, micro_batch=1)
    assert len(trainer.losses) == 3
    # Forward, the quantizer's own backward and the optimizer have all been watched.
    assert {torch.ops.aten.gelu, torch.ops.aten.eq, torch.ops.aten._fused_adam_} <= mode.seen


def test_linear_that_no_sample_reaches_is_left_at_its_start():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)
            self.requires_grad_(False)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.used(hidden)

    block = Block()
    source = weights_of(block)
    quantizer = BlockQuantizer(
        block, dict.fromkeys(matrices_in(block), IntegerGrid(bits=4)), "adascale", Kernels(), torch.float32
    )
    quantizer.start(source)
    stepper = LocalStepper(quantizer, OptimizeOptions(grid_lr=1e-3, weight_lr=1e-3, optimizer="rms"))
    stepper.start(3)
    inputs = torch.randn(2, 4, 8)
    batches = [(inputs, torch.randn(2, 4, 8))] * 3
    for _ in distill(lambda some, wanted: (block(some) - wanted).square().mean(), quantizer, stepper, batches, 2):
        pass
    used, idle = quantizer.quantizers
    assert all(parameter.any() for parameter in used.parameters())
    assert not any(parameter.any() for parameter in idle.parameters())


def test_training_that_is_left_has_taken_no_step_more_and_keeps_no_batch_between_steps():
    block = make_block()
    source, batches = weights_of(block), make_batches(block)
    trainer, reference = (Trainer(copy.deepcopy(block), IntegerGrid(bits=3), "adascale") for _ in range(2))
    expected = reference.train(source, batches[:3])
    taken = []

    def copied(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        copies = tuple(values.clone() for values in batch)
        taken.extend(map(weakref.ref, copies))
        return copies

    trainer.quantizer.start(source)
    for done, _ in enumerate(trainer.steps(map(copied, batches)), 1):
        assert len(taken) == 2 * done and not any(values() is not None for values in taken)
        if done == 3:
            break
    for name, linear in trainer.linears():
        assert all(torch.equal(expected[name][kind], value) for kind, value in linear.named_parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_loss_that_is_not_finite_stops_all_steps_though_its_gradient_is(symmetric: bool, bad: float, method: Method):
    block = make_block()
    batches, source, calls = make_batches(block)[:6], weights_of(block), []
    trainer = Trainer(block, IntegerGrid(bits=3, symmetric=symmetric), method)
    loss_of = trainer.loss_of

    def bad_once(inputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(None)
        return loss_of(inputs, targets) + (bad if len(calls) == 4 else 0)

    def trained(batches: list) -> dict[str, Tensor]:
        trainer.quantizer.start(source)
        trainer.stepper.start(OPTIONS.iterations)
        assert len(list(trainer.steps(batches))) == len(batches)
        return {name: parameter.detach().clone() for name, parameter in trainer.quantizer.named_parameters()}

    expected = trained(batches[:3])
    assert trainer.stepper.is_finite()
    trainer.loss_of = bad_once
    stopped = trained(batches)
    assert not trainer.stepper.is_finite() and len(calls) == 6
    for name, value in expected.items():
        assert torch.equal(stopped[name], value) and value.any(), name


def test_s3_gradient_shows_whether_s2_has_one_that_is_not_finite():
    """The stepper looks at s3's alone."""
    for method in ("adascale", "flexround"):
        block = make_block()
        source = weights_of(block)
        quantizer = BlockQuantizer(
            block, dict.fromkeys(matrices_in(block), IntegerGrid(bits=4)), method, PLAIN, torch.float32
        )
        quantizer.start(source)
        weights = quantizer()
        gradients = [torch.ones_like(weight) for weight in weights]
        gradients[1][3, 5] = float("inf")
        torch.autograd.backward(weights, gradients)
        found = {name: bool(p.grad.isfinite().all()) for name, p in quantizer.named_parameters()}
        assert not found["quantizers.1.s2"] and not found["quantizers.1.s3"]
        assert found["quantizers.0.s2"] and found["quantizers.0.s3"]
