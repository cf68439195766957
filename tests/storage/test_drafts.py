"""Files that are being written: nobody foretells their names, and what killed writers leave is removed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metacontroller.storage import files
from metacontroller.storage.files import left_behind
from metacontroller.storage.lock import locked
from metacontroller.storage.manifest import replacing, write_text
from metacontroller.storage.run_folder import RunFolder

KILLED = """
import os, signal, sys
from pathlib import Path
from metacontroller.storage.manifest import replacing
with replacing(Path(sys.argv[1])) as draft:
    draft.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_link_where_a_draft_was_foretold_leads_no_writer_out(tmp_path: Path) -> None:
    outside, run = tmp_path / "outside", RunFolder(tmp_path / "run")
    outside.write_text("mine")
    run.path.mkdir()
    for name in ("summary.json", "manifest.json", "pretrain.safetensors"):
        (run.path / f".{name}.{os.getpid()}.tmp").symlink_to(outside)
    run.write_summary({"a": 1})
    run.save_checkpoint("pretrain", {"w": torch.zeros(2)}, {})
    assert outside.read_text() == "mine"
    assert run.read_summary() == {"a": 1}


def test_every_draft_is_new_and_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with replacing(tmp_path / "x.json") as one, replacing(tmp_path / "x.json") as two:
        assert one != two
        assert not list(tmp_path.rglob("x.json"))
        for draft in (one, two):
            assert left_behind(draft.parent)
            assert draft.parent.stat().st_mode & 0o777 == 0o700
            draft.write_text("{}")
    assert names(tmp_path) == ["x.json"]
    (tmp_path / f"{files.PREFIX}7{files.SUFFIX}").symlink_to(tmp_path)
    monkeypatch.setattr("secrets.token_hex", lambda size: "7")
    with pytest.raises(FileExistsError, match=r"x\.json"):
        write_text(tmp_path / "x.json", "other")
    assert (tmp_path / "x.json").read_text() == "{}"


def test_the_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        RunFolder(tmp_path).save_checkpoint("pretrain", {"w": torch.zeros(2)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "pretrain.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(files.fcntl is None, reason="this system has no such locks")
def test_what_a_killed_writer_left_is_removed_at_the_next_start_and_nothing_else(tmp_path: Path) -> None:
    for name in ("run/analyses/a.json", "run/summary.json"):
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)], check=False)
    run, others = tmp_path / "run", [".notes.tmp", "mine.tmp"]
    for name in others:
        (run / name).write_text("mine")
    (tmp_path / "elsewhere" / f"{files.PREFIX}0{files.SUFFIX}").mkdir(parents=True)
    (run / "link").symlink_to(tmp_path / "elsewhere")
    (run / f"{files.PREFIX}1{files.SUFFIX}").symlink_to(tmp_path / "elsewhere")
    assert len(names(run)) == len(others) + 4
    assert len(names(run / "analyses")) == 1
    with replacing(run / "analyses" / "b.json") as live, locked(run):
        assert names(run / "analyses") == [live.parent.name]
        live.write_text("{}")
    assert names(run) == sorted([f"{files.PREFIX}1{files.SUFFIX}", *others, "analyses", "link"])
    assert names(run / "analyses") == ["b.json"]
    assert len(names(tmp_path / "elsewhere")) == 1
