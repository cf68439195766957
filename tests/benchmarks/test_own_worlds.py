"""The script over the worlds of docs/own-data.md: what it reads from the page, and how it judges codes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from helpers import load_script
from metacontroller.data.trajectories import Trajectories

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "own_worlds.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(SCRIPT)


def test_every_world_of_the_page_has_commands_and_facts(script: ModuleType) -> None:
    experts, worlds = script.page_worlds()
    assert worlds.keys() == script.FACTS.keys()
    for name, lines in worlds.items():
        words = [line.split()[1] for line in lines]
        assert words[:4] == ["collect", "pretrain", "discover", "internal-rl"]
        assert words[-1] == "report"
        assert sum(f"runs/{name}" in line for line in lines) == len(lines) - 1
        assert not any("#" in line for line in lines)
    assert "def four_rooms" in experts


def test_what_is_known_explains_what_follows_from_it(script: ModuleType) -> None:
    random = torch.Generator().manual_seed(0)
    known, noise = torch.randn(800, 2, generator=random), torch.randn(800, 1, generator=random)
    product = known.prod(1, keepdim=True)
    assert script.explained(known, product) > 0.8
    assert script.explained(known[:, :1], product) < 0.1
    assert abs(script.explained(known, noise)) < 0.1
    assert script.explained(known, torch.ones(800, 1)) is None


def test_the_goal_of_four_rooms_is_where_the_expert_goes(script: ModuleType) -> None:
    left, right, forward = 0, 1, 2
    actions = torch.tensor([[forward, forward, right, forward, 0], [left, forward, right, forward, left]])
    episodes = Trajectories(states=torch.zeros(2, 6, 1), actions=actions, lengths=torch.tensor([4, 5]))
    facts = script.rooms_facts(episodes)
    assert facts["cells ahead to the goal"].tolist() == [[2.0], [1.0]]
    assert facts["cells right to the goal"].tolist() == [[1.0], [-1.0]]
    assert facts["steps to the goal"].tolist() == [[4.0], [5.0]]


def test_a_failing_command_ends_its_world(script: ModuleType, tmp_path: Path) -> None:
    done = script.run_commands(["metacontroller nonsense", "metacontroller --version"], tmp_path)
    assert [command["exit"] for command in done] == [2]
