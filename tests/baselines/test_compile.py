"""CompILE as a baseline: its termination rule is causal, the model stays frozen, what it leaves behind can act."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from metacontroller.baselines.compile import (
    CompILE,
    CompileConfig,
    boundary_probability,
    build_compile,
    discover_compile,
)
from metacontroller.control.metacontroller import MetaController
from metacontroller.domains.registry import domain_of
from metacontroller.models.protocol import SteerableModel
from metacontroller.presets.gridworld import debug
from metacontroller.recipes.config import ExperimentConfig, build_meta_controller, build_model
from metacontroller.recipes.run_phase import demonstrations
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import Processes
from metacontroller.training.optimizer import OptimizerConfig

OPTIMIZER = OptimizerConfig(steps=6, batch_size=16, lr=1e-2, log_every=2, checkpoint_every=3)


def encoder_of(config: ExperimentConfig) -> dict[str, Any]:
    return domain_of(config.domain).spec().encoder


def learn(folder: Path, steps: int = 6, resume: bool = False) -> tuple[SteerableModel, CompILE, MetaController]:
    """The debug preset after some updates."""
    config = debug()
    model, acting = build_model(config), build_meta_controller(config)
    settings = replace(config.compile, optimizer=replace(OPTIMIZER, steps=steps))
    segmentation = build_compile(settings, model, encoder_of(config), acting.dim_latent, seed=0)
    source = demonstrations(domain_of(config.domain), "discover")
    discover_compile(settings, model, segmentation, acting, source, RunFolder(folder), resume=resume, quiet=True)
    return model, segmentation, acting


def test_the_termination_rule_is_what_acts_step_by_step() -> None:
    acting = build_meta_controller(debug()).double()
    for parameter in acting.parameters():
        torch.nn.init.normal_(parameter)
    residual = torch.randn(3, 9, acting.dim_model, dtype=torch.float64)
    switch = torch.rand(3, 9) < 0.3
    switch[:, 0] = True
    code = torch.randn(3, 9, acting.dim_latent, dtype=torch.float64)
    last = torch.where(switch, torch.arange(9), 0).cummax(1).values
    held = code.gather(1, last[..., None].expand_as(code))
    beta = boundary_probability(acting, residual, held)
    state = acting.initial_state(3)
    for step in range(9):
        seen, state = acting.observe(residual[:, step], state)
        if step:
            assert torch.allclose(seen, beta[:, step], atol=1e-12)
        state = acting.integrate(state, switch[:, step], code[:, step])
    changed = residual.clone()
    changed[:, 5:] += torch.randn(3, 4, acting.dim_model)
    assert torch.equal(boundary_probability(acting, changed, held)[:, :5], beta[:, :5])
    assert not torch.allclose(boundary_probability(acting, changed, held)[:, 5:], beta[:, 5:])


def test_the_model_stays_frozen_and_only_what_acts_is_trained(tmp_path: Path) -> None:
    config = debug()
    model, segmentation, acting = learn(tmp_path)
    for name, value in build_model(config).state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    initial = build_meta_controller(config).state_dict()
    moved = {name.split(".")[0] for name, value in acting.state_dict().items() if not torch.equal(value, initial[name])}
    assert moved == {"norm", "history", "switching", "controller"}
    untrained = build_compile(config.compile, model, encoder_of(config), acting.dim_latent, seed=0).state_dict()
    changed = [name for name, value in segmentation.state_dict().items() if not torch.equal(value, untrained[name])]
    assert "encoder.table" in changed
    assert "segmenter.code.2.weight" in changed


def test_the_boundary_loss_trains_the_gate_alone(tmp_path: Path) -> None:
    model, segmentation, acting = learn(tmp_path)
    batch = demonstrations(domain_of(debug().domain), "discover")(8, torch.Generator().manual_seed(1))
    result = segmentation(batch.states, batch.lengths, segmentation.segmenter.sample_noise(8, batch.steps))
    beta = boundary_probability(acting, model.residual(batch.states, batch.actions).detach(), result.code_at().detach())
    target = result.boundary_at().detach()
    loss = F.binary_cross_entropy(beta, target)
    gradients = torch.autograd.grad(loss, list(segmentation.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in gradients)
    assert torch.autograd.grad(loss, acting.switching.out.weight)[0].abs().sum() > 0


def test_a_resumed_run_ends_as_one_never_stopped(tmp_path: Path) -> None:
    _, whole, acting = learn(tmp_path / "whole")
    learn(tmp_path / "resumed", steps=3)
    _, resumed, resumed_acting = learn(tmp_path / "resumed", resume=True)
    for module, other in ((whole, resumed), (acting, resumed_acting)):
        for name, value in module.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "is_main", False)
    learn(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_it_leaves_behind_can_be_loaded(tmp_path: Path) -> None:
    _, segmentation, _ = learn(tmp_path)
    loaded = CompILE.init_and_load(tmp_path / "compile.safetensors")
    for name, value in segmentation.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    assert [line["step"] for line in RunFolder(tmp_path).read_metrics("discover")] == [2, 4, 6]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="alpha_code is -1"):
        CompileConfig(optimizer=OPTIMIZER, alpha_code=-1.0)
    with pytest.raises(ValueError, match="alpha_warmup is"):
        CompileConfig(optimizer=OPTIMIZER, alpha_warmup=(5, 2))
    assert CompileConfig(optimizer=OPTIMIZER, alpha_code=0.4, alpha_warmup=(2, 6)).alpha_code_at(4) == 0.2
