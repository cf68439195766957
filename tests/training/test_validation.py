"""The loss on episodes that are not trained on: what it is, when it parts, and that training does not depend on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from metacontroller.cli import main
from metacontroller.data.batching import Generate, apart
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.registry import domain_of
from metacontroller.phases.pretrain import pretrain
from metacontroller.presets.gridworld import debug
from metacontroller.recipes.config import build_model
from metacontroller.recipes.run_phase import demonstrations
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.seeding import noise_generator
from metacontroller.training.validation import Validation


def source(mean: float, spread: float = 1.0, different: int = 1000) -> Generate:
    """Episodes of 1 to 3 steps, whose 'loss' is their state: a mean and a spread; only so many differ."""

    def generate(n: int, generator: torch.Generator) -> Trajectories:
        made = torch.Generator().manual_seed(3)
        losses = mean + spread * torch.randn(different, generator=made).double()
        rows = torch.randint(different, (n,), generator=generator)
        lengths = torch.randint(1, 4, (different,), generator=made)[rows]
        states = losses[rows][:, None, None].expand(-1, 4, 1)
        return Trajectories(states=states, actions=torch.zeros(n, 3, dtype=torch.int64), lengths=lengths)

    return generate


def validation(of: Generate, rows: int = 32, module: nn.Module | None = None) -> Validation:
    def action_loss(batch: Trajectories, generator: torch.Generator) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        return (batch.states[:, :-1, 0] * batch.mask()).sum() / batch.lengths.sum()

    return Validation(of, rows, 0, nn.Linear(1, 1) if module is None else module, action_loss)


def test_the_losses_part_beyond_noise_and_a_margin() -> None:
    trained_on = source(1.0, 0.1)
    assert validation(source(1.5, 0.1)).compared(trained_on)[1]
    assert not validation(source(1.05, 0.1)).compared(trained_on)[1]  # within a tenth
    assert not validation(source(0.2, 0.1)).compared(trained_on)[1]  # lower
    assert not validation(source(2.0, 5.0)).compared(source(1.0, 5.0))[1]  # within noise
    assert not validation(source(9.0, 0.1, different=1)).compared(trained_on)[1]  # of one episode noise is unknown
    assert validation(source(-2.0, 0.1)).compared(source(-3.0, 0.1))[1]  # densities


def test_the_line_tells_both_means_over_steps_and_how_many_episodes_differ() -> None:
    found = validation(source(2.0, different=5), rows=20)
    episodes = found.episodes
    different = {float(row[0, 0]): int(length) for row, length in zip(episodes.states, episodes.lengths, strict=True)}
    expected = sum(loss * steps for loss, steps in different.items()) / sum(different.values())
    line, _ = found.compared(source(1.0, 0.0, different=1))
    assert line == f"action loss 1 on 1 episodes of training, {expected:.4g} on {len(different)} held out"
    assert found.loss() == pytest.approx(
        float((episodes.states[:, 0, 0] * episodes.lengths).sum() / episodes.lengths.sum())
    )


def test_each_part_returns_to_its_mode() -> None:
    module = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
    module.train()
    module[1].eval()
    validation(source(1.0), module=module).loss()
    assert [part.training for part in module] == [True, False]


def test_weights_do_not_depend_on_it_and_its_loss_is_that_of_the_model(tmp_path: Path) -> None:
    config, models = debug(), []
    domain = domain_of(config.domain)
    held_out = demonstrations(domain, "validation")
    for name, judged_by in (("with", held_out), ("without", None)):
        run = RunFolder(tmp_path / name)
        options: dict[str, Any] = {"validation": judged_by, "quiet": True}
        source = demonstrations(domain, "pretrain")
        models.append(pretrain(config.pretrain, build_model(config), source, run, **options))
    watched, alone = (list(model.parameters()) for model in models)
    assert all(torch.equal(one, other) for one, other in zip(watched, alone, strict=True))
    lines, others = (RunFolder(tmp_path / name).read_metrics("pretrain") for name in ("with", "without"))
    assert [line["action_loss"] for line in lines] == [line["action_loss"] for line in others]
    assert all("val_action_loss" not in line for line in others)
    start = noise_generator(config.pretrain.seed, torch.device("cpu"))
    episodes = domain.demonstrations("validation", config.pretrain.optimizer.batch_size, apart(start))
    with torch.no_grad():
        expected = models[0].behavior_cloning_loss(episodes.states, episodes.actions, episodes.lengths).action
    assert lines[-1]["val_action_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_own_data_that_cannot_be_learned_but_by_heart_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Actions are coins: in training the loss falls below log 2, on held-out episodes it cannot."""
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz",
        states=rng.normal(size=(40, 9, 4)).astype(np.float32),
        actions=rng.integers(2, size=(40, 8)),
    )
    (tmp_path / "coins.py").write_text(
        "import numpy as np, torch, pathlib\n"
        "from metacontroller.data import Trajectories\n\n\n"
        "def coins():\n"
        "    held = np.load(pathlib.Path(__file__).parent / 'data.npz')\n"
        "    arrays = {name: torch.from_numpy(held[name]) for name in ('states', 'actions')}\n"
        "    return Trajectories(**arrays, lengths=torch.full((40,), 8))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        words = ["--preset", "offline-debug", "--dataset", "coins:coins", "--device", "cpu"]
        words += ["--config.pretrain.optimizer.steps", "90", "--config.pretrain.optimizer.lr", "0.02"]
        assert main(["pretrain", str(tmp_path / "run"), *words, "--validation-share", "0.25"]) == 0
        error = capsys.readouterr().err
        assert "held out\npretrain: warning: the model knows the episodes that it trained on better" in error
        last = RunFolder(tmp_path / "run").read_metrics("pretrain")[-1]
        assert last["val_action_loss"] > 0.7 > 0.6 > last["action_loss"]
        assert main(["pretrain", str(tmp_path / "all"), *words, "--validation-share", "0"]) == 0
        assert "held out" not in capsys.readouterr().err
        assert "val_action_loss" not in RunFolder(tmp_path / "all").read_metrics("pretrain")[-1]
        assert main(["pretrain", str(tmp_path / "none"), "--validation-share", "0.2"]) == 2
        assert "--validation-share 0.2 stands beside no dataset" in capsys.readouterr().err
