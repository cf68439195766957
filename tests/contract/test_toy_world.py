# fmt: off
"""A world in one file, a corridor with three doors, registered by entry point: every command runs on it unchanged."""
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import one_hot, pad

from helpers import quick_reproductions
from metacontroller.cli import main
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.base import FREE, Domain, DomainSpec
from metacontroller.presets import preset, study_config

COMMANDS = """pretrain A -P|discover A|internal-rl A|internal-rl A --raw|evaluate A|evaluate A --policy raw|gate A
probe A --steps 3|steer A --steps 3|inject A --walks 8|episodes A|reproduce -P --out B|sweep -P --out C
figures -P --out B --seeds 0 --workers 1|report A B --out B/page.html"""
STUDIES, TASKS = {"tiny": replace(study_config("debug"), state_loss_weights=())}, torch.tensor([[0, 2], [2, 1], [1, 0]])
tiny = lambda: replace(preset("debug"), domain=CorridorConfig())  # noqa: E731
class Corridors:  # seven cells; doors are cells 1, 3 and 5; moving onto one from elsewhere reaches it
    observation = property(lambda self: one_hot(self.agent, 7).float())
    terminated = success = property(lambda self: (self.subgoals_done == self.asked) & (self.asked > 0))
    truncated = property(lambda self: (self.steps >= self.limit) & ~self.terminated)
    __len__, reached = lambda self: len(self.agent), lambda self: self.door
    goal = lambda self: self.tasks.gather(1, self.subgoals_done[:, None])[:, 0]  # noqa: E731
    def __init__(self, generator, tasks, limit=20):
        self.tasks, self.asked, self.limit = pad(tasks, (0, 1), value=-1), tasks.shape[1], limit
        self.agent, self.door = torch.randint(7, (len(tasks),), generator=generator), None
        self.steps = self.subgoals_done = torch.zeros_like(self.agent)
    def step(self, actions):
        running, agent = ~(self.terminated | self.truncated), (self.agent + 2 * actions - 1).clamp(0, 6)
        self.door = torch.where(running & (agent != self.agent) & (agent % 2 == 1), agent // 2, -1)
        self.agent, self.steps = torch.where(running, agent, self.agent), self.steps + running
        self.subgoals_done = self.subgoals_done + ((self.door >= 0) & (self.door == self.goal()))
        return (running & self.terminated).float()
    def select(self, rows):
        self.__dict__.update({name: value[rows] for name, value in vars(self).items() if torch.is_tensor(value)})
@dataclass(frozen=True)
class CorridorConfig: ...
class Corridor(Domain):
    name, Config = "corridor", CorridorConfig
    spec = lambda self: DomainSpec({"num_continuous": 7}, {"num_discrete": 2}, 20, ("0", "1", "2"))  # noqa: E731
    def reset(self, n, generator, *, task=None, max_steps=None):
        return Corridors(generator, torch.tensor([[] if task is FREE else [0, 1]] * n).long(), max_steps or 20)
    def demonstrations(self, split, n, generator):
        env, seen = Corridors(generator, TASKS[torch.randint(3, (n,), generator=generator)]), []
        while not (env.terminated | env.truncated).all():
            seen.append((env.observation, (2 * env.goal() + 1 > env.agent).long(), env.goal(), env.subgoals_done))
            env.step(seen[-1][1])
        states, actions, *labels = (torch.stack(values, 1) for values in zip(*seen, strict=True))
        goals, places = (x.masked_fill(torch.arange(len(seen)) >= env.steps[:, None], -1) for x in labels)
        states = torch.cat([states, env.observation[:, None]], 1)
        return Trajectories(states=states, actions=actions, lengths=env.steps, subgoals=goals, segments=places)

def test_every_command_runs_on_a_world_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "toy-1.dist-info").mkdir()
    points = tmp_path / "toy-1.dist-info" / "entry_points.txt"
    points.write_text(f"[metacontroller.domains]\ncorridor = {__name__}:Corridor\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with quick_reproductions():
        for line in COMMANDS.replace("-P", f"--preset {__name__}:tiny").replace("\n", "|").split("|"):
            assert main([*line.split(), "--device", "cpu"]) == 0, line
