"""Subgoals of table A1 are pairs of colors: in labels, in probes and supervised controllers, and in what codes mean."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metacontroller.analysis import codes as codes_module
from metacontroller.analysis import figures, steering
from metacontroller.analysis.codes import code_subgoal_bits, injected_codes, unseen_transition_share
from metacontroller.analysis.runs import probe_run
from metacontroller.analysis.switching import gate_alignment
from metacontroller.data.trajectories import Trajectories
from metacontroller.envs.gridworld_pinpad import PinpadConfig, sample_layouts
from metacontroller.envs.tasks import A1_POST, TABLE_A1, subgoal_indices, subgoal_vocabulary
from metacontroller.models.transformer import Transformer
from metacontroller.phases.evaluate import evaluate
from metacontroller.presets import PRESETS
from metacontroller.presets.gridworld import build_meta_controller, build_model, debug, generate
from metacontroller.run_folder import RunFolder

SMALL = replace(PRESETS["paper"](), model=debug().model, meta_controller=debug().meta_controller)
PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))


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
    episodes = generate(PRESETS["paper"](), "discover")(64, torch.Generator().manual_seed(0))
    assert episodes.subgoals is not None
    assert episodes.segments is not None
    assert set(episodes.subgoals[episodes.mask()].tolist()) == {0, 1, 2, 3}
    assert set(episodes.segments[episodes.mask()].tolist()) == {0, 1, 2}
    beta = first_steps_after_pairs(episodes, 8)
    found = gate_alignment(beta, episodes.segments, episodes.lengths, tolerance=0)
    assert (float(found["gate_recall"]), float(found["gate_precision"])) == (1.0, 1.0)


def test_probes_of_table_a1_tell_four_subgoals_apart(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_config(SMALL)
    build_model(SMALL).save(tmp_path / "base_model.safetensors")
    probe_run(run, steps=2, batch_size=4, lr=1e-3, episodes=8, quiet=True, device="cpu")
    tensors, _ = run.load_checkpoint("probes")
    assert {name: len(value) for name, value in tensors.items()} == dict.fromkeys(tensors, 4)


def test_a_supervised_controller_a_pair_is_trained_and_chained(monkeypatch: pytest.MonkeyPatch) -> None:
    chained: list[int] = []
    monkeypatch.setattr(
        steering, "play_chained", lambda model, controllers, *rest: chained.append(len(controllers.read)) or 0.0
    )
    options: dict[str, Any] = {"steps": 1, "batch_size": 2, "episodes": 2, "seed": 0, "subgoals": PAIRS, "quiet": True}
    source = generate(SMALL, "discover")
    steering.steer_layers(build_model(SMALL), source, SMALL.environment, SMALL.post_task, **options)
    assert chained == [4, 4, 4]


def test_chained_play_asks_for_the_pair_that_the_task_asks_for() -> None:
    asked: list[Tensor] = []

    class Spy(steering.SupervisedControllers):
        def forward(self, residual: Tensor, subgoal: Tensor) -> Tensor:
            asked.append(subgoal)
            return super().forward(residual, subgoal)

    model = build_model(SMALL)
    steering.play_chained(model, Spy(4, model.dim, 2), SMALL.environment, (4, 5, 0, 1), 20, 0, PAIRS)
    assert asked[0].tolist() == [2] * 20
    assert len(asked) > 1


@pytest.fixture
def aimless() -> Transformer:
    """A model that takes every action equally often, however it is steered, on the grid of `WALKED`."""
    model = build_model(replace(debug(), environment=WALKED, tasks=((0, 1),), post_task=(1, 0)))
    with torch.no_grad():
        model.action_readout.linear.weight.zero_()
        model.action_readout.linear.bias.zero_()
    return model


WALKED = PinpadConfig(size=3, num_colors=3, num_walls=0)


def share_that_reaches(pair: Sequence[int], walks: int, steps: int) -> float:
    """Share of aimless walks on the grid of `WALKED` that visit the pair's colors one after the other."""
    dice, done, size = random.Random(0), 0, WALKED.size
    layouts = sample_layouts(WALKED, walks, torch.Generator().manual_seed(1))
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


def test_a_pair_is_reached_by_walks_that_visit_its_colors_one_after_the_other(aimless: Transformer) -> None:
    controller, generator = build_meta_controller(debug()), torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"codes": 2, "layouts_per_code": 1000, "generator": generator}
    meaning = code_subgoal_bits(aimless, controller, WALKED, subgoals=((0, 1),), **options)
    assert meaning.share.shape == (2, 2)
    expected = share_that_reaches((0, 1), 2000, 4 * WALKED.size * 2)
    assert float(meaning.marginal[1]) == pytest.approx(expected, abs=0.05)
    colors = code_subgoal_bits(aimless, controller, WALKED, **options)
    assert colors.share.shape == (2, 4)


def test_walks_are_counted_by_transitions_between_pairs(aimless: Transformer) -> None:
    pairs, tasks = ((0, 1), (1, 2), (2, 0)), [(0, 1, 1, 2), (1, 2, 2, 0), (2, 0, 0, 1)]
    options: dict[str, Any] = {"subgoals": pairs, "generator": torch.Generator().manual_seed(0)}
    share = unseen_transition_share(aimless, WALKED, tasks, episodes=300, **options)
    assert 0 < share < 1
    found = injected_codes(
        aimless, build_meta_controller(debug()), WALKED, tasks, codes=2, layouts_per_code=4, walks=300, **options
    )
    assert found.forced == pytest.approx(found.free, abs=0.1)
    assert 0 < found.free < 1


def test_the_seen_transitions_of_table_a1_are_between_pairs() -> None:
    pairs = subgoal_vocabulary(TABLE_A1, 2, 8)
    seen = codes_module._seen_transitions(pairs, TABLE_A1, torch.device("cpu"))
    assert seen.shape == (4, 4)
    assert not any(seen[a, b] for a, b in pairwise(subgoal_indices(A1_POST, pairs)))
    assert bool(seen[0, 2])  # 0-1-4-5-...
    assert not bool(seen[0, 1])  # 0-1-2-3 is never shown


def test_evaluation_counts_pairs_and_refuses_half_of_one() -> None:
    model = build_model(SMALL)
    whole = evaluate(model, None, SMALL.environment, "base", (0, 1), 200, 0)
    pairs = evaluate(model, None, SMALL.environment, "base", (0, 1), 200, 0, subgoals=PAIRS)
    assert pairs["subgoals"] == pairs["success"] < whole["subgoals"]
    with pytest.raises(ValueError, match="task 0-1-2 has 3 colors, no multiple of colors_per_subgoal 2"):
        evaluate(model, None, SMALL.environment, "base", (0, 1, 2), 4, 0, subgoals=PAIRS)


def test_figures_name_pairs() -> None:
    summary = {"code_color_share": [[0.2, 0.2, 0.2, 0.2, 0.2]], "code_subgoal_bits": 0.5}
    ax = figures.measured_codes_figure(SMALL, summary).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0-1", "2-3", "4-5", "6-7", "none"]


def test_a_config_whose_tasks_end_within_a_subgoal_is_refused() -> None:
    with pytest.raises(ValueError, match="task 0-1-2 has 3 colors, no multiple of colors_per_subgoal 2"):
        replace(SMALL, post_task=(0, 1, 2))
