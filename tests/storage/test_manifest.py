"""The manifest: what was cut, flipped, swapped or is newer is refused by name; nothing leads out of the folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from metacontroller import MetaController
from metacontroller.errors import UserError
from metacontroller.phases.artefacts import META_CONTROLLER, artefact_path, copy_artefact, load_artefact
from metacontroller.storage import run_folder
from metacontroller.storage.run_folder import RunFolder


def make_run(path: Path, seed: int = 0) -> RunFolder:
    torch.manual_seed(seed)
    run = RunFolder(path)
    run.write_config({"seed": seed})
    run.write_analysis("gate", {"recall": 0.5})
    run.save_checkpoint("discover", {"w": torch.rand(3)}, {"step": 4})
    MetaController(8, dim_meta_controller=8, dim_latent=3, rank=2).save(artefact_path(run, META_CONTROLLER))
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "run")


READS: dict[str, Any] = {
    "config.json": lambda run: run.read_config(),
    "analyses/gate.json": lambda run: run.read_analysis("gate"),
    "discover.safetensors": lambda run: run.load_checkpoint("discover"),
    "meta_controller.safetensors": lambda run: load_artefact(MetaController, run, META_CONTROLLER, "cpu"),
}


def refused(run: RunFolder, name: str, said: str = "") -> None:
    with pytest.raises(UserError) as caught:
        READS[name](run)
    assert Path(name).name in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", READS)
def test_every_damage_is_refused_by_name(run: RunFolder, tmp_path: Path, name: str) -> None:
    READS[name](run)
    path = run.path / name
    content = path.read_bytes()
    for damage in (content[:-1], content + b" ", b"", content[: len(content) // 2]):
        path.write_bytes(damage)
        refused(run, name)
    for place in range(0, len(content), max(1, len(content) // 40)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        refused(run, name)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_bytes(content)
    refused(run, name, "out of")
    path.unlink()
    path.symlink_to(path)
    refused(run, name)
    path.unlink()
    os.mkfifo(path)
    refused(run, name, "is no regular file")


@pytest.mark.parametrize("name", ["discover.safetensors", "meta_controller.safetensors"])
def test_a_file_of_another_run_is_refused(run: RunFolder, tmp_path: Path, name: str) -> None:
    other = make_run(tmp_path / "other", seed=1)
    shutil.copy(other.path / name, run.path / name)
    refused(run, name, "swapped")
    for listed in (name, "manifest.json"):
        shutil.copy(other.path / listed, run.path / listed)
    content = json.loads((run.path / "manifest.json").read_text())
    content["files"]["config.json"] = {"versions": [{"size": 0, "sha256": ""}]}
    (run.path / "manifest.json").write_text(json.dumps(content))
    refused(run, name, "another config.json")


@pytest.mark.parametrize("name", ["discover.safetensors", "meta_controller.safetensors"])
def test_what_was_made_with_an_earlier_config_is_refused(run: RunFolder, name: str) -> None:
    for seed in (1, 2):
        run.write_config({"seed": seed})
        refused(run, name, "was made with another config.json")
    run.write_config({"seed": 0})
    READS[name](run)


@pytest.mark.parametrize("name", ["discover.safetensors", "meta_controller.safetensors"])
def test_a_config_that_is_said_to_change_nothing_keeps_what_was_made(
    run: RunFolder, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_text", lambda path, text: None)  # killed before the config is replaced
        run.write_config({"seed": 0, "env": "A"}, keeps_weights=True)
    READS[name](run)
    for env in "AB":
        run.write_config({"seed": 0, "env": env}, keeps_weights=True)
        READS[name](run)
    run.save_checkpoint("other", {"w": torch.rand(3)}, {})
    run.write_config({"seed": 0})
    READS[name](run)
    with pytest.raises(UserError, match=r"other\.safetensors was made with another config\.json"):
        run.load_checkpoint("other")


def test_an_older_manifest_names_one_config_as_a_text(run: RunFolder) -> None:
    path = run.path / "manifest.json"
    content = json.loads(path.read_text())
    for entry in content["files"].values():
        if "config" in entry:
            (entry["config"],) = entry["config"]
    path.write_text(json.dumps(content))
    run.load_checkpoint("discover")
    run.write_config({"seed": 0, "env": "A"}, keeps_weights=True)
    run.load_checkpoint("discover")
    run.write_config({"seed": 1})
    refused(run, "discover.safetensors", "was made with another config.json")


def test_a_config_that_says_the_same_stays_as_it_is(run: RunFolder) -> None:
    before = (run.path / "config.json").read_bytes()
    run.write_config({"seed": 0.0})
    assert (run.path / "config.json").read_bytes() == before
    run.load_checkpoint("discover")


def test_files_that_no_one_listed_and_newer_manifests_are_refused(run: RunFolder) -> None:
    shutil.copy(run.path / "discover.safetensors", run.path / "pretrain.safetensors")
    with pytest.raises(UserError, match="is not of this run"):
        run.load_checkpoint("pretrain")
    path = run.path / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(UserError, match=r"manifest\.json has format 2 and this release reads 1"):
        run.read_config()
    version = {"size": 1, "sha256": "0"}
    for entry in ([], {"versions": [{**version, "size": {}}]}, {"versions": [{**version, "sha256": 0}]}):
        path.write_text(json.dumps({**content, "files": {"config.json": entry}}))
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            run.read_config()


def test_a_kill_between_listing_and_replacing_leaves_a_file_that_is_listed(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        if Path(target).suffix == ".safetensors":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        for step in (5, 6):
            with pytest.raises(KeyboardInterrupt):
                run.save_checkpoint("discover", {"w": torch.rand(3)}, {"step": step})
    assert run.load_checkpoint("discover")[1]["step"] == 4
    run.save_checkpoint("discover", {"w": torch.rand(3)}, {"step": 7})
    assert run.load_checkpoint("discover")[1]["step"] == 7


def test_a_folder_without_a_manifest_is_read_with_a_word_and_listed_when_it_is_written(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / "manifest.json").unlink()
    for _ in range(2):
        assert run.read_config() == {"seed": 0}
    assert (
        capsys.readouterr().err == f"metacontroller: {run.path} has no manifest.json: its files are read unchecked.\n"
    )
    run.write_summary({"done": True})
    for read in READS.values():
        read(run)
    (run.path / "config.json").write_text('{"seed": 1}')
    refused(run, "config.json", "it was cut or swapped")


def test_copies_are_listed_and_only_whole_files_are_copied(run: RunFolder, tmp_path: Path) -> None:
    job = RunFolder(tmp_path / "job")
    job.write_config({"seed": 0, "alpha": 1})
    copy_artefact(META_CONTROLLER, run.path, job.path)
    load_artefact(MetaController, job, META_CONTROLLER, "cpu")
    path = artefact_path(run, META_CONTROLLER)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="it was cut or swapped"):
        copy_artefact(META_CONTROLLER, run.path, job.path)


def test_nothing_is_written_outside_the_folder(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out of"):
        run.write_analysis("../../outside", {})
    (run.path / "metrics.jsonl").symlink_to(tmp_path / "outside.jsonl")
    with pytest.raises(UserError, match="out of"):
        run.log_metrics("pretrain", 1, loss=1.0)
    assert not list(tmp_path.glob("outside*"))


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_take_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        run = make_run(tmp_path / "run")
        modes = {path.stat().st_mode & 0o777 for path in run.path.rglob("*") if path.is_file()}
    finally:
        os.umask(before)
    assert modes == {0o666 & ~mask}


@pytest.mark.parametrize(
    "line",
    [
        '{"phase": 1, "step": 2}',
        '{"phase": "p", "step": "2"}',
        '{"phase": "p", "step": true}',
        '{"phase": "p", "step": 2, "loss": "low"}',
        '{"phase": "p", "step": 2, "loss": NaN}',
        '{"phase": "p", "step": 2, "rewound": 1}',
        "[" * 100_000,
    ],
)
def test_a_line_of_metrics_of_other_types_is_refused(run: RunFolder, line: str) -> None:
    run.metrics_path.write_text(line + "\n")
    with pytest.raises(UserError, match=r"Line 1 of .* is not a JSON object with a phase and a step, and numbers"):
        run.read_metrics()
