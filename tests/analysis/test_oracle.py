from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from metacontroller.analysis import oracle as module
from metacontroller.analysis.gate_alignment import HeldOutGate, held_out_gate
from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.oracle import Oracle, OracleCodes, named_success, oracle_codes, readable, recorded_proposal
from metacontroller.analysis.registry import run_analysis
from metacontroller.baselines.compile import build_compile
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpad, GridworldPinpadConfig
from metacontroller.domains.gridworld_pinpad.simulator import PinpadBatch
from metacontroller.presets.gridworld import debug
from metacontroller.recipes.config import load_run
from metacontroller.recipes.measure import measure_stages


def test_an_episode_started_anew_has_its_expert_s_task_and_is_solved_by_its_actions() -> None:
    domain = GridworldPinpad(GridworldPinpadConfig(size=6, num_walls=2, post_task=tuple(range(8))))
    rng = torch.Generator().manual_seed(0)
    for episodes in (domain.demonstrations("discover", 40, rng), domain.demonstrate(None, 40, rng)):
        assert episodes.subgoals is not None
        env = domain.restart(episodes)
        for step in range(episodes.steps):
            running = ~(env.terminated | env.truncated)
            assert torch.equal(env.observation[running], episodes.states[running, step])
            assert torch.equal(env.goal()[running], episodes.subgoals[running, step])
            env.step(episodes.actions[:, step])
        assert bool(env.success.all())
        assert torch.equal(env.steps, episodes.lengths)


def test_the_expert_of_a_task_does_that_task() -> None:
    domain = GridworldPinpad(GridworldPinpadConfig(size=6, num_walls=2))
    episodes = domain.demonstrate((4, 5, 0, 1), 8, torch.Generator().manual_seed(1))
    assert torch.equal(domain.restart(episodes).tasks, torch.tensor([[4, 5, 0, 1]]).expand(8, -1))


def test_facts_are_those_of_the_layout() -> None:
    domain = GridworldPinpad(GridworldPinpadConfig(size=6, num_walls=2))
    episodes = domain.demonstrations("discover", 30, torch.Generator().manual_seed(2))
    facts = domain.facts(episodes)
    assert episodes.subgoals is not None
    for row, step in ((0, 0), (7, 3), (29, int(episodes.lengths[29]) - 1)):
        subgoal, state = domain.subgoals[int(episodes.subgoals[row, step])], episodes.states[row, step]
        place, agent = divmod(int(state[subgoal[0]]), 6), divmod(int(state[-1]), 6)
        assert int(facts["color"][row, step]) == subgoal[0]
        assert int(facts["place"][row, step]) == 6 * place[0] + place[1]
        assert divmod(int(facts["way"][row, step]), 11) == (place[0] - agent[0] + 5, place[1] - agent[1] + 5)
        assert int(facts["move"][row, step]) == int(episodes.actions[row, step])
    assert all(bool((value[~episodes.mask()] == -1).all()) for value in facts.values())


def test_codes_are_taken_at_the_first_step_and_where_the_gate_opens_within_the_episode() -> None:
    code = torch.arange(10.0).view(2, 5, 1)
    beta = torch.tensor([[1.0, 0.2, 0.5, 0.1, 0.9], [1.0, 0.0, 0.4, 0.0, 1.0]])
    episodes = Trajectories(states=torch.zeros(2, 6), actions=torch.zeros(2, 5), lengths=torch.tensor([5, 4]))
    codes = oracle_codes(HeldOutGate(beta, code, episodes, None, 0.5))
    assert codes.count.tolist() == [3, 1]
    assert codes.code[..., 0].tolist() == [[0.0, 2.0, 4.0], [5.0, 0.0, 0.0]]


def test_recorded_codes_come_in_their_order_and_the_last_one_stays() -> None:
    codes = OracleCodes(torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]]]), torch.tensor([2, 1]))
    propose, nothing = recorded_proposal(codes), torch.zeros(2, 1)
    taken = [propose(nothing, nothing, torch.tensor([0, 1]))[0][:, 0].tolist() for _ in range(3)]
    assert taken == [[1.0, 3.0], [2.0, 3.0], [2.0, 3.0]]
    assert propose(nothing[:1], nothing[:1], torch.tensor([1]))[0].tolist() == [[3.0]]


def test_a_label_is_read_from_codes_that_name_it_and_not_from_noise() -> None:
    rng = torch.Generator().manual_seed(3)
    label = torch.randint(4, (1000,), generator=rng)
    named = torch.nn.functional.one_hot(label, 4) + 0.1 * torch.randn(1000, 4, generator=rng)
    noise = torch.randn(1000, 4, generator=rng)
    for codes, low, high in ((named, 0.99, 1.0), (noise, 0.0, 0.35)):
        assert low <= readable((codes[:500], label[:500]), (codes[500:], label[500:]), 0) <= high


def test_the_analysis_of_a_run_that_has_learned_nothing(
    untrained: Callable[..., LoadedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READER_UPDATES", 20)
    results = run_analysis("oracle", untrained(), Oracle.Config(episodes=40))
    assert 0 <= results["unseen"] <= results["unseen_subgoals"] <= 1
    assert 0 <= results["seen"] <= results["seen_subgoals"] <= 1
    assert results["nats"] == pytest.approx(sum(results["nats_by_dimension"]))
    assert set(results["readable"]) == set(results["commonest"]) == {"subgoal", "color", "place", "way", "move"}
    rows = dict(Oracle().rows([results]))
    assert rows["readable: place"] == [results["readable"]["place"]]
    assert "nats_by_dimension" not in rows


def test_named_codes_are_the_means_over_switches_with_that_label(
    untrained: Callable[..., LoadedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, kept = untrained(), []
    run = replace(run, controller=replace(run.controller, action_temperature=0.5))
    monkeypatch.setattr(module, "play_chained", lambda model, *rest: kept.extend((rest[0], rest[-1])) or 0.25)
    gate = held_out_gate(run, 64, 7)
    assert named_success(run, gate, 7) == 0.25
    assert kept[1] == 0.5
    residual = torch.randn(3, run.base.dim, generator=torch.Generator().manual_seed(0))
    assert gate.episodes.subgoals is not None
    for subgoal in range(len(run.subgoals)):
        codes = [
            gate.code[row, step]
            for row, length in enumerate(gate.episodes.lengths.tolist())
            for step in range(length)
            if gate.beta[row, step] >= 0.5 and gate.episodes.subgoals[row, step] == subgoal
        ]
        expected = run.meta_controller.steer(residual, torch.stack(codes).mean(0).expand(3, -1))
        torch.testing.assert_close(kept[0](residual, torch.full((3,), subgoal)), expected)


def test_after_compile_the_codes_are_its_own(untrained: Callable[..., LoadedRun]) -> None:
    config = replace(debug(), discovery="compile")
    run = untrained(config)
    segmentation = build_compile(config.compile, run.base, run.domain.spec().encoder, run.meta_controller.dim_latent, 0)
    segmentation.save(run.folder.path / "compile.safetensors")
    results = run_analysis("oracle", load_run(run.folder, "cpu"), Oracle.Config(episodes=20))
    assert results["nats"] is results["dimensions_used"] is None
    assert 0 <= results["unseen_subgoals"] <= 1


def test_where_no_goal_is_told_the_stages_leave_supervised_controllers_out(
    untrained: Callable[..., LoadedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READER_UPDATES", 20)

    class Silent(GridworldPinpad):
        def reset(self, *arguments: Any, **options: Any) -> PinpadBatch:
            env = super().reset(*arguments, **options)
            env.goal = lambda: torch.full_like(env.steps, -1)  # type: ignore[method-assign]
            return env

    run = untrained()
    told, silent = measure_stages(run, True), measure_stages(replace(run, domain=Silent(run.domain.config)), True)
    assert told["supervised_success"] is not None
    assert silent["supervised_success"] is None
    assert silent["named_success"] is None
    assert silent["probe_accuracy"] == told["probe_accuracy"]
