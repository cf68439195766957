"""Discovery: the KL's weight over time, what is logged, what is left alone."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from metacontroller.baselines.compile import build_compile, discover_compile
from metacontroller.control.discovery_losses import discover_episodes, steered_losses
from metacontroller.control.metacontroller import MetaController
from metacontroller.control.parameter_groups import matrices
from metacontroller.control.switching import GateConfig
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.registry import domain_of
from metacontroller.phases.diagnostics import diagnose
from metacontroller.phases.discover import DiscoverConfig, discover
from metacontroller.presets.gridworld import debug
from metacontroller.recipes.config import build_meta_controller, build_model
from metacontroller.recipes.run_phase import demonstrations
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.optimizer import OptimizerConfig

OPTIMIZER = OptimizerConfig(steps=12, batch_size=16, lr=1e-2, log_every=4)
METRICS = {"loss", "action_loss", "kl", "alpha", "switches", "codes"}
METRICS |= {"gate_recall", "gate_precision", "gate_binary_fraction"}


def learn(
    folder: Path, model: Any = None, labels: bool = True, **options: Any
) -> tuple[MetaController, list[dict[str, Any]]]:
    """A metacontroller of the debug preset after 12 updates, and what was logged."""
    config = debug()
    source = demonstrations(domain_of(config.domain), "discover")

    def unlabelled(n: int, generator: torch.Generator) -> Any:
        return dataclasses.replace(source(n, generator), subgoals=None, segments=None)

    run = RunFolder(folder)
    settings = DiscoverConfig(**({"optimizer": OPTIMIZER, "alpha": 0.2, "alpha_start": 0.2} | options))
    steering, base = build_meta_controller(config), model or build_model(config)
    discover(settings, base, steering, source if labels else unlabelled, run, quiet=True)
    return steering, run.read_metrics("discover")


def test_alpha_rises_between_its_steps() -> None:
    config = DiscoverConfig(optimizer=OPTIMIZER, alpha=0.5, alpha_start=0.1, alpha_warmup=(2, 6))
    assert [config.alpha_at(step) for step in (0, 2, 3, 4, 6, 11)] == pytest.approx([0.1, 0.1, 0.2, 0.3, 0.5, 0.5])
    assert DiscoverConfig(optimizer=OPTIMIZER, alpha=0.5, alpha_start=0.1).alpha_at(0) == 0.5


def test_what_is_logged_adds_up(tmp_path: Path) -> None:
    _, lines = learn(tmp_path)
    assert [set(line) for line in lines] == [METRICS | {"phase", "step"}] * 3
    for line in lines:
        assert line["loss"] == pytest.approx(line["action_loss"] + 0.2 * line["kl"], rel=1e-4)
        assert line["switches"] > 0
        assert line["codes"] >= 1
    assert lines[-1]["kl"] < lines[0]["kl"]


@pytest.mark.parametrize("mode", ["soft", "forced"])
def test_codes_are_counted_where_the_gate_is_thresholded(tmp_path: Path, mode: Any) -> None:
    config = debug()
    sizes = dataclasses.replace(config.meta_controller, gate=GateConfig(mode=mode))
    steering = build_meta_controller(dataclasses.replace(config, meta_controller=sizes))
    with torch.no_grad():
        steering.switching.out.weight.zero_()
        steering.switching.out.bias.fill_(-0.5)  # soft: beta 0.38 at every step, below the threshold
    episode = demonstrations(domain_of(config.domain), "discover")(1, torch.Generator().manual_seed(0))
    length = int(episode.lengths[0])
    assert length > 4

    def source(n: int, generator: torch.Generator) -> Any:
        return episode.index(torch.zeros(n, dtype=torch.long))

    run, optimizer = RunFolder(tmp_path), dataclasses.replace(OPTIMIZER, steps=1)
    discover(DiscoverConfig(optimizer=optimizer), build_model(config), steering, source, run, quiet=True)
    (line,) = run.read_metrics("discover")
    assert line["codes"] == (length if mode == "forced" else 1)
    beta = 1.0 if mode == "forced" else 1 / (1 + math.exp(0.5))
    assert line["switches"] == pytest.approx(beta * (length - 1), rel=1e-4)


def logged_in_one_update(folder: Path, way: str, gate: GateConfig, **options: Any) -> dict[str, Any]:
    """The metrics of one update from scratch, of the metacontroller or of CompILE."""
    config, optimizer = debug(), dataclasses.replace(OPTIMIZER, steps=1)
    model, source = build_model(config), demonstrations(domain_of(config.domain), "discover")
    sizes = dataclasses.replace(config.meta_controller, gate=gate)
    run, steering = RunFolder(folder), build_meta_controller(dataclasses.replace(config, meta_controller=sizes))
    if way == "compile":
        settings = dataclasses.replace(config.compile, optimizer=optimizer)
        encoder = domain_of(config.domain).spec().encoder
        parts = build_compile(settings, model, encoder, sizes.dim_latent, 0), steering
        discover_compile(settings, model, *parts, source, run, quiet=True, **options)
    else:
        discover(DiscoverConfig(optimizer=optimizer), model, steering, source, run, quiet=True, **options)
    return run.read_metrics("discover")[0]


@pytest.mark.parametrize("way", ["discover", "compile"])
def test_switches_are_judged_within_the_given_tolerance(tmp_path: Path, way: str) -> None:
    forced = GateConfig(mode="forced")
    near, far = (
        logged_in_one_update(tmp_path / str(steps), way, forced, gate_tolerance=steps)["gate_precision"]
        for steps in (0, 100)
    )
    assert near < 0.7
    assert far == 1.0


@pytest.mark.parametrize("way", ["discover", "compile"])
def test_switches_are_counted_at_the_gates_threshold(tmp_path: Path, way: str) -> None:
    low, high = (  # beta is about 0.5 in the first update
        logged_in_one_update(tmp_path / str(threshold), way, GateConfig(threshold=threshold), gate_tolerance=100)
        for threshold in (0.1, 0.9)
    )
    assert (low["gate_recall"], low["gate_precision"]) == (1.0, 1.0)
    assert (high["gate_recall"], high["gate_precision"]) == (0.0, 0.0)


def test_diagnostics_are_written_and_change_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = debug()
    source, settings = demonstrations(domain_of(config.domain), "discover"), DiscoverConfig(optimizer=OPTIMIZER)

    def learned(folder: Path, quiet: bool) -> MetaController:
        steering, run = build_meta_controller(config), RunFolder(folder)
        discover(settings, build_model(config), steering, source, run, quiet=quiet)
        return steering

    before = torch.random.get_rng_state()
    steering = learned(tmp_path / "loud", quiet=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    written = RunFolder(tmp_path / "loud").read_analysis("diagnostics")
    warnings = written.pop("warnings")
    assert warnings == diagnose(**written)
    assert warnings  # twelve updates find nothing
    assert capsys.readouterr().err.splitlines()[-len(warnings) :] == [f"discover: warning: {line}" for line in warnings]

    learned(tmp_path / "quiet", quiet=True)
    assert capsys.readouterr().err == ""
    assert RunFolder(tmp_path / "quiet").read_analysis("diagnostics") == {**written, "warnings": warnings}

    monkeypatch.setattr("metacontroller.phases.discover.write_diagnostics", lambda *_: [])
    without = learned(tmp_path / "without", quiet=True)
    assert RunFolder(tmp_path / "without").read_analysis("diagnostics") == {}
    for name, value in steering.state_dict().items():
        assert torch.equal(value, without.state_dict()[name])
    logged = [RunFolder(tmp_path / name).read_metrics() for name in ("loud", "without")]
    assert logged[0] == logged[1]


def test_an_unknown_objective_is_refused(tmp_path: Path) -> None:
    config, run = debug(), RunFolder(tmp_path)
    parts = DiscoverConfig(optimizer=OPTIMIZER), build_model(config), build_meta_controller(config)
    source = demonstrations(domain_of(config.domain), "discover")
    with pytest.raises(ValueError, match="discovery 'other' is unknown; known are metacontroller"):
        discover(*parts, source, run, objective="other", quiet=True)


def test_discovery_does_not_look_at_the_labels(tmp_path: Path) -> None:
    with_labels, _ = learn(tmp_path / "with")
    without, lines = learn(tmp_path / "without", labels=False)
    assert not any(name.startswith("gate") for line in lines for name in line)
    for name, value in with_labels.state_dict().items():
        assert torch.equal(value, without.state_dict()[name])


def test_the_model_and_the_policy_are_left_alone(tmp_path: Path) -> None:
    model = build_model(debug())
    steering, _ = learn(tmp_path, model, state_loss_weight=0.1)
    for module, prefix in ((model, ""), (steering, "policy.")):
        initial = build_model(debug()) if module is model else build_meta_controller(debug())
        for name, value in initial.state_dict().items():
            same = torch.equal(module.state_dict()[name], value)
            assert same or not name.startswith(prefix)
    saved = MetaController.init_and_load(tmp_path / "meta_controller.safetensors").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in steering.state_dict().items())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
def test_muon_trains_the_matrices_of_a_metacontroller_and_resumes_exactly(tmp_path: Path) -> None:
    config = debug()
    full = dataclasses.replace(config, meta_controller=dataclasses.replace(config.meta_controller, rank=None))
    steering = build_meta_controller(full)
    names = {id(value): name for name, value in steering.named_parameters()}
    chosen = {names[id(matrix)] for matrix in matrices(steering)}
    assert {"encoder.0.weight", "sequence_embedder.project_in.weight", "switching.drive.weight"} <= chosen
    assert {"history.weight_ih_l0", "history.weight_hh_l0", "controller.full"} <= chosen
    assert not any(name.startswith("policy.") or name.endswith("bias") for name in chosen)
    source, base = demonstrations(domain_of(debug().domain), "discover"), build_model(debug())

    def run(folder: str, *parts: int, muon_lr: float = 3e-3) -> dict[str, torch.Tensor]:
        for number, steps in enumerate(parts):
            steering = build_meta_controller(full)
            settings = DiscoverConfig(optimizer=dataclasses.replace(OPTIMIZER, steps=steps), muon_lr=muon_lr)
            where = RunFolder(tmp_path / folder)
            discover(settings, base, steering, source, where, resume=number > 0, quiet=True)
        return steering.state_dict()

    whole, pieces, plain = run("whole", 6), run("pieces", 3, 6), run("plain", 6, muon_lr=0.0)
    assert all(torch.equal(value, pieces[name]) for name, value in whole.items())
    for name in ("encoder.0.weight", "controller.full"):
        assert not torch.equal(whole[name], plain[name])


def test_the_choice_of_a_mode_is_emphasized_in_training_alone(tmp_path: Path) -> None:
    config = debug()
    base = dataclasses.replace(config.model, action_modes=2).build({"num_continuous": 3}, {"num_continuous": 2})

    def source(n: int, generator: torch.Generator) -> Trajectories:
        states, actions = (torch.randn(n, *shape, generator=generator) for shape in ((6, 3), (5, 2)))
        return Trajectories(states=states, actions=actions, lengths=torch.full((n,), 5))

    def learned(weight: float) -> dict[str, torch.Tensor]:
        steering = build_meta_controller(config)
        settings = DiscoverConfig(optimizer=dataclasses.replace(OPTIMIZER, steps=2), choice_weight=weight)
        run = RunFolder(tmp_path / str(weight))
        discover(settings, base, steering, source, run, quiet=True)
        return steering.state_dict()

    plain, emphasized = learned(1.0), learned(20.0)
    assert not torch.equal(plain["encoder.0.weight"], emphasized["encoder.0.weight"])
    assert base.action_readout.choice_weight == 1.0
    with pytest.raises(ValueError, match=r"choice_weight is 20\.0, but actions are no mixture"):
        learn(tmp_path / "grid", choice_weight=20.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": -0.1}, "alpha is -0.1; expected a number of at least 0"),
        ({"alpha_warmup": (5, 2)}, r"alpha_warmup is \(5, 2\); expected \(from, to\)"),
        ({"alpha_warmup": (-1, 2)}, r"alpha_warmup is \(-1, 2\)"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiscoverConfig(optimizer=OPTIMIZER, **change)


def test_a_symmetry_changes_what_the_embedder_sees_and_nothing_else() -> None:
    model, steering = build_model(debug()), build_meta_controller(debug())
    episodes = demonstrations(domain_of(debug().domain), "discover")(8, torch.Generator().manual_seed(0))
    augment = domain_of(debug().domain).augment

    def output(states: torch.Tensor | None) -> Any:
        noise = steering.sample_noise(8, episodes.steps, torch.Generator().manual_seed(1))
        arguments = (model, episodes.states, episodes.actions, episodes.lengths)
        return steered_losses(steering, *arguments, noise=noise, embedded_states=states)[1]

    as_they_are, again = output(None), output(episodes.states)
    augmented = output(augment(episodes.states, torch.Generator().manual_seed(2)))
    assert torch.equal(as_they_are.mean, again.mean)
    assert not torch.allclose(as_they_are.mean, augmented.mean)


def test_the_embedder_reads_the_state_after_the_last_action_and_nothing_after_it() -> None:
    model, steering = build_model(debug()), build_meta_controller(debug())
    episodes = demonstrations(domain_of(debug().domain), "discover")(8, torch.Generator().manual_seed(0))
    row = int(episodes.lengths.argmin())
    length = int(episodes.lengths[row])
    assert length < episodes.steps

    def mean_of_row(changed: slice) -> torch.Tensor:
        states = episodes.states.clone()
        states[row, changed, -1] = (states[row, changed, -1] + 1) % debug().domain.size ** 2
        output = discover_episodes(steering, model, states, episodes.actions, episodes.lengths)
        return output.mean[row, :length]

    as_it_is, last, padding = mean_of_row(slice(0)), mean_of_row(slice(length, length + 1)), slice(length + 1, None)
    assert not torch.allclose(as_it_is, last)
    torch.testing.assert_close(as_it_is, mean_of_row(padding))


def test_an_embedded_residual_of_another_length_is_refused() -> None:
    steering = build_meta_controller(debug())
    width = debug().model.dim
    with pytest.raises(ValueError, match="embedded_residual has 7 steps; expected 5, as the residual, or one more"):
        steering.discover(torch.zeros(2, 5, width), embedded_residual=torch.zeros(2, 7, width))


def test_co_training_moves_the_model_and_leaves_the_losses_what_they_are(tmp_path: Path) -> None:
    config = debug()
    model, steering = build_model(config).double(), build_meta_controller(config).double()
    batch = demonstrations(domain_of(config.domain), "discover")(6, torch.Generator().manual_seed(0))
    noise = steering.sample_noise(batch.batch, batch.steps, torch.Generator().manual_seed(1))
    seen = domain_of(config.domain).augment(batch.states, torch.Generator().manual_seed(2))

    def losses(train_model: bool) -> Any:
        return steered_losses(
            steering,
            model,
            batch.states,
            batch.actions,
            batch.lengths,
            noise=noise,
            embedded_states=seen,
            train_model=train_model,
        )[0]

    frozen, trained = losses(False), losses(True)
    for ours, theirs in zip(frozen, trained, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    ours = torch.autograd.grad(frozen.action, steering.controller.write)
    theirs = torch.autograd.grad(trained.action, steering.controller.write, retain_graph=True)
    assert torch.allclose(ours[0], theirs[0], atol=1e-12)
    reached = torch.autograd.grad(trained.action, list(model.parameters()), allow_unused=True)
    names = [name for (name, _), value in zip(model.named_parameters(), reached, strict=True) if value is None]
    assert all(name.startswith(("state_readout", "action_readout.embedding")) for name in names)
    weight = dict(model.named_parameters())["encoder.table"]
    (gradient,) = torch.autograd.grad(losses(True).action, weight)
    index = tuple(int(i) for i in (gradient.abs() == gradient.abs().max()).nonzero()[0])
    with torch.no_grad():
        weight[index] += 1e-6
        up = float(losses(True).action)
        weight[index] -= 2e-6
        down = float(losses(True).action)
    assert (up - down) / 2e-6 == pytest.approx(float(gradient[index]), rel=1e-5)


def test_a_co_trained_model_is_kept_beside_the_metacontroller(tmp_path: Path) -> None:
    model = build_model(debug())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learn(tmp_path, model=model, train_model=True)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    kept = type(model).init_and_load(tmp_path / "cotrained_model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept.state_dict()[name])
