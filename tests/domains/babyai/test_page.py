"""docs/babyai.md: its commands run, at debug sizes; and the presets are what it says they are."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from metacontroller.cli import main
from metacontroller.domains.babyai.domain import BabyAIConfig
from metacontroller.domains.pinpad.tasks import transitions
from metacontroller.presets import preset, preset_names
from metacontroller.recipes.config import from_json, to_json
from metacontroller.storage.run_folder import RunFolder

PAGE = Path(__file__).parents[3] / "docs" / "babyai.md"


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minigrid", reason="the extra babyai is not installed")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```shell\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for line in block.splitlines() if line.startswith("metacontroller ")]
    assert {line.split()[1] for line in lines} >= {
        "pretrain",
        "discover",
        "internal-rl",
        "evaluate",
        "gate",
        "oracle",
        "episodes",
        "report",
    }
    for line in lines:
        words = shlex.split(line.replace("babyai-laptop", "babyai-debug"))[1:]
        assert main([*words, "--device", "cpu"]) == 0, line
    run = RunFolder("runs/babyai")
    assert run.read_config()["domain"]["name"] == "babyai"
    assert run.read_analysis("gate")["episodes"] > 0
    assert all(run.read_analysis("oracle")[name] is not None for name in ("seen", "unseen", "named"))
    assert len(list(Path("datasets/babyai").iterdir())) == 3  # one a split, shared by all commands


@pytest.mark.parametrize("name", ["babyai-debug", "babyai-laptop"])
def test_a_preset_survives_json(name: str) -> None:
    assert name in preset_names()
    config = preset(name)
    assert isinstance(config.domain, BabyAIConfig)
    assert from_json(json.loads(json.dumps(to_json(config), default=dataclasses.asdict))) == config


def test_of_the_transitions_of_the_post_training_task_one_is_demonstrated() -> None:
    config = preset("babyai-laptop").domain
    assert transitions(config.tasks) & transitions([config.post_task]) == {(2, 0)}
    assert len(config.post_task) > max(map(len, config.tasks))
