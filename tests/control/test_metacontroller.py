"""The metacontroller: what each module may see, padding, and acting step by step against discovery over sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from metacontroller.control import codes as codes_module
from metacontroller.control.core import DiscoveryOutput, SteeringState
from metacontroller.control.discovery_losses import auxiliary_ratio_loss, kl_loss
from metacontroller.control.losses import ratio_loss
from metacontroller.control.metacontroller import MetaController
from metacontroller.control.switching import GateConfig

BATCH, TIME, WIDTH, CODE = 4, 8, 6, 3
MODES = ("soft", "hard", "straight-through", "gumbel-sigmoid", "forced", "fixed-frequency")


def make_steering(mode: Any = "soft", **options: Any) -> MetaController:
    """Float64, with weights large enough that the gate opens and shuts and codes matter."""
    gate = GateConfig(mode=mode, period=3)
    steering = MetaController(WIDTH, dim_meta_controller=8, dim_latent=CODE, rank=2, gate=gate, **options).double()
    for name, parameter in steering.named_parameters():
        if not name.startswith(("norm", "policy.norm")):
            nn.init.normal_(parameter, std=0.6)
    return steering


def make_residual() -> Tensor:
    return torch.randn(BATCH, TIME, WIDTH, dtype=torch.float64)


def propose(monkeypatch: pytest.MonkeyPatch, z_tilde: Tensor | None = None) -> None:
    """Discovery proposes the codes given, or the means of its proposals."""

    def sample(distribution: Tensor, generator: torch.Generator | None = None, **_: Any) -> Tensor:
        return distribution.chunk(2, -1)[0] if z_tilde is None else z_tilde

    monkeypatch.setattr(codes_module, "sample_gaussian", sample)


def embed_alike(monkeypatch: pytest.MonkeyPatch, steering: MetaController) -> None:
    """The sequence embedding no longer tells sequences apart."""
    embedding = torch.randn(1, 8, dtype=torch.float64)
    monkeypatch.setattr(steering.sequence_embedder, "forward", lambda read, mask: embedding.expand(len(read), -1))


def slow_history(steering: MetaController, read: Tensor) -> Tensor:
    """h_1 .. h_T, step by step through the GRU's equations."""
    w_in, w_hidden, b_in, b_hidden = steering.history.parameters()
    h, steps = read.new_zeros(len(read), steering.dim_history), []
    for t in range(read.shape[1]):
        r_in, z_in, n_in = (read[:, t] @ w_in.T + b_in).chunk(3, -1)
        r_hidden, z_hidden, n_hidden = (h @ w_hidden.T + b_hidden).chunk(3, -1)
        reset, keep = (r_in + r_hidden).sigmoid(), (z_in + z_hidden).sigmoid()
        h = keep * h + (1 - keep) * (n_in + reset * n_hidden).tanh()
        steps.append(h)
    return torch.stack(steps, 1)


def test_encoder_and_gate_read_the_history_before_the_step() -> None:
    steering, residual = make_steering(), make_residual()
    seen: list[tuple[Tensor, ...]] = []
    steering.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    steering.switching.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    steering.discover(residual)
    read = steering.norm(residual)
    history = slow_history(steering, read)
    before = torch.cat([torch.zeros_like(history[:, :1]), history[:, :-1]], 1)
    (encoded,), (gate_read, gate_history, *_) = seen
    torch.testing.assert_close(encoded[..., :WIDTH], read)
    torch.testing.assert_close(encoded[..., WIDTH : WIDTH + 8], before)
    torch.testing.assert_close(gate_read, read)
    torch.testing.assert_close(gate_history, before)


@pytest.mark.parametrize("mode", MODES)
def test_discovery_composes_its_parts(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steering, residual = make_steering(mode).eval(), make_residual()
    z_tilde = torch.randn(BATCH, TIME, CODE, dtype=torch.float64)
    propose(monkeypatch, z_tilde)
    output = steering.discover(residual)
    expected = residual + torch.einsum("btoi,bti->bto", steering.controller.matrix(output.z), residual)
    torch.testing.assert_close(output.steered, expected)
    before = torch.cat([torch.zeros_like(z_tilde[:, :1]), output.z[:, :-1]], 1)
    gate = output.gate[..., None]
    torch.testing.assert_close(output.z, gate * z_tilde + (1 - gate) * before)
    assert bool((output.beta[:, 0] == 1).all())


def test_the_gate_and_code_depend_on_the_future_only_through_the_proposals(monkeypatch: pytest.MonkeyPatch) -> None:
    steering, residual = make_steering(), make_residual()
    propose(monkeypatch)
    future = residual.clone()
    future[:, 5:] += torch.randn_like(future[:, 5:])
    assert not torch.allclose(steering.discover(future).beta[:, :5], steering.discover(residual).beta[:, :5])
    embed_alike(monkeypatch, steering)
    before, after = steering.discover(residual), steering.discover(future)
    for name in ("beta", "gate", "z", "mean", "log_std", "steered"):
        torch.testing.assert_close(getattr(after, name)[:, :5], getattr(before, name)[:, :5])
        assert not torch.allclose(getattr(after, name)[:, 5:], getattr(before, name)[:, 5:])


def test_with_fixed_proposals_the_gate_ignores_the_future(monkeypatch: pytest.MonkeyPatch) -> None:
    steering, residual = make_steering(), make_residual().requires_grad_()
    propose(monkeypatch, torch.randn(BATCH, TIME, CODE, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(steering.discover(residual).beta[:, 4].sum(), residual)
    assert gradient[:, 5:].abs().max() == 0
    assert bool((gradient[:, :5].abs().sum(-1) > 0).all())


def test_the_proposal_knows_the_whole_sequence_up_to_its_length() -> None:
    steering, residual = make_steering(), make_residual().requires_grad_()
    lengths = torch.tensor([TIME, 5, 2, 1])
    (gradient,) = torch.autograd.grad(steering.discover(residual, lengths).mean[:, 0].sum(), residual)
    real = torch.arange(TIME) < lengths[:, None]
    assert torch.equal(gradient.abs().sum(-1) > 0, real)


def test_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    propose(monkeypatch)
    steering, residual = make_steering(ratio_loss_weight=0.5), make_residual()
    lengths = torch.tensor([TIME, 5, 2, 1])
    wide = torch.cat([residual, torch.randn(BATCH, 4, WIDTH, dtype=torch.float64)], 1)
    wide[torch.arange(TIME + 4) >= lengths[:, None]] = 9.0
    parameters = steering.discovery_parameters()
    results = []
    for batch in (residual, wide):
        output = steering.discover(batch, lengths)
        losses = torch.stack([kl_loss(output), auxiliary_ratio_loss(steering, output)])
        real = [getattr(output, name)[output.mask] for name in ("z", "beta", "kl", "steered")]
        loss = losses.sum() + output.steered[output.mask].square().mean()
        results.append((losses, real, torch.autograd.grad(loss, parameters)))
    torch.testing.assert_close(*results)


def test_kl_is_paid_at_every_real_step_also_where_the_gate_is_shut() -> None:
    steering = make_steering()
    nn.init.constant_(steering.switching.out.bias, -1e3)
    lengths = torch.tensor([TIME, 5, 2, 1])
    output = steering.discover(make_residual(), lengths)
    assert output.gate[:, 1:].max() == 0
    prior = Normal(torch.zeros_like(output.mean), torch.ones_like(output.mean))
    kl = kl_divergence(Normal(output.mean, output.log_std.exp()), prior).sum(-1)
    terms = [kl[b, t] for b, length in enumerate(lengths.tolist()) for t in range(length)]
    torch.testing.assert_close(kl_loss(output), torch.stack(terms).mean())


def test_ratio_loss_is_weighted_and_optional() -> None:
    steering, residual = make_steering(ratio_loss_weight=0.5, target_segment_length=3.0), make_residual()
    output = steering.discover(residual)
    expected = 0.5 * ratio_loss(output.beta, output.mask, 3.0)
    torch.testing.assert_close(auxiliary_ratio_loss(steering, output), expected)
    assert auxiliary_ratio_loss(make_steering(), output) == 0


def test_proposals_are_sampled_from_their_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    steering, residual = make_steering("forced"), make_residual()
    noise = steering.sample_noise(BATCH, TIME, torch.Generator().manual_seed(3))
    output = steering.discover(residual, noise=noise)
    expected = torch.randn(output.z.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(output.z, output.mean + output.log_std.exp() * expected)


def act_given(
    steering: MetaController, residual: Tensor, z_tilde: Tensor, drop: int | None = None
) -> tuple[DiscoveryOutput, Tensor]:
    """Steps through observe, integrate, steer with the given codes; returns the rows that remain after ``drop``."""
    rows, state = torch.arange(BATCH), steering.initial_state(BATCH)
    blank = torch.zeros(BATCH, TIME, dtype=torch.float64)
    out = DiscoveryOutput(torch.zeros_like(residual), torch.zeros_like(z_tilde), *(blank.clone() for _ in range(5)))
    for t in range(TIME):
        if t == drop:
            going = torch.tensor([3, 1])
            rows, state = rows[going], state.index(going)
        beta, state = steering.observe(residual[rows, t], state)
        switch = beta >= steering.gate_config.threshold
        state = steering.integrate(state, switch, z_tilde[rows, t])
        out.beta[rows, t], out.gate[rows, t], out.z[rows, t] = beta, switch.double(), state.z
        out.steered[rows, t] = steering.steer(residual[rows, t], state.z)
    return out, rows


@pytest.mark.parametrize("drop", [None, 4])
@pytest.mark.parametrize("mode", ["hard", "forced", "fixed-frequency"])
def test_acting_equals_discovery_with_the_same_codes(
    mode: str, drop: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steering, residual = make_steering(mode), make_residual()
    z_tilde = torch.randn(BATCH, TIME, CODE, dtype=torch.float64)
    propose(monkeypatch, z_tilde)
    with torch.no_grad():
        whole = steering.discover(residual)
        stepped, rows = act_given(steering, residual, z_tilde, drop)
    for name in ("beta", "gate", "z", "steered"):
        torch.testing.assert_close(getattr(stepped, name)[rows], getattr(whole, name)[rows])
    assert set(whole.gate[rows].flatten().tolist()) == ({1.0} if mode == "forced" else {0.0, 1.0})


def test_acting_holds_code_and_policy_state_while_the_gate_is_shut() -> None:
    steering, residual = make_steering("hard"), make_residual()
    state: SteeringState | None = None
    shut = opened = 0
    generator = torch.Generator().manual_seed(0)
    for t in range(TIME):
        before = state or steering.initial_state(BATCH)
        steered, output = steering.act(residual[:, t : t + 1], before, generator)
        state = output.state
        assert state is not None
        switch = output.switch_beta[:, 0] >= 0.5
        distribution, advanced = steering.policy(residual[:, t : t + 1], before.policy)
        torch.testing.assert_close(output.action_dist, distribution)
        torch.testing.assert_close(state.policy, torch.where(switch[:, None], advanced, before.policy))
        assert torch.equal(state.z[~switch], before.z[~switch])
        assert not (state.z[switch] == before.z[switch]).any()
        assert torch.equal(output.actions[:, 0], state.z)
        assert torch.equal(output.input_residual_stream, residual[:, t : t + 1])
        torch.testing.assert_close(steered, steering.steer(residual[:, t : t + 1], output.actions))
        opened, shut = opened + int(switch.sum()), shut + int((~switch).sum())
        assert t or bool((output.switch_beta == 1).all())
    assert opened > BATCH
    assert shut > 0


def test_acted_episodes_give_ratio_one_before_any_update() -> None:
    # what acting stores and what the loss recomputes agree: the surrogate is minus the mean advantage of the switches
    steering, residual = make_steering("hard"), make_residual()
    state, outputs = None, []
    for t in range(TIME):
        _, output = steering.act(residual[:, t : t + 1], state)
        state = output.state
        outputs.append(output)
    dist, codes, betas = (
        torch.cat([getattr(output, name) for output in outputs], 1)
        for name in ("action_dist", "actions", "switch_beta")
    )
    advantages = torch.randn(BATCH, dtype=torch.float64)
    loss = steering.policy_loss(residual, steering.log_prob(dist, codes), codes, advantages, betas, eps_clip=1e-6)
    switch = (betas >= 0.5).double()
    torch.testing.assert_close(loss, -(switch * advantages[:, None]).sum() / switch.sum())


def test_acting_repeats_with_the_seed() -> None:
    steering, residual = make_steering("hard"), make_residual()
    first, again, other = (
        steering.act(residual[:, :1], None, torch.Generator().manual_seed(seed))[1].actions for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_discovery_trains_everything_but_the_policy() -> None:
    steering = make_steering("soft")
    output = steering.discover(make_residual())
    (output.steered.square().sum() + kl_loss(output)).backward()
    trained = {name for name, value in steering.named_parameters() if value.grad is not None}
    listed = {id(value) for value in steering.discovery_parameters()}
    assert trained == {name for name, value in steering.named_parameters() if id(value) in listed}
    assert trained == {name for name, _ in steering.named_parameters() if not name.startswith("policy.")}


def test_bfloat16_keeps_codes_and_kl_in_float32() -> None:
    steering, residual = make_steering().float(), make_residual().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = steering.discover(residual)
    assert {getattr(output, name).dtype for name in ("z", "beta", "kl", "mean", "log_std")} == {torch.float32}
    exact = steering.discover(residual)
    torch.testing.assert_close(output.kl, exact.kl, rtol=0.1, atol=0.1)
