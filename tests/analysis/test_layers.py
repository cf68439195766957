"""Probes and supervised controllers: what they find where the answer is known, and that the model stays as it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metacontroller import Transformer
from metacontroller.analysis import figures, steering
from metacontroller.analysis.probing import probe_layers
from metacontroller.analysis.steering import SupervisedControllers, play_chained, steer_layers
from metacontroller.cli import main
from metacontroller.data.trajectories import Trajectories
from metacontroller.envs.gridworld_pinpad import PinpadBatch, PinpadConfig
from metacontroller.phases.internal_rl import task_grids
from metacontroller.presets.gridworld import build_model, debug, generate
from metacontroller.run_folder import RunFolder


def told(n: int, generator: torch.Generator) -> Trajectories:
    """Episodes whose observation tells the subgoal of the second segment, and nothing of the first."""
    subgoals = torch.randint(3, (n, 2), generator=generator)
    shown = torch.nn.functional.one_hot(subgoals[:, 1], 3).float()
    states = torch.stack([torch.zeros(n, 3), shown, torch.zeros(n, 3)], 1)
    return Trajectories(
        states=states,
        actions=torch.zeros(n, 2, dtype=torch.int64),
        lengths=torch.full((n,), 2),
        subgoals=subgoals,
        segments=torch.tensor([0, 1]).expand(n, -1),
    )


def test_a_probe_finds_what_the_residual_holds_and_nothing_else() -> None:
    body: dict[str, Any] = {"depth": 1, "heads": 2}
    model = Transformer(
        8,
        action_embed_readout={"num_discrete": 4},
        state_embed_readout={"num_continuous": 3},
        lower_body=body,
        upper_body=body,
        condition_on_actions=False,
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    found = probe_layers(model, told, subgoals=3, steps=400, batch_size=64, episodes=3000, seed=0, lr=3e-2, quiet=True)
    assert len(found.accuracy) == model.depth + 1 == 3
    for accuracy, at_start in zip(found.accuracy, found.at_start, strict=True):
        assert at_start == pytest.approx(1 / 3, abs=0.05)  # five standard deviations
        assert accuracy == pytest.approx((1 + 1 / 3) / 2, abs=0.03)
    assert found.majority == pytest.approx(1 / 3, abs=0.03)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_residuals_are_those_of_every_split() -> None:
    model = build_model(debug())
    batch = generate(debug(), "pretrain")(4, torch.Generator().manual_seed(0))
    layers = model.residuals(batch.states, batch.actions)
    for layer, residual in enumerate(layers):
        model.resplit(layer)
        torch.testing.assert_close(residual, model.residual(batch.states, batch.actions))


def test_controllers_equal_the_dense_product() -> None:
    controllers = SupervisedControllers(3, 5, 2).double()
    torch.nn.init.normal_(controllers.write)
    residual, subgoal = torch.randn(4, 7, 5, dtype=torch.float64), torch.randint(3, (4, 7))
    dense: Tensor = controllers.write @ controllers.read  # (g, o, i)
    expected = residual + torch.einsum("btoi,bti->bto", dense[subgoal], residual)
    torch.testing.assert_close(controllers(residual, subgoal), expected)


def test_untrained_controllers_steer_nothing() -> None:
    residual = torch.randn(2, 3, 5)
    assert torch.equal(SupervisedControllers(3, 5, 2)(residual, torch.zeros(2, 3, dtype=torch.int64)), residual)


def test_labels_make_the_actions_likelier_and_the_model_stays() -> None:
    config = debug()
    model = build_model(config)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    options: dict[str, Any] = {"batch_size": 32, "episodes": 40, "seed": 0, "lr": 1e-2, "quiet": True}
    arguments = (model, generate(config, "discover"), config.environment, config.post_task)
    short, long = (steer_layers(*arguments, steps=steps, **options) for steps in (2, 120))
    assert len(long.success) == len(long.action_loss) == model.depth + 1
    assert all(later < earlier for earlier, later in zip(short.action_loss, long.action_loss, strict=True))
    assert all(0 <= share <= 1 for share in long.success)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert len(model.lower_body.blocks) == config.model.lower_depth


def test_chained_play_counts_the_tasks_done() -> None:
    config = dataclasses.replace(debug().environment, max_steps=400)
    assert isinstance(config, PinpadConfig)
    model = build_model(debug())
    controllers = SupervisedControllers(config.num_colors, model.dim, 2)
    share = play_chained(model, controllers, config, (2,), 600, seed=0)
    assert share == pytest.approx(0.25, abs=0.09)  # the first color that an aimless walk meets is one of four


def test_chained_play_counts_tasks_and_not_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    class Generous(PinpadBatch):
        def step(self, actions: Tensor) -> Tensor:
            running = ~(self.terminated | self.truncated)
            return 3 * super().step(actions) + 0.5 * running

    def generous(*arguments: Any) -> PinpadBatch:
        grids = task_grids(*arguments)
        grids.__class__ = Generous
        return grids

    config, model = debug().environment, build_model(debug())
    arguments = (model, SupervisedControllers(config.num_colors, model.dim, 2), config, (2,), 300, 0)
    plain = play_chained(*arguments)
    monkeypatch.setattr(steering, "task_grids", generous)
    assert 0 < play_chained(*arguments) == plain < 1


def test_both_commands_write_what_they_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    assert main(["pretrain", str(run), "--preset", "debug", "--quiet", "--device", "cpu"]) == 0
    options = ["--steps", "3", "--batch-size", "8", "--episodes", "16", "--quiet", "--json", "--device", "cpu"]
    for command, name, measure, layers in (("probe", "probes", "accuracy", 3), ("steer", "steering", "success", 3)):
        capsys.readouterr()
        assert main([command, str(run), *options]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert len(printed[measure]) == layers
        assert RunFolder(run).read_analysis(name)[measure] == printed[measure]
    assert (run / "figures" / "layers.png").stat().st_size > 0
    panels = figures.layers_figure([RunFolder(run), RunFolder(run)]).axes
    assert [len(panel.lines) for panel in panels] == [3, 3, 3]  # a line a seed and the median; a line a layer
    over = RunFolder(run).read_analysis("probes")["over_training"]
    assert over["steps"] == [0, 4, 12]
    assert over["accuracy"][-1] == RunFolder(run).read_analysis("probes")["accuracy"]
    assert main(["probe", str(run), "--steps", "0"]) == 2
    assert "steps is 0" in capsys.readouterr().err
