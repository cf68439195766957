"""Evaluation mode that lets gradients through recurrent layers on a GPU, and the phases that ask for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from metacontroller.cli import main
from metacontroller.training.evaluation_mode import evaluation_mode

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PHASES = ["pretrain", "discover", "internal-rl", "internal-rl --raw"]


def test_only_recurrent_layers_without_dropout_stay_in_training_mode() -> None:
    module = nn.Sequential(nn.Dropout(), nn.GRU(3, 3), nn.LSTM(3, 3, num_layers=2, dropout=0.1)).train()
    evaluation_mode(module)
    assert [layer.training for layer in module] == [False, True, False]
    assert not module.training


@pytest.mark.parametrize("discovery", ["metacontroller", "compile", "cotrained"])
def test_no_phase_takes_gradients_through_a_recurrent_layer_in_evaluation_mode(
    discovery: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, forward = [], nn.GRU.forward

    def checked(self: nn.GRU, x: Any, *rest: Any) -> Any:
        output = forward(self, x, *rest)
        if output[0].requires_grad:
            taken.append(self.training)
        return output

    monkeypatch.setattr(nn.GRU, "forward", checked)
    options = {"compile": ["--config.discovery", "compile"], "cotrained": ["--config.discover.train-model"]}
    made = ["--preset", "debug", *options.get(discovery, [])]
    for phase in PHASES:
        words = [*phase.split(), str(tmp_path), *(made if phase == "pretrain" else [])]
        assert main([*words, "--quiet", "--device", "cpu"]) == 0
    assert taken
    assert all(taken)


@needs_cuda
@pytest.mark.parametrize("discovery", ["metacontroller", "compile"])
def test_every_phase_runs_on_a_gpu(discovery: str, tmp_path: Path) -> None:
    made = ["--preset", "debug", "--config.discovery", discovery]
    for phase in PHASES:
        words = [*phase.split(), str(tmp_path), *(made if phase == "pretrain" else [])]
        assert main([*words, "--quiet", "--device", "cuda"]) == 0
