"""Settings that change after a run has begun: which may, what is kept of them, and that files made before stay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metacontroller.cli import main, parse
from metacontroller.data import Trajectories
from metacontroller.errors import UserError
from metacontroller.models.transformer import Transformer
from metacontroller.presets import preset
from metacontroller.presets.gridworld import debug
from metacontroller.recipes.config import ExperimentConfig, build_model, read_config, to_json
from metacontroller.recipes.history import changed_config, differences, keep_changes
from metacontroller.storage.run_folder import RunFolder

CPU = ["--quiet", "--device", "cpu"]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """The folder of a pretrained run."""
    folder = RunFolder(tmp_path / "run")
    folder.write_config(to_json(debug()))
    build_model(debug()).save(folder.path / "base_model.safetensors")
    return folder


def altered(part: str, **changes: Any) -> ExperimentConfig:
    return replace(debug(), **{part: replace(getattr(debug(), part), **changes)})


def history(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "history.jsonl").read_text().splitlines()]


def test_differences_are_told_by_dotted_names() -> None:
    after = altered("discover", alpha=0.7, optimizer=replace(debug().discover.optimizer, lr=0.5))
    assert differences(debug(), after) == {
        "discover.optimizer.lr": [debug().discover.optimizer.lr, 0.5],
        "discover.alpha": [debug().discover.alpha, 0.7],
    }
    assert differences(debug(), debug()) == {}


def test_a_phase_changes_its_own_part_alone(run: RunFolder) -> None:
    for part, changes, phase in (
        ("pretrain", {"clip_steps": 2}, "discover"),
        ("domain", {"max_steps": 9}, "discover"),
        ("internal_rl", {"lr": 0.5}, "discover"),
        ("discover", {"alpha": 0.7}, "internal_rl"),
        ("internal_rl", {"lr": 0.5}, "raw_action_rl"),
    ):
        with pytest.raises(UserError, match=rf"{part}\.{next(iter(changes))} is fixed in .*; leave it out, or start"):
            changed_config(run, altered(part, **changes), phase)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="seed is fixed"):
        changed_config(run, replace(debug(), seed=5), "discover")
    with pytest.raises(UserError, match="the seeds of phases derive from the run's"):
        changed_config(run, altered("discover", seed=5), "discover")
    guided = replace(
        altered("discover", guided_updates=1), meta_controller=replace(debug().meta_controller, code="binary")
    )
    with pytest.raises(UserError, match="has no positions"):  # what the phase itself would refuse later
        changed_config(run, guided, "discover")
    assert not (run.path / "history.jsonl").exists()


def test_what_a_checkpoint_depends_on_is_fixed_until_it_is_moved_away(run: RunFolder) -> None:
    asked = altered("discover", alpha=0.7)
    for name in ("discover", "internal_rl", "evolution"):
        path = run.save_checkpoint(name, {}, {})
        with pytest.raises(UserError, match=rf"holds {name}\.safetensors, which depends on discover\.alpha"):
            changed_config(run, asked, "discover")
        assert changed_config(run, debug(), "discover") == debug()
        path.unlink()
    run.save_checkpoint("discover", {}, {})
    assert changed_config(run, altered("internal_rl", lr=0.5), "internal_rl").internal_rl.lr == 0.5


def test_changes_are_kept_and_so_are_the_files_made_before(run: RunFolder) -> None:
    keep_changes(run, debug(), "discover")
    assert not (run.path / "history.jsonl").exists()
    for step in range(6):  # more than a manifest keeps versions of a file
        keep_changes(run, altered("discover", alpha=0.1 * (step + 1)), "discover")
    assert read_config(run) == altered("discover", alpha=0.1 * 6)
    Transformer.init_and_load(run.path / "base_model.safetensors")
    lines = history(run)
    assert [line["changed"]["discover.alpha"][1] for line in lines] == [0.1 * (step + 1) for step in range(6)]
    assert all(line["phase"] == "discover" and line["time"].endswith("+00:00") for line in lines)


def test_the_commands_take_options_of_their_phase(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    path, updates = str(run.path), ["--config.discover.optimizer.steps", "3"]
    assert main(["discover", path, *CPU, "--config.pretrain.optimizer.steps", "5"]) == 2
    assert "pretrain.optimizer.steps is fixed" in capsys.readouterr().err
    assert main(["discover", *CPU, *updates, path]) == 0
    assert run.read_metrics("discover")[-1]["step"] == 3
    assert history(run)[0]["changed"] == {"discover.optimizer.steps": [12, 3]}
    assert main(["discover", path, *CPU, "--resume", "--config.discover.optimizer.steps", "4"]) == 2
    assert "discover.safetensors, which depends on discover.optimizer.steps" in capsys.readouterr().err
    command = parse(["internal-rl", path, "--config.internal-rl.lr", "0.5"])
    assert command.config == replace(read_config(run), internal_rl=replace(debug().internal_rl, lr=0.5))
    assert main(["discover", path, *CPU, "--resume"]) == 0  # finished, and as it was


def played() -> Trajectories:
    rng = np.random.default_rng(0)
    return Trajectories.from_episodes({"states": rng.normal(size=(4, 4)), "actions": np.arange(3)} for _ in range(3))


def test_what_counts_as_success_may_be_said_until_something_has_acted(tmp_path: Path) -> None:
    run, config = RunFolder(tmp_path / "run"), preset("offline-debug")
    config = replace(config, domain=replace(config.domain, dataset=f"{__name__}:played"))  # type: ignore[type-var]
    run.write_config(to_json(config))
    asked = replace(config, domain=replace(config.domain, success_return=50.0))  # type: ignore[type-var]
    with pytest.raises(UserError, match=r"domain\.success_return is fixed"):
        changed_config(run, asked, "discover")
    for phase in ("internal_rl", "raw_action_rl"):
        assert changed_config(run, asked, phase) == asked  # type: ignore[arg-type]
        for name in ("internal_rl", "raw_action_rl", "evolution"):
            path = run.save_checkpoint(name, {}, {})
            with pytest.raises(UserError, match=rf"holds {name}\.safetensors, which depends on domain\.success"):
                changed_config(run, asked, phase)  # type: ignore[arg-type]
            path.unlink()


def test_an_environment_given_later_is_told_too(tmp_path: Path) -> None:
    (tmp_path / "told_later.py").write_text(
        "import torch\nfrom metacontroller.data import Trajectories\n\n\n"
        "def made():\n"
        "    states, actions = torch.randn(9, 4, 4), torch.randint(2, (9, 3))\n"
        "    return Trajectories(states=states, actions=actions, lengths=torch.full((9,), 3))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        run, words = RunFolder(tmp_path / "run"), ["--preset", "offline-debug", "--dataset", "told_later:made"]
        assert main(["pretrain", str(run.path), *CPU, *words]) == 0
        assert main(["pretrain", str(run.path), *CPU, "--resume", "--env", "CartPole-v1"]) == 0
    assert history(run)[0]["changed"] == {"domain.env": [None, "CartPole-v1"]}
