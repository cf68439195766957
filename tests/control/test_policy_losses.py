"""Losses of the policy against loops over episodes, steps and entries, in float64, forward and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metacontroller.control.losses import clipped_surrogate, ratio_loss, target_policy_loss, z_score
from metacontroller.control.metacontroller import MetaController
from metacontroller.errors import UserError
from metacontroller.variants.proposers import StepwisePolicy, make_proposer

BATCH, TIME, ENTRIES = 4, 5, 3
MASK = torch.arange(TIME) < torch.tensor([5, 3, 1, 4])[:, None]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close_with_gradient(fast: Tensor, slow: Tensor, weights: Tensor) -> None:
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(*(torch.autograd.grad(value, weights, retain_graph=True)[0] for value in (fast, slow)))


@pytest.mark.parametrize("per_entry", [False, True])
@pytest.mark.parametrize("clip", [0.2, (0.1, 0.4)])
def test_the_surrogate_clips_below_and_above_of_codes_or_of_entries(per_entry: bool, clip: float | tuple) -> None:
    new, old, advantage = (
        random(BATCH, TIME, ENTRIES).requires_grad_(),
        random(BATCH, TIME, ENTRIES),
        random(BATCH, TIME),
    )
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    terms = []
    for b, t in MASK.nonzero().tolist():
        pairs = [(new[b, t, i], old[b, t, i]) for i in range(ENTRIES)]
        pairs = pairs if per_entry else [(new[b, t].sum(), old[b, t].sum())]
        term = torch.zeros((), dtype=torch.float64)
        for now, before in pairs:
            ratio = (now - before).exp()
            limited = min(max(ratio, torch.tensor(1 - low).double()), torch.tensor(1 + high).double())
            term = term + min(ratio * advantage[b, t], limited * advantage[b, t])
        terms.append(term)
    args = (new, old) if per_entry else (new.sum(-1), old.sum(-1))
    close_with_gradient(clipped_surrogate(*args, advantage, MASK, clip), -torch.stack(terms).mean(), new)


def test_target_policy_optimization_moves_scores_by_p_minus_q() -> None:
    scores, old, u, eta = random(6).requires_grad_(), random(6), random(6), 0.5
    terms, expected = [], []
    for start in (0, 3):
        rows = range(start, start + 3)
        p_old = torch.stack([old[i].exp() for i in rows]) / sum(old[i].exp() for i in rows)
        q = torch.stack([p_old[i - start] * (u[i] / eta).exp() for i in rows])
        q = q / q.sum()
        p = scores[start : start + 3].exp() / scores[start : start + 3].exp().sum()
        terms.append(-(q * p.log()).sum())
        expected.append((p - q).detach() / 2)
    loss = target_policy_loss(scores, old, u, eta=eta, group=3)
    close_with_gradient(loss, torch.stack(terms).mean(), scores)
    torch.testing.assert_close(
        torch.autograd.grad(target_policy_loss(scores, old, u, eta=eta, group=3), scores)[0], torch.cat(expected)
    )
    wrong: list[tuple[dict[str, Any], str]] = [({"eta": 0.0}, "eta is 0.0"), ({"group": 4}, "groups of 4")]
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            target_policy_loss(scores, old, u, **options)


def test_the_ratio_loss_of_chunks_is_the_mean_of_theirs() -> None:
    beta = torch.rand(3, 7, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([7, 4, 2])
    terms = []
    for b, length in enumerate(lengths.tolist()):
        for start in (0, 3):  # the seventh step is beyond the last whole chunk
            part = beta[b, start : min(start + 3, length)]
            if start < length:
                share, soft = (part >= 0.5).double().mean(), part.mean()
                terms.append(4 / 3 * (3 * share * soft + (1 - share) * (1 - soft)))
    mask = torch.arange(7) < lengths[:, None]
    close_with_gradient(ratio_loss(beta, mask, 4, chunk=3), torch.stack(terms).mean(), beta)
    given = torch.ones(3, 7, dtype=torch.bool)
    torch.testing.assert_close(ratio_loss(beta, mask, 4, hard=given), 4 * beta[mask].mean())


def test_z_scores() -> None:
    values = random(3, 4)
    rows = torch.stack([(row - sum(row) / 4) / (((row - sum(row) / 4) ** 2).sum() / 3).sqrt() for row in values])
    torch.testing.assert_close(z_score(values, 1), rows)
    torch.testing.assert_close(z_score(values[0]), rows[0])


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("code", ["gaussian", "binary"])
def test_losses_over_stored_episodes(every_step: bool, code: Any) -> None:
    steering = MetaController(6, dim_meta_controller=8, dim_latent=2, code=code, rank=2).double()
    if every_step:
        steering.policy = StepwisePolicy(make_proposer(6, "gru"), 6, steering.codes.params).double()
    for parameter in steering.policy.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    states, betas, lengths = random(BATCH, TIME, 6), torch.rand(BATCH, TIME).double(), torch.tensor([5, 4, 5, 3])
    betas[:, 0] = 1.0
    actions = steering.codes.sample(random(BATCH, TIME, steering.codes.params))
    old, advantages = random(BATCH, TIME, 2), random(BATCH)
    surrogate, scores, old_scores, kls = [], [], [], []
    for b in range(BATCH):
        switches = [t for t in range(int(lengths[b])) if betas[b, t] >= 0.5]
        read = states[b : b + 1] if every_step else states[b : b + 1, switches]
        distribution = steering.policy(read)[0][0]
        distribution = distribution[switches] if every_step else distribution
        log_prob = steering.codes.log_prob(distribution, actions[b, switches]).sum(-1)
        before = old[b, switches].sum(-1)
        ratio = (log_prob - before).exp()
        surrogate.append(torch.minimum(ratio * advantages[b], ratio.clamp(0.8, 1.3) * advantages[b]))
        scores.append(log_prob.mean())
        old_scores.append(before.mean())
        kls.append(steering.codes.kl(distribution))
    args = (states, old, actions, advantages, betas, lengths)
    losses = steering.policy_losses(*args, (0.2, 0.3))
    weight = steering.policy.readout.weight
    close_with_gradient(losses.surrogate, -torch.cat(surrogate).mean(), weight)
    close_with_gradient(losses.kl, torch.cat(kls).mean(), weight)
    target = target_policy_loss(torch.stack(scores), torch.stack(old_scores), advantages, group=2)
    close_with_gradient(steering.policy_losses(*args, objective="target", group=2).surrogate, target, weight)
    torch.testing.assert_close(steering.policy_loss(*args, (0.2, 0.3)), losses.surrogate)
    with pytest.raises(UserError, match="one an episode"):
        steering.policy_losses(states, old, actions, betas, betas, lengths, objective="target")


def test_a_step_whose_gate_is_at_the_threshold_is_a_decision() -> None:
    torch.manual_seed(0)
    steering = MetaController(4, dim_meta_controller=8, dim_latent=2, rank=2, gate={"threshold": 0.5}).double()
    states, codes, old = random(BATCH, TIME, 4), random(BATCH, TIME, 2), random(BATCH, TIME, 2)

    def loss(beta: float) -> Tensor:
        betas = torch.full((BATCH, TIME), beta).double()
        betas[:, 0] = 1.0  # an episode begins with a decision
        return steering.policy_loss(states, old, codes, torch.arange(BATCH).double(), switch_betas=betas)

    assert torch.equal(loss(0.5), loss(1.0))
    assert not torch.equal(loss(0.5), loss(0.4))
