"""Muon beside AdamW: which weights it trains, by what steps, and that a run with both resumes exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from metacontroller.domains.registry import domain_of
from metacontroller.models.transformer import Transformer
from metacontroller.phases.pretrain import PretrainConfig, pretrain
from metacontroller.presets.gridworld import debug
from metacontroller.recipes.config import build_model
from metacontroller.recipes.run_phase import demonstrations
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.optimizer import Learner, OptimizerConfig

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
OPTIMIZER = OptimizerConfig(steps=6, batch_size=4, lr=1e-2, decay_steps=4, checkpoint_every=3)


def learner_of(module: nn.Module, muon_lr: float, weight_decay: float = 0.0) -> Learner:
    return Learner(
        module,
        list(module.parameters()),
        torch.Generator(),
        lr=1e-2,
        weight_decay=weight_decay,
        max_grad_norm=1e9,
        matrices=[value for value in module.parameters() if value.ndim > 1],
        muon_lr=muon_lr,
    )


@needs_muon
def test_muon_moves_a_matrix_by_its_orthogonalized_gradient_and_adamw_the_rest() -> None:
    """The slow version: U V^T of the gradient's singular value decomposition, as long as a step of AdamW."""
    torch.manual_seed(0)
    module = nn.Linear(24, 16)
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    learner = learner_of(module, muon_lr=0.1)
    loss = (module(torch.randn(64, 24)) - torch.randn(64, 16)).square().mean()
    loss.backward()
    gradient, of_bias = module.weight.grad.clone(), module.bias.grad.clone()  # type: ignore[union-attr]
    learner.optimizer_step(loss)
    left, _, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    step = (weight - module.weight.detach()).double() / (0.1 * 0.2 * 24**0.5)
    turned = left.T @ step @ right.T
    assert torch.linalg.svdvals(step).tolist() == pytest.approx([1.0] * 16, abs=0.35)  # Newton-Schulz is not exact
    assert float((turned - torch.diag(turned.diagonal())).abs().max()) < 0.05
    torch.testing.assert_close(bias - module.bias.detach(), 1e-2 * of_bias.sign(), rtol=1e-3, atol=1e-5)


@needs_muon
def test_slices_of_three_axes_are_matrices_of_their_own() -> None:
    """Three matrices in one parameter move as three parameters do."""
    torch.manual_seed(0)
    start, target, seen = torch.randn(3, 6, 8), torch.randn(3, 64, 6), torch.randn(64, 8)

    def moved(parts: nn.ParameterList, joined: bool) -> torch.Tensor:
        module = nn.Module()
        module.parts = parts
        module.bias = nn.Parameter(torch.zeros(6))
        learner = learner_of(module, muon_lr=0.1, weight_decay=0.1)
        for _ in range(3):
            whole = parts[0] if joined else torch.stack(list(parts))
            loss = (torch.einsum("ni,koi->kno", seen, whole) + module.bias - target).square().mean()
            loss.backward()
            learner.optimizer_step(loss)
            assert all(part.grad is None for part in parts)
        return parts[0].detach() if joined else torch.stack([part.detach() for part in parts])

    one = moved(nn.ParameterList([nn.Parameter(start.clone())]), joined=True)
    three = moved(nn.ParameterList([nn.Parameter(part.clone()) for part in start]), joined=False)
    assert not torch.allclose(one, start, atol=0.01)
    torch.testing.assert_close(one, three)


def test_without_a_learning_rate_of_its_own_muon_trains_nothing() -> None:
    module = nn.Linear(4, 4)
    assert set(learner_of(module, muon_lr=0.0).optimizers) == {"optimizer"}
    sizes = [len(group["params"]) for group in learner_of(module, 0.0).optimizers["optimizer"].param_groups]
    assert sizes == [2]


def test_the_matrices_are_those_of_the_blocks() -> None:
    model = build_model(debug())
    assert isinstance(model, Transformer)
    names = {id(value): name for name, value in model.named_parameters()}
    chosen = {names[id(matrix)] for matrix in model.matrices()}
    assert chosen
    assert all(name.startswith(("lower_body.blocks", "upper_body.blocks")) for name in chosen)
    assert all(value.ndim == 2 for value in model.matrices())


@needs_muon
def test_a_run_with_muon_resumes_exactly(tmp_path: Path) -> None:
    config = PretrainConfig(optimizer=OPTIMIZER, muon_lr=3e-3)
    source = demonstrations(domain_of(debug().domain), "pretrain")

    def run(folder: str, *parts: int) -> dict[str, torch.Tensor]:
        for number, steps in enumerate(parts):
            part = replace(config, optimizer=replace(OPTIMIZER, steps=steps, decay_steps=0))
            model = pretrain(
                part, build_model(debug()), source, RunFolder(tmp_path / folder), resume=number > 0, quiet=True
            )
        return model.state_dict()

    whole, pieces = run("whole", 6), run("pieces", 3, 6)
    assert all(torch.equal(value, pieces[name]) for name, value in whole.items())
    plain = pretrain(
        PretrainConfig(optimizer=replace(OPTIMIZER, decay_steps=0)),
        build_model(debug()),
        source,
        RunFolder(tmp_path / "plain"),
        quiet=True,
    ).state_dict()
    assert any(not torch.equal(value, plain[name]) for name, value in whole.items())


def test_an_old_torch_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match=r"muon_lr is 0\.1, and torch .* has no Muon"):
        learner_of(nn.Linear(4, 4), muon_lr=0.1)
