"""A guided start of discovery: its losses against slow ones, no look at labels, exact resumption, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.objectives.test_fixed_points import walks
from torch import Tensor
from torch.nn import functional as F

from metacontroller.baselines.compile import boundary_probability
from metacontroller.control.core import DiscoveryNoise
from metacontroller.control.discovery_losses import discover_episodes, steered_losses
from metacontroller.control.metacontroller import MetaController
from metacontroller.control.parameter_groups import fixed_gate
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.registry import domain_of
from metacontroller.models.protocol import SteerableModel
from metacontroller.models.transformer import Transformer
from metacontroller.objectives import guided
from metacontroller.objectives.base import Setup
from metacontroller.objectives.clips import draw_clips
from metacontroller.objectives.guided import GATE_WEIGHT, Guided
from metacontroller.objectives.steering import Steering
from metacontroller.phases.discover import DiscoverConfig, discover
from metacontroller.presets import ant, gridworld
from metacontroller.recipes.run_phase import run_discover, run_internal_rl, run_pretrain
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.optimizer import OptimizerConfig

OPTIMIZER = OptimizerConfig(steps=6, batch_size=8, lr=1e-2, log_every=2, checkpoint_every=3)


@pytest.fixture(autouse=True)
def few_demonstrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guided, "EPISODES", 100)


def source(n: int, generator: torch.Generator) -> Trajectories:
    """Walks to two of three things; an action is the step taken."""
    positions, lengths, goals = walks(n, generator)
    actions = 10 * (positions[:, 1:, :2] - positions[:, :-1, :2])
    segments = F.pad((goals[:, 1:] != goals[:, :-1]).cumsum(1), (1, 0))
    return Trajectories(states=positions, actions=actions, lengths=lengths, subgoals=goals, segments=segments)


def positions_of(states: Tensor) -> Tensor:
    return states


def make_model() -> SteerableModel:
    torch.manual_seed(0)
    return Transformer(
        16,
        action_embed_readout={"num_continuous": 2},
        state_embed_readout={"num_continuous": 8},
        lower_body={"depth": 1},
        upper_body={"depth": 1},
    ).eval()


def make_steering(**options: Any) -> MetaController:
    torch.manual_seed(1)
    return MetaController(16, dim_meta_controller=16, **({"dim_latent": 2, "code": "binary"} | options))


def whole(batch: Trajectories) -> tuple[Tensor, Tensor, Tensor]:
    return batch.states, batch.actions, batch.lengths


def learn(folder: Path, *parts: int, updates: int, generate: Any = source, **options: Any) -> dict[str, Tensor]:
    known = {"positions": positions_of, "decisions": decisions_of}
    for number, steps in enumerate(parts):
        steering, run = make_steering(), RunFolder(folder)
        settings = DiscoverConfig(
            optimizer=replace(OPTIMIZER, steps=steps), guided_updates=min(updates, steps), **options
        )
        resume = number > 0
        discover(settings, make_model(), steering, generate, run, **known, resume=resume, quiet=True)
    return steering.state_dict()


def make_guide(steering: MetaController, model: SteerableModel) -> Guided:
    """Four guided updates before eq. 3."""
    config, setup = DiscoverConfig(optimizer=OPTIMIZER, guided_updates=4), Setup(model, steering, source)
    return Guided(Steering(config, setup), config, setup._replace(positions=positions_of))


def test_the_loss_is_that_of_its_equation() -> None:
    steering, model = make_steering(), make_model()
    guide, batch = make_guide(steering, model), source(5, torch.Generator().manual_seed(3))
    extras = guide.prepare(batch, 0, torch.Generator().manual_seed(4))
    taught, noise = guide.code_vectors(extras["fixed_point_codes"]), DiscoveryNoise(extras["code"], extras["gate"])
    with torch.no_grad():
        losses, output = steered_losses(steering, model, *whole(batch), noise=noise, teacher_codes=taught)
        loss, metrics = guide.loss(batch, 3, extras)
    assert torch.equal(output.z, taught)
    begin, every, gate, counts = 0.0, 0.0, 0.0, [0, 0, 0]
    for row in range(5):
        for step in range(int(batch.lengths[row])):
            word = int(taught[row, step].argmax())
            begins = step == 0 or word != int(taught[row, step - 1].argmax())
            missing = 0.0
            for bit in range(2):
                share = torch.sigmoid(output.distribution[row, step, bit].double())
                missing -= float(torch.log(share if word >> bit & 1 else 1 - share))
            every, counts[1] = every + missing, counts[1] + 1
            if begins:
                begin, counts[0] = begin + missing, counts[0] + 1
            if step:
                beta = output.beta[row, step].double()
                gate, counts[2] = gate - float(torch.log(beta if begins else 1 - beta)), counts[2] + 1
    assert counts[0] > 7  # more than one code an episode
    expected = begin / counts[0] + every / counts[1] + GATE_WEIGHT * gate / counts[2]
    assert float(loss) == pytest.approx(float(losses.action) + expected, rel=1e-4)
    assert metrics["action_loss"] == losses.action


def test_after_the_last_guided_update_the_loss_is_that_of_the_objective_that_follows() -> None:
    steering, model = make_steering(), make_model()
    guide, batch = make_guide(steering, model), source(5, torch.Generator().manual_seed(3))
    following = Steering(guide.config, guide.setup)
    found = [
        each.loss(batch, 4, each.prepare(batch, 4, torch.Generator().manual_seed(4))) for each in (guide, following)
    ]
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    found[0][0].backward()
    assert all(value.grad is None and value.requires_grad for value in steering.switching.parameters())


def test_the_losses_of_several_processes_add_up_to_that_of_one() -> None:
    guide, batch = make_guide(make_steering(), make_model()), source(6, torch.Generator().manual_seed(3))
    extras = guide.prepare(batch, 0, torch.Generator().manual_seed(4))

    @torch.no_grad()
    def loss(rows: list[int]) -> float:
        index = torch.tensor(rows)
        some = replace(batch, **{name: value[index] for name, value in vars(batch).items() if value is not None})
        share = float(some.lengths.sum() / batch.lengths.sum())
        return share * float(guide.loss(some, 0, {name: value[index] for name, value in extras.items()})[0])

    assert loss([0, 1]) + loss([2, 3, 4, 5]) == pytest.approx(loss([0, 1, 2, 3, 4, 5]), rel=1e-5)


def decisions_of(episodes: Trajectories) -> Tensor:
    return episodes.mask() & (torch.arange(episodes.steps) % 3 == 0)


def test_the_loss_of_clips_is_that_of_steered_steps_under_the_code_of_the_first() -> None:
    steering, model = make_steering(), make_model()
    guide, batch = make_guide(steering, model), source(4, torch.Generator().manual_seed(3))
    drawn = draw_clips(source, decisions_of, 12, 3, torch.Generator().manual_seed(5))
    extras = guide.clip_extras(drawn, batch)
    total, count = 0.0, 0
    for number, (row, start) in enumerate(zip(drawn.rows.tolist(), drawn.starts.tolist(), strict=True)):
        code = F.one_hot(guide.codes_of(drawn.episodes)[row, start], 4).float()
        clip = drawn.clips.index(torch.tensor([number]))
        with torch.no_grad():
            residual = model.residual(clip.states, clip.actions)
            steered = residual + residual @ steering.controller.matrix(code).T
            log_prob = model.action_readout.log_prob(model.action_readout(model.upper(steered)), clip.actions)
        total -= float(log_prob[0, : int(clip.lengths)].sum())
        count += int(clip.lengths)
    loss = guide.clip_loss(batch, extras)
    assert float(loss.detach()) == pytest.approx(total / count, rel=1e-4)
    loss.backward()
    written: Any = steering.controller.write.grad
    assert float(written.abs().sum()) > 0
    assert all(value.grad is None for value in model.parameters())


def test_teacher_codes_steer_and_the_gate_is_asked_after_each_of_them() -> None:
    steering, model = make_steering(), make_model()
    with torch.no_grad():
        steering.switching.drive.weight[:, model.dim :] = 0.0  # it reads no history
    batch = source(4, torch.Generator().manual_seed(3))
    free = discover_episodes(steering, model, *whole(batch))
    taught = discover_episodes(steering, model, *whole(batch), teacher_codes=free.z.detach())
    for name in ("steered", "beta"):
        torch.testing.assert_close(getattr(taught, name), getattr(free, name))
    other = discover_episodes(steering, model, *whole(batch), teacher_codes=free.z.detach().flip(0))
    assert not torch.allclose(other.steered, free.steered)


def test_under_teacher_codes_the_gate_is_asked_with_the_history_of_a_random_step() -> None:
    steering, model = make_steering(), make_model()
    batch = source(4, torch.Generator().manual_seed(3))
    taught = F.one_hot(torch.randint(4, (4, batch.steps)), 4).float()
    noise = steering.sample_noise(4, batch.steps)
    found = discover_episodes(steering, model, *whole(batch), noise=noise, teacher_codes=taught).beta
    elsewhere = 0
    with torch.no_grad():
        read = steering.norm(model.residual(batch.states[:, : batch.steps], batch.actions))
        for row, length in enumerate(batch.lengths.tolist()):
            state, histories = torch.zeros(1, steering.dim_history), []
            for step in range(length):
                histories.append(state)
                state = steering.history(read[row : row + 1, step : step + 1], state[None])[1][0]
            for step in range(1, length):
                asked = int(noise.gate[row, step] * length)
                options = (read[row, step], histories[asked][0], taught[row, step - 1], torch.ones(()))
                torch.testing.assert_close(found[row, step], steering.switching.probability(*options))
                elsewhere += asked != step
    assert elsewhere > 20


@pytest.mark.parametrize("mode", ["soft", "straight-through", "forced"])
def test_a_fixed_gate_mixes_codes_as_before_and_gets_no_gradient(mode: Any) -> None:
    steering, model = make_steering(gate={"mode": mode}).double(), make_model().double()
    batch = source(4, torch.Generator().manual_seed(3))
    batch = replace(batch, states=batch.states.double(), actions=batch.actions.double())
    noise, encoder = steering.sample_noise(4, batch.steps), list(steering.encoder.parameters())
    options = (model, batch.states, batch.actions, batch.lengths)
    losses, free = steered_losses(steering, *options, noise=noise)
    attached = torch.autograd.grad(losses.action, encoder, retain_graph=True)
    with fixed_gate(steering):
        losses, fixed = steered_losses(steering, *options, noise=noise)
    detached = torch.autograd.grad(losses.action, encoder, retain_graph=True)
    torch.testing.assert_close(fixed.z, free.z)
    assert torch.equal(fixed.beta, free.beta)
    losses.action.backward()
    for part in (steering.switching, steering.norm, steering.history):
        assert all(value.grad is None and value.requires_grad for value in part.parameters())
    same = torch.allclose(attached[0], detached[0])  # beta depends on the code before, eq. 16
    assert same == (mode == "forced")

    z, before = [], torch.zeros(4, 4, dtype=torch.float64)  # the slow version: step by step, beta as numbers
    proposal = steering.codes.sample(free.distribution, noise=noise.code)
    for step in range(batch.steps):
        share = free.gate.detach()[:, step, None]
        before = share * proposal[:, step] + (1 - share) * before
        z.append(before)
    steered = steering.steer(model.residual(batch.states[:, : batch.steps], batch.actions), torch.stack(z, 1))
    slow = model.losses_under(steered, batch.states, batch.actions, batch.lengths).action
    torch.testing.assert_close(losses.action, slow)
    for found, expected in zip(detached, torch.autograd.grad(slow, encoder), strict=True):
        torch.testing.assert_close(found, expected)


def gate_along(parts: dict[str, Tensor], residual: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """beta (b, t) along given codes (b, t, n_z), of a metacontroller with these weights: at once, and step by step."""
    steering = make_steering()
    steering.load_state_dict(parts)
    with torch.no_grad():
        whole = boundary_probability(steering, residual, codes)
        state, steps = steering.initial_state(len(codes)), []
        for t in range(codes.shape[1]):
            beta, state = steering.observe(residual[:, t], state)
            state = steering.integrate(state, torch.ones(len(codes), dtype=torch.bool), codes[:, t])
            steps.append(beta)
    return whole, torch.stack(steps, 1)


@pytest.mark.parametrize("muon_lr", [0.0, 1e-2])
def test_updates_after_guided_ones_leave_beta_of_given_residuals_and_codes_as_it_is(
    tmp_path: Path, muon_lr: float
) -> None:
    after, whole = (learn(tmp_path / str(steps), steps, updates=4, muon_lr=muon_lr) for steps in (4, 6))
    batch = source(16, torch.Generator().manual_seed(9))
    with torch.no_grad():
        residual = make_model().residual(batch.states, batch.actions)
    codes = F.one_hot(torch.randint(4, residual.shape[:2], generator=torch.Generator().manual_seed(1)), 4).float()
    for before, now in zip(gate_along(after, residual, codes), gate_along(whole, residual, codes), strict=True):
        middle = before[:, 1:].median()  # so that half of the decisions lie near the threshold
        assert int(((before >= middle) != (now >= middle)).sum()) == 0
        assert torch.equal(before, now)
    moved = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, whole[name])}
    assert moved == {"encoder", "sequence_embedder", "controller"}

    start = make_steering().state_dict()
    for learned in (after, learn(tmp_path / "free", 6, updates=0)):  # guided updates and free ones do teach the gate
        assert not torch.equal(gate_along(learned, residual, codes)[0], gate_along(start, residual, codes)[0])


def test_guided_updates_teach_gate_encoder_and_controller_without_labels(tmp_path: Path) -> None:
    def unlabelled(n: int, generator: torch.Generator) -> Trajectories:
        return replace(source(n, generator), subgoals=None, segments=None)

    learned = learn(tmp_path / "with", 6, updates=6)
    without = learn(tmp_path / "without", 6, updates=6, generate=unlabelled)
    assert all(torch.equal(value, without[name]) for name, value in learned.items())
    plain = learn(tmp_path / "plain", 6, updates=0)
    for part in ("encoder.0.weight", "switching.drive.weight", "controller.write"):
        assert not torch.equal(learned[part], plain[part])
        assert not torch.equal(learned[part], make_steering().state_dict()[part])


def test_guided_and_free_updates_resume_exactly(tmp_path: Path) -> None:
    whole = learn(tmp_path / "whole", 6, updates=4, clips=2)
    for first in (3, 5):
        pieces = learn(tmp_path / f"pieces{first}", first, 6, updates=4, clips=2)
        assert all(torch.equal(value, pieces[name]) for name, value in whole.items())
    plain = learn(tmp_path / "plain", 6, updates=4)
    assert not torch.equal(plain["controller.write"], whole["controller.write"])


def test_it_learns(tmp_path: Path) -> None:
    optimizer = replace(OPTIMIZER, steps=40, batch_size=16)
    steering, run = make_steering(), RunFolder(tmp_path)
    settings = DiscoverConfig(optimizer=optimizer, guided_updates=40)
    discover(settings, make_model(), steering, source, run, positions=positions_of, quiet=True)
    lines = run.read_metrics("discover")
    assert lines[-1]["loss"] < lines[0]["loss"] - 1.0


def test_what_it_needs_is_asked_for(tmp_path: Path) -> None:
    settings = DiscoverConfig(optimizer=OPTIMIZER, guided_updates=2)
    with pytest.raises(ValueError, match="guided_updates is 2, but no positions are given"):
        discover(settings, make_model(), make_steering(), source, RunFolder(tmp_path / "a"), quiet=True)
    for changes in ({"guided_updates": 0}, {}):
        with pytest.raises(ValueError, match="clips is 2, but updates are not guided or no decisions are given"):
            discover(
                replace(settings, clips=2, **changes),
                make_model(),
                make_steering(),
                source,
                RunFolder(tmp_path / "c"),
                positions=positions_of,
                quiet=True,
            )
    gaussian = make_steering(code="gaussian")
    with pytest.raises(ValueError, match=r"meta_controller\.code is 'gaussian'; set it to 'binary'"):
        discover(
            settings, make_model(), gaussian, source, RunFolder(tmp_path / "b"), positions=positions_of, quiet=True
        )
    with pytest.raises(ValueError, match=r"guided_updates is 7; expected at most 6"):
        DiscoverConfig(optimizer=OPTIMIZER, guided_updates=7)
    world = domain_of(gridworld.debug().domain)
    with pytest.raises(ValueError, match=r"the world gridworld-pinpad has no positions; set discover\.guided_updates"):
        world.positions(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="the world gridworld-pinpad does not say where experts decide; set clips"):
        world.decisions(source(2, torch.Generator()))


@pytest.mark.parametrize("mode", ["forced", "fixed-frequency"])
def test_a_gate_that_does_not_learn_is_not_asked(mode: Any) -> None:
    steering = make_steering(gate={"mode": mode})
    guide, batch = make_guide(steering, make_model()), source(4, torch.Generator().manual_seed(3))
    extras = guide.prepare(batch, 0, torch.Generator().manual_seed(4))
    taught = guide.code_vectors(extras["fixed_point_codes"])
    output = discover_episodes(steering, guide.setup.model, *whole(batch), teacher_codes=taught)
    loss = float(guide.proposal_loss(batch, extras, output).detach())
    assert 0 < loss < 2 * 2 * 2  # two means of two bits of about log 2


def test_the_ant_names_all_of_an_observation_but_its_body() -> None:
    world = domain_of(ant.debug().domain)
    states = world.reset(3, torch.Generator().manual_seed(0)).observation[:, None]
    assert torch.equal(world.positions(states), states[..., 27:])


def test_a_run_of_the_ant_may_start_guided_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guided, "EPISODES", 300)  # they are short
    config = ant.debug()
    codes = replace(config.meta_controller, code="binary", dim_latent=2, decoder_hidden=0, action_temperature=0.0)
    config = replace(
        config,
        domain=replace(config.domain, dataset=str(tmp_path / "data")),
        meta_controller=codes,
        pretrain=replace(config.pretrain, clips=2),
        discover=replace(config.discover, guided_updates=4, clips=2, symmetry_augmentation=True),
    )
    options: Any = {"quiet": True, "device": "cpu"}
    learned = []
    for name, parts in (("whole", [6]), ("pieces", [3, 6])):
        run = RunFolder(tmp_path / name)
        run_pretrain(config, run, resume=False, **options)
        for number, steps in enumerate(parts):
            optimizer = replace(config.discover.optimizer, steps=steps, decay_steps=0)
            guided_updates = min(4, steps)
            part = replace(config.discover, optimizer=optimizer, guided_updates=guided_updates)
            steering = run_discover(replace(config, discover=part), run, resume=number > 0, **options)
        learned.append(steering.state_dict())
        rl = replace(config.internal_rl, episodes=16, batch_size=16)
        run_internal_rl(replace(config, internal_rl=rl), run, resume=False, **options)
    assert all(torch.equal(value, learned[1][name]) for name, value in learned[0].items())
