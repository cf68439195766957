"""Probes and supervised controllers: what they find where the answer is known, and that the model stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metacontroller import Transformer
from metacontroller.analysis import steering
from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.probing import LayerConfig, Probes, probe_layers
from metacontroller.analysis.steering import Steering, SupervisedControllers, play_chained, steer_layers
from metacontroller.cli import main
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpad
from metacontroller.domains.gridworld_pinpad.simulator import PinpadBatch
from metacontroller.models.protocol import SteerableModel
from metacontroller.presets.gridworld import debug
from metacontroller.recipes.config import ExperimentConfig, build_model
from metacontroller.storage.run_folder import RunFolder

WORLD = GridworldPinpad(debug().domain)


def source(n: int, generator: torch.Generator) -> Trajectories:
    """Demonstrations of the debug preset."""
    return WORLD.demonstrations("discover", n, generator)


def single_task(world: type[GridworldPinpad] = GridworldPinpad, max_steps: int = 20) -> GridworldPinpad:
    """The world of the debug preset with a single color as its task."""
    return world(replace(debug().domain, post_task=(2,), max_steps=max_steps))


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
    config = LayerConfig(steps=400, batch_size=64, episodes=3000, lr=3e-2)
    found = probe_layers(model, (told, told), config, subgoals=3, seed=0, quiet=True)
    assert len(found.accuracy) == model.depth + 1 == 3
    for accuracy, at_start in zip(found.accuracy, found.at_start, strict=True):
        assert at_start == pytest.approx(1 / 3, abs=0.05)  # five standard deviations
        assert accuracy == pytest.approx((1 + 1 / 3) / 2, abs=0.03)
    assert found.majority == pytest.approx(1 / 3, abs=0.03)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_residuals_are_those_of_every_split() -> None:
    model = build_model(debug())
    batch = source(4, torch.Generator().manual_seed(0))
    layers = model.residuals(batch.states, batch.actions)
    for layer, residual in enumerate(layers):
        model.resplit(layer)
        torch.testing.assert_close(residual, model.residual(batch.states, batch.actions))


@pytest.mark.parametrize("rank", [2, None])
def test_controllers_equal_the_dense_product(rank: int | None) -> None:
    controllers = SupervisedControllers(3, 5, rank).double()
    torch.nn.init.normal_(controllers.full if rank is None else controllers.write)
    residual, subgoal = torch.randn(4, 7, 5, dtype=torch.float64), torch.randint(3, (4, 7))
    dense: Tensor = controllers.full if rank is None else controllers.write @ controllers.read  # (g, o, i)
    expected = residual + torch.einsum("btoi,bti->bto", dense[subgoal], residual)
    torch.testing.assert_close(controllers(residual, subgoal), expected)


@pytest.mark.parametrize("rank", [2, None])
def test_untrained_controllers_steer_nothing(rank: int | None) -> None:
    residual = torch.randn(2, 3, 5)
    assert torch.equal(SupervisedControllers(3, 5, rank)(residual, torch.zeros(2, 3, dtype=torch.int64)), residual)


@pytest.mark.parametrize(("rank", "shape"), [(3, (4, 16, 3)), (None, (4, 16, 16))])
def test_they_have_the_rank_of_the_runs_controllers(
    untrained: Callable[[ExperimentConfig], LoadedRun],
    monkeypatch: pytest.MonkeyPatch,
    rank: int | None,
    shape: tuple[int, ...],
) -> None:
    played: list[SupervisedControllers] = []
    monkeypatch.setattr(steering, "play_chained", lambda model, controllers, *rest: played.append(controllers) or 0.0)
    run = untrained(replace(debug(), meta_controller=replace(debug().meta_controller, rank=rank)))
    Steering().measure(run, Steering.Config(steps=2, batch_size=4, episodes=2), quiet=True)
    weights = [controllers.full if rank is None else controllers.write for controllers in played]
    assert [tuple(weight.shape) for weight in weights] == [shape] * (run.base.depth + 1)
    assert all(weight.count_nonzero() for weight in weights)  # they were trained


def test_they_act_at_the_temperature_of_the_runs_controllers(
    untrained: Callable[[ExperimentConfig], LoadedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[float] = []
    monkeypatch.setattr(steering, "play_chained", lambda *arguments: played.append(arguments[-1]) or 0.0)
    run = untrained(replace(debug(), meta_controller=replace(debug().meta_controller, action_temperature=0.5)))
    Steering().measure(run, Steering.Config(steps=1, batch_size=2, episodes=2), quiet=True)
    assert played == [0.5] * (run.base.depth + 1)


def test_in_chained_play_actions_have_the_temperature_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = build_model(debug()), set()
    sample = model.action_readout.sample

    def spy(logits: Tensor, generator: torch.Generator, *, temperature: float) -> Tensor:
        asked.add(temperature)
        return sample(logits, generator, temperature=temperature)

    monkeypatch.setattr(model.action_readout, "sample", spy)
    controllers = SupervisedControllers(4, model.dim, 2)
    play_chained(model, controllers, single_task(), 3, seed=0, temperature=0.25)
    assert asked == {0.25}


def test_labels_make_the_actions_likelier_and_the_model_stays() -> None:
    model = build_model(debug())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    configs = (LayerConfig(steps=steps, batch_size=32, episodes=40, lr=3e-2) for steps in (2, 40))
    short, long = (steer_layers(model, (source, source), WORLD, config, seed=0, quiet=True) for config in configs)
    assert len(long.success) == len(long.action_loss) == model.depth + 1
    assert all(later < earlier for earlier, later in zip(short.action_loss, long.action_loss, strict=True))
    assert all(0 <= share <= 1 for share in long.success)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert isinstance(model, Transformer)
    assert len(model.lower_body.blocks) == debug().model.lower_depth


def test_a_model_that_cannot_be_split_is_refused() -> None:
    class Whole(Transformer):
        resplit = SteerableModel.resplit

    model = build_model(debug())
    model.__class__ = Whole
    with pytest.raises(ValueError, match="a Whole can be steered at one only; leave this analysis out"):
        steer_layers(model, (source, source), WORLD, LayerConfig(steps=1, batch_size=2, episodes=2), seed=0, quiet=True)


def test_chained_play_counts_the_tasks_done() -> None:
    model = build_model(debug())
    controllers = SupervisedControllers(4, model.dim, 2)
    share = play_chained(model, controllers, single_task(max_steps=400), 300, seed=0)
    assert share == pytest.approx(0.25, abs=0.09)  # the first color that an aimless walk meets is one of four


class Generous(PinpadBatch):
    """The same grids with other rewards."""

    def step(self, actions: Tensor) -> Tensor:
        running = ~(self.terminated | self.truncated)
        return 3 * super().step(actions) + 0.5 * running


class Silent(PinpadBatch):
    """The same grids, which do not tell the subgoal."""

    def goal(self) -> Tensor:
        return torch.full_like(self.steps, -1)


def world_of(kind: type[PinpadBatch]) -> type[GridworldPinpad]:
    """A world whose episodes are of another kind."""

    class World(GridworldPinpad):
        def reset(self, *arguments: Any, **options: Any) -> PinpadBatch:
            grids = super().reset(*arguments, **options)
            grids.__class__ = kind
            return grids

    return World


def test_chained_play_counts_tasks_and_not_rewards() -> None:
    model = build_model(debug())
    controllers = SupervisedControllers(4, model.dim, 2)
    plain, generous = single_task(), single_task(world_of(Generous))
    share = play_chained(model, controllers, plain, 300, 0)
    assert 0 < play_chained(model, controllers, generous, 300, 0) == share < 1


def test_chained_play_needs_to_know_the_subgoal() -> None:
    model = build_model(debug())
    with pytest.raises(ValueError, match="which the world gridworld-pinpad does not tell"):
        play_chained(model, SupervisedControllers(4, model.dim, 2), single_task(world_of(Silent)), 4, 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 0}, "steps is 0; expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"episodes": -1}, "episodes is -1; expected at least 1"),
        ({"lr": float("nan")}, "lr is nan; expected a number above 0"),
    ],
)
def test_bad_options_are_refused(change: dict[str, Any], sentence: str) -> None:
    for kind in (Probes, Steering):
        with pytest.raises(ValueError, match=sentence):
            kind.Config(**change)


def test_both_commands_write_what_they_measured(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    assert main(["pretrain", str(run), "--preset", "debug", "--quiet", "--device", "cpu"]) == 0
    options = ["--steps", "3", "--batch-size", "8", "--episodes", "16", "--quiet", "--json", "--device", "cpu"]
    for command, name, measure, layers in (("probe", "probes", "accuracy", 3), ("steer", "steering", "success", 3)):
        capsys.readouterr()
        assert main([command, str(run), *options]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert len(printed[measure]) == layers
        assert RunFolder(run).read_analysis(name)[measure] == printed[measure]
        assert (run / "figures" / f"{name}.png").stat().st_size > 0
    results = RunFolder(run).read_analysis("probes")
    assert [len(panel.lines) for panel in Probes().draw([results, results]).axes] == [3, 3]  # runs and median; layers
    steered = RunFolder(run).read_analysis("steering")
    assert [len(panel.lines) for panel in Steering().draw([steered, steered]).axes] == [3]
    assert results["over_training"]["steps"] == [0, 4, 12]
    assert results["over_training"]["accuracy"][-1] == results["accuracy"]
    with pytest.raises(SystemExit, match="2"):
        main(["probe", str(run), "--steps", "0"])
    assert "steps is 0; expected at least 1." in capsys.readouterr().err


def test_a_table_has_a_line_a_layer_and_measure(untrained: Callable[..., LoadedRun]) -> None:
    results = Probes().measure(untrained(), Probes.Config(steps=1, batch_size=4, episodes=8), quiet=True)
    assert "over_training" not in results  # there are no snapshots
    rows = dict(Probes().rows([results, results]))
    assert rows["accuracy, layer 2"] == 2 * [results["accuracy"][2]]
    assert rows["lr"] == 2 * [3e-3]
