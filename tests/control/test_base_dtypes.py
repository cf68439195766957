"""Base models in float64, bfloat16 and float16 are steered in float32: against the same model in float32."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from metacontroller.control.discovery_losses import discover_episodes
from metacontroller.control.metacontroller import MetaController
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpad, GridworldPinpadConfig
from metacontroller.environments.internal_env import InternalEnv
from metacontroller.environments.internal_vector_env import InternalVectorEnv
from metacontroller.models.attention import AttentionBody
from metacontroller.models.hawk import HawkBody
from metacontroller.models.transformer import Transformer
from metacontroller.phases.rollout import policy_proposal, prior_proposal, rollout_abstract, rollout_raw

DTYPES = [torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
BODIES: list[Any] = ["attention", "hawk"]
CODES: list[Any] = ["gaussian", "binary"]
BATCH, TIME, DIM = 3, 6, 16


def make_model(body: str = "attention", *, continuous: bool = False) -> Transformer:
    torch.manual_seed(0)
    stack = {"kind": body, "depth": 1, "heads": 4}
    return Transformer(
        DIM,
        action_embed_readout={"num_continuous": 2} if continuous else {"num_discrete": 4},
        state_embed_readout={"num_continuous": 4},
        lower_body=stack,
        upper_body=stack,
    ).eval()


def make_steering(code: Any = "gaussian") -> MetaController:
    torch.manual_seed(1)
    steering = MetaController(DIM, dim_meta_controller=16, dim_latent=2, code=code, rank=2)
    nn.init.normal_(steering.controller.write, std=0.2)
    return steering.eval()


def episodes(continuous: bool = False) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    actions = torch.randn(BATCH, TIME, 2) if continuous else torch.randint(4, (BATCH, TIME))
    return torch.randn(BATCH, TIME, 4), actions


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_discovery_is_that_of_the_base_in_float32(dtype: torch.dtype, body: str, code: Any) -> None:
    states, actions = episodes(continuous := body == "hawk")
    losses, slopes = [], []
    for kind in (torch.float32, dtype):
        model, steering = make_model(body, continuous=continuous).to(kind), make_steering(code)
        torch.manual_seed(3)
        found = model(states, actions, meta_controller=steering, discovery_phase=True)
        torch.stack([value.float() for value in found]).sum().backward()
        losses.append(torch.stack([value.detach().float() for value in found]))
        slopes.append(
            torch.cat([value.grad.flatten() for value in steering.discovery_parameters() if value.grad is not None])
        )
        torch.manual_seed(3)
        output = discover_episodes(steering, model, states, actions)
        assert output.steered.dtype == kind
        assert {value.dtype for value in (output.z, output.beta, output.kl, output.distribution)} == {torch.float32}
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(losses[1], losses[0], atol=tolerance, rtol=tolerance)
    assert float(torch.cosine_similarity(slopes[0], slopes[1], 0)) > 1 - tolerance


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_acting_is_that_of_the_base_in_float32(dtype: torch.dtype, body: str) -> None:
    states, actions = episodes()
    found: list[list[Tensor]] = []
    for kind in (torch.float32, dtype):
        model, steering, cache, past = make_model(body).to(kind), make_steering(), None, None
        torch.manual_seed(4)
        logits = []
        for t in range(TIME):
            out, cache = model(states[:, t : t + 1], past, meta_controller=steering, cache=cache, return_cache=True)
            past = actions[:, t : t + 1]
            assert cache.residual.dtype == kind
            assert cache.prev_hiddens.meta_controller.actions.dtype == torch.float32
            logits.append(out.float())
        torch.manual_seed(5)
        control, output = steering(model.residual(states, actions))
        assert (control.dtype, output.z.dtype) == (kind, torch.float32)
        found.append([torch.cat(logits, 1), control.float(), output.z])
    torch.testing.assert_close(found[1], found[0], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_controller_of_zeros_changes_no_bit(dtype: torch.dtype) -> None:
    steering, residual = make_steering(), torch.randn(BATCH, TIME, DIM, dtype=dtype)
    steering.controller.write.zero_()
    assert torch.equal(steering.discover(residual).steered, residual)
    assert torch.equal(steering.act(residual[:, :1])[0], residual[:, :1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_policy_learns_from_residuals_of_any_type(dtype: torch.dtype) -> None:
    steering, residual = make_steering(), torch.randn(BATCH, TIME, DIM).to(dtype)
    with torch.no_grad():
        distribution, _ = steering.policy(residual.float())
        codes = steering.codes.sample(distribution)
        old = steering.codes.log_prob(distribution, codes)
    given = old, codes, torch.tensor([1.0, -1.0, 0.5])
    loss, expected = (steering.policy_loss(states, *given) for states in (residual, residual.float()))
    torch.testing.assert_close(loss, expected)


WORLD = GridworldPinpad(
    GridworldPinpadConfig(
        size=4, num_colors=3, num_walls=1, max_steps=9, tasks=((0, 1),), post_task=(0, 1), colors_per_subgoal=1
    )
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rollouts_and_environments_play_with_a_base_of_any_type(dtype: torch.dtype) -> None:
    spec = WORLD.spec()
    torch.manual_seed(0)
    stack = {"depth": 1}
    readouts: Any = {"action_embed_readout": spec.action, "state_embed_readout": spec.encoder}
    model = Transformer(DIM, **readouts, lower_body=stack, upper_body=stack).to(dtype).eval()
    steering, generator = make_steering(), torch.Generator().manual_seed(0)
    for proposal in (policy_proposal, prior_proposal):
        played = rollout_abstract(model, steering, WORLD.reset(4, generator), proposal(steering, generator), generator)
        assert {played.residual.dtype, played.code.dtype, played.log_prob.dtype} == {torch.float32}
        assert bool((played.steps > 0).all())
    assert bool(rollout_raw(model, WORLD.reset(4, generator), generator).log_prob.isfinite().all())
    rows = InternalVectorEnv(WORLD, model, steering, 3)
    rows.reset(seed=0)
    for _ in range(12):  # beyond an episode's end
        observation, *_ = rows.step(rows.sample_prior())
        assert observation.dtype == np.float32
        assert np.isfinite(observation).all()


class Pushing(gymnasium.Env):
    """Ten steps of two continuous numbers."""

    observation_space, action_space = spaces.Box(-5, 5, (4,)), spaces.Box(-1, 1, (2,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(4, np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        assert self.action_space.contains(action)
        self.t += 1
        return np.ones(4, np.float32) * self.t / 10, 0.0, False, self.t == 10, {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_continuous_actions_reach_an_environment_as_it_takes_them(dtype: torch.dtype) -> None:
    env = InternalEnv(Pushing(), make_model(continuous=True).to(dtype), make_steering())
    env.reset(seed=0)
    ended, steps = False, 0
    while not ended:
        *_, ended, info = env.step(np.zeros(2, np.float32))
        steps += info["steps"]
    assert steps == 10


@pytest.mark.parametrize("Body", [AttentionBody, HawkBody])
@torch.no_grad()
def test_a_cache_may_be_kept_for_more_rows_than_it_held(Body: Any) -> None:
    body = Body(8, depth=2, heads=2).double()
    x, rows = torch.randn(2, 5, 8, dtype=torch.float64), torch.tensor([1, 0, 1, 1])
    cache = body.empty_cache(2, 4)
    body(x[:, :3], cache)
    cache.keep(rows)
    steps = [body(x[rows, t : t + 1], cache) for t in (3, 4)]  # beyond its capacity
    torch.testing.assert_close(torch.cat(steps, 1), body(x[rows])[:, 3:])
