"""Losses against sums written out by hand."""

import numpy as np
import pytest
import torch

from shardq.optimize import loss
from shardq.optimize.loss import (
    ErrorSums,
    distillation_loss,
    error_sums,
    prediction_error,
    prediction_loss,
    prediction_sums,
    summed_probabilities,
)


def test_training_loss_sums_the_sequence_and_averages_samples_and_channels():
    output, target = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    total = 0.0
    for sample in range(2):
        for channel in range(3):
            for position in range(5):
                total += (output[sample, position, channel] - target[sample, position, channel]).item() ** 2
    assert distillation_loss(output, target).item() == pytest.approx(total / (2 * 3), rel=1e-6)


def test_training_loss_grows_with_the_sequence_but_not_with_the_batch():
    output, target = torch.randn(1, 4, 3), torch.randn(1, 4, 3)
    single = distillation_loss(output, target)
    doubled_batch = distillation_loss(output.repeat(2, 1, 1), target.repeat(2, 1, 1))
    doubled_length = distillation_loss(output.repeat(1, 2, 1), target.repeat(1, 2, 1))
    torch.testing.assert_close(torch.stack([doubled_batch, doubled_length]), torch.stack([single, 2 * single]))


def test_relative_loss_is_mean_squared_error_over_mean_target_square():
    output, target = torch.randn(2, 5, 3), torch.randn(2, 5, 3) + 1
    exact, reference = output.numpy().astype(np.float64), target.numpy().astype(np.float64)
    expected = np.mean((exact - reference) ** 2) / np.mean(reference**2)
    assert error_sums(output, target).loss == pytest.approx(expected, rel=1e-6)


def test_relative_loss_ignores_the_unit_of_the_activations():
    output, target = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    scaled = error_sums(output * 1024, target * 1024)
    assert scaled.loss == pytest.approx(error_sums(output, target).loss, rel=1e-9)


def test_perfect_output_has_loss_zero_and_output_zero_has_loss_one():
    target = torch.randn(2, 5, 3)
    assert error_sums(target, target).loss == 0
    assert error_sums(torch.zeros_like(target), target).loss == 1


def test_target_of_zeros_gives_a_finite_loss():
    assert error_sums(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)).loss == 0


def test_sums_of_parts_add_up_to_the_whole():
    output, target = torch.randn(7, 5, 3), torch.randn(7, 5, 3)
    whole = error_sums(output, target)
    parts = sum((error_sums(output[part], target[part]) for part in (slice(0, 3), slice(3, 7))), ErrorSums())
    assert parts.error == pytest.approx(whole.error, rel=1e-12)
    assert parts.weight == pytest.approx(whole.weight, rel=1e-12)


def test_many_small_errors_are_not_lost_beside_a_large_one():
    target = torch.zeros(1, 1 << 16, 4)
    output = torch.full_like(target, 1e-3)
    output[0, 0, 0] = 1e3
    # In float32 the small squares, 1e-6 each, would vanish beside 1e6.
    assert error_sums(output, target).error - 1e6 == pytest.approx((target.numel() - 1) * 1e-6, rel=1e-3)


def test_token_loss_of_a_position_without_power_is_finite():
    output, target = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    output[0, 0], target[0, 1] = 1e-3, 1.0
    assert torch.isfinite(distillation_loss(output, target, "token"))


def test_token_loss_weighs_each_position_by_the_power_of_its_target():
    output, target = torch.randn(2, 5, 3), torch.randn(2, 5, 3) * torch.logspace(-2, 2, 5)[:, None]
    total = 0.0
    for sample in range(2):
        for position in range(5):
            error = (output[sample, position] - target[sample, position]).square()
            total += (error / target[sample, position].square().mean()).sum().item()
    assert distillation_loss(output, target, "token").item() == pytest.approx(total / (2 * 3), rel=1e-5)
    assert error_sums(output, target, "token").loss == pytest.approx(total / (2 * 5 * 3), rel=1e-5)


def without_labels(logits, target):
    return prediction_error(logits, target, torch.full(logits.shape[:2], -1), torch.tensor(0.3))


def test_prediction_error_is_the_divergence_and_its_gradient_autograds():
    logits, target = 3 * torch.randn(2, 5, 11), 3 * torch.randn(2, 5, 11)
    value, gradient = without_labels(logits, target)
    logits.requires_grad_(True)
    p, q = (given.double().softmax(-1) for given in (target, logits))
    expected = (p * (p / q).log()).sum()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, logits))
    assert without_labels(target, target)[0].item() == pytest.approx(0, abs=1e-5)


def test_prediction_error_keeps_the_logits_dtype_for_the_gradient_alone():
    logits, target = torch.randn(1, 3, 7).bfloat16(), torch.randn(1, 3, 7).bfloat16()
    value, gradient = without_labels(logits, target)
    assert value.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert value.item() == pytest.approx(without_labels(logits.float(), target.float())[0].item(), rel=1e-6)


def test_labels_take_their_share_of_the_prediction_error_where_there_are_some():
    logits, target = 3 * torch.randn(2, 5, 11), 3 * torch.randn(2, 5, 11)
    labels = torch.tensor([[3, -1, 0, 10, 7], [-1, -1, 2, 2, 5]])
    value, gradient = prediction_error(logits, target, labels, torch.tensor(0.3))
    logits.requires_grad_(True)
    log_q, p = logits.double().log_softmax(-1), target.double().softmax(-1)
    expected = 0
    for sample in range(2):
        for position, label in enumerate(labels[sample].tolist()):
            kl = (p[sample, position] * (p[sample, position].log() - log_q[sample, position])).sum()
            expected += kl if label < 0 else 0.7 * kl - 0.3 * log_q[sample, position, label]
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, logits))


@pytest.mark.parametrize("label_weight", [0.0, 0.25])
@pytest.mark.parametrize("at_once", [1, 4, 15, 256])
def test_prediction_loss_in_pieces_is_that_of_all_logits_at_once(monkeypatch, at_once: int, label_weight: float):
    """2 samples of 7 positions: pieces that end within a sample, at its end, beyond it, and nowhere."""
    monkeypatch.setattr(loss, "LOGITS_TOKENS", at_once)
    norm, head = torch.nn.LayerNorm(6), torch.nn.Linear(6, 11)
    head.requires_grad_(False)
    pieces = []

    def to_logits(hidden):
        pieces.append(hidden.shape[1])
        return head(norm(hidden))

    output, target = torch.randn(2, 7, 6, requires_grad=True), torch.randn(2, 7, 6)
    labels = torch.arange(14).view(2, 7) % 11
    value = prediction_loss(output, target, labels, label_weight, to_logits)
    assert max(pieces) == min(at_once, 14)
    (gradient,) = torch.autograd.grad(3 * value, output)
    log_q, p = head(norm(output)).log_softmax(-1), head(norm(target)).softmax(-1).detach()
    divergence = torch.nn.functional.kl_div(log_q, p, reduction="sum") / 2
    cross_entropy = torch.nn.functional.nll_loss(log_q.flatten(0, 1), labels.flatten(), reduction="sum") / 2
    expected = (1 - label_weight) * divergence + label_weight * cross_entropy
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, *torch.autograd.grad(3 * expected, output))
    sums = prediction_sums(output, target, to_logits)
    assert sums.weight == 14 and sums.loss == pytest.approx(divergence.item() / 7, rel=1e-5)


@pytest.mark.parametrize("at_once", [1, 4, 256])
def test_summed_probabilities_are_the_softmaxs_sum_over_all_positions(monkeypatch, at_once: int):
    monkeypatch.setattr(loss, "LOGITS_TOKENS", at_once)
    head, hidden = torch.nn.Linear(6, 11), torch.randn(2, 7, 6)
    expected = head(hidden).detach().double().exp()
    expected = (expected / expected.sum(-1, keepdim=True)).flatten(0, 1).sum(0)
    torch.testing.assert_close(summed_probabilities(hidden, head), expected.float())
