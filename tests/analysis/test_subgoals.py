"""Subgoals of table A1 are pairs of colors: in labels, in probes and supervised controllers, and in what codes mean."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from metacontroller.analysis import steering
from metacontroller.analysis.code_content import Walks, code_subgoal_bits, unseen_transition_share
from metacontroller.analysis.injection import injected_codes
from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.probing import LayerConfig, Probes
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpad, GridworldPinpadConfig
from metacontroller.domains.pinpad.layouts import sample_layouts
from metacontroller.domains.pinpad.tasks import A1_POST
from metacontroller.metrics.switch_alignment import gate_alignment
from metacontroller.models.protocol import SteerableModel
from metacontroller.phases.evaluate import evaluate
from metacontroller.presets.gridworld import debug, paper
from metacontroller.recipes.config import ExperimentConfig, build_meta_controller, build_model
from metacontroller.report import figures

SMALL = replace(paper(), model=debug().model, meta_controller=debug().meta_controller)
WORLD = GridworldPinpad(SMALL.domain)
SIZE = 3  # of the grid that aimless walks are on


def first_steps_after_pairs(episodes: Trajectories, num_colors: int) -> Tensor:
    """(b, t) 1.0 at an episode's first step and wherever a second, fourth, ... color was just visited: from the cells
    alone, not from the labels."""
    agent = episodes.states[..., -1]
    colored = (episodes.states[..., :num_colors] == agent[..., None]).any(-1)
    visits = torch.zeros_like(colored)
    visits[:, 1:] = colored[:, 1:] & (agent[:, 1:] != agent[:, :-1])
    begins = visits & (visits.cumsum(1) % 2 == 0)
    begins[:, 0] = True
    return begins[:, :-1].float()


def test_table_a1_has_four_classes_and_a_gate_that_opens_between_pairs_is_perfect() -> None:
    episodes = WORLD.demonstrations("discover", 64, torch.Generator().manual_seed(0))
    assert episodes.subgoals is not None
    assert episodes.segments is not None
    assert set(episodes.subgoals[episodes.mask()].tolist()) == {0, 1, 2, 3}
    assert set(episodes.segments[episodes.mask()].tolist()) == {0, 1, 2}
    beta = first_steps_after_pairs(episodes, 8)
    alignment = gate_alignment(beta, episodes.segments, episodes.lengths, threshold=0.5, tolerance=0)
    assert (float(alignment["gate_recall"]), float(alignment["gate_precision"])) == (1.0, 1.0)


def test_probes_of_table_a1_tell_four_subgoals_apart(untrained: Callable[[ExperimentConfig], LoadedRun]) -> None:
    run = untrained(SMALL)
    Probes().measure(run, Probes.Config(steps=2, batch_size=4, lr=1e-3, episodes=8), quiet=True)
    tensors, _ = run.folder.load_checkpoint("probes")
    assert {name: len(value) for name, value in tensors.items()} == dict.fromkeys(tensors, 4)


def test_a_supervised_controller_a_pair_is_trained_and_chained(monkeypatch: pytest.MonkeyPatch) -> None:
    chained: list[int] = []
    monkeypatch.setattr(
        steering, "play_chained", lambda model, controllers, *rest: chained.append(len(controllers.read)) or 0.0
    )
    source = partial(WORLD.demonstrations, "discover")
    config = LayerConfig(steps=1, batch_size=2, episodes=2)
    steering.steer_layers(build_model(SMALL), (source, source), WORLD, config, seed=0, quiet=True)
    assert chained == [4, 4, 4]


def test_chained_play_asks_for_the_pair_that_the_task_asks_for() -> None:
    asked: list[Tensor] = []

    class Spy(steering.SupervisedControllers):
        def forward(self, residual: Tensor, subgoal: Tensor) -> Tensor:
            asked.append(subgoal)
            return super().forward(residual, subgoal)

    model, world = build_model(SMALL), GridworldPinpad(replace(SMALL.domain, post_task=(4, 5, 0, 1)))
    steering.play_chained(model, Spy(4, model.dim, 2), world, 20, 0)
    assert asked[0].tolist() == [2] * 20
    assert len(asked) > 1


def walked_world(tasks: Sequence[tuple[int, ...]], colors_per_subgoal: int = 2) -> GridworldPinpad:
    """A small grid in which to walk."""
    config = GridworldPinpadConfig(
        size=SIZE,
        num_colors=3,
        num_walls=0,
        tasks=tuple(tasks),
        post_task=tuple(tasks[0]),
        colors_per_subgoal=colors_per_subgoal,
    )
    return GridworldPinpad(config)


@pytest.fixture
def aimless() -> SteerableModel:
    """A model that takes every action equally often, however it is steered, on the grid of `walked_world`."""
    model = build_model(replace(debug(), domain=walked_world([(0, 1)]).config))
    with torch.no_grad():
        model.action_readout.linear.weight.zero_()
        model.action_readout.linear.bias.zero_()
    return model


def share_that_reaches(pair: Sequence[int], walks: int, steps: int) -> float:
    """Share of aimless walks on the grid of `walked_world` that visit the pair's colors one after the other."""
    dice, done, size = random.Random(0), 0, SIZE
    layouts = sample_layouts(walked_world([(0, 1)]).config.grid, walks, torch.Generator().manual_seed(1))
    for colors, agent in zip(layouts.objects.tolist(), layouts.agent.tolist(), strict=True):
        visited: list[int] = []
        for _ in range(steps):
            row, column = divmod(agent, size)
            down, right = dice.choice([(-1, 0), (1, 0), (0, -1), (0, 1)])
            ahead = size * min(max(row + down, 0), size - 1) + min(max(column + right, 0), size - 1)
            if ahead != agent and ahead in colors:
                visited.append(colors.index(ahead))
            agent = ahead
            if visited[-2:] == list(pair):
                done += 1
                break
    return done / walks


def test_a_pair_is_reached_by_walks_that_visit_its_colors_one_after_the_other(aimless: SteerableModel) -> None:
    controller, steps = build_meta_controller(debug()), 4 * SIZE * 2
    walks = Walks(aimless, walked_world([(0, 1)]), steps, torch.Generator().manual_seed(0))
    meaning = code_subgoal_bits(walks, controller, codes=2, layouts_per_code=1000)
    assert meaning.share.shape == (2, 2)
    assert float(meaning.marginal[1]) == pytest.approx(share_that_reaches((0, 1), 2000, steps), abs=0.05)
    walks = replace(walks, domain=walked_world([(0, 1)], 1))
    colors = code_subgoal_bits(walks, controller, codes=2, layouts_per_code=1000)
    assert colors.share.shape == (2, 4)


def test_walks_are_counted_by_transitions_between_pairs(aimless: SteerableModel) -> None:
    world = walked_world([(0, 1, 2, 0), (2, 0, 1, 2), (1, 2, 0, 1)])
    walks = Walks(aimless, world, 4 * SIZE * 2, torch.Generator().manual_seed(0))
    share = unseen_transition_share(walks, episodes=300)
    assert 0 < share < 1
    controller = build_meta_controller(debug())
    meaning = code_subgoal_bits(walks, controller, codes=2, layouts_per_code=4)
    injected = injected_codes(walks, controller, meaning, 300)
    assert injected.forced == pytest.approx(injected.free, abs=0.1)
    assert 0 < injected.free < 1


def test_the_seen_transitions_of_table_a1_are_between_pairs() -> None:
    seen = WORLD.seen_transitions()
    assert seen.shape == (4, 4)
    wanted = [WORLD.subgoals.index(pair) for pair in zip(A1_POST[::2], A1_POST[1::2], strict=True)]
    assert not any(seen[a, b] for a, b in pairwise(wanted))
    assert bool(seen[0, 2])  # 0-1-4-5-...
    assert not bool(seen[0, 1])  # 0-1-2-3 is never shown


def test_evaluation_counts_pairs_and_refuses_half_of_one() -> None:
    model, singles = build_model(SMALL), GridworldPinpad(replace(SMALL.domain, colors_per_subgoal=1))
    whole = evaluate(model, None, singles, "base", (0, 1), 200, 0)
    pairs = evaluate(model, None, WORLD, "base", (0, 1), 200, 0)
    assert pairs["subgoals"] == pairs["success"] < whole["subgoals"]
    with pytest.raises(ValueError, match="task 0-1-2 has 3 colors, no multiple of colors_per_subgoal 2"):
        evaluate(model, None, WORLD, "base", (0, 1, 2), 4, 0)


def test_figures_name_pairs() -> None:
    names = list(WORLD.spec().subgoals)
    measured = {"code_subgoal_share": [[0.2, 0.2, 0.2, 0.2, 0.2]], "code_subgoal_bits": 0.5, "subgoals": names}
    ax = figures.measured_codes_figure(measured).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0-1", "2-3", "4-5", "6-7", "none"]


def test_a_config_whose_tasks_end_within_a_subgoal_is_refused() -> None:
    with pytest.raises(ValueError, match="task 0-1-2 has 3 colors, no multiple of colors_per_subgoal 2"):
        replace(SMALL.domain, post_task=(0, 1, 2))
