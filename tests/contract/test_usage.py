"""The public contract: the usage of the library that users know, statement by statement, and what it returns."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metacontroller import MetaController, Transformer

INITIALIZE = """
import torch
from metacontroller import Transformer, MetaController

model = Transformer(
    dim = 512,
    action_embed_readout = dict(num_discrete = 4),
    state_embed_readout = dict(num_continuous = 384),
    lower_body = dict(depth = 2),
    upper_body = dict(depth = 2)
)

state = torch.randn(2, 128, 384)
actions = torch.randint(0, 4, (2, 128))
"""

BEHAVIORAL_CLONING = """
state_loss, action_loss = model(state, actions)
(state_loss + action_loss).backward()
"""

DISCOVERY = """
meta_controller = MetaController(
    dim_model = 512,
    dim_meta_controller = 256,
    dim_latent = 128
)

state_pred_loss, action_recon_loss, kl_loss, aux_ratio_loss = model(
    state,
    actions,
    meta_controller = meta_controller,
    discovery_phase = True
)
(action_recon_loss + kl_loss * 0.1).backward()
"""

INTERNAL_RL_ACT = """
logits, cache = model(
    one_state,
    past_action_id,
    meta_controller = meta_controller,
    return_cache = True
)
meta_output = cache.prev_hiddens.meta_controller
old_log_probs = meta_controller.log_prob(meta_output.action_dist, meta_output.actions)
"""

INTERNAL_RL_LEARN = """
loss = meta_controller.policy_loss(
    group_states,
    group_old_log_probs,
    group_latent_actions,
    group_advantages,
    group_switch_betas
)
loss.backward()
"""

SMALL = {"512": "32", "384": "6", "256": "16", "128": "8"}
CONTINUOUS = {
    "dict(num_discrete = 4)": "dict(num_continuous = 4)",
    "torch.randint(0, 4, (2, 8))": "torch.randn(2, 8, 4)",
}

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


def run(code: str, names: dict[str, Any], device: str = "cpu", **replaced: str) -> None:
    """Runs statements in the namespace ``names`` after replacing pieces of them."""
    for old, new in replaced.items():
        code = code.replace(old, new)
    with torch.device(device):
        exec(code, names)


def gather_group(names: dict[str, Any], steps: int) -> None:
    """Acts for a few steps, going on from the cache, and stacks what the policy's loss needs."""
    model, meta_controller = names["model"], names["meta_controller"]
    cache, past = None, None
    outputs: list[Any] = []
    log_probs: list[Tensor] = []
    for t in range(steps):
        logits, cache = model(
            names["state"][:, t : t + 1], past, meta_controller=meta_controller, cache=cache, return_cache=True
        )
        past = model.action_readout.sample(logits)
        output = cache.prev_hiddens.meta_controller
        outputs.append(output)
        log_probs.append(meta_controller.log_prob(output.action_dist, output.actions))
    names["group_states"] = torch.cat([output.input_residual_stream for output in outputs], 1)
    names["group_old_log_probs"] = torch.cat(log_probs, 1)
    names["group_latent_actions"] = torch.cat([output.actions for output in outputs], 1)
    names["group_switch_betas"] = torch.cat([output.switch_beta for output in outputs], 1)
    names["group_advantages"] = torch.tensor([1.0, -0.5], device=names["state"].device)


def gradients(module: torch.nn.Module) -> set[str]:
    return {name for name, value in module.named_parameters() if value.grad is not None and bool(value.grad.any())}


def walk_through(names: dict[str, Any], device: str = "cpu", **replaced: str) -> None:
    """Steps 1 to 4, with a look at what each leaves behind."""
    run(INITIALIZE, names, device, **replaced)
    names["model"].to(device)
    run(BEHAVIORAL_CLONING, names, device, **replaced)
    assert {"encoder.linear.weight", "lower_body.blocks.0.to_qkv.weight", "norm.weight"} <= gradients(names["model"])
    names["model"].zero_grad()

    run(DISCOVERY, names, device, **replaced)
    assert names["aux_ratio_loss"] == 0
    assert not gradients(names["model"])
    learned = gradients(names["meta_controller"])
    assert {"history.weight_hh_l0", "switching.out.weight", "controller.read", "encoder.0.weight"} <= learned
    assert not any(name.startswith("policy.") for name in learned)
    names["meta_controller"].zero_grad()

    names["one_state"], names["past_action_id"] = names["state"][:, :1], names["actions"][:, :1]
    run(INTERNAL_RL_ACT, names, device, **replaced)
    gather_group(names, steps=4)
    run(INTERNAL_RL_LEARN, names, device, **replaced)
    assert names["loss"].device.type == device
    assert not gradients(names["model"])
    assert {name.split(".")[0] for name in gradients(names["meta_controller"])} == {"policy"}


def test_usage_as_written() -> None:
    names: dict[str, Any] = {}
    walk_through(names)
    output = names["meta_output"]
    assert names["logits"].shape == (2, 1, 4)
    assert names["old_log_probs"].shape == output.actions.shape == (2, 1, 128)
    assert output.input_residual_stream.shape == (2, 1, 512)
    assert names["group_latent_actions"].shape == (2, 4, 128)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("replaced", [SMALL, SMALL | CONTINUOUS], ids=["discrete", "continuous"])
def test_usage_at_small_sizes(replaced: dict[str, str], device: str) -> None:
    names: dict[str, Any] = {}
    walk_through(names, device, **replaced)
    parameters = 8 if "dict(num_discrete = 4)" in replaced else 4  # mean and log standard deviation, or logits
    assert names["logits"].shape == (2, 1, parameters)


@pytest.fixture
def small() -> dict[str, Any]:
    """The namespace after the first steps, small."""
    names: dict[str, Any] = {}
    run(INITIALIZE, names, **SMALL)
    run(DISCOVERY, names, **SMALL)
    return names


def test_losses_unpack_in_the_order_shown_and_carry_names(small: dict[str, Any]) -> None:
    losses = small["model"](small["state"], small["actions"])
    assert losses == (losses.state, losses.action)
    losses = small["model"](
        small["state"], small["actions"], meta_controller=small["meta_controller"], discovery_phase=True
    )
    assert losses == (losses.state_pred, losses.action_recon, losses.kl, losses.ratio)
    # the four are told apart by what they are, so that no two can change places
    plain = small["model"](small["state"], small["actions"])
    torch.testing.assert_close(losses.state_pred, plain.state, rtol=0.2, atol=0)
    torch.testing.assert_close(losses.action_recon, plain.action, rtol=0.2, atol=0)
    summed = small["model"].behavior_cloning_loss(small["state"], small["actions"])
    torch.testing.assert_close(plain, type(plain)(summed.state / 6, summed.action))  # a mean over the state's 6 numbers
    assert losses.kl < plain.action


@pytest.mark.parametrize("library", ["metacontroller", "metacontroller.metacontroller"])
def test_the_sum_of_both_losses_learns_actions_beside_a_large_state(library: str) -> None:
    torch.manual_seed(0)
    body = {"depth": 1, "heads": 2}
    state, actions = torch.randn(2, 16, 384), torch.randint(0, 4, (2, 16))
    model = import_module(library).Transformer(
        dim=32,
        action_embed_readout={"num_discrete": 4},
        state_embed_readout={"num_continuous": 384},
        lower_body=body,
        upper_body=body,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        state_loss, action_loss = model(state, actions)
        optimizer.zero_grad()
        (state_loss + action_loss).backward()
        optimizer.step()
    assert action_loss.item() < 0.05  # as a sum over entries the state's loss left it at 0.6


def test_the_ratio_loss_is_there_when_asked_for(small: dict[str, Any]) -> None:
    meta_controller = MetaController(32, dim_meta_controller=16, dim_latent=8, ratio_loss_weight=1.0)
    *_, ratio = small["model"](small["state"], small["actions"], meta_controller=meta_controller, discovery_phase=True)
    assert ratio > 0


@pytest.mark.parametrize("phase", [{}, {"discovery_phase": True}], ids=["cloning", "discovery"])
def test_losses_take_episode_lens(phase: dict[str, bool], small: dict[str, Any]) -> None:
    lens = torch.tensor([8, 3])
    model, state, actions = small["model"], small["state"], small["actions"]
    steering = {"meta_controller": small["meta_controller"]} if phase else {}
    torch.manual_seed(1)
    masked = model(state, actions, episode_lens=lens, **phase, **steering)
    state[1, 3:], actions[1, 3:] = 5.0, 0
    torch.manual_seed(1)
    padded = model(state, actions, episode_lens=lens, **phase, **steering)
    torch.manual_seed(1)
    whole = model(state, actions, **phase, **steering)
    torch.testing.assert_close(padded, masked)
    assert not torch.isclose(padded[1], whole[1])


def test_policy_loss_takes_episode_lens_and_a_clip(small: dict[str, Any]) -> None:
    gather_group(small, steps=4)
    group = [
        small[f"group_{name}"] for name in ("states", "old_log_probs", "latent_actions", "advantages", "switch_betas")
    ]
    policy_loss = small["meta_controller"].policy_loss
    group[-1] = torch.ones_like(group[-1])
    torch.testing.assert_close(policy_loss(*group), torch.tensor(-0.25))
    # before any update every ratio is 1, so the loss is minus the mean advantage of what counts
    torch.testing.assert_close(policy_loss(*group, episode_lens=torch.tensor([4, 1])), torch.tensor(-(4 - 0.5) / 5))
    group[1] = group[1] - 1.0  # now every ratio is e^8: clipped where the advantage is above 0
    ratio = torch.tensor(8.0).exp()
    torch.testing.assert_close(policy_loss(*group, eps_clip=0.5), -(1.5 * 1.0 + ratio * -0.5) / 2, rtol=1e-4, atol=0)


def test_the_cache_goes_on_where_it_stopped(small: dict[str, Any]) -> None:
    model, meta_controller, state = small["model"], small["meta_controller"], small["state"]
    _, cache = model(state[:, :1], meta_controller=meta_controller, return_cache=True)
    first = cache.prev_hiddens.meta_controller
    past = small["actions"][:, :1]
    logits, cache = model(state[:, 1:2], past, meta_controller=meta_controller, cache=cache, return_cache=True)
    second = cache.prev_hiddens.meta_controller
    assert bool((first.switch_beta == 1).all())
    assert bool(((second.switch_beta > 0) & (second.switch_beta < 1)).all())
    residual = model.residual(state[:, :2], small["actions"][:, :2])
    torch.testing.assert_close(first.input_residual_stream, residual[:, :1])
    torch.testing.assert_close(second.input_residual_stream, residual[:, 1:])
    steered = torch.cat(
        [
            meta_controller.steer(residual[:, :1], first.actions),
            meta_controller.steer(residual[:, 1:], second.actions),
        ],
        1,
    )
    torch.testing.assert_close(logits, model.action_readout(model.upper(steered))[:, 1:])


def test_models_are_saved_and_loaded(small: dict[str, Any], tmp_path: Path) -> None:
    for kind, module in ((Transformer, small["model"]), (MetaController, small["meta_controller"])):
        path = tmp_path / kind.__name__
        module.save(path)
        again = kind.init_and_load(path)
        assert all(torch.equal(again.state_dict()[name], value) for name, value in module.state_dict().items())
        fresh = kind(**module.arguments)
        fresh.load(path)
        assert all(torch.equal(fresh.state_dict()[name], value) for name, value in module.state_dict().items())


def test_arguments_are_taken_in_the_order_shown() -> None:
    names = list(inspect.signature(MetaController.policy_loss).parameters)[1:]
    assert names == [
        "states",
        "old_log_probs",
        "actions",
        "advantages",
        "switch_betas",
        "episode_lens",
        "eps_clip",
    ]
    assert list(inspect.signature(Transformer.evolve).parameters)[1:3] == ["num_generations", "environment"]
