"""Settings that only a later phase could refuse are refused before the first one begins, and leave no folder behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metacontroller.cli import main
from metacontroller.errors import UserError
from metacontroller.presets import preset
from metacontroller.recipes.config import ExperimentConfig, check_phases
from metacontroller.recipes.run_phase import run_pretrain
from metacontroller.storage.run_folder import RunFolder

Change = Callable[[ExperimentConfig], ExperimentConfig]


def discovery(**changes: Any) -> Change:
    return lambda config: replace(config, discover=replace(config.discover, **changes))


def steering(**changes: Any) -> Change:
    return lambda config: replace(config, meta_controller=replace(config.meta_controller, **changes))


CASES: dict[str, tuple[str, Change, str]] = {
    "guided with Gaussian codes": ("ant-laptop", steering(code="gaussian", free_bits=0.0), "set it to 'binary'"),
    "guided without positions": ("debug", discovery(guided_updates=2), r"has no positions; set discover\.guided_up"),
    "clips that are not guided": ("ant-laptop", discovery(guided_updates=0), "clips is 16, but updates are not guided"),
    "clips without decisions": (
        "debug",
        lambda config: replace(config, pretrain=replace(config.pretrain, clips=2)),
        "does not say where experts decide; set clips to 0",
    ),
}


def binary_where_guided(config: ExperimentConfig, message: str) -> ExperimentConfig:
    return steering(code="binary")(config) if "positions" in message else config


@pytest.mark.parametrize("name", CASES)
def test_what_a_later_phase_would_refuse(tmp_path: Path, name: str) -> None:
    start, change, message = CASES[name]
    config = binary_where_guided(change(preset(start)), message)
    with pytest.raises(UserError, match=message):
        check_phases(config)
    with pytest.raises(UserError, match=message):
        run_pretrain(config, RunFolder(tmp_path / "run"), resume=False, quiet=True, device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_world_without_symmetry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom metacontroller.data import Trajectories\n\n\n"
        "def made():\n"
        "    states, actions = torch.randn(9, 4, 2), torch.randint(2, (9, 3))\n"
        "    return Trajectories(states=states, actions=actions, lengths=torch.full((9,), 3))\n"
    )
    words = ["--dataset", "mine:made", "--preset", "offline-debug", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        augmented = "--config.discover.symmetry-augmentation"
        assert main(["pretrain", str(tmp_path / "run"), *words, augmented]) == 2
    assert "the world offline has no symmetry; set discover.symmetry_augmentation to false" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["debug", "quick", "laptop", "paper", "ant-laptop", "ant-paper", "babyai-debug"])
def test_presets_pass(name: str) -> None:
    check_phases(preset(name))


def test_a_new_reproduction_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "debug", "--seeds", "0", "--config.pretrain.clips", "2", "--device", "cpu"]
    assert main(["reproduce", "--out", str(tmp_path / "out"), *words]) == 2
    assert "does not say where experts decide" in capsys.readouterr().err
    assert not (tmp_path / "out" / "seed-0").exists()
