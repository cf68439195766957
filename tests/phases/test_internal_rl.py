"""Internal RL and raw-action RL: a two-step task that must be solved, seeds, and what must not change."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from metacontroller.baselines.raw_action_rl import raw_action_rl
from metacontroller.control.codes import CodeKind
from metacontroller.control.config import MetaControllerConfig
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.trajectories import length_mask, masked_mean
from metacontroller.domains.base import BatchedEnv
from metacontroller.domains.gridworld_pinpad.layouts import PinpadConfig
from metacontroller.domains.gridworld_pinpad.simulator import PinpadBatch
from metacontroller.domains.gymnasium_adapter import GymnasiumEnvironments
from metacontroller.domains.pinpad.layouts import Layouts
from metacontroller.errors import UserError
from metacontroller.models.transformer import Transformer
from metacontroller.phases import policy_gradient
from metacontroller.phases.internal_rl import internal_rl
from metacontroller.phases.policy_gradient import InternalRLConfig, _learn, _minibatches, ratio_metrics, reinforce
from metacontroller.phases.rollout import AbstractRollout, policy_proposal, rollout_abstract, rollout_raw
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import Processes, processes
from metacontroller.training.optimizer import Learner

# A 0 .    Right to color 0, then down to color 1: two steps, and any other move ends or wastes the episode.
# . 1 .
GRID = PinpadConfig(size=3, num_colors=2, num_walls=0, max_steps=2)
DIM, CONSTANT = 16, 4  # channels 0..3 of the residual are the actions', channel 4 is always 1
AXES = ((0, 1.0), (0, -1.0), (1, 1.0), (1, -1.0))  # of the code: up, down, left, right


def new_grids(n: int, generator: torch.Generator) -> PinpadBatch:
    layouts = Layouts(torch.tensor([[1, 4]]), torch.tensor([0])).repeat(n)
    return PinpadBatch(GRID, layouts, torch.tensor([[0, 1]]).expand(n, -1), torch.full((n,), 2))


@torch.no_grad()
def make_model() -> Transformer:
    """Without blocks, and undecided: what it does is what is written into the channels of its four actions."""
    model = Transformer(
        DIM,
        action_embed_readout={"num_discrete": 4},
        state_embed_readout={"grid": {"size": 3, "num_colors": 2, "num_walls": 0}},
        lower_body={"depth": 0},
        upper_body={"depth": 0},
        condition_on_actions=False,
    )
    model.encoder.get_parameter("table")[:, :CONSTANT] = 0.0
    model.encoder.get_parameter("table")[:, CONSTANT] = 1 / 3  # of three objects: two colors and the agent
    model.action_readout.linear.weight.copy_(4 * torch.eye(4, DIM))
    model.action_readout.linear.bias.zero_()
    return model


@torch.no_grad()
def make_steering() -> MetaController:
    """A code of two numbers points up, down, left or right; each step takes a new one."""
    gate: dict[str, Any] = {"mode": "forced"}
    steering = MetaController(
        DIM, dim_meta_controller=8, dim_latent=2, decoder_hidden=4, rank=None, policy_hidden=16, gate=gate
    )
    steering.controller.full.zero_()
    steering.controller.code_to_hidden.weight.zero_()
    steering.controller.code_to_hidden.bias.zero_()
    for action, (axis, sign) in enumerate(AXES):
        steering.controller.code_to_hidden.weight[action, axis] = sign
        steering.controller.full[action, action, CONSTANT] = 2.0  # U: constant -> this action's channel
    return steering


CONFIG = InternalRLConfig(episodes=128 * 25, batch_size=128, lr=2e-2, update_epochs=3, minibatches=2)


def learn(folder: Path, kind: str = "internal", config: InternalRLConfig = CONFIG) -> list[dict[str, Any]]:
    """Trains on the toy task and returns what was logged."""
    torch.manual_seed(0)
    run = RunFolder(folder)
    if kind == "internal":
        internal_rl(config, make_model(), make_steering(), new_grids, run, quiet=True)
        return run.read_metrics("internal_rl")
    raw_action_rl(config, make_model(), new_grids, run, quiet=True)
    return run.read_metrics("raw_action_rl")


@pytest.mark.parametrize("kind", ["internal", "raw"])
def test_a_task_of_two_steps_is_solved(kind: str, tmp_path: Path) -> None:
    lines = learn(tmp_path, kind)
    assert len(lines) == 25
    assert lines[0]["success"] < 0.25  # two moves of four choices each
    assert min(line["success"] for line in lines[-3:]) > 0.9
    assert lines[-1]["episodes"] == CONFIG.episodes
    assert lines[-1]["subgoals_done"] > 1.8
    assert all(1 <= line["steps"] <= 2 for line in lines)
    if kind == "internal":
        assert all(line["decisions"] == line["steps"] for line in lines)
        entropies = [line["entropy_per_code"] for line in lines if "entropy_per_code" in line]
        assert entropies[-1] < entropies[0]


class Generous(PinpadBatch):
    """The same grids with other rewards: 3 for the task, and a little for every step."""

    def step(self, actions: torch.Tensor) -> torch.Tensor:
        running = ~(self.terminated | self.truncated)
        return 3 * super().step(actions) + 0.5 * running


@pytest.mark.parametrize("kind", ["internal", "raw"])
def test_the_success_logged_is_the_environments_and_not_the_return(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = InternalRLConfig(episodes=128, batch_size=128, lr=1e-2)
    (plain,) = learn(tmp_path / "plain", kind, config)
    monkeypatch.setattr(f"{__name__}.PinpadBatch", Generous)
    (line,) = learn(tmp_path / "generous", kind, config)
    assert 0 < line["success"] == plain["success"] == plain["return"] < 1
    assert line["return"] == pytest.approx(3 * line["success"] + 0.5 * line["steps"], rel=1e-5)


def test_a_batch_without_differences_changes_nothing(tmp_path: Path) -> None:
    def impossible(n: int, generator: torch.Generator) -> PinpadBatch:
        grids = new_grids(n, generator)
        return PinpadBatch(
            replace(GRID, max_steps=1), Layouts(grids.objects, grids.agent), grids.tasks, grids.task_lengths
        )

    steering = make_steering()
    before = {name: value.clone() for name, value in steering.named_parameters()}
    config = InternalRLConfig(episodes=64, batch_size=32, lr=1e-2, weight_decay=0.1)
    internal_rl(config, make_model(), steering, impossible, RunFolder(tmp_path), quiet=True)
    assert all(line["success"] == 0 and "grad_norm" not in line for line in RunFolder(tmp_path).read_metrics())
    assert all(torch.equal(value, before[name]) for name, value in steering.named_parameters())


@pytest.mark.parametrize("kind", ["internal", "raw"])
def test_the_same_seed_gives_the_same_run(kind: str, tmp_path: Path) -> None:
    names = {"internal": "internal_rl_policy", "raw": "raw_action_model"}
    configs = {"first": 1, "again": 1, "other": 2}
    runs = {
        name: learn(tmp_path / name, kind, InternalRLConfig(episodes=96, batch_size=32, lr=1e-2, seed=seed))
        for name, seed in configs.items()
    }
    weights = {name: load_file(tmp_path / name / f"{names[kind]}.safetensors") for name in configs}
    assert runs["first"] == runs["again"] != runs["other"]
    same = [all(torch.equal(weights["first"][key], weights[name][key]) for key in weights["first"]) for name in weights]
    assert same == [True, True, False]


def test_only_the_policy_learns(tmp_path: Path) -> None:
    model, steering = make_model(), make_steering()
    before = {name: value.clone() for name, value in [*model.named_parameters(), *steering.named_parameters()]}
    config = InternalRLConfig(episodes=64, batch_size=32, lr=1e-2, weight_decay=0.1)
    internal_rl(config, model, steering, new_grids, RunFolder(tmp_path), quiet=True)
    after = dict([*model.named_parameters(), *steering.named_parameters()])
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("policy.") for name in changed)
    assert all(value.grad is None for value in model.parameters())


def test_before_the_first_step_the_policy_is_the_one_that_played(tmp_path: Path) -> None:
    config = InternalRLConfig(episodes=64, batch_size=64, lr=1e-2)
    (line,) = learn(tmp_path, config=config)  # one pass: measured before its step
    assert line["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert line["clip_fraction"] == 0
    assert line["entropy_per_code"] == pytest.approx(2.8379, abs=1e-4)  # of N(0, I) in two dimensions: log(2 pi e)
    assert line["grad_norm"] > 0


@pytest.mark.parametrize("kind", ["internal", "raw"])
def test_updates_in_chunks_are_updates_of_the_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = InternalRLConfig(episodes=192, batch_size=64, lr=1e-2, update_epochs=2)
    whole = learn(tmp_path / "whole", kind, config)
    monkeypatch.setattr(policy_gradient, "MAX_CHUNK_DECISIONS", 10)
    resumed = learn(tmp_path / "resumed", kind, config)
    assert len(whole) == 3
    for one, other in zip(whole, resumed, strict=True):
        assert one.pop("phase") == other.pop("phase")
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", ["internal", "raw"])
def test_updates_on_a_batch_end_at_the_target_kl(kind: str, tmp_path: Path) -> None:
    once = InternalRLConfig(episodes=64, batch_size=64, lr=1e-2)
    several = replace(once, update_epochs=5)
    configs = {
        "once": once,
        "nearest": replace(several, target_kl=1e-9),
        "all": several,
        "farthest": replace(several, target_kl=1e9),
    }
    lines = {name: learn(tmp_path / name, kind, config)[0] for name, config in configs.items()}
    names = {"internal": "internal_rl_policy", "raw": "raw_action_model"}
    weights = {name: load_file(tmp_path / name / f"{names[kind]}.safetensors") for name in configs}

    def equal(one: str, other: str) -> bool:
        return all(torch.equal(weights[one][key], weights[other][key]) for key in weights[one])

    assert equal("once", "nearest")
    assert equal("all", "farthest")
    assert not equal("once", "all")
    assert lines["once"]["grad_norm"] == lines["nearest"]["grad_norm"]  # of the last step that was taken
    assert lines["nearest"]["approx_kl"] > 1e-9


@pytest.mark.parametrize("kind", ["internal", "raw"])
def test_entropy_is_kept_where_it_has_a_weight(kind: str, tmp_path: Path) -> None:
    config = replace(CONFIG, episodes=128 * 6)
    plain = learn(tmp_path / "plain", kind, config)
    kept = learn(tmp_path / "kept", kind, replace(config, entropy_weight=1.0))
    if kind == "internal":
        assert kept[-1]["entropy_per_code"] > plain[-1]["entropy_per_code"] + 0.5
    assert kept[-1]["success"] < plain[-1]["success"] - 0.2  # a policy that is held at chance


@pytest.mark.parametrize("kind", ["internal", "raw"])
def test_an_update_waits_for_better_episodes_and_goes_on_from_a_checkpoint(kind: str, tmp_path: Path) -> None:
    config = InternalRLConfig(episodes=16 * 20, batch_size=16, lr=2e-3, min_better=8, checkpoint_every=1)
    whole = learn(tmp_path / "whole", kind, config)
    waiting = better = 0
    for line in whole:
        better += round(16 * line["success"])
        assert ("grad_norm" in line) == (better >= 8)
        waiting += "grad_norm" not in line and better > 0
        better = 0 if "grad_norm" in line else better
    assert waiting > 3

    phase = {"internal": "internal_rl", "raw": "raw_action_rl"}[kind]
    for done in range(1, 21):  # interrupted after every batch, also where episodes wait
        run = RunFolder(tmp_path / "parts")
        torch.manual_seed(0)
        part = replace(config, episodes=16 * done)
        if kind == "internal":
            internal_rl(part, make_model(), make_steering(), new_grids, run, quiet=True, resume=done > 1)
        else:
            raw_action_rl(part, make_model(), new_grids, run, quiet=True, resume=done > 1)
    assert RunFolder(tmp_path / "parts").read_metrics(phase) == whole
    ended = [RunFolder(tmp_path / name).load_checkpoint(phase)[0] for name in ("whole", "parts")]
    assert ended[0].keys() == ended[1].keys()
    assert all(torch.equal(value, ended[1][name]) for name, value in ended[0].items())


def test_what_waits_is_learned_from_as_if_it_had_been_played_together(tmp_path: Path) -> None:
    """Two batches, of which only the second gives enough: its episodes and the better ones of the first, in one."""
    batches: list[AbstractRollout] = []

    def play(n: int, generator: torch.Generator) -> AbstractRollout:
        grids, steering = new_grids(n, generator), make_steering()
        return rollout_abstract(make_model(), steering, grids, policy_proposal(steering, generator), generator)

    def recorded(n: int, generator: torch.Generator) -> AbstractRollout:
        batches.append(play(n, generator))
        return batches[-1]

    seen: list[AbstractRollout] = []
    advantages: list[torch.Tensor] = []
    module = torch.nn.Linear(1, 1)

    def surrogate(rollout: AbstractRollout, advantage: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        seen.append(rollout)
        advantages.append(advantage)
        return 0.0 * module.weight.sum(), {"approx_kl": torch.zeros(())}

    config = InternalRLConfig(episodes=16 * 8, batch_size=16, min_better=6)
    reinforce("internal_rl", config, module, recorded, surrogate, RunFolder(tmp_path), resume=False, quiet=True)
    pool: list[float] = []
    expected = []
    for batch in batches:
        returns = pool + batch.returns.tolist()
        better = [value for value in returns if value > sum(returns) / len(returns)]
        pool = [] if len(better) >= 6 else better
        if not pool and better:
            expected.append(sorted(returns))
    counts = [round(float(rollout.returns.sum())) for rollout in seen]
    assert sum(counts) == sum(round(sum(returns)) for returns in expected)
    assert sum(len(rollout.returns) for rollout in seen) == sum(map(len, expected))
    assert len(expected) < len(batches)
    solved = torch.cat(advantages)[torch.cat([rollout.returns for rollout in seen]) > 0]
    assert bool((solved > 0).all())


@pytest.mark.parametrize(("episodes", "sizes"), [(8, [2, 2, 2, 2]), (5, [2, 1, 1, 1]), (9, [3, 2, 2, 2])])
def test_a_batch_of_any_size_has_as_many_steps_as_minibatches(episodes: int, sizes: list[int]) -> None:
    config = InternalRLConfig(episodes=8, batch_size=8, minibatches=4, update_epochs=3)
    parts = list(_minibatches(config, episodes, torch.Generator().manual_seed(1)))
    assert [len(part) for part in parts] == 3 * sizes
    for epoch in range(3):
        assert torch.cat(parts[4 * epoch :][:4]).sort().values.tolist() == list(range(episodes))
    if episodes == 8:  # the order that the generator draws, cut where it always was
        rng = torch.Generator().manual_seed(1)
        assert torch.cat(parts[:4]).tolist() == torch.randperm(8, generator=rng).tolist()


def updated_weight(
    lengths: torch.Tensor, rows: torch.Tensor, workers: Processes, minibatches: int = 2
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A weight in float64, and the metrics, after an update on the episodes ``rows`` of some with ``lengths``."""
    torch.manual_seed(0)
    count, steps = len(lengths), int(lengths.max())
    rollout = AbstractRollout(
        returns=torch.rand(count).double().masked_fill(lengths == 0, 0.0),
        success=torch.ones(count, dtype=torch.bool),
        steps=lengths,
        subgoals_done=lengths,
        lost=lengths == 0,
        residual=torch.randn(count, steps, 3).double(),
        code=torch.randn(count, steps, 2).double(),
        log_prob=torch.randn(count, steps).double(),
        lengths=lengths,
    ).index(rows)
    module = nn.Linear(3, 2, bias=False).double()

    def surrogate(chunk: AbstractRollout, own: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        score = (module(chunk.residual) * chunk.code).sum(-1) * own[:, None]
        loss = masked_mean(score, length_mask(chunk.lengths, chunk.code.shape[1]))
        return loss, {"approx_kl": loss.detach(), "other": 2 * loss.detach()}

    config = InternalRLConfig(episodes=8, batch_size=8, minibatches=minibatches, update_epochs=2, target_kl=1e3)
    rng = torch.Generator()
    learner = Learner(module, list(module.parameters()), rng, lr=0.1, weight_decay=0.0, max_grad_norm=1.0)
    learner.processes = workers
    returns = workers.gather(rollout.returns[rollout.decisions > 0])
    metrics = _learn(config, learner, rollout, returns, surrogate, rng)
    return module.weight.detach(), metrics


def test_episodes_that_could_not_start_change_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.arange(count))
    lengths, alone = torch.tensor([3, 0, 2, 0, 0, 5, 4, 0]), processes("cpu")
    started = lengths.nonzero().squeeze(1)
    some, every = (updated_weight(lengths, rows, alone) for rows in (started, torch.arange(8)))
    torch.testing.assert_close(some, every)
    # With nothing to learn in the first minibatch, the second alone is a step.
    late = updated_weight(lengths, torch.tensor([1, 3, 0, 2]), alone)
    torch.testing.assert_close(late, updated_weight(lengths, torch.tensor([0, 2]), alone, minibatches=1))


class Moody(gymnasium.Env):
    """Three steps of reward -1, or 0 after the action 1. While some are moody, every third seed has no episode."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    refused: Callable[[int], bool] = lambda seed: False

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        if type(self).refused(seed or 0):
            raise RuntimeError("not today")
        super().reset(seed=seed)
        self.taken = 0
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.taken += 1
        seen = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return seen, float(action) - 1.0, self.taken == 3, False, {}


gymnasium.register("reinforced/Moody-v0", Moody)  # type: ignore[arg-type]


def moody_parts() -> tuple[GymnasiumEnvironments, Transformer, MetaController]:
    torch.manual_seed(0)
    body = {"depth": 1, "heads": 2}
    options: dict[str, Any] = {"lower_body": body, "upper_body": body, "state_embed_readout": {"num_continuous": 2}}
    model = Transformer(8, action_embed_readout={"num_discrete": 2}, **options)
    gate: dict[str, Any] = {"mode": "forced"}
    steering = MetaController(8, dim_meta_controller=8, dim_latent=2, rank=2, gate=gate)
    return GymnasiumEnvironments("reinforced/Moody-v0"), model.eval(), steering.eval()


@pytest.mark.parametrize("kind", ["internal", "raw"])
def test_an_episode_that_cannot_start_takes_no_decision_and_is_lost(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environments, model, steering = moody_parts()
    rng = torch.Generator().manual_seed(0)
    environments.reset(9, rng, 10)  # the environments are made, and have an observation
    monkeypatch.setattr(Moody, "refused", lambda seed: seed % 3 == 1)
    env = environments.reset(9, rng, 10)
    lost = env.lost.clone()
    assert int(lost.sum()) == 3
    if kind == "internal":
        rollout = rollout_abstract(model, steering, env, policy_proposal(steering, rng), rng)
        assert bool((rollout.code[lost] == 0).all())
    else:
        rollout = rollout_raw(model, env, rng)
    assert rollout.lost is not None
    assert torch.equal(rollout.lost, lost)
    assert rollout.steps.tolist() == rollout.decisions.tolist() == torch.where(lost, 0, 3).tolist()
    assert not bool(rollout.success[lost].any())
    assert bool((rollout.returns[lost] == 0).all())


@pytest.mark.parametrize("kind", ["internal", "raw"])
def test_learning_goes_on_where_some_or_all_episodes_cannot_start(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments, model, steering = moody_parts()
    batches = 0

    def reset(n: int, generator: torch.Generator) -> BatchedEnv:
        nonlocal batches
        batches += 1
        refused = {2: lambda seed: seed % 3 == 1, 3: lambda seed: True}.get(batches, lambda seed: False)
        monkeypatch.setattr(Moody, "refused", refused)
        return environments.reset(n, generator, 10)

    config, run = InternalRLConfig(episodes=48, batch_size=12, minibatches=4, lr=1e-2), RunFolder(tmp_path)
    if kind == "internal":
        internal_rl(config, model, steering, reset, run, quiet=True)
    else:
        raw_action_rl(config, model, reset, run, quiet=True)
    lines = run.read_metrics()
    assert [line["lost"] for line in lines] == pytest.approx([0, 1 / 3, 1, 0])
    assert [line["steps"] for line in lines] == [3, 2, 0, 3]
    assert [line["decisions"] for line in lines if "decisions" in line] == ([3, 2, 0, 3] if kind == "internal" else [])
    assert ["grad_norm" in line for line in lines] == [True, True, False, True]


class Solved(PinpadBatch):
    """The same grids, of which each counts as solved."""

    @property
    def success(self) -> torch.Tensor:
        return torch.ones_like(self.terminated)


def test_learning_what_is_solved_already_is_questioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = InternalRLConfig(episodes=32, batch_size=16)
    internal_rl(config, make_model(), make_steering(), new_grids, RunFolder(tmp_path / "plain"))
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(f"{__name__}.PinpadBatch", Solved)
    internal_rl(config, make_model(), make_steering(), new_grids, RunFolder(tmp_path / "solved"))
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warning.startswith("internal_rl: warning: success is 1.00 before any update")
    assert "why go on?" in warning
    learn(tmp_path / "quiet", config=config)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["internal", "raw"])
def test_no_process_goes_on_before_the_policy_is_in_its_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"internal": "internal_rl_policy", "raw": "raw_action_model"}[kind]
    there: list[bool] = []
    monkeypatch.setattr(Processes, "wait", lambda workers: there.append((tmp_path / f"{name}.safetensors").exists()))
    learn(tmp_path, kind, InternalRLConfig(episodes=16, batch_size=16))
    assert there[-1] is True


def test_a_policy_starts_with_the_spread_asked_for() -> None:
    steering = MetaController(DIM, dim_meta_controller=8, dim_latent=2, policy_std=2.0)
    distribution, _ = steering.policy(torch.randn(3, 1, DIM))
    assert distribution[:, 0].tolist() == [[0.0, 0.0, pytest.approx(math.log(2)), pytest.approx(math.log(2))]] * 3
    refused: tuple[tuple[CodeKind, float, str], ...] = (("gaussian", 0.0, "above 0"), ("binary", 2.0, "expected 1"))
    for code, std, message in refused:
        with pytest.raises(UserError, match=message):
            MetaController(DIM, dim_meta_controller=8, dim_latent=2, code=code, policy_std=std)
        with pytest.raises(UserError, match=message):
            MetaControllerConfig(dim_latent=2, code=code, policy_std=std)


def test_ratios_are_measured_on_both_sides_of_one() -> None:
    old, mask = torch.zeros(1, 5, dtype=torch.float64), torch.tensor([[True, True, True, True, False]])
    new = torch.tensor([[1.5, 0.5, 1.1, 0.9, 9.0]], dtype=torch.float64).log()
    measured = ratio_metrics(new, old, mask, 0.2)
    assert float(measured["clip_fraction"]) == 0.5
    expected = sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.1, 0.9)) / 4
    assert float(measured["approx_kl"]) == pytest.approx(expected, rel=1e-12)


def test_padding_does_not_reach_the_metrics(tmp_path: Path) -> None:
    # a very narrow policy, whose density at the zeros of the padding overflows
    steering = make_steering()
    nn.init.constant_(steering.policy.readout.bias[2:], -50.0)

    def ending_early(n: int, generator: torch.Generator) -> PinpadBatch:
        grids = new_grids(n, generator)
        odd = torch.arange(n)[:, None] % 2 == 1  # for these color 0 is wrong at first
        return PinpadBatch(
            GRID,
            Layouts(grids.objects, grids.agent),
            torch.where(odd, grids.tasks.flip(1), grids.tasks),
            grids.task_lengths,
        )

    config = InternalRLConfig(episodes=64, batch_size=64, lr=1e-6)
    internal_rl(config, make_model(), steering, ending_early, RunFolder(tmp_path), quiet=True)
    (line,) = RunFolder(tmp_path).read_metrics()
    assert 1 < line["decisions"] < 2
    assert line["success"] > 0  # else there would be nothing to learn from, and no pass
    assert line["approx_kl"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"episodes": 0}, "episodes is 0; expected at least 1"),
        ({"update_epochs": 0}, "update_epochs is 0; expected at least 1"),
        ({"min_better": 0}, "min_better is 0; expected at least 1"),
        ({"min_better": 9}, "min_better is 9; expected 1..8, a batch's episodes"),
        ({"target_kl": 0.0}, "target_kl is 0.0; expected a number above 0"),
        ({"entropy_weight": -0.1}, "entropy_weight is -0.1; expected a number of at least 0"),
        ({"minibatches": 3}, "batch_size 8 is not a multiple of minibatches 3"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InternalRLConfig(**({"episodes": 8, "batch_size": 8} | change))


def test_the_last_update_may_go_beyond_the_episodes_asked_for() -> None:
    assert InternalRLConfig(episodes=17, batch_size=8).updates == 3
