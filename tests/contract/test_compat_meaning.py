"""What each keyword of `metacontroller-pytorch` means here: an equation between two calls, at two sizes and kinds of
action, with and without lengths. That each is taken and has an effect is tested beside this, in `test_compat_keywords`.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from compat_models import ACTIONS, BODY, CONDITION, STATE, STEPS, Binary, make_model, make_steering, theirs
from torch import Tensor, nn

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CASES = [(8, False, True), (16, True, False)], [(8, True, True), (16, False, False)]  # the others only if asked
each = pytest.mark.parametrize(
    ("width", "continuous", "lengths", "device"),
    [
        pytest.param(*case, device, marks=marks)
        for cases, slow in zip(CASES, ((), (pytest.mark.slow,)), strict=True)
        for device, marks in (("cpu", slow), ("cuda", (*slow, GPU)))
        for case in cases
    ],
)


def batch(continuous: bool, lengths: bool, device: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    torch.manual_seed(1)
    actions = torch.randn(2, STEPS, ACTIONS) if continuous else torch.randint(ACTIONS, (2, STEPS))
    given = {"episode_lens": torch.tensor([STEPS, 3], device=device)} if lengths else {}
    return torch.randn(2, STEPS, STATE).to(device), actions.to(device), given


def discover(model: Any, steering: Any, data: Any, **options: Any) -> tuple[Any, Any]:
    """Losses and output of discovery, with the same noise every time."""
    states, actions, given = data
    torch.manual_seed(2)
    return model(
        states,
        actions,
        meta_controller=steering,
        discovery_phase=True,
        return_meta_controller_output=True,
        **given,
        **options,
    )


def equal(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


def differ(first: Tensor, second: Tensor) -> None:
    assert (first - second).abs().max() > 1e-6


@each
def test_of_the_transformers_losses(width: int, continuous: bool, lengths: bool, device: str) -> None:
    data = states, actions, given = batch(continuous, lengths, device)
    plain = make_model(width, continuous, device, next_latent_loss_weight=0.0)
    base = plain(states, actions, **given)
    heavy = [
        make_model(width, continuous, device, next_latent_loss_weight=w)(states, actions, **given) for w in (1.0, 3.0)
    ]
    equal(heavy[1].state - base.state, 3 * (heavy[0].state - base.state))  # next_latent_loss_weight
    differ(heavy[0].state, base.state)
    equal(heavy[0].action, base.action)
    deaf = make_model(width, continuous, device, embed_past_actions=False, next_latent_loss_weight=0.0)
    other = actions.flip(1)
    equal(deaf(states, actions, return_embed=True), deaf(states, other, return_embed=True))  # embed_past_actions
    equal(deaf(states, actions, **given).state, deaf(states, other, **given).state)
    differ(plain(states, actions, return_embed=True), plain(states, other, return_embed=True))
    scaled = make_model(
        width,
        continuous,
        device,
        normalize_state_action_losses=True,
        loss_normalizer_beta=0.5,
        next_latent_loss_weight=0.0,
    )
    scaled(states, actions, **given)  # counts: m = (1 + loss^2) / 2
    now, scale = scaled(states, actions, update_loss_ema=False, **given), ((1 + base.action.detach() ** 2) / 2).sqrt()
    equal(now.action, base.action / scale)
    equal(scaled.running_bc_action_loss[0], scale)
    equal(scaled.running_discovery_action_loss[0].item(), 1.0)
    posted = make_model(width, continuous, device, lower_transformer_post_norm=True)
    _, residual = posted(states, actions, return_residual_stream=True, **given)
    equal(residual.mean(-1), torch.zeros_like(residual[..., 0]))  # a norm follows the last block
    torch.testing.assert_close(residual.var(-1, correction=0), torch.ones_like(residual[..., 0]), atol=0.01, rtol=0)
    steering = make_steering(width, device)
    assert discover(plain, steering, data)[0].state_pred == 0
    cloning = make_model(width, continuous, device, discovery_phase_state_clone_loss=True, next_latent_loss_weight=0.0)
    losses, _ = discover(cloning, steering, data, control_signal_multiplier=0.0)
    equal(losses.state_pred, base.state)  # and without control discovery is cloning
    equal(losses.action_recon, base.action)


@each
def test_of_bodies_and_states(width: int, continuous: bool, lengths: bool, device: str) -> None:
    states, actions, given = batch(continuous, lengths, device)
    wide = make_model(width, continuous, device, lower_body={**BODY, "attn_dim_head": 12})
    assert wide.lower_body.blocks[0].to_out.in_features == 2 * 12
    dynamic = make_model(width, continuous, device, dynamics_hidden_dim=5, dynamics_num_layers=2).dynamics_model
    assert [layer.out_features for layer in dynamic.hidden] == [5, 5]
    assert dynamic.last.out_features == width
    built = make_model(width, continuous, device)
    handed = make_model(width, continuous, device, lower_body=built.lower_body, upper_body=built.upper_body)
    assert handed.lower_body is built.lower_body
    handed.load_state_dict(built.state_dict())
    equal(handed(states, actions, **given), built(states, actions, **given))
    ruled = make_model(width, continuous, device, dim_condition=CONDITION)
    for parameter in ruled.parameters():
        nn.init.normal_(parameter, std=0.3)
    goals = torch.randn(2, CONDITION, device=device)
    found = ruled(states, actions, condition=goals, return_residual_stream=True, **given)[1]
    changed = ruled(
        states, actions, condition=torch.cat([goals[:1], -goals[1:]]), return_residual_stream=True, **given
    )[1]
    equal(changed[0], found[0])  # a goal is its row's own
    differ(changed[1], found[1])
    numbers = torch.randn(2, STEPS, 2, device=device)
    for sizes, chosen in ((7, torch.randint(7, (2, STEPS))), ([7, 3], torch.randint(3, (2, STEPS, 2)))):
        chosen = chosen.to(device)
        single = make_model(width, continuous, device, state_embed_readout={"num_discrete": sizes})
        mixed = make_model(width, continuous, device, state_embed_readout={"num_discrete": sizes, "num_continuous": 2})
        assert math.isfinite(single(chosen, actions, **given).state.item())
        first = mixed((chosen, numbers), actions, **given)
        first.state.backward()
        assert all(value.grad.abs().sum() > 0 for value in mixed.state_embed.parameters())
        equal(
            mixed((chosen, numbers), actions, return_embed=True), mixed.embed(_joined(chosen, numbers), actions[:, :-1])
        )


def _joined(chosen: Tensor, numbers: Tensor) -> Tensor:
    chosen = chosen[..., None] if chosen.dim() == 2 else chosen
    return torch.cat([chosen.to(numbers.dtype), numbers], -1)


@each
def test_of_what_is_returned(width: int, continuous: bool, lengths: bool, device: str) -> None:
    data = states, actions, given = batch(continuous, lengths, device)
    model, steering = make_model(width, continuous, device), make_steering(width, device)
    entries = 2 * ACTIONS if continuous else ACTIONS
    losses, logits, residual = model(
        states, actions, return_action_logits=True, return_residual_stream=True, return_embed=False, **given
    )
    assert logits.shape == (2, STEPS, entries)
    assert residual.shape == (2, STEPS, width)
    equal(model(states, actions, return_cache=True, **given), losses)  # of a whole episode losses come first
    equal(model(states, actions, return_action_cache=True)[0], logits)  # whose last action is no past one
    whole, cache = model(states, actions[:, :-1], return_action_cache=True)  # a prompt of any length
    equal(whole, logits)
    assert cache.cache_steps == STEPS
    equal(cache.residual_stream_latent, residual)
    for keyword in ("return_latents", "return_action_cache"):
        out, left = model(states, actions[:, :-1], **{keyword: True, "return_raw_action_dist": True})
        equal(out, logits)
        assert left.cache_steps == STEPS
    equal(model(states, actions[:, :-1], return_raw_action_dist=True), logits)
    model.meta_controller = steering
    forced = model(states, actions, force_behavior_cloning=True, **given)
    equal(forced, losses)
    found, output = discover(model, steering, data)
    assert output.action_dist.shape == (2, STEPS, steering.codes.params)
    assert output.switch_beta.shape == (2, STEPS)
    equal(found.kl, output.kl_loss)
    equal(found.ratio, output.ratio_loss)
    equal(output.input_residual_stream, residual)


@each
def test_of_a_steering_call(width: int, continuous: bool, lengths: bool, device: str) -> None:
    data = batch(continuous, lengths, device)
    model, steering = make_model(width, continuous, device), make_steering(width, device)
    given = torch.rand(2, STEPS, device=device)
    _, output = discover(model, steering, data, ablate_switch_beta=given)
    equal(output.switch_beta, given)
    z = torch.zeros(2, 4, device=device)
    for t in range(STEPS):
        z = given[:, t, None] * output.actions[:, t] + (1 - given[:, t, None]) * z
        equal(output.z[:, t], z)
    _, regular = discover(model, steering, data, switch_beta_frequency=3)
    assert regular.switch_beta.tolist() == [[0, 0, 1, 0, 0, 1]] * 2
    equal(regular.switch_beta, steering.create_regular_switch_beta(2, STEPS, 3, device=device))
    assert steering.create_regular_switch_beta(1, 4, 3, offset=1).tolist() == [[0, 1, 0, 0]]
    _, soft = discover(model, steering, data)
    for hard in (discover(model, steering, data, hard_switch=True)[1], None):
        if hard is None:
            steering.hard_switch = True
            hard = discover(model, steering, data)[1]
        assert set(hard.switch_beta.unique().tolist()) <= {0.0, 1.0}
    equal(discover(model, steering, data, hard_switch=False)[1].switch_beta, soft.switch_beta)
    bias = steering.switching.out.bias
    for through in (False, True):
        steering.hard_switch_straight_through = through
        gradient = torch.autograd.grad(discover(model, steering, data)[0].action_recon, bias, allow_unused=True)[0]
        assert (gradient is not None and bool(gradient.abs().sum() > 0)) == through
    steering.hard_switch = None
    cold = discover(model, steering, data, meta_controller_temperature=0.0)[1]
    equal(cold.actions, cold.action_dist.chunk(2, -1)[0])  # the mean
    steering.switch_temperature = 1e6
    flat = discover(model, steering, data)[1].switch_beta
    equal(flat[:, 1:], torch.full_like(flat[:, 1:], 0.5))
    steering.switch_temperature = 1.0
    steering.latent_action_barrier_scale = 0.3
    bound = discover(model, steering, data, ablate_switch_beta=torch.ones_like(given))[1]
    equal(bound.z, 0.3 * torch.tanh(bound.actions / 0.3))
    control, _ = steering(bound.input_residual_stream, ablate_switch_beta=torch.ones_like(given), temperature=0.0)
    zero = torch.zeros_like(control)
    twice, once = (_steered(model, steering, zero, multiplier=scale).steered for scale in (2.0, 1.0))
    base = model.lower(zero)
    equal(twice - base, 2 * (once - base))  # control_signal_multiplier
    steering.train()
    lost = _steered(model, steering, zero, dropout=1.0).steered
    equal(lost, zero)  # metacontroller_residual_stream_dropout
    steering.eval()
    kept = _steered(model, steering, zero, dropout=1.0).steered
    equal(kept, base)


def _steered(model: Any, steering: Any, residual: Tensor, multiplier: float = 0.0, dropout: float = 0.0) -> Any:
    call = {"cache": None, "condition": None, "discovery_phase": False, "meta_controller_temperature": 0.0}
    call |= dict.fromkeys(("ablate_switch_beta", "switch_beta_frequency", "hard_switch"))
    call |= {"control_signal_multiplier": multiplier, "metacontroller_residual_stream_dropout": dropout}
    return model._steered(residual, steering, call, None, acts=False)


@each
def test_of_the_metacontrollers_losses(width: int, continuous: bool, lengths: bool, device: str) -> None:
    data = batch(continuous, lengths, device)
    model = make_model(width, continuous, device)
    mask = torch.arange(STEPS, device=device) < torch.tensor([STEPS, 3 if lengths else STEPS], device=device)[:, None]
    steering = make_steering(width, device)
    base, output = discover(model, steering, data)
    each_step = steering.calculate_kl_loss(output.action_dist).sum(-1)
    equal(base.kl, each_step[mask].mean())
    beta = output.switch_beta
    share, soft = (beta >= 0.5).float()[mask].mean(), beta[mask].mean()
    equal(base.ratio, 4 / 3 * (3 * share * soft + (1 - share) * (1 - soft)))  # target_temporal_segment_len = 4
    equal(steering.ratio_loss(4, beta, episode_lens=data[2].get("episode_lens")), base.ratio)
    changing = make_steering(
        width,
        device,
        kl_loss_weight=0.5,
        kl_loss_warmup_steps=4,
        ratio_loss_weight=2.0,
        ratio_loss_final_weight=1.0,
        ratio_loss_warmdown_steps=4,
        target_temporal_segment_len=2,
        ratio_loss_chunk_size=3,
    )
    for steps, kl, ratio in ((0, 0.0, 2.0), (1, 0.125, 1.75), (4, 0.5, 1.0), (9, 0.5, 1.0)):
        changing.reset_kl_loss_warmup()
        for _ in range(steps):
            changing.maybe_increment_kl_loss_step()
        assert (changing.current_kl_loss_weight, changing.current_ratio_loss_weight) == (kl, ratio)
        losses, output = discover(model, changing, data)
        equal(losses.kl, kl * base.kl)
        assert output.kl_loss_weight == kl
        expected = []
        for row, first in product(range(2), (0, 3)):
            part = output.switch_beta[row, first : first + 3][mask[row, first : first + 3]]
            if len(part):
                share, soft = (part >= 0.5).float().mean(), part.mean()
                expected.append(2 * (share * soft + (1 - share) * (1 - soft)))
        equal(losses.ratio, ratio * torch.stack(expected).mean())
    plain = make_steering(width, device, kl_loss_weight=0.5, kl_loss_warmup_steps=4, apply_kl_loss_weight=False)
    equal(discover(model, plain, data)[0].kl, base.kl)
    assert discover(model, make_steering(width, device, ratio_loss_weight=0.0), data)[0].ratio == 0
    bits = make_steering(width, device, Binary, kl_loss_threshold=0.2)
    losses, output = discover(model, bits, data)
    p = torch.sigmoid(output.action_dist)
    free = (3 * math.log(2) - theirs.binary_entropy(p).sum(-1) - 0.2).clamp_min(0)
    equal(losses.kl, free[mask].mean())
    assert output.actions.shape == (2, STEPS, 8)
    equal(output.actions.detach().sum(-1), torch.ones(2, STEPS, device=device))


@each
def test_of_what_learns_in_which_phase(width: int, continuous: bool, lengths: bool, device: str) -> None:
    data = batch(continuous, lengths, device)
    model, steering = make_model(width, continuous, device), make_steering(width, device)
    sizes = {name: _count(getattr(steering, name)()) for name in ("discovery_parameters", "internal_rl_parameters")}
    gate = _count(steering.discovery_parameters_switching_unit())
    assert sum(sizes.values()) == _count(steering.parameters())
    assert _count(steering.discovery_parameters_non_switching()) == sizes["discovery_parameters"] - gate
    model.train_discovery(meta_controller=steering, eval_rest=True)
    assert (model.training, steering.training) == (False, True)
    assert _learning(model) == 0
    assert _learning(steering) == sizes["discovery_parameters"]
    losses, output = discover(model, steering, data)
    (losses.action_recon + losses.kl + losses.ratio).backward()
    assert all(value.grad is not None for value in steering.discovery_parameters())
    assert all(value.grad is None for value in [*steering.internal_rl_parameters(), *model.parameters()])
    steering.zero_grad()
    model.train_internal_rl(meta_controller=steering, eval_rest=True)
    assert _learning(model) == 0
    assert _learning(steering) == sizes["internal_rl_parameters"]
    stored = output.input_residual_stream.detach()
    distribution, kl = steering.get_action_dist_for_internal_rl(stored, return_kl_loss=True)
    codes = steering.codes.sample(distribution).detach()
    entries = steering.log_prob(distribution, codes)
    fields = steering.replay_buffer_field_dict
    assert fields == {
        "states": ("float", stored.shape[-1]),
        "log_probs": ("float", entries.shape[-1]),
        "switch_betas": "float",
        "latent_actions": ("float", codes.shape[-1]),
    }
    steering.policy_loss(stored, entries.detach(), codes, torch.tensor([1.0, -1.0], device=device)).backward()
    assert all(value.grad is None for value in [*steering.discovery_parameters(), *model.parameters()])
    assert kl.shape == entries.shape


def _count(parameters: Any) -> int:
    return sum(value.numel() for value in parameters)


def _learning(module: Any) -> int:
    return _count(value for value in module.parameters() if value.requires_grad)


@each
@pytest.mark.parametrize("kind", [theirs.MetaController, Binary], ids=["gaussian", "binary"])
def test_of_the_policy_loss(kind: Any, width: int, continuous: bool, lengths: bool, device: str) -> None:
    torch.manual_seed(1)
    steering = make_steering(width, device, kind)
    stored = torch.randn(2, STEPS, width, device=device)
    distribution, kl = steering.get_action_dist_for_internal_rl(stored, return_kl_loss=True)
    codes = steering.codes.sample(distribution).detach()
    new = steering.log_prob(distribution, codes)
    old = (new + 0.3 * torch.randn_like(new)).detach()
    advantages = torch.tensor([1.0, -0.5], device=device)
    mask = torch.tensor([[1.0, 0, 1, 1, 0, 1]] * 2, device=device)
    given = {"episode_lens": torch.tensor([STEPS, 3], device=device)} if lengths else {}
    real = torch.arange(STEPS, device=device) < torch.tensor([STEPS, 3 if lengths else STEPS], device=device)[:, None]
    decided = (mask > 0.5) & real
    ratio = (new - old).sum(-1).exp()
    a = advantages[:, None].expand(2, STEPS)

    def surrogate(low: float, high: float, where: Tensor) -> Tensor:
        return -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)[where].mean()

    loss = steering.policy_loss
    data = stored, old, codes, advantages
    equal(loss(*data, mask, **given), surrogate(0.2, 0.2, decided))
    equal(loss(*data, mask[..., None] > 0.5, **given), surrogate(0.2, 0.2, decided))
    equal(loss(*data, **given), surrogate(0.2, 0.2, real))
    equal(loss(*data, mask, eps_clip=(0.01, 0.5), **given), surrogate(0.01, 0.5, decided))
    equal(loss(*data[:3], advantages[:, None, None], mask, **given), surrogate(0.2, 0.2, decided))
    regular = steering.create_regular_switch_beta(2, STEPS, 3, device=device) > 0.5
    equal(loss(*data, mask, switch_beta_frequency=3, **given), surrogate(0.2, 0.2, regular & real))
    own = (new - old).exp()
    terms = torch.minimum(own * a[..., None], own.clamp(0.8, 1.2) * a[..., None]).sum(-1)
    equal(loss(*data, mask, per_entry=True, **given), -terms[decided].mean())
    main, pull = loss(*data, mask, return_kl_loss=True, kl_loss_weight=0.3, **given)
    equal(main, surrogate(0.2, 0.2, decided))
    each_step = kl.sum(-1) if kl.dim() == 3 else kl
    equal(pull, 0.3 * each_step[decided].mean())
    scores, before = ((value.sum(-1) * decided).sum(1) / decided.sum(1).clamp_min(1) for value in (new, old))
    for eta in (1.0, 0.5):
        q = theirs.tpo_target(before, advantages, eta=eta)
        equal(q, (before.log_softmax(-1) + advantages / eta).softmax(-1))
        expected = theirs.tpo_loss(scores.log_softmax(-1), q)
        equal(loss(*data, mask, use_tpo=True, tpo_eta=eta, **given), expected)
        equal(loss(*data, mask, use_tpo=True, tpo_eta=eta, tpo_group_size=2, **given), expected)
    assert loss(*data, mask, use_tpo=True, tpo_group_size=1, **given).item() == 0
    values = theirs.z_score(torch.randn(7, 3), 0)
    equal(values.mean(0), torch.zeros(3))
    equal(values.std(0), torch.ones(3))


@each
@pytest.mark.parametrize("kind", [theirs.MetaController, Binary], ids=["gaussian", "binary"])
def test_of_sizes_embedders_and_proposers(kind: Any, width: int, continuous: bool, lengths: bool, device: str) -> None:
    data = batch(continuous, lengths, device)
    model = make_model(width, continuous, device)
    n_z = 8 if kind is Binary else 4
    sized = make_steering(
        width,
        device,
        kind,
        dim_meta_controller=12,
        decoder_expansion_factor=3.0,
        decoder_depth=2,
        hypernetwork_low_rank=3,
        dim_sequence_summary_embed=6,
    )
    assert sized.to_sequence_summary_embed.out_features == 6
    assert sized.decoder.code_to_hidden.out_features == 3 * n_z
    assert sized.summary_gru.hidden_size == 12
    z = torch.randn(2, STEPS, n_z, device=device)
    matrix = torch.stack(  # U, column by column
        [sized.decoder(z, row.expand(2, STEPS, -1)) for row in torch.eye(width, device=device)], -1
    )
    assert int(torch.linalg.matrix_rank(matrix[0, 0].double(), rtol=1e-4)) == 3
    assert _layers(sized.decoder) == 1 + _layers(make_steering(width, device, kind).decoder)
    residual = model.lower(model.embed(data[0]))
    later = residual.clone()
    later[:, 4:] = torch.randn_like(later[:, 4:])
    for bidirectional, pooled in product((True, False), (True, False)):
        steering = make_steering(width, device, kind, bidirectional=bidirectional, pool_embedded_sequence=pooled)
        outputs = []
        for stream in (residual, later):
            torch.manual_seed(3)
            outputs.append(steering(stream, discovery_phase=True)[1].action_dist)
        if bidirectional:
            differ(outputs[0][:, :4], outputs[1][:, :4])
        else:
            equal(outputs[0][:, :4], outputs[1][:, :4])  # causal: the future is not seen
    for options in ({"kind": "gru", "depth": 1}, {"kind": "hawk", "depth": 1, "heads": 2}):
        steering = make_steering(width, device, kind, internal_sequence_embedder=options)
        assert discover(model, steering, data)[0].action_recon.isfinite()
    if kind is not Binary:
        compact = make_steering(width, device, kind, compact_sequence_embedding=True)
        assert compact.sequence_embedder.body.gru.hidden_size == width
        assert discover(model, compact, data)[0].kl.isfinite()
    for options in ({"kind": "gru"}, {"kind": "mingru"}, {"kind": "mlp"}, {"kind": "hawk", "depth": 1, "heads": 2}):
        steering = make_steering(width, device, kind, action_proposer=options)
        _acts_as_over_sequences(steering, residual)
    wrapped = theirs.ActionProposerWrapper(nn.GRU(width, width, batch_first=True), "hx", None).to(device)
    for module in (wrapped, nn.GRU(width, width, batch_first=True).to(device)):
        _acts_as_over_sequences(make_steering(width, device, kind, action_proposer=module), residual)


def _layers(module: nn.Module) -> int:
    return sum(isinstance(part, nn.Linear) for part in module.modules())


def _acts_as_over_sequences(steering: Any, residual: Tensor) -> None:
    whole, cache, parts = steering.get_action_dist_for_internal_rl(residual), None, []
    for t in range(STEPS):
        _, cache = steering(residual[:, t : t + 1], cache=cache)
        parts.append(cache.action_dist)
    equal(torch.cat(parts, 1), whole)
