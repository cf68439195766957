"""Rollouts: the model at work in many grids at once is the model at work step by step, past actions included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from metacontroller.analysis.code_content import Walks, code_subgoal_bits
from metacontroller.control.metacontroller import MetaController
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpad, GridworldPinpadConfig
from metacontroller.domains.gridworld_pinpad.simulator import PinpadBatch, start_grids
from metacontroller.models.transformer import Transformer
from metacontroller.phases import rollout as rollout_phase
from metacontroller.phases.rollout import (
    Actor,
    policy_proposal,
    prior_proposal,
    rollout_abstract,
    rollout_raw,
    survivors,
)

WORLD = GridworldPinpad(
    GridworldPinpadConfig(
        size=4, num_colors=3, num_walls=1, max_steps=9, tasks=((0, 1),), post_task=(0, 1), colors_per_subgoal=1
    )
)
GRID = WORLD.config.grid
EPISODES, CODE = 24, 3


def make_model(condition_on_actions: bool) -> Transformer:
    """Past actions, where they enter, count for as much as what is seen."""
    model = Transformer(
        16,
        action_embed_readout={"num_discrete": 4},
        state_embed_readout={"grid": {"size": GRID.size, "num_colors": GRID.num_colors, "num_walls": GRID.num_walls}},
        lower_body={"depth": 1},
        upper_body={"depth": 1},
        condition_on_actions=condition_on_actions,
    )
    nn.init.normal_(model.action_readout.embedding.weight)
    nn.init.normal_(model.action_readout.linear.weight)
    return model.eval()


def make_steering(mode: Any = "soft") -> MetaController:
    """Codes matter, the gate opens now and then, and the policy always takes its mean."""
    gate = {"mode": mode, "period": 3}
    steering = MetaController(16, dim_meta_controller=8, dim_latent=CODE, rank=2, gate=gate)
    for weight in (steering.controller.write, steering.switching.out.weight, steering.switching.code.weight):
        nn.init.normal_(weight, std=2.0)
    nn.init.normal_(steering.policy.readout.weight[:CODE])
    nn.init.constant_(steering.policy.readout.bias[CODE:], -100.0)
    return steering.eval()


def new_grids() -> PinpadBatch:
    return start_grids(GRID, (0, 1), EPISODES, torch.Generator().manual_seed(0))


def greedy(logits: Tensor, generator: torch.Generator | None = None, *, temperature: float = 1.0) -> Tensor:
    return logits.argmax(-1)


@torch.no_grad()
def step_by_step(model: Transformer, steering: MetaController | None, grids: PinpadBatch) -> list[dict[str, Any]]:
    """Every episode alone, by Transformer.step: what was seen and done at each of its steps."""
    episodes = []
    for row in range(len(grids)):
        alone = new_grids()
        alone.select(torch.tensor([row]))
        cache, past = None, None
        seen: dict[str, list[Tensor]] = {"residual": [], "action": [], "log_prob": [], "switch": [], "code": []}
        total = 0.0
        while not bool(alone.terminated | alone.truncated):
            logits, cache = model.step(alone.observe_tokens()[:, None], past, steering, cache)
            past = model.action_readout.sample(logits)
            total += float(alone.step(past[:, 0]))
            output = cache.prev_hiddens.meta_controller
            seen["residual"].append(cache.residual[0, 0])
            seen["action"].append(past[0, 0])
            seen["log_prob"].append(model.action_readout.log_prob(logits, past)[0, 0])
            if output is not None:
                seen["switch"].append(output.switch_beta[0, 0] >= 0.5)
                seen["code"].append(output.actions[0, 0])
        stacked = {name: torch.stack(values) for name, values in seen.items() if values}
        episodes.append(
            {**stacked, "return": total, "steps": int(alone.steps), "subgoals_done": int(alone.subgoals_done)}
        )
    return episodes


@pytest.mark.parametrize("many", [2, 1000])
@pytest.mark.parametrize("condition_on_actions", [False, True])
def test_raw_rollouts_equal_steps_of_the_model(
    condition_on_actions: bool, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_phase, "MANY_ROWS", many)
    monkeypatch.setattr(rollout_phase, "ROW_STEP", 5)
    model = make_model(condition_on_actions)
    monkeypatch.setattr(model.action_readout, "sample", greedy)
    rollout = rollout_raw(model, new_grids())
    episodes = step_by_step(model, None, new_grids())
    for row, episode in enumerate(episodes):
        steps = episode["steps"]
        assert torch.equal(rollout.actions[row, :steps], episode["action"])
        torch.testing.assert_close(rollout.log_prob[row, :steps], episode["log_prob"], atol=1e-5, rtol=1e-4)
        assert (rollout.returns[row], rollout.steps[row]) == (episode["return"], steps)
        assert rollout.subgoals_done[row] == episode["subgoals_done"]
    assert len({episode["steps"] for episode in episodes}) > 2  # so rows were dropped on the way
    whole = model.residual(rollout.states, rollout.actions)
    logits = model.action_readout(model.upper(whole))
    again = model.action_readout.log_prob(logits, rollout.actions)
    played = torch.arange(rollout.actions.shape[1]) < rollout.steps[:, None]
    torch.testing.assert_close(again[played], rollout.log_prob[played], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("mode", "condition_on_actions"),
    [
        ("soft", False),
        ("hard", True),
        ("straight-through", False),
        ("gumbel-sigmoid", True),
        ("forced", False),
        ("fixed-frequency", True),
    ],
)
def test_abstract_rollouts_equal_steps_of_the_steered_model(
    mode: str, condition_on_actions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = 2 if mode in ("soft", "hard", "forced") else 1000
    monkeypatch.setattr(rollout_phase, "MANY_ROWS", many)
    monkeypatch.setattr(rollout_phase, "ROW_STEP", 5)
    model, steering = make_model(condition_on_actions), make_steering(mode)
    steering.action_temperature = 0.0  # the likeliest action
    rollout = rollout_abstract(model, steering, new_grids(), policy_proposal(steering, None))
    monkeypatch.setattr(model.action_readout, "sample", greedy)
    episodes = step_by_step(model, steering, new_grids())
    for row, episode in enumerate(episodes):
        switch, count = episode["switch"], int(episode["switch"].sum())
        assert rollout.lengths[row] == count
        torch.testing.assert_close(rollout.residual[row, :count], episode["residual"][switch], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(rollout.code[row, :count], episode["code"][switch], atol=1e-4, rtol=1e-3)
        assert (rollout.returns[row], rollout.steps[row]) == (episode["return"], episode["steps"])
        assert rollout.subgoals_done[row] == episode["subgoals_done"]
    decisions = sum(int(episode["switch"].sum()) for episode in episodes)
    steps = sum(episode["steps"] for episode in episodes)
    assert decisions == steps if mode == "forced" else EPISODES < decisions < steps


def test_codes_are_held_by_a_model_that_knows_its_past_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steering = make_model(condition_on_actions=True), make_steering()
    known: list[int] = []
    embed = model.embed

    def note(states: Tensor, past_actions: Tensor | None = None) -> Tensor:
        known.append(0 if past_actions is None else len(past_actions))
        assert len(known) == 1 or len(states) == known[-1]
        return embed(states, past_actions)

    monkeypatch.setattr(model, "embed", note)
    walks = Walks(model, WORLD, 4 * GRID.size, torch.Generator().manual_seed(0))
    code_subgoal_bits(walks, steering, codes=2, layouts_per_code=10)
    assert known[0] == 0
    assert len(set(known)) > 2


def test_prior_codes_are_standard_normal_and_leave_the_policy_state_alone() -> None:
    steering = make_steering()
    state = torch.randn(4000, 8)
    propose = prior_proposal(steering, torch.Generator().manual_seed(0))
    code, log_prob, after = propose(torch.randn(4000, 16), state, torch.arange(4000))
    torch.testing.assert_close(code.mean(0), torch.zeros(CODE), atol=0.06, rtol=0)
    torch.testing.assert_close(code.std(0), torch.ones(CODE), atol=0.06, rtol=0)
    torch.testing.assert_close(log_prob, torch.distributions.Normal(0.0, 1.0).log_prob(code).sum(-1))
    assert after is state


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 20), st.integers(1, 8))
def test_the_survivors_are_all_alive_and_few_of_them_move(alive: list[bool], many: int, step: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rollout_phase, "MANY_ROWS", many)
        patched.setattr(rollout_phase, "ROW_STEP", step)
        rows = survivors(torch.tensor(alive)).tolist()
    running = [row for row, lives in enumerate(alive) if lives]
    assert len(set(rows)) == len(rows)
    assert set(running) <= set(rows)
    assert all(row == place or (row >= len(rows) and not alive[place]) for place, row in enumerate(rows))
    if len(running) > many:
        assert len(rows) % step == 0 or len(rows) == len(alive)
        assert len(rows) < len(running) + step
    else:
        assert len(rows) == len(running)


@torch.no_grad()
def test_an_actor_that_keeps_some_grids_goes_on_with_their_past() -> None:
    model, rows = make_model(condition_on_actions=True), torch.tensor([5, 2])
    some, all_of_them = (Actor(model, new_grids(), torch.Generator().manual_seed(1)) for _ in range(2))
    for actor in (some, all_of_them):
        actor.act(actor.look())
    some.keep(rows)
    torch.testing.assert_close(some.look(), all_of_them.look()[rows])
    assert some.past_actions is not None
    assert len(some.past_actions) == len(some.env) == 2
