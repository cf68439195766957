"""Evolution with the whole population in one rollout: each member plays as it would alone, and a task is learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from metacontroller.control.metacontroller import MetaController
from metacontroller.control.population import Population
from metacontroller.domains.gridworld_pinpad.layouts import PinpadConfig
from metacontroller.domains.gridworld_pinpad.simulator import PinpadBatch
from metacontroller.domains.pinpad.layouts import Layouts
from metacontroller.errors import DivergedError, UserError
from metacontroller.models.transformer import Transformer
from metacontroller.phases.evolution import EvolutionConfig, evolution, fitness_of, play_population
from metacontroller.phases.rollout import AbstractRollout, policy_proposal, rollout_abstract
from metacontroller.storage.run_folder import RunFolder

DIM, CONSTANT = 8, 4  # channels 0..3 of the residual are the actions', channel 4 is always 1
AXES = ((0, 1.0), (0, -1.0), (1, 1.0), (1, -1.0))  # of the code: up, down, left, right
CONFIG = EvolutionConfig(generations=20, population=64, episodes=8, scale=0.2, lr=0.2)


def new_grids(n: int, generator: torch.Generator | None = None, reward: float = 1.0) -> PinpadBatch:
    """A 0 in the first row of three cells, 1 below: right to 0 and down to 1 in at most two steps."""
    grid = PinpadConfig(size=3, num_colors=2, num_walls=0, max_steps=2)
    layouts = Layouts(torch.tensor([[1, 4]]), torch.tensor([0])).repeat(n)
    return Scaled(grid, layouts, torch.tensor([[0, 1]]).expand(n, -1), torch.full((n,), 2)).times(reward)


class Scaled(PinpadBatch):
    """The grids with a reward that is multiplied."""

    factor = 1.0

    def times(self, factor: float) -> Scaled:
        self.factor = factor
        return self

    def step(self, actions: torch.Tensor) -> torch.Tensor:
        return super().step(actions) * self.factor


@torch.no_grad()
def make_parts(sharpness: float = 4.0) -> tuple[Transformer, MetaController]:
    """A model without blocks that does what is written into its actions' channels, and codes that point there."""
    model = Transformer(
        DIM,
        action_embed_readout={"num_discrete": 4},
        state_embed_readout={"grid": {"size": 3, "num_colors": 2, "num_walls": 0}},
        lower_body={"depth": 0},
        upper_body={"depth": 0},
        condition_on_actions=False,
    )
    table = model.encoder.get_parameter("table")
    table[:, :CONSTANT], table[:, CONSTANT] = 0.0, 1 / 3  # of three objects: two colors and the agent
    model.action_readout.linear.weight.copy_(sharpness * torch.eye(4, DIM))
    model.action_readout.linear.bias.zero_()
    gate: dict[str, Any] = {"mode": "forced"}
    sizes: dict[str, Any] = {"dim_meta_controller": 8, "dim_latent": 2, "decoder_hidden": 4, "policy_hidden": 8}
    steering = MetaController(DIM, **sizes, rank=None, gate=gate)
    decoder = steering.controller
    for value in (decoder.full, decoder.code_to_hidden.weight, decoder.code_to_hidden.bias):
        value.zero_()
    for action, (axis, sign) in enumerate(AXES):
        decoder.code_to_hidden.weight[action, axis] = sign
        decoder.full[action, action, CONSTANT] = 2.0
    return model, steering


def test_a_population_plays_as_each_member_alone() -> None:
    model, steering = make_parts(sharpness=1e8)
    model, steering = model.double(), steering.double()
    with torch.no_grad():
        torch.nn.init.normal_(steering.policy.readout.weight, std=1.0)
        steering.policy.readout.bias[2:] = -40.0  # almost no spread: codes and actions are certain
    population = Population(steering.policy, 8, scale=0.5, rank=2)
    together = play_population(model, steering, population, new_grids(24))
    fitness = fitness_of(together, 8)
    assert fitness.shape == (8,)
    start = {name: value.clone() for name, value in steering.policy.state_dict().items()}
    for member in range(8):
        steering.policy.load_state_dict(start)
        steering.policy.load_state_dict(population.weights(member))
        alone = rollout_abstract(model, steering, new_grids(3), policy_proposal(steering, None))
        mine = together.index(torch.arange(3 * member, 3 * member + 3))
        torch.testing.assert_close(mine.residual, alone.residual)
        torch.testing.assert_close(mine.code, alone.code)
        torch.testing.assert_close(mine.subgoals_done, alone.subgoals_done)
        torch.testing.assert_close(fitness[member], alone.returns.mean())
    assert len(together.code[:, 0].round(decimals=3).unique(dim=0)) == 8  # each member has codes of its own


def test_the_curve_rises_and_only_the_policy_changes(tmp_path: Path) -> None:
    model, steering = make_parts()
    before = {name: value.clone() for name, value in steering.state_dict().items()}
    evolution(CONFIG, model, steering, new_grids, RunFolder(tmp_path), quiet=True)
    lines = RunFolder(tmp_path).read_metrics("evolution")
    assert len(lines) == 20
    assert lines[-1]["episodes"] == 20 * 64 * 8
    assert lines[0]["success"] < 0.15  # two moves of four choices each
    assert min(line["success"] for line in lines[-3:]) > 0.4
    assert all(line["best"] >= line["return"] == line["success"] for line in lines)
    changed = {name for name, value in steering.state_dict().items() if not torch.equal(value, before[name])}
    assert "policy.readout.bias" in changed
    assert all(name.startswith("policy.") for name in changed)
    torch.testing.assert_close(load_file(tmp_path / "evolved_policy.safetensors"), steering.state_dict())


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    def run(folder: str, generations: int, resume: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        config = EvolutionConfig(generations=generations, population=4, episodes=2, scale=0.3, checkpoint_every=1)
        evolution(config, *make_parts(), new_grids, RunFolder(tmp_path / folder), resume=resume, quiet=True)
        return load_file(tmp_path / folder / "evolved_policy.safetensors")

    whole = run("whole", 4, False)
    run("parts", 2, False)
    with pytest.raises(UserError, match="checkpoint of this phase"):
        run("parts", 4, False)
    torch.testing.assert_close(run("parts", 4, True), whole, rtol=0, atol=0)


def test_a_resumed_evolution_has_the_settings_that_it_began_with(tmp_path: Path) -> None:
    """Their episodes would be counted as if all had been played with the new ones."""
    begun = EvolutionConfig(generations=2, population=4, episodes=2, scale=0.3, checkpoint_every=1)
    run = RunFolder(tmp_path)
    evolution(begun, *make_parts(), new_grids, run, quiet=True)
    for change in ({"population": 8}, {"episodes": 4}, {"scale": 0.1}, {"rank": 2}, {"lr": 0.1}, {"seed": 1}):
        name, value = next(iter(change.items()))
        said = f"was evolved with {name} {getattr(begun, name)}, not {value}; resume with the same settings"
        with pytest.raises(UserError, match=said):
            evolution(replace(begun, generations=4, **change), *make_parts(), new_grids, run, resume=True, quiet=True)
    evolution(replace(begun, generations=4), *make_parts(), new_grids, run, resume=True, quiet=True)
    assert [line["episodes"] for line in run.read_metrics("evolution")] == [8, 16, 24, 32]


def test_equal_members_teach_nothing_and_a_return_that_is_not_finite_stops(tmp_path: Path) -> None:
    model, steering = make_parts()
    before = {name: value.clone() for name, value in steering.state_dict().items()}
    config = EvolutionConfig(generations=2, population=2, episodes=2)
    run = RunFolder(tmp_path / "equal")
    evolution(config, model, steering, lambda n, generator: new_grids(n, reward=0.0), run, quiet=True)
    assert all("grad_norm" not in line for line in run.read_metrics("evolution"))
    torch.testing.assert_close(steering.state_dict(), before, rtol=0, atol=0)
    run = RunFolder(tmp_path / "diverged")
    with pytest.raises(DivergedError, match="evolution diverged at update 1: the return of an episode"):
        evolution(config, model, steering, lambda n, generator: new_grids(n, reward=float("nan")), run, quiet=True)


@pytest.mark.parametrize(
    ("name", "value"), [("population", 3), ("population", 0), ("episodes", 0), ("scale", 0.0), ("lr", float("inf"))]
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}"):
        EvolutionConfig(**{name: value})


def test_episodes_must_divide_among_members() -> None:
    model, steering = make_parts()
    with pytest.raises(UserError, match="3 episodes do not divide among 2 members"):
        play_population(model, steering, Population(steering.policy, 2, scale=0.1), new_grids(3))


def test_an_episode_that_could_not_start_makes_no_member_fitter() -> None:
    lengths = torch.tensor([2, 0, 1, 3, 0, 0])
    returns = torch.tensor([-4.0, 0.0, -1.0, -1.0, 0.0, 0.0])
    empty = torch.zeros(6, 3, 1)
    rollout = AbstractRollout(
        returns, lengths > 3, lengths, lengths, lengths == 0, empty, empty, empty[..., 0], lengths
    )
    assert fitness_of(rollout, 3).tolist() == [-3.0, -1.0, -2.0]  # the mean of those that started is -2
    assert fitness_of(rollout.index(torch.tensor([1, 4])), 2).tolist() == [0.0, 0.0]
