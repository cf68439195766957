"""Training that diverges stops at once, says where, keeps the last checkpoint and leaves a dump."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from metacontroller import Transformer, cli
from metacontroller.data import Trajectories
from metacontroller.errors import DivergedError, UserError
from metacontroller.phases.policy_gradient import InternalRLConfig, reinforce
from metacontroller.phases.pretrain import PretrainConfig, pretrain
from metacontroller.phases.rollout import RawRollout
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.loop import train
from metacontroller.training.optimizer import OptimizerConfig

NAN, INF = float("nan"), float("inf")


class Scale(nn.Module):
    """Two weights, of which a test can spoil loss, gradient or value at a chosen update."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))


def episodes(n: int, generator: torch.Generator) -> Trajectories:
    return Trajectories(
        states=torch.rand(n, 3, 1, generator=generator),
        actions=torch.zeros(n, 2, dtype=torch.int64),
        lengths=torch.full((n,), 2),
    )


def spoil(module: Scale, loss: Tensor, kind: str) -> Tensor:
    """A loss whose value, one gradient or one weight is not finite."""
    if kind == "loss":
        return loss * INF
    if kind == "gradient":
        module.second.register_hook(lambda gradient: gradient * NAN)
    elif kind == "overflow":
        module.second.register_hook(lambda gradient: gradient.clamp_min(1) * 1e30)
    elif kind == "parameter":
        with torch.no_grad():
            module.second[1] = NAN
    return loss


def run_train(folder: Path, kind: str, at: int, **options: Any) -> Scale:
    module = Scale()

    def loss_function(batch: Trajectories, step: int, extras: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (module.first.sum() * batch.states.mean() - module.second.sum()).square()
        return (spoil(module, loss, kind) if step + 1 == at else loss), {"size": loss.detach()}

    settings = {"steps": 8, "batch_size": 2, "lr": 0.1, "log_every": 2, "checkpoint_every": 2, **options}
    config = OptimizerConfig(**settings)
    train(
        "phase",
        config,
        module,
        list(module.parameters()),
        episodes,
        loss_function,
        RunFolder(folder),
        seed=0,
        quiet=True,
    )
    return module


def test_padding_that_holds_nan_is_not_learned_from(tmp_path: Path) -> None:
    model = Transformer(
        8,
        action_embed_readout={"num_continuous": 1},
        state_embed_readout={"num_continuous": 2},
        lower_body={"depth": 1},
        upper_body={"depth": 1},
    )

    def padded(n: int, generator: torch.Generator, within: bool = False) -> Trajectories:
        states, actions = torch.rand(n, 5, 2, generator=generator), torch.rand(n, 4, 1, generator=generator)
        states[:, 3 - within :], actions[:, 2:] = NAN, INF
        return Trajectories(states=states, actions=actions, lengths=torch.full((n,), 2))

    config = PretrainConfig(optimizer=OptimizerConfig(steps=3, batch_size=2, lr=0.1), state_loss_weight=1.0)
    pretrain(config, model, padded, RunFolder(tmp_path / "run"), quiet=True)
    assert all(bool(value.isfinite().all()) for value in model.parameters())
    with pytest.raises(UserError, match="state holds NaN"):
        pretrain(config, model, partial(padded, within=True), RunFolder(tmp_path / "other"), quiet=True)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("loss", "the loss is inf"),
        ("gradient", "the gradient of second is not finite"),
    ],
)
def test_the_update_is_not_made_and_the_dump_shows_it(tmp_path: Path, kind: str, found: str) -> None:
    with pytest.raises(DivergedError) as caught:
        run_train(tmp_path, kind, at=5)
    assert f"phase diverged at update 5: {found}" in str(caught.value)
    assert "(phase.safetensors, as it was)" in str(caught.value)
    tensors, meta = RunFolder(tmp_path).load_checkpoint("phase")
    assert meta["step"] == 4
    told = json.loads((tmp_path / "diverged" / "phase.json").read_text())
    assert (told["update"], told["found"], told["phase"]) == (5, found, "phase")
    dump = load_file(tmp_path / "diverged" / "phase.safetensors")
    assert torch.equal(dump["module.second"], tensors["module.second"])
    assert dump["batch.states"].shape == (2, 3, 1)


def test_finite_gradients_whose_norm_overflows_are_clipped(tmp_path: Path) -> None:
    module = run_train(tmp_path, "overflow", at=2, max_grad_norm=0.5)
    assert RunFolder(tmp_path).load_checkpoint("phase")[1]["step"] == 8
    assert all(bool(value.isfinite().all()) for value in module.parameters())


def test_a_weight_that_is_not_finite_is_not_written_to_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="diverged at update 6: the parameter second is not finite"):
        run_train(tmp_path, "parameter", at=6)
    assert RunFolder(tmp_path).load_checkpoint("phase")[1]["step"] == 4


def test_without_a_checkpoint_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"diverged at update 1: .*\(none yet\)"):
        run_train(tmp_path, "loss", at=1)


def test_the_error_travels_between_processes() -> None:
    error = copy.copy(DivergedError("pretrain diverged."))  # as pickle would, from a worker to its parent
    assert (str(error), error.status) == ("pretrain diverged.", 3)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("loss", "the loss is (inf|nan)"),
        ("return", "the return of an episode is not finite"),
        ("parameter", "parameter second"),
    ],
)
def test_reinforcement_stops_too(tmp_path: Path, kind: str, found: str) -> None:
    module, played = Scale(), 0

    def play(n: int, generator: torch.Generator) -> RawRollout:
        nonlocal played
        played += 1
        returns, ones = torch.arange(float(n)), torch.ones(n, dtype=torch.int64)
        if kind == "return" and played == 3:
            returns[1] = NAN
        steps = torch.zeros(n, 1)
        return RawRollout(returns, ones > 0, ones, ones, None, states=steps, actions=steps, log_prob=steps)

    def surrogate(rollout: RawRollout, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (module.first.sum() + module.second.sum()) * advantage.mean()
        return (spoil(module, loss, kind) if played == 3 else loss), {}

    config = InternalRLConfig(episodes=20, batch_size=4, checkpoint_every=1)
    with pytest.raises(DivergedError, match=f"rl diverged at update 3: .*{found}"):
        reinforce("rl", config, module, play, surrogate, RunFolder(tmp_path), resume=False, quiet=True)
    assert RunFolder(tmp_path).load_checkpoint("rl")[1]["step"] == 2
    assert "batch.returns" in load_file(tmp_path / "diverged" / "rl.safetensors")


def test_a_phase_that_diverges_ends_with_status_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "debug", "--quiet", "--device", "cpu", "--config.pretrain.optimizer.lr", "1e30"]
    assert cli.main(["pretrain", str(tmp_path / "run"), *words]) == 3
    said = capsys.readouterr().err
    assert said.startswith("metacontroller: pretrain diverged at update 2: the loss is ")
    assert said.count("\n") == 1
    assert not (tmp_path / "run" / "base_model.safetensors").exists()
