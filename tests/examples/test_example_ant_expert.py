"""The script that trains the ant's expert: its statistics, its policy as it is exported, and resuming."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch

from helpers import load_script
from metacontroller.domains.ant_pinpad.domain import AntPinpad, AntPinpadConfig
from metacontroller.domains.ant_pinpad.expert import Expert
from metacontroller.domains.base import Split
from metacontroller.presets import preset
from metacontroller.storage.run_folder import RunFolder

for package, extra in (("mujoco", "ant"), ("stable_baselines3", "expert")):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extra {extra})", allow_module_level=True)

SCRIPT = Path(__file__).parents[2] / "examples" / "ant_expert.py"
SMALL = ["--rows", "8", "--steps-per-update", "16", "--checkpoint-every", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(SCRIPT)


def test_running_statistics_are_those_of_all_values(script: ModuleType) -> None:
    values = torch.randn(60, 3).double() * torch.tensor([1.0, 5.0, 0.1]) + 3
    found = script.Statistics(3)
    for part in values.split([10, 1, 49]):
        found.add(part)
    assert torch.allclose(found.mean, values.mean(0), atol=1e-4)
    assert torch.allclose(found.variance, values.var(0, unbiased=False), rtol=1e-3, atol=1e-4)


def test_a_resumed_run_ends_like_one_that_was_never_interrupted(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []
    for name, parts in (("whole", ["384"]), ("parts", ["256", "384"])):
        run = RunFolder(tmp_path / name)
        for steps in parts:
            words = ["--steps", steps, *(["--resume"] if steps != parts[0] else [])]
            monkeypatch.setattr(sys, "argv", ["ant_expert.py", "train", str(run.path), *words, *SMALL])
            script.main()
        shown = [
            {key: line[key] for key in ("step", "success", "episode_steps", "speed")}
            for line in run.read_metrics("expert")
        ]
        tensors, meta = run.load_checkpoint(script.CHECKPOINT)
        ended.append((tensors, meta["updates"], shown, (run.path / "expert.safetensors").read_bytes()))
    (tensors, *whole), (resumed, *rest) = ended
    assert whole == rest
    assert tensors.keys() == resumed.keys()
    assert [name for name, value in tensors.items() if not torch.equal(value, resumed[name])] == []
    assert len(tensors["window.steps"]) > 2  # episodes ended, and new ones began

    written = str(tmp_path / "parts" / "expert.safetensors")
    world = AntPinpad(AntPinpadConfig(expert=written, only_successes=False, max_steps=4, threads=1))
    assert world.demonstrate(None, 2, torch.Generator().manual_seed(0)).actions.shape == (2, 4, 8)


def test_it_resumes_and_what_it_exports_acts_like_its_policy(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, policies = RunFolder(tmp_path / "run"), []
    monkeypatch.setattr(
        script,
        "exported",
        lambda policy, seen, make=script.exported: policies.append((policy, seen)) or make(policy, seen),
    )
    for words in (["--steps", "256"], ["--steps", "384", "--resume"]):
        monkeypatch.setattr(sys, "argv", ["ant_expert.py", "train", str(run.path), *words, *SMALL])
        script.main()
    assert [line["step"] for line in run.read_metrics("expert")][-2:] == [256, 384]
    assert run.load_checkpoint(script.CHECKPOINT)[1]["updates"] == 3
    expert, about = Expert.load(run.path / "expert.safetensors")
    assert about["steps"] == 384
    policy, seen = policies[-1]
    features = seen.mean + seen.std * torch.randn(5, expert.features).double()
    normalized = ((features - seen.mean) / seen.std).clamp(-script.LIMIT, script.LIMIT).float()
    with torch.no_grad():
        assert torch.allclose(expert(features.float()), policy.get_distribution(normalized).mode(), atol=1e-3)
    monkeypatch.setattr(sys, "argv", ["ant_expert.py", "train", str(run.path), "--steps", "512", *SMALL])
    with pytest.raises(ValueError, match="a checkpoint of this phase; resume it"):
        script.main()


def test_data_are_those_of_the_preset(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expert, out = tmp_path / "expert.safetensors", tmp_path / "data"
    Expert.untrained().save(expert, {"arena": {"cell_size": 1.5}})
    words = ["--preset", "ant-debug", "--episodes", "4", "--keep-failures", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["ant_expert.py", "data", str(expert), *words])
    script.main()
    assert capsys.readouterr().out.count("4 episodes of 4 played") == 3
    written = {path.name for path in out.iterdir()}
    config = replace(preset("ant-debug").domain, expert=str(expert), episodes=4, dataset=str(out))
    for split in get_args(Split):
        AntPinpad(config).store(split)
    assert {path.name for path in out.iterdir()} == written


def test_the_reward_is_the_velocity_along_the_way(script: ModuleType) -> None:
    ants = script.GuidedAnts(script.Arena(), [(0, 2)], 6, bonus=2.0, penalty=0.0, gamma=0.9, seed=0, threads=1)
    ants.reset()
    way, before = ants.guide.way(), ants.ants.state[:, :2]
    _, scaled, ended, _ = ants.step(torch.zeros(6, 8).numpy())
    assert not ended.any()
    expected = 2.0 * ((ants.ants.state[:, :2] - before) / 0.05 * way).sum(1)
    assert torch.allclose(torch.from_numpy(scaled).double() * ants.returns.std, expected, atol=1e-5)


def test_an_ant_that_falls_loses_the_penalty(script: ModuleType) -> None:
    ants = script.GuidedAnts(script.Arena(), [(0, 2)], 4, bonus=0.0, penalty=3.0, gamma=0.9, seed=0, threads=1)
    ants.reset()
    ants.ants.state[:2, 2] = 5.0
    _, scaled, ended, infos = ants.step(torch.zeros(4, 8).numpy())
    assert ended.tolist() == [True, True, False, False]
    assert torch.allclose(
        torch.from_numpy(scaled).double() * ants.returns.std, torch.tensor([-3.0, -3.0, 0.0, 0.0]).double()
    )
    assert [info.get("is_success") for info in infos] == [False, False, None, None]


def test_the_learning_rate_follows_the_divergence(script: ModuleType) -> None:
    rate = script.Rate(1e-3, 0.01)
    for kl, expected in ((0.03, 1e-3 / 1.5), (0.01, 1e-3 / 1.5), (0.004, 1e-3)):
        rate.adapt(kl)
        assert rate(0.5) == pytest.approx(expected)
    for _ in range(20):
        rate.adapt(0.0)
    assert rate(0.5) == script.RATES[1]


def test_quick_physics_is_for_training_alone(script: ModuleType) -> None:
    options = script.ant_model().opt
    before = options.integrator
    with script.integrator(euler=True):
        assert options.integrator == script.mujoco.mjtIntegrator.mjINT_EULER != before
    assert options.integrator == before


def test_rows_that_end_start_anew_and_are_guided_there(script: ModuleType) -> None:
    arena = script.Arena(max_steps=3)
    ants = script.GuidedAnts(arena, [(0, 2)], 4, bonus=0.0, penalty=3.0, gamma=0.9, seed=0, threads=1)
    ants.reset()
    for _ in range(3):
        observation, _, ended, infos = ants.step(torch.zeros(4, 8).numpy())
    assert ended.all()
    assert all(info["TimeLimit.truncated"] and not info["is_success"] and info["steps"] == 3 for info in infos)
    assert ants.ants.steps.tolist() == [0] * 4
    assert torch.equal(ants.guide.fields, script.Guide(ants.ants).fields)
    assert not (infos[0]["terminal_observation"] == observation[0]).all()
