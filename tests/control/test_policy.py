"""The abstract-action policy and its loss: the prior at first, steps against sequences, loss against a slow loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from metacontroller.control.metacontroller import MetaController
from metacontroller.control.policy import AbstractActionPolicy

BATCH, TIME, WIDTH, CODE = 4, 9, 6, 3


def make_policy() -> AbstractActionPolicy:
    policy = AbstractActionPolicy(WIDTH, CODE, hidden=5).double()
    nn.init.normal_(policy.readout.weight)
    return policy


def test_the_policy_starts_as_the_prior_whatever_it_sees() -> None:
    policy = AbstractActionPolicy(WIDTH, CODE, hidden=5)
    distribution, state = policy(100 * torch.randn(BATCH, TIME, WIDTH))
    mean, log_std = distribution.chunk(2, -1)
    assert mean.shape == (BATCH, TIME, CODE)
    assert bool((mean == 0).all())
    assert bool((log_std == 0).all())
    assert bool((state != 0).any())


def test_steps_with_the_state_equal_the_sequence() -> None:
    policy, residual = make_policy(), torch.randn(BATCH, TIME, WIDTH, dtype=torch.float64)
    whole, last = policy(residual)
    state, steps = policy.initial_state(BATCH), []
    for t in range(TIME):
        distribution, state = policy(residual[:, t : t + 1], state)
        steps.append(distribution)
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    torch.testing.assert_close(state, last)
    assert not torch.allclose(steps[-1], policy(residual[:, -1:])[0])  # it remembers


def make_steering(**options: Any) -> MetaController:
    steering = MetaController(WIDTH, dim_meta_controller=4, dim_latent=CODE, rank=2, **options).double()
    nn.init.normal_(steering.policy.readout.weight, std=0.5)
    return steering


def stored_episodes() -> dict[str, Any]:
    """Random stored residuals, codes and gates; the ratios straddle the clip."""
    return {
        "states": torch.randn(BATCH, TIME, WIDTH, dtype=torch.float64),
        "old_log_probs": torch.randn(BATCH, TIME, CODE, dtype=torch.float64) * 0.3 - 1.5,
        "actions": torch.randn(BATCH, TIME, CODE, dtype=torch.float64) * 0.5,
        "advantages": torch.tensor([1.0, -1.5, 0.5, -0.2], dtype=torch.float64),
        "switch_betas": torch.rand(BATCH, TIME, dtype=torch.float64),
    }


def slow_policy_loss(steering: MetaController, stored: dict[str, Any], lengths: list[int], eps_clip: float) -> Tensor:
    """Episode by episode, step by step; the recurrence advances only where the gate opened."""
    policy, terms = steering.policy, []
    for b, length in enumerate(lengths):
        state = policy.initial_state(1)
        for t in range(length):
            if stored["switch_betas"][b, t] < steering.gate_config.threshold:
                continue
            out, state = policy.recurrence(policy.norm(stored["states"][b : b + 1, t : t + 1]), state)
            mean, log_std = policy.readout(out)[0, 0].chunk(2)
            log_prob = Normal(mean, log_std.exp()).log_prob(stored["actions"][b, t]).sum()
            ratio = (log_prob - stored["old_log_probs"][b, t].sum()).exp()
            advantages = stored["advantages"]
            advantage = advantages[b] if advantages.dim() == 1 else advantages[b, t]
            terms.append(-torch.minimum(ratio * advantage, ratio.clamp(1 - eps_clip, 1 + eps_clip) * advantage))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("lengths", [None, [9, 5, 1, 7]])
@pytest.mark.parametrize("eps_clip", [None, 0.5])
@pytest.mark.parametrize("kind", ["gru", "hawk"])
def test_policy_loss_equals_the_slow_loop(
    per_step: bool, lengths: list[int] | None, eps_clip: float | None, kind: str
) -> None:
    steering, stored = make_steering(eps_clip=0.3, policy_kind=kind, policy_hidden=8), stored_episodes()
    stored["switch_betas"][:, 0] = 1
    if per_step:
        stored["advantages"] = torch.randn(BATCH, TIME, dtype=torch.float64)
    lens = None if lengths is None else torch.tensor(lengths)
    loss = steering.policy_loss(**stored, episode_lens=lens, eps_clip=eps_clip)
    slow = slow_policy_loss(steering, stored, lengths or [TIME] * BATCH, eps_clip or 0.3)
    torch.testing.assert_close(loss, slow)
    parameters = list(steering.policy.parameters())
    fast_gradients, slow_gradients = (torch.autograd.grad(value, parameters) for value in (loss, slow))
    torch.testing.assert_close(fast_gradients, slow_gradients)
    assert all(bool((gradient != 0).any()) for gradient in fast_gradients)


def test_what_is_stored_is_constant() -> None:
    steering, stored = make_steering(), stored_episodes()
    stored = {name: value.requires_grad_() for name, value in stored.items()}
    loss = steering.policy_loss(**stored)
    loss.backward()
    assert all(stored[name].grad is None for name in ("states", "old_log_probs", "actions"))
    trained = {name for name, value in steering.named_parameters() if value.grad is not None}
    assert trained == {name for name, _ in steering.named_parameters() if name.startswith("policy.")}


def test_what_happens_between_switches_does_not_matter() -> None:
    steering, stored = make_steering(), stored_episodes()
    held = stored["switch_betas"] < 0.5
    changed = {name: value.clone() for name, value in stored.items()}
    for name in ("states", "old_log_probs", "actions"):
        changed[name][held] += 1
    torch.testing.assert_close(steering.policy_loss(**changed), steering.policy_loss(**stored))
    changed["states"][~held] += torch.randn(WIDTH, dtype=torch.float64)
    assert not torch.isclose(steering.policy_loss(**changed), steering.policy_loss(**stored))


def test_episodes_without_a_switch_give_no_loss() -> None:
    steering, stored = make_steering(), stored_episodes()
    stored["switch_betas"][:] = 0
    assert steering.policy_loss(**stored) == 0
