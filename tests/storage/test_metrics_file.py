"""metrics.jsonl: what was written up to the last checkpoint is known; lines that stand there twice are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from metacontroller.errors import UserError
from metacontroller.storage.metrics_file import LONGEST
from metacontroller.storage.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Six lines before a checkpoint, one after it."""
    run = RunFolder(tmp_path / "run")
    for step in (1, 2, 3):
        run.log_metrics("pretrain", step, loss=0.5 / step)
        run.log_metrics("discover", step, loss=0.25)
    run.save_checkpoint("pretrain", {"w": torch.zeros(2)}, {"step": 3})
    run.log_metrics("pretrain", 4, loss=0.125)
    return run


def refused(run: RunFolder, said: str) -> None:
    with pytest.raises(UserError, match=said):
        RunFolder(run.path).read_metrics()


def test_no_byte_before_the_checkpoint_can_change(run: RunFolder) -> None:
    assert len(run.read_metrics()) == 7
    content = run.metrics_path.read_bytes()
    listed = content.rfind(b"\n", 0, -1) + 1
    for place in range(0, listed, 5):
        run.metrics_path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        refused(run, r"metrics\.jsonl")
    run.metrics_path.write_bytes(content.replace(b"0.25", b"0.26"))
    refused(run, r"metrics\.jsonl is not what was written")
    for end in (0, listed - 1, content.find(b"\n") + 1):
        run.metrics_path.write_bytes(content[:end])
        refused(run, r"metrics\.jsonl has less than the \d+ bytes that were written")


def test_what_comes_after_the_checkpoint_is_read_and_may_be_torn(run: RunFolder) -> None:
    content = run.metrics_path.read_bytes()
    run.metrics_path.write_bytes(content[:-3])
    assert [line["step"] for line in run.read_metrics("pretrain")] == [1, 2, 3]
    resumed = RunFolder(run.path)
    resumed.rewind_metrics("pretrain", 3)
    resumed.log_metrics("pretrain", 4, loss=0.125)
    resumed.save_checkpoint("pretrain", {"w": torch.zeros(2)}, {"step": 4})
    assert run.metrics_path.read_bytes() == content
    run.metrics_path.write_bytes(content.replace(b"0.125", b"0.126"))
    refused(run, "its SHA-256 differs")


@pytest.mark.parametrize("last", [1, 2, 4])
def test_lines_that_stand_there_twice_are_refused(run: RunFolder, last: int) -> None:
    lines = run.metrics_path.read_bytes().splitlines(keepends=True)
    run.metrics_path.write_bytes(b"".join(lines + lines[-last:]))
    refused(run, r"Line 8 of .*metrics\.jsonl has the step \d of \w+ again")


def test_two_processes_may_log_and_save_side_by_side(run: RunFolder) -> None:
    run.log_metrics("internal_rl", 1, loss=1.0)
    other = RunFolder(run.path)
    for step in (1, 2, 3):
        other.log_metrics("raw_action_rl", step, loss=1.0)
        other.save_checkpoint("raw_action_rl", {"w": torch.zeros(2)}, {"step": step})
        run.log_metrics("internal_rl", step + 1, loss=1.0)
    run.save_checkpoint("internal_rl", {"w": torch.zeros(2)}, {"step": 4})
    listed = json.loads((run.path / "manifest.json").read_text())["files"]["metrics.jsonl"]["versions"]
    assert [version["size"] for version in listed] == [run.metrics_path.stat().st_size]
    assert len(run.read_metrics()) == 14


def test_a_manifest_of_before_knows_no_metrics_and_the_next_checkpoint_lists_them(run: RunFolder) -> None:
    manifest = run.path / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["files"]["metrics.jsonl"]
    manifest.write_text(json.dumps(content))
    assert len(run.read_metrics()) == 7
    run.save_checkpoint("pretrain", {"w": torch.zeros(2)}, {"step": 4})
    run.metrics_path.write_bytes(run.metrics_path.read_bytes().replace(b"0.125", b"0.126"))
    refused(run, "its SHA-256 differs")


def test_a_line_without_end_takes_no_memory(run: RunFolder) -> None:
    with run.metrics_path.open("ab") as file:
        file.truncate(2**40)
    refused(run, r"Line 8 of .*metrics\.jsonl is not a JSON object")
    with pytest.raises(UserError, match=f"the last line of .* has more than {LONGEST} bytes"):
        RunFolder(run.path).log_metrics("pretrain", 5, loss=1.0)


def test_metrics_that_are_gone_are_missed(run: RunFolder) -> None:
    run.metrics_path.unlink()
    refused(run, r"metrics\.jsonl is not there any more, but \d+ bytes were written; copy it")
    (run.path / "manifest.json").unlink()
    assert run.read_metrics() == []
