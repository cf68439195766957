"""Valid calls of what is public, drawn at random: they run, repeat, and agree where they say the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.wrappers import TimeLimit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from metacontroller import InternalEnv, InternalVectorEnv, MetaController, Transformer
from metacontroller.control.discovery_losses import kl_loss
from metacontroller.domains.registry import domain_of
from metacontroller.presets import preset
from metacontroller.recipes.config import build_model

pytestmark = pytest.mark.slow
WIDTH = 8
GATES = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["soft", "hard", "straight-through", "gumbel-sigmoid", "forced", "fixed-frequency"]),
        "threshold": st.sampled_from([0.1, 0.5, 0.9]),
        "temperature": st.sampled_from([0.5, 2.0]),
        "period": st.integers(1, 4),
    }
)
STEERINGS = st.fixed_dictionaries(
    {
        "dim_latent": st.integers(1, 3),
        "code": st.sampled_from(["gaussian", "binary"]),
        "rank": st.sampled_from([None, 1, 2]),
        "decoder_hidden": st.sampled_from([0, 4]),
        "embedder_kind": st.sampled_from(["attention", "hawk", "causal-attention", "gru"]),
        "policy_kind": st.sampled_from(["gru", "hawk"]),
        "ratio_loss_weight": st.sampled_from([0.0, 1.0]),
        "gate": GATES,
    }
)
ACTIONS = st.sampled_from([{"num_discrete": 3}, {"num_discrete": [2, 3]}, {"num_continuous": 2}])
BODIES = st.fixed_dictionaries(
    {"kind": st.sampled_from(["attention", "hawk"]), "depth": st.integers(0, 2), "heads": st.sampled_from([1, 2])}
)
SIZES = {"batch": st.integers(1, 3), "steps": st.integers(1, 5), "seed": st.integers(0, 99)}
FIFTY = settings(deadline=None, max_examples=50)


def weights_drawn(module: Any, seed: int) -> Any:
    """In float64, with weights that do something everywhere."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.4)
    return module.double().eval()


def make_steering(options: dict[str, Any], seed: int) -> MetaController:
    return weights_drawn(MetaController(WIDTH, dim_meta_controller=8, switch_hidden=8, **options), seed)


def make_model(lower: dict[str, Any], upper: dict[str, Any], actions: dict[str, Any], reads: bool, seed: int) -> Any:
    options: dict[str, Any] = {"state_embed_readout": {"num_continuous": 3}, "condition_on_actions": reads}
    model = Transformer(WIDTH, action_embed_readout=actions, lower_body=lower, upper_body=upper, **options)
    return weights_drawn(model, seed)


def actions_drawn(readout: dict[str, Any], *shape: int) -> Tensor:
    if "num_continuous" in readout:
        return torch.randn(*shape, readout["num_continuous"], dtype=torch.float64)
    choices = readout["num_discrete"]
    if isinstance(choices, int):
        return torch.randint(choices, shape)
    return torch.stack([torch.randint(count, shape) for count in choices], -1)


@FIFTY
@given(options=STEERINGS, **SIZES)
def test_discover_and_a_call_in_discovery(options: dict[str, Any], batch: int, steps: int, seed: int) -> None:
    """The same codes, gates, residuals and losses for the same noise, whatever the lengths."""
    steering = make_steering(options, seed)
    residual, lengths = torch.randn(batch, steps, WIDTH).double(), torch.randint(1, steps + 1, (batch,))
    torch.manual_seed(seed)
    expected = steering.discover(residual, lengths)
    torch.manual_seed(seed)
    control, output = steering(residual, discovery_phase=True, episode_lens=lengths)
    torch.testing.assert_close(residual + control, expected.steered)
    torch.testing.assert_close((output.z, output.switch_beta), (expected.z, expected.gate))
    torch.testing.assert_close(output.kl_loss, kl_loss(expected))
    assert all(bool(value.isfinite().all()) for value in (control, output.z, output.kl_loss, output.ratio_loss))


@FIFTY
@given(options=STEERINGS, **SIZES)
def test_act_and_a_call(options: dict[str, Any], batch: int, steps: int, seed: int) -> None:
    """The same codes, switches and residuals for the same noise, step by step and at once."""
    steering, residual = make_steering(options, seed), torch.randn(batch, steps, WIDTH).double()
    torch.manual_seed(seed)
    state, acted = None, []
    for t in range(steps):
        steered, output = steering.act(residual[:, t : t + 1], state)
        switch = output.switch_beta >= steering.gate_config.threshold
        acted.append((steered, output.actions, switch.double()))
        state = output.state
    torch.manual_seed(seed)
    control, called = steering(residual)
    whole = [torch.cat(values, 1) for values in zip(*acted, strict=True)]
    torch.testing.assert_close([residual + control, called.z, called.switch_beta], whole)


@FIFTY
@given(lower=BODIES, upper=BODIES, actions=ACTIONS, reads=st.booleans(), **SIZES)
def test_a_sequence_and_its_steps(
    lower: dict[str, Any],
    upper: dict[str, Any],
    actions: dict[str, Any],
    reads: bool,
    batch: int,
    steps: int,
    seed: int,
) -> None:
    """The model gives the same parameters of actions at once and step by step, and finite losses."""
    model = make_model(lower, upper, actions, reads, seed)
    states, taken = torch.randn(batch, steps, 3).double(), actions_drawn(actions, batch, steps)
    residual = model.residual(states, taken)
    whole = model.action_readout(model.upper(residual))
    cache, parts = None, []
    for t in range(steps):
        logits, cache = model.step(states[:, t : t + 1], taken[:, t - 1 : t] if t else None, cache=cache)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    losses = model(states, taken, episode_lens=torch.randint(1, steps + 1, (batch,)))
    assert all(bool(loss.isfinite()) for loss in losses)


@FIFTY
@given(options=STEERINGS, lower=BODIES, upper=BODIES, **SIZES)
def test_the_model_acts_as_its_metacontroller_does(
    options: dict[str, Any], lower: dict[str, Any], upper: dict[str, Any], batch: int, steps: int, seed: int
) -> None:
    """Calls that return a cache steer with the codes of `act`, step by step."""
    model, steering = make_model(lower, upper, {"num_discrete": 3}, False, seed), make_steering(options, seed)
    states = torch.randn(batch, steps, 3).double()
    residual = model.residual(states, torch.zeros(batch, steps, dtype=torch.int64))
    torch.manual_seed(seed)
    cache, logits = None, []
    for t in range(steps):
        found, cache = model(states[:, t : t + 1], meta_controller=steering, cache=cache, return_cache=True)
        logits.append(found)
    torch.manual_seed(seed)
    control, called = steering(residual)
    torch.testing.assert_close(torch.cat(logits, 1), model.action_readout(model.upper(residual + control)))
    assert cache is not None
    torch.testing.assert_close(cache.prev_hiddens.meta_controller.actions[:, 0], called.z[:, -1])


# -- environments -----------------------------------------------------------------------------------------------------

WORLD = domain_of(preset("debug").domain)
BASE = build_model(preset("debug"))
CODES = {"dim_latent": st.integers(1, 3), "threshold": st.sampled_from([0.1, 0.5, 0.9]), "warped": st.booleans()}


def played(env: Any, seed: int, steps: int) -> list[np.ndarray]:
    """What an environment shows and pays for actions that its space draws."""
    env.action_space.seed(seed)
    seen, _ = env.reset(seed=seed)
    found = [seen]
    for _ in range(steps):
        seen, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert env.observation_space.contains(seen)
        assert np.isfinite(reward).all()
        found += [seen, np.asarray(reward), np.asarray(terminated), np.asarray(truncated)]
        if not isinstance(terminated, np.ndarray) and (terminated or truncated):
            seen, _ = env.reset()
            found.append(seen)
    return found


def alike(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def steering_of(model: Any, dim_latent: int, threshold: float, seed: int) -> MetaController:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"dim_latent": dim_latent, "rank": 2, "gate": {"threshold": threshold}}
    return MetaController(model.dim, dim_meta_controller=8, **options).eval()


@FIFTY
@given(num_envs=st.integers(1, 3), steps=st.integers(1, 4), seed=st.integers(0, 99), **CODES)
def test_an_internal_vector_env(
    num_envs: int, steps: int, seed: int, dim_latent: int, threshold: float, warped: bool
) -> None:
    steering = steering_of(BASE, dim_latent, threshold, seed)
    runs = [played(InternalVectorEnv(WORLD, BASE, steering, num_envs, warped=warped), seed, steps) for _ in range(2)]
    assert alike(*runs)
    assert runs[0][0].shape == (num_envs, BASE.dim)


@FIFTY
@given(lower=BODIES, steps=st.integers(1, 4), seed=st.integers(0, 99), **CODES)
def test_an_internal_env(
    lower: dict[str, Any], steps: int, seed: int, dim_latent: int, threshold: float, warped: bool
) -> None:
    torch.manual_seed(seed)
    model = Transformer(
        WIDTH,
        action_embed_readout={"num_discrete": 2},
        state_embed_readout={"num_continuous": 4},
        lower_body=lower,
        upper_body=lower,
    ).eval()
    steering = steering_of(model, dim_latent, threshold, seed)
    envs = [InternalEnv(TimeLimit(CartPoleEnv(), 20), model, steering, warped=warped) for _ in range(2)]
    assert alike(*(played(env, seed, steps) for env in envs))
