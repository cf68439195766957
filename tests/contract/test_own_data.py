"""docs/own-data.md: its commands run at debug sizes, each world from its policy to its report."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from helpers import load_script
from metacontroller.cli import main
from metacontroller.data import Dataset, Episodes, Trajectories
from metacontroller.domains.offline.domain import Offline, OfflineConfig
from metacontroller.phases.artefacts import learned_from
from metacontroller.storage.run_folder import RunFolder

PAGE = (Path(__file__).parents[2] / "docs" / "own-data.md").read_text(encoding="utf-8")
EXPERTS, SCRIPT = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
WORLDS = re.findall(r"^```shell\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SMALLER = {"--episodes": "6", "--workers": "1"}
"""Of `collect`."""
SIZES = {"internal-rl.episodes": 8, "evaluate.episodes": 4, "domain.max-steps": 8}
DEBUG = " ".join(["--preset offline-debug --quiet", *(f"--config.{name} {size}" for name, size in SIZES.items())])
"""Of `pretrain`, for all phases."""


def measuring() -> Any:
    """The script that measures the page's worlds."""
    return load_script(Path(__file__).parents[2] / "benchmarks" / "own_worlds.py")


def commands(block: str) -> list[list[str]]:
    """The words of each line, at debug sizes."""
    lines = []
    for line in block.splitlines():
        words = shlex.split(line, comments=True)[1:]
        if words[0] == "collect":
            words = [SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)] + ["--quiet"]
        elif words[0] == "pretrain":
            words += DEBUG.split()
        lines.append(words)
    return lines


@pytest.mark.parametrize("block", WORLDS, ids=lambda block: block.split("--env ")[1].split()[0])
def test_a_world_of_others_from_policy_to_report(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if "MiniGrid" in block:
        pytest.importorskip("minigrid", reason="needs the extra babyai")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experts.py").write_text(EXPERTS, encoding="utf-8")
    for words in commands(block):
        assert main([*words, *([] if words[0] == "collect" else ["--device", "cpu"])]) == 0, words
    (run,) = (tmp_path / "runs").iterdir()
    evaluated = RunFolder(run).read_analysis("evaluation-internal-rl")
    assert (evaluated["episodes"], evaluated["lost"]) == (4, 0)
    page = (tmp_path / f"{run.name}.html").read_text()
    assert "internal RL" in page
    assert "± one standard error" in page
    said = capsys.readouterr()
    assert "6 episodes kept" in said.out
    assert "gate_recall" not in said.out  # nothing is known of subgoals here
    assert "evaluate: 4 episodes of internal RL" in said.err
    script = measuring()
    script.EPISODES = 16
    script.print_world(run.name, script.results(run.name, tmp_path))
    table = capsys.readouterr().out
    assert "the model without codes" in table
    assert table.count("with the first code") >= 2


def test_without_an_environment_all_but_acting_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(SCRIPT, "own-data.md", "exec"), {})
    debug = [*DEBUG.split(), "--device", "cpu"]
    assert main(["pretrain", "runs/mine", "--dataset", "data/mine", *debug]) == 0
    assert main(["discover", "runs/mine", "--quiet"]) == 0
    assert main(["report", "runs/mine", "--out", "mine.html"]) == 0
    capsys.readouterr()
    for command in ("internal-rl", "evaluate"):
        assert main([command, "runs/mine"]) == 2
        assert "acting needs an environment" in capsys.readouterr().err
    assert main(["probe", "runs/mine"]) == 2
    assert "probes needs the subgoal of each step" in capsys.readouterr().err
    assert main(["pretrain", "runs/other", "--dataset", "misspelt"]) == 2
    assert "misspelt" in capsys.readouterr().err  # also where Minari is not installed
    assert not Path("runs/other").exists()
    assert main(["pretrain", "runs/other", "--env", "CartPole-v1"]) == 2
    assert "give --dataset ID" in capsys.readouterr().err
    assert main(["pretrain", "runs/other", "--dataset", "data/mine", "--preset", "laptop"]) == 2
    assert "does not fit the preset" in capsys.readouterr().err


def test_a_run_can_be_given_its_environment_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    episodes = Trajectories.from_episodes(
        {"states": rng.normal(size=(steps + 1, 4)), "actions": rng.integers(2, size=steps)} for steps in (5, 8)
    )
    box = spaces.Box(-np.inf, np.inf, (4,), np.float32)
    Dataset(Episodes.of(episodes), box, spaces.Discrete(2), "CartPole-v1").write("data")
    assert main(["pretrain", "runs/mine", "--dataset", "data", *DEBUG.split(), "--device", "cpu"]) == 0
    assert main(["discover", "runs/mine", "--quiet"]) == 0
    trained = (tmp_path / "runs/mine/base_model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["internal-rl", "runs/mine"]) == 2
    assert "pretrain RUN --resume --env CartPole-v1" in capsys.readouterr().err
    resume = ["pretrain", "runs/mine", "--resume", "--quiet", "--env"]
    assert main([*resume, "Acrobot-v1"]) == 2
    assert "the data have observations" in capsys.readouterr().err
    assert main([*resume, "CartPole-v1", "--config.model.dim", "32"]) == 2
    assert "leave out --config" in capsys.readouterr().err
    assert main([*resume, "CartPole-v1"]) == 0
    assert (tmp_path / "runs/mine/base_model.safetensors").read_bytes() == trained
    assert main(["internal-rl", "runs/mine", "--quiet"]) == 0
    assert main([*resume, "MountainCar-v0"]) == 2
    assert "has a world of its own already" in capsys.readouterr().err


def cartpole(env: str | None = "CartPole-v1", seed: int = 0) -> Dataset:
    """Episodes in CartPole's spaces."""
    rng = np.random.default_rng(seed)
    episodes = Trajectories.from_episodes(
        {"states": rng.normal(size=(steps + 1, 4)), "actions": rng.integers(2, size=steps)} for steps in (5, 8)
    )
    box = spaces.Box(-np.inf, np.inf, (4,), np.float32)
    return Dataset(Episodes.of(episodes), box, spaces.Discrete(2), env, versions={"gymnasium": "0.9"})


def test_data_that_changed_are_noticed_and_data_that_moved_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    cartpole().write("data")
    assert main(["pretrain", "mine", "--dataset", "data", *DEBUG.split(), "--device", "cpu"]) == 0
    run, trained = RunFolder("mine"), Path("mine/base_model.safetensors").read_bytes()
    record = {"environment": "CartPole-v1", "gymnasium": "0.9", "metacontroller-rl": version("metacontroller-rl")}
    kept = learned_from(run)
    assert kept == run.load_checkpoint("pretrain")[1]["versions"] == {**record, "data": kept["data"]}

    cartpole(seed=1).write("data")
    for command in (["discover", "mine"], ["pretrain", "mine", "--resume"]):
        capsys.readouterr()
        assert main([*command, "--quiet", "--device", "cpu"]) == 2
        assert "was learned from other data than the run's dataset holds now" in capsys.readouterr().err

    cartpole().write("elsewhere")
    shutil.rmtree("data")
    assert main(["discover", "mine", "--quiet"]) == 2
    assert "data is not there; if it was moved, name its place by: metacontroller discover RUN --dataset" in (
        capsys.readouterr().err
    )
    cartpole(seed=1).write("others")
    assert main(["discover", "mine", "--quiet", "--dataset", "others"]) == 2
    assert "was learned from other data" in capsys.readouterr().err
    assert run.read_config()["domain"]["dataset"] == str(tmp_path / "data")
    assert main(["discover", "mine", "--quiet", "--dataset", "elsewhere"]) == 0
    assert run.read_config()["domain"]["dataset"] == str(tmp_path / "elsewhere")
    shutil.move("elsewhere", "again")
    capsys.readouterr()
    assert main(["pretrain", "mine", "--quiet", "--resume", "--dataset", "again", "--seed", "7"]) == 2
    assert "was started from seed 0, not 7" in capsys.readouterr().err
    assert main(["pretrain", "mine", "--quiet", "--resume", "--dataset", "again"]) == 0
    assert Path("mine/base_model.safetensors").read_bytes() == trained
    assert main(["discover", "mine", "--quiet", "--resume"]) == 0


def test_data_of_one_version_of_an_environment_warn_in_another(tmp_path: Path) -> None:
    """Hopper-v4 and Hopper-v5 have spaces of the same shapes, and another reward."""
    pytest.importorskip("mujoco", reason="needs the extra ant")
    space, rng = gymnasium.make("Hopper-v5"), np.random.default_rng(0)
    episodes = Trajectories.from_episodes([{"states": rng.normal(size=(6, 11)), "actions": rng.uniform(-1, 1, (5, 3))}])
    made = Dataset(Episodes.of(episodes), space.observation_space, space.action_space, "Hopper-v4")
    replace(made, versions={"mujoco": "3.1.0"}).write(tmp_path / "data")
    world = Offline(OfflineConfig(dataset=str(tmp_path / "data"), env="Hopper-v5"))
    first = pytest.warns(UserWarning, match="data was made in Hopper-v4 and this is Hopper-v5")
    second = pytest.warns(UserWarning, match=rf"data was made with mujoco 3\.1\.0 and {version('mujoco')} is installed")
    with first, second:
        assert world.spec().max_steps == 1000
    here = {name: version(name) for name in ("gymnasium", "mujoco", "metacontroller-rl")}
    assert world.versions() == {"environment": "Hopper-v5", **here}
    assert {**world.data_versions(), "data": ""} == {
        "environment": "Hopper-v4",
        "mujoco": "3.1.0",
        "metacontroller-rl": here["metacontroller-rl"],
        "data": "",
    }


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_a_fall_is_paid_otherwise_in_another_version() -> None:
    pytest.importorskip("mujoco", reason="needs the extra ant")
    rewards = []
    for name in ("Hopper-v4", "Hopper-v5"):
        env, ended, reward = gymnasium.make(name), False, 0.0
        env.reset(seed=0)
        while not ended:
            _, reward, ended, _, _ = env.step(np.zeros(3, np.float32))
        rewards.append(float(reward))
    assert rewards == pytest.approx([0.77, -0.23], abs=0.01)
