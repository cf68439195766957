"""Attention over the last steps alone: against a slow loop, at once and step by step, whoever plays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tests.models.test_attention import slow_block
from torch import Tensor, nn

from metacontroller.control.metacontroller import MetaController
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpad, GridworldPinpadConfig
from metacontroller.environments.internal_env import InternalEnv
from metacontroller.models.attention import AttentionBlock, AttentionBody
from metacontroller.models.caches import AttentionStore
from metacontroller.models.transformer import Transformer
from metacontroller.phases.rollout import Actor, rollout_raw

BATCH, TIME, DIM, WINDOW = 3, 13, 8, 4


def make_body(depth: int, window: int | None = WINDOW) -> AttentionBody:
    torch.manual_seed(0)
    body = AttentionBody(DIM, depth=depth, heads=2).double()
    for parameter in body.parameters():
        nn.init.normal_(parameter, std=0.5)
    if window is not None:
        body.limit_context(window)
    return body


def states(steps: int = TIME) -> Tensor:
    return torch.randn(BATCH, steps, DIM, dtype=torch.float64)


def slow_body(body: AttentionBody, x: Tensor) -> Tensor:
    """Block by block, each step of a block from its last `WINDOW` inputs alone."""
    for block in body.blocks:
        assert isinstance(block, AttentionBlock)
        seen = [x[:, max(0, t + 1 - WINDOW) : t + 1] for t in range(x.shape[1])]
        x = torch.stack([slow_block(block, part)[:, -1] for part in seen], 1)
    return x


@pytest.mark.parametrize("depth", [1, 3])
def test_each_step_attends_to_the_last_ones_at_once_and_in_pieces(depth: int) -> None:
    body, x = make_body(depth), states()
    expected = slow_body(body, x)
    whole = body(x)
    torch.testing.assert_close(whole, expected)
    assert not torch.allclose(whole, make_body(depth, None)(x))
    gradients = [
        torch.autograd.grad(out.square().sum(), [*body.parameters()], allow_unused=True) for out in (whole, expected)
    ]
    torch.testing.assert_close(*([slope for slope in some if slope is not None] for some in gradients))
    for pieces in ([1] * TIME, [5, 1, 1, 6], [2, 7, 1, 3]):
        cache, out = body.empty_cache(BATCH, 2), []
        with torch.no_grad():
            for part in x.split(pieces, 1):
                out.append(body(part, cache))
        torch.testing.assert_close(torch.cat(out, 1), expected)


@torch.no_grad()
def test_one_block_acts_as_on_the_last_steps_alone() -> None:
    body, x = make_body(1), states()
    cache = body.empty_cache(BATCH)
    for t in range(TIME):
        step = body(x[:, t : t + 1], cache)[:, 0]
        alone = make_body(1, None)(x[:, max(0, t + 1 - WINDOW) : t + 1])[:, -1]
        torch.testing.assert_close(step, alone)


@torch.no_grad()
def test_what_fits_the_window_changes_by_no_bit() -> None:
    limited, free, x = make_body(2), make_body(2, None), states(WINDOW)
    assert torch.equal(limited(x), free(x))
    caches = limited.empty_cache(BATCH), free.empty_cache(BATCH)
    for t in range(WINDOW):
        assert torch.equal(*(body(x[:, t : t + 1], cache) for body, cache in zip((limited, free), caches, strict=True)))


@torch.no_grad()
def test_rows_of_different_age_attend_to_their_own_last_steps() -> None:
    body, x = make_body(2), states()
    expected, store = slow_body(body, x), AttentionStore(body, BATCH, x.device)
    ages = [9, 1, 6]
    for row, age in enumerate(ages):
        rows = torch.tensor([row])
        cache = store.take(rows)
        body(x[rows, :age], cache)
        store.put(rows, cache, torch.tensor([0]), age)
    everyone = torch.arange(BATCH)
    cache = store.take(everyone)
    for step in range(3):
        now = torch.stack([x[row, age + step] for row, age in enumerate(ages)])[:, None]
        out = body(now, cache)[:, 0]
        torch.testing.assert_close(out, torch.stack([expected[row, age + step] for row, age in enumerate(ages)]))


WORLD = GridworldPinpad(
    GridworldPinpadConfig(
        size=4, num_colors=3, num_walls=1, max_steps=11, tasks=((0, 1),), post_task=(0, 1), colors_per_subgoal=1
    )
)


def make_model(context: int | None, **depths: int) -> Transformer:
    torch.manual_seed(1)
    spec = WORLD.spec()
    bodies: Any = {f"{name}_body": {"depth": depths.get(name, 1)} for name in ("lower", "upper")}
    model = Transformer(16, action_embed_readout=spec.action, state_embed_readout=spec.encoder, **bodies)
    for name, parameter in model.named_parameters():
        if "bias.table" in name or "to_qkv" in name:
            nn.init.normal_(parameter, std=1.0)
    nn.init.normal_(model.action_readout.linear.weight, std=3.0)
    if context is not None:
        model.limit_context(context)
    return model.eval()


def test_rl_on_raw_actions_learns_from_the_log_probabilities_by_which_it_acted() -> None:
    model = make_model(WINDOW, lower=2)
    generator = torch.Generator().manual_seed(0)
    played = rollout_raw(model, WORLD.reset(16, generator), generator)
    assert int(played.steps.max()) > 2 * WINDOW
    with torch.no_grad():
        for limited in (True, False):
            other = model if limited else make_model(None, lower=2)
            logits = other.action_readout(other.upper(other.residual(played.states, played.actions)))
            log_prob = other.action_readout.log_prob(logits, played.actions)
            mask = torch.arange(log_prob.shape[1]) < played.steps[:, None]
            assert torch.allclose(log_prob[mask], played.log_prob[mask], atol=1e-4) == limited


@torch.no_grad()
def test_an_actor_reads_the_last_steps_alone() -> None:
    model = make_model(WINDOW)
    alone = make_model(None)  # the same weights
    env = WORLD.reset(8, torch.Generator().manual_seed(0))
    actor, seen, taken = Actor(model, env, temperature=0.0), [], []
    for _ in range(2 * WINDOW):
        residual = actor.look()
        seen.append(actor.observation)
        past = torch.stack(taken, 1)[:, -WINDOW:] if taken else None
        last = torch.stack(seen, 1)[:, -WINDOW:]
        torch.testing.assert_close(residual, alone.lower(alone.embed(last, past))[:, -1], atol=1e-5, rtol=1e-4)
        taken.append(actor.act(residual)[1][:, 0])


class Wandering(gymnasium.Env):
    """Random observations, which it keeps."""

    observation_space, action_space = spaces.Box(-5, 5, (3,)), spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.seen: list[np.ndarray] = []
        return self._look(), {}

    def step(self, action: Any) -> Any:
        return self._look(), 0.0, False, False, {}

    def _look(self) -> np.ndarray:
        self.seen.append(self.np_random.normal(size=3).astype(np.float32))
        return self.seen[-1]


def test_environments_of_codes_read_the_last_steps_alone() -> None:
    torch.manual_seed(2)
    readouts: Any = {"action_embed_readout": {"num_discrete": 2}, "state_embed_readout": {"num_continuous": 3}}
    options: Any = {"lower_body": {"depth": 1}, "upper_body": {"depth": 1}, "condition_on_actions": False}
    model = Transformer(16, **readouts, **options, context=WINDOW).eval()
    (block,) = model.lower_body.blocks
    assert isinstance(block, AttentionBlock)
    nn.init.normal_(block.to_qkv.weight)
    alone = Transformer(16, **readouts, **options).eval()
    alone.load_state_dict(model.state_dict())
    steering = MetaController(16, dim_meta_controller=8, dim_latent=2, rank=2, gate={"mode": "forced"}).eval()
    inner = Wandering()
    env = InternalEnv(inner, model, steering)
    residual, _ = env.reset(seed=0)
    beyond = []
    for _ in range(3 * WINDOW):
        with torch.no_grad():
            last = torch.from_numpy(np.stack(inner.seen[-WINDOW:]))[None]
            expected = alone.lower(alone.embed(last))[0, -1]
            everything = alone.lower(alone.embed(torch.from_numpy(np.stack(inner.seen))[None]))[0, -1]
        np.testing.assert_allclose(residual, expected, rtol=1e-4, atol=1e-5)
        beyond.append(not np.allclose(residual, everything, atol=1e-3))
        residual, *_ = env.step(env.sample_prior())
    assert not any(beyond[:WINDOW])
    assert sum(beyond[WINDOW:]) >= WINDOW


def test_the_limit_is_kept_with_the_weights_wherever_the_model_is_split(tmp_path: Path) -> None:
    model = make_model(WINDOW, upper=2)
    model.save(tmp_path / "model.safetensors")
    again = Transformer.init_and_load(tmp_path / "model.safetensors").eval()
    tokens = WORLD.demonstrations("pretrain", 4, torch.Generator().manual_seed(0))
    longer = tokens.states.repeat(1, 4, *[1] * (tokens.states.dim() - 2)), tokens.actions.repeat(1, 4)
    steps = min(longer[0].shape[1], longer[1].shape[1])
    states_, actions = longer[0][:, :steps], longer[1][:, :steps]
    assert steps > 2 * WINDOW
    with torch.no_grad():
        out = [one.upper(one.residual(states_, actions)) for one in (model, again)]
        assert torch.equal(*out)
        again.resplit(2)
        torch.testing.assert_close(again.upper(again.residual(states_, actions)), out[0])
        free = make_model(None, upper=2)
        assert not torch.allclose(free.upper(free.residual(states_, actions)), out[0], atol=1e-3)
    assert "context" not in free.arguments
    with pytest.raises(ValueError, match="context is 0; expected at least 1"):
        make_model(0)
