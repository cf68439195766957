"""Losses: against torch.distributions and values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from metacontroller.control.losses import (
    MAX_LOG_RATIO,
    binary_entropy,
    clipped_surrogate,
    gaussian_kl,
    log_ratio,
    ratio_loss,
    trajectory_advantages,
)
from metacontroller.data.trajectories import masked_mean


def test_kl_equals_that_of_torch_distributions() -> None:
    mean = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    log_std = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(-1)
    kl = gaussian_kl(mean, log_std)
    torch.testing.assert_close(kl, expected)
    fast, slow = (torch.autograd.grad(value.sum(), (mean, log_std)) for value in (kl, expected))
    torch.testing.assert_close(fast, slow)
    assert gaussian_kl(torch.zeros(5), torch.zeros(5)) == 0


def test_binary_entropy_has_a_finite_slope_at_its_ends() -> None:
    p = torch.tensor([0.0, 1e-30, 0.2, 0.5, 1 - 1e-12, 1.0], dtype=torch.float64, requires_grad=True)
    entropy = binary_entropy(p)
    inside = p[1:-1]
    expected = -inside * inside.log() - (1 - inside) * (1 - inside).log()
    torch.testing.assert_close(entropy[1:-1], expected)
    assert entropy[[0, -1]].tolist() == [0, 0]
    (slope,) = torch.autograd.grad(entropy.sum(), p)
    torch.testing.assert_close(slope[1:-1], ((1 - inside) / inside).log().detach())
    assert slope[[0, -1]].tolist() == [0, 0]


def test_ratio_loss_by_hand() -> None:
    beta = torch.tensor([[1.0, 0.2, 0.6, 0.9], [1.0, 0.3, 0.7, 0.7]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    hard, soft, n = 4 / 6, (1 + 0.2 + 0.6 + 0.9 + 1 + 0.3) / 6, 3
    expected = n / (n - 1) * ((n - 1) * hard * soft + (1 - hard) * (1 - soft))
    assert ratio_loss(beta, mask, n).item() == pytest.approx(expected)
    stricter = 3 / 6  # 0.6 no longer counts as a switch
    expected = n / (n - 1) * ((n - 1) * stricter * soft + (1 - stricter) * (1 - soft))
    assert ratio_loss(beta, mask, n, threshold=0.8).item() == pytest.approx(expected)


def test_ratio_losses_of_parts_add_up_to_that_of_the_whole() -> None:
    beta = torch.rand(5, 7, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(7) < torch.tensor([7, 2, 4, 1, 6])[:, None]
    whole = ratio_loss(beta, mask, 3, threshold=0.7)
    share = masked_mean((beta >= 0.7).double(), mask)
    parts = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 2), slice(2, 5)):
        loss = ratio_loss(beta[rows], mask[rows], 3, threshold=0.7, share=share)
        parts = parts + mask[rows].sum() / mask.sum() * loss
    torch.testing.assert_close(parts, whole)
    fast, slow = (torch.autograd.grad(loss, beta)[0] for loss in (parts, whole))
    torch.testing.assert_close(fast, slow)


def test_ratio_loss_is_least_at_one_switch_per_target_length() -> None:
    steps, n = 60, 5
    mask = torch.ones(1, steps, dtype=torch.bool)
    losses = [ratio_loss((torch.arange(steps) < k)[None].double(), mask, n).item() for k in range(steps + 1)]
    assert losses.index(min(losses)) == steps // n
    assert min(losses) == pytest.approx(1.0)


@pytest.mark.parametrize(("switches", "sign"), [(1, -1), (2, 0), (5, 1)])
def test_ratio_loss_pulls_the_gate_towards_the_target(switches: int, sign: int) -> None:
    beta = torch.where(torch.arange(10) < switches, 0.9, 0.1)[None].double().requires_grad_()
    (gradient,) = torch.autograd.grad(ratio_loss(beta, torch.ones(1, 10, dtype=torch.bool), 5), beta)
    assert gradient.sum().item() == pytest.approx(0, abs=1e-12) if sign == 0 else gradient.sum() * sign > 0


@pytest.mark.parametrize("length", [1, 0.5])
def test_a_target_of_a_single_step_is_refused(length: float) -> None:
    with pytest.raises(ValueError, match="target_length"):
        ratio_loss(torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), length)


def test_advantages_by_hand() -> None:
    returns = torch.tensor([1.0, 0.0, 0.0, 3.0])
    mean, std = 1.0, math.sqrt((0 + 1 + 1 + 4) / 4)
    expected = (returns - mean) / (std + 0.5)
    torch.testing.assert_close(trajectory_advantages(returns, delta=0.5), expected)


def test_advantages_of_equal_returns_are_zero() -> None:
    assert trajectory_advantages(torch.zeros(4)).tolist() == [0.0] * 4
    assert trajectory_advantages(torch.ones(1)).tolist() == [0.0]


def test_clipped_surrogate_by_hand() -> None:
    ratios = torch.tensor([[1.5, 1.5, 1.1], [0.5, 0.5, 9.0]], dtype=torch.float64)
    advantage = torch.tensor([[2.0, -2.0, 1.0], [2.0, -2.0, 5.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    old = torch.randn(2, 3, dtype=torch.float64)
    log_prob = (old + ratios.log()).requires_grad_()
    loss = clipped_surrogate(log_prob, old, advantage, mask, eps_clip=0.2)
    # the smaller of the ratio and the clipped ratio, each times the advantage
    kept = [1.2 * 2, 1.5 * -2, 1.1 * 1, 0.5 * 2, 0.8 * -2]
    assert loss.item() == pytest.approx(-sum(kept) / 5)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    # d ratio / d log_prob = ratio; no gradient where the clip binds, none in the padding
    expected = [[0, 1.5 * 2 / 5, -1.1 / 5], [-0.5 * 2 / 5, 0, 0]]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64))


def test_an_overflow_in_the_padding_spoils_nothing() -> None:
    log_prob = torch.tensor([[0.0, 1e4]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    loss = clipped_surrogate(log_prob, torch.zeros(1, 2), torch.ones(1, 2), mask)
    assert loss == -1
    (gradient,) = torch.autograd.grad(loss, log_prob)
    assert gradient.tolist() == [[-1.0, 0.0]]


@pytest.mark.parametrize("value", [0.0, 0.1, 1e8])
def test_equal_returns_give_no_advantage_whatever_delta_is(value: float) -> None:
    for delta in (0.0, 1e-3):
        assert trajectory_advantages(torch.full((7,), value), delta).tolist() == [0.0] * 7
    assert trajectory_advantages(torch.tensor([0.0, 2.0]), delta=0.0).tolist() == [-1.0, 1.0]


def test_log_ratios_are_bounded_and_ordinary_ones_are_as_they_were() -> None:
    new = torch.tensor([[3e38, -3e38, 0.7, torch.nan]], requires_grad=True)
    mask = torch.tensor([[True, True, True, False]])
    ratio = log_ratio(new, torch.tensor([[0.0, 0.0, 0.2, 0.0]]), mask)
    assert ratio.tolist()[0] == [MAX_LOG_RATIO, -MAX_LOG_RATIO, float(torch.tensor(0.7) - torch.tensor(0.2)), 0.0]
    loss = clipped_surrogate(new, torch.zeros(1, 4), torch.tensor([[-1.0, 1.0, 1.0, torch.nan]]), mask)
    loss.backward()
    assert bool(loss.isfinite())
    assert new.grad is not None
    assert bool(new.grad.isfinite().all())


def test_nan_in_the_padding_reaches_neither_a_mean_nor_its_gradient() -> None:
    values = torch.tensor([[1.0, 3.0, torch.nan]], requires_grad=True)
    mean = masked_mean(values, torch.tensor([[True, True, False]]))
    mean.backward()
    assert mean == 2.0
    assert values.grad is not None
    assert values.grad.tolist() == [[0.5, 0.5, 0.0]]
