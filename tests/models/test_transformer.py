"""The action model: losses against slow loops, padding, causality, step mode, and the freezing of discovery."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metacontroller.control import codes as codes_module
from metacontroller.control.discovery_losses import auxiliary_ratio_loss, kl_loss
from metacontroller.control.metacontroller import MetaController
from metacontroller.models.encoders import GridEncoder
from metacontroller.models.protocol import frozen
from metacontroller.models.readouts import CategoricalReadout
from metacontroller.models.transformer import Transformer

BATCH, TIME, DIM, STATE, ACTIONS = 3, 7, 12, 5, 4
LENGTHS = torch.tensor([TIME, 4, 1])
GRID = {"size": 4, "num_colors": 3, "num_walls": 2}


def make_model(continuous: bool = False, grid: bool = False, **options: Any) -> Transformer:
    """A small float64 model with one block on either side of the controlled layer."""
    bodies: dict[str, Any] = {"lower_body": {"depth": 1, "heads": 2}, "upper_body": {"depth": 1, "heads": 2}}
    model = Transformer(
        DIM,
        action_embed_readout={"num_continuous": 2} if continuous else {"num_discrete": ACTIONS},
        state_embed_readout={"grid": GRID} if grid else {"num_continuous": STATE},
        **(bodies | options),
    )
    return model.double()


def make_steering(**options: Any) -> MetaController:
    defaults: dict[str, Any] = {"dim_meta_controller": 8, "dim_latent": 3, "rank": 2}
    return MetaController(DIM, **(defaults | options)).double()


def batch_of(model: Transformer, extra_state: bool = True) -> tuple[Tensor, Tensor]:
    """Random states (b, T or T + 1, ...) and actions (b, T, ...)."""
    steps = TIME + int(extra_state)
    if isinstance(model.encoder, GridEncoder):
        states = torch.randint(0, 16, (BATCH, steps, 6))
    else:
        states = torch.randn(BATCH, steps, STATE, dtype=torch.float64)
    if isinstance(model.action_readout, CategoricalReadout):
        return states, torch.randint(0, ACTIONS, (BATCH, TIME))
    return states, torch.randn(BATCH, TIME, 2, dtype=torch.float64)


def fixed_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proposals take their mean, so that two calls propose the same."""
    monkeypatch.setattr(codes_module, "sample_gaussian", lambda params, **_: params.chunk(2, -1)[0])


@pytest.mark.parametrize("extra_state", [False, True])
@pytest.mark.parametrize("grid", [False, True])
def test_losses_are_means_over_the_real_steps(grid: bool, extra_state: bool) -> None:
    model = make_model(grid=grid)
    states, actions = batch_of(model, extra_state)
    hidden = model.upper(model.residual(states, actions))
    logits, predicted = model.action_readout(hidden), model.state_readout(hidden)
    action_terms, state_terms = [], []
    for b, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            action_terms.append(-logits[b, t].log_softmax(-1)[actions[b, t]])
            if t == length - 1 and not extra_state:
                continue  # without the state after the last action, the last real step predicts none
            if grid:
                state_terms.append(-predicted[b, t].log_softmax(-1)[states[b, t + 1, -1]])
            else:
                mean, log_std = predicted[b, t].chunk(2)
                normal = torch.distributions.Normal(mean, log_std.exp())
                state_terms.append(-normal.log_prob(states[b, t + 1]).sum())
    losses = model.behavior_cloning_loss(states, actions, LENGTHS)
    torch.testing.assert_close(losses.action, torch.stack(action_terms).mean())
    torch.testing.assert_close(losses.state, torch.stack(state_terms).mean())


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("phase", ["behavior cloning", "discovery"])
def test_padding_changes_no_loss_and_no_gradient(phase: str, continuous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_codes(monkeypatch)
    model, steering = make_model(continuous), make_steering(ratio_loss_weight=0.5)
    states, actions = batch_of(model)
    wide_states = torch.cat([states, torch.randn(BATCH, 3, STATE, dtype=torch.float64)], 1)
    wide_actions = torch.cat([actions, torch.ones_like(actions[:, :3])], 1)
    for b, length in enumerate(LENGTHS.tolist()):
        wide_states[b, length + 1 :] = 7.0
        wide_actions[b, length:] = 3
    learned = steering.discovery_parameters() if phase == "discovery" else list(model.parameters())
    results = []
    for batch in ((states, actions), (wide_states, wide_actions)):
        if phase == "discovery":
            losses = model(*batch, meta_controller=steering, discovery_phase=True, episode_lens=LENGTHS)
        else:
            losses = model(*batch, episode_lens=LENGTHS)
        assert all(bool(loss != 0) for loss in losses)
        gradients = torch.autograd.grad(torch.stack(losses).sum(), learned, allow_unused=True)
        results.append((losses, [gradient for gradient in gradients if gradient is not None]))
    assert len(results[0][1]) > 10
    torch.testing.assert_close(*results)


def test_the_state_loss_can_be_left_out() -> None:
    model = make_model()
    states, actions = batch_of(model)
    losses = model.behavior_cloning_loss(states, actions, with_state_loss=False)
    assert losses.state == 0
    assert losses.action == model(states, actions).action


@pytest.mark.parametrize("condition_on_actions", [False, True])
def test_actions_depend_on_the_past_alone(condition_on_actions: bool) -> None:
    model = make_model(continuous=True, condition_on_actions=condition_on_actions)
    states, actions = batch_of(model)
    states.requires_grad_()
    actions.requires_grad_()
    params = model.action_readout(model.upper(model.residual(states, actions)))
    by_state, by_action = torch.autograd.grad(params[:, 3].square().sum(), (states, actions), allow_unused=True)
    assert by_state[:, 4:].abs().max() == 0
    assert by_state[:, :4].abs().sum(-1).min() > 0
    if condition_on_actions:
        assert by_action[:, 3:].abs().max() == 0
        assert by_action[:, :3].abs().sum(-1).min() > 0
    else:
        assert by_action is None


@pytest.mark.parametrize("condition_on_actions", [False, True])
@pytest.mark.parametrize("kind", ["discrete", "continuous", "grid"])
def test_step_mode_equals_sequence_mode(kind: str, condition_on_actions: bool) -> None:
    model = make_model(kind == "continuous", kind == "grid", condition_on_actions=condition_on_actions)
    states, actions = batch_of(model, extra_state=False)
    whole = model.action_readout(model.upper(model.residual(states, actions)))
    cache = None
    for t in range(TIME):
        past = actions[:, t - 1 : t] if t else None
        logits, cache = model(states[:, t : t + 1], past, cache=cache, return_cache=True)
        torch.testing.assert_close(logits[:, 0], whole[:, t])
    assert cache is not None
    torch.testing.assert_close(cache.residual[:, 0], model.residual(states, actions)[:, -1])


@pytest.mark.parametrize("rank", [2, None])
def test_a_zero_controller_leaves_the_logits_as_they_are_bit_for_bit(rank: int | None) -> None:
    model, steering = make_model(), make_steering(rank=rank)
    states, actions = batch_of(model)
    residual = model.residual(states, actions)
    plain = model.action_readout(model.upper(residual))
    steered = model.action_readout(model.upper(steering.discover(residual).steered))
    assert not torch.equal(steered, plain)
    nn.init.zeros_(steering.controller.full if rank is None else steering.controller.write)
    steered = model.action_readout(model.upper(steering.discover(residual).steered))
    assert torch.equal(steered, plain)
    first, _ = model(states[:, :1], None, meta_controller=steering, return_cache=True)
    alone, _ = model(states[:, :1], None, return_cache=True)
    assert torch.equal(first, alone)


@pytest.mark.parametrize("attached", [False, True])
def test_discovery_leaves_the_model_untouched(attached: bool) -> None:
    model, steering = make_model(), make_steering()
    states, actions = batch_of(model)
    base = list(model.named_parameters())
    before = {name: value.clone() for name, value in base}
    codes = copy.deepcopy(steering.state_dict())
    if attached:
        model.meta_controller = steering
    everything = {id(value): value for value in [*model.parameters(), *steering.parameters()]}
    optimizer = torch.optim.AdamW(everything.values(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        losses = model(states, actions, meta_controller=None if attached else steering, discovery_phase=True)
        optimizer.zero_grad()
        (losses.state_pred + losses.action_recon + 0.1 * losses.kl).backward()
        assert all(value.grad is None for _, value in base)
        assert all(value.grad is not None for value in steering.discovery_parameters())
        assert all(value.grad is None for value in steering.policy.parameters())
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in base)
    assert all(value.requires_grad for value in everything.values())
    changed = {name for name, value in steering.state_dict().items() if not torch.equal(value, codes[name])}
    assert changed == {name for name in codes if not name.startswith("policy.")}


def test_discovery_losses_are_those_of_the_steered_model(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_codes(monkeypatch)
    model, steering = make_model(), make_steering(ratio_loss_weight=0.5, target_segment_length=3.0)
    states, actions = batch_of(model)
    losses = steering.discovery_loss(model, states, actions, LENGTHS)
    whole = model.lower(model.embed(states, actions))  # of the state after the last action too
    assert whole.shape[1] == actions.shape[1] + 1
    torch.testing.assert_close(whole[:, :-1], model.residual(states, actions))
    output = steering.discover(whole[:, :-1], LENGTHS, embedded_residual=whole)
    expected = model.readout_losses(model.upper(output.steered), states, actions, LENGTHS, True)
    assert (losses.state_pred, losses.action_recon) == tuple(expected)
    assert losses.kl == kl_loss(output)
    assert losses.ratio == auxiliary_ratio_loss(steering, output)
    plain = model.behavior_cloning_loss(states, actions, LENGTHS)
    assert losses.action_recon != plain.action


def test_frozen_gives_back_what_it_took_even_after_an_error() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)

    def fail() -> None:
        with frozen(module):
            assert not module.weight.requires_grad
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert module.weight.requires_grad
    assert not module.bias.requires_grad


def test_a_metacontroller_named_in_the_call_goes_before_the_attached_one() -> None:
    model, attached, named = make_model(), make_steering(), make_steering()
    model.meta_controller = attached
    states, _ = batch_of(model)
    _, cache = model(states[:, :1], return_cache=True)
    assert cache.prev_hiddens.meta_controller is not None
    by_attached, _ = model(states[:, :1], None, return_cache=True, meta_controller=attached)
    torch.manual_seed(5)
    by_named, _ = model(states[:, :1], None, return_cache=True, meta_controller=named)
    torch.manual_seed(5)
    model.meta_controller = named
    again, _ = model(states[:, :1], None, return_cache=True)
    assert torch.equal(by_named, again)
    assert not torch.equal(by_named, by_attached)


def test_a_batch_that_was_checked_is_not_looked_at_again() -> None:
    model = make_model()
    states, actions = batch_of(model)
    states[0, 0, 0] = torch.nan
    assert bool(model.behavior_cloning_loss(states, actions, checked=True).action.isnan())


@pytest.mark.parametrize("layer", [0, 1, 3, 4])
def test_resplit_moves_the_controlled_layer_and_changes_no_logit(layer: int, tmp_path: Path) -> None:
    body = {"heads": 2, "mlp_dim": 10}
    model = make_model(lower_body={"depth": 1, **body}, upper_body={"depth": 3, **body})
    states, actions = batch_of(model)
    x = model.embed(states[:, :TIME], actions[:, :-1])
    layers = [x]
    for block in [*model.lower_body.blocks, *model.upper_body.blocks]:
        layers.append(block(layers[-1]))
    logits = model.action_readout(model.upper(model.residual(states, actions)))
    model.resplit(layer)
    assert torch.equal(model.residual(states, actions), layers[layer])
    assert torch.equal(model.action_readout(model.upper(model.residual(states, actions))), logits)
    assert (model.arguments["lower_body"]["depth"], model.arguments["upper_body"]["depth"]) == (layer, 4 - layer)
    model.save(tmp_path / "model")
    again = Transformer.init_and_load(tmp_path / "model").double()
    assert torch.equal(again.residual(states, actions), layers[layer])
    assert len(again.lower_body.blocks) == layer


@pytest.mark.parametrize(
    ("sizes", "layer", "message"),
    [
        ({}, 3, "lower_depth is 3; expected 0..2"),
        ({}, -1, "lower_depth is -1; expected 0..2"),
        ({"mlp_dim": 10}, 1, "only bodies of one kind and the same sizes"),
        ({"heads": 3}, 1, "only bodies of one kind and the same sizes"),
        ({"dim_head": 5}, 1, "only bodies of one kind and the same sizes"),
    ],
)
def test_impossible_splits_are_refused(sizes: dict[str, int], layer: int, message: str) -> None:
    model = make_model(upper_body={"depth": 1, "heads": 2, **sizes})
    with pytest.raises(ValueError, match=message):
        model.resplit(layer)
    assert len(model.lower_body.blocks) == 1
