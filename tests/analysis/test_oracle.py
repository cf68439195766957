from __future__ import annotations

import torch

from metacontroller.analysis.oracle import OracleCodes, oracle_codes, readable, recorded_proposal
from metacontroller.control.discovery import DiscoveryOutput
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpad, GridworldPinpadConfig


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


def output_of(mean: torch.Tensor, beta: torch.Tensor) -> DiscoveryOutput:
    nothing = torch.zeros_like(beta)
    return DiscoveryOutput(mean, mean, beta, beta, nothing, nothing.bool(), mean, torch.zeros_like(mean))


def test_codes_are_taken_at_the_first_step_and_where_the_gate_opens_within_the_episode() -> None:
    mean = torch.arange(10.0).view(2, 5, 1)
    beta = torch.tensor([[0.0, 0.2, 0.5, 0.1, 0.9], [1.0, 0.0, 0.4, 0.0, 1.0]])
    codes = oracle_codes(output_of(mean, beta), torch.tensor([5, 4]), 0.5)
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
    assert readable(named, label, 0) > 0.99
    assert readable(torch.randn(1000, 4, generator=rng), label, 0) < 0.35
