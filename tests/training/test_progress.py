from __future__ import annotations

import io
import multiprocessing
from contextvars import copy_context

import pytest
import torch
from rich.console import Console

from metacontroller.training.progress import BarProgress, LineProgress, Progress, announce, label_lines, track


class Clock:
    """A clock that a test sets by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain_console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=False), out


def test_lines_are_at_least_ten_seconds_apart_and_the_last_state_is_shown():
    console, out = plain_console()
    clock = Clock()
    with LineProgress(100, "pretrain", console=console, clock=clock) as progress:
        for step in range(1, 26):  # one step a second
            clock.now += 1.0
            progress.update(step, loss=1.0 / step)
    assert out.getvalue().splitlines() == [
        "pretrain: 10/100  1/s  loss 0.1",
        "pretrain: 20/100  1/s  loss 0.05",
        "pretrain: 25/100  1/s  loss 0.04",
    ]


def test_a_last_state_that_was_shown_is_not_shown_again():
    console, out = plain_console()
    clock = Clock()
    with LineProgress(20, "pretrain", console=console, clock=clock) as progress:
        for step in (10, 20):
            clock.now += 10.0
            progress.update(step)
    assert out.getvalue().splitlines() == ["pretrain: 10/20  1/s", "pretrain: 20/20  1/s"]


def test_a_loop_with_nothing_left_to_do_is_shown():
    console, out = plain_console()
    with LineProgress(20, "pretrain", start=20, console=console, clock=Clock()):
        pass
    assert out.getvalue() == "pretrain: 20/20  0/s\n"


def test_rate_leaves_out_the_steps_before_a_resume():
    clock = Clock()
    with Progress(100, "pretrain", start=90, clock=clock) as progress:
        assert progress.rate == 0.0
        clock.now += 2.0
        progress.update(94)
        assert progress.rate == 2.0


def test_metrics_are_not_read_before_they_are_shown():
    class Unreadable:
        def __float__(self) -> float:
            raise AssertionError("read although nothing is shown")

    console, _ = plain_console()
    progress = LineProgress(10, "pretrain", console=console, clock=Clock())
    progress.update(1, loss=Unreadable())
    with pytest.raises(AssertionError, match="read although"), progress:
        pass  # the last line does read it


def test_tensor_metric_is_shown_as_a_number():
    console, out = plain_console()
    with track(1, "discover", console=console) as progress:
        progress.update(1, kl=torch.tensor(0.25))
    assert "kl 0.25" in out.getvalue()


def test_where_it_stopped_is_shown_after_an_error():
    def diverge() -> None:
        with track(10, "discover", console=console) as progress:
            progress.update(3)
            raise RuntimeError("diverged")

    console, out = plain_console()
    with pytest.raises(RuntimeError, match="diverged"):
        diverge()
    assert out.getvalue().startswith("discover: 3/10")


def test_bar_on_a_terminal():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with track(4, "internal RL", console=console) as progress:
        assert isinstance(progress, BarProgress)
        for step in range(1, 5):
            progress.update(step, reward=0.5)
    for text in ("internal RL", "4/4", "reward 0.5"):
        assert text in out.getvalue()


def test_plain_lines_without_a_terminal():
    console, _ = plain_console()
    assert isinstance(track(4, "internal RL", console=console), LineProgress)


def test_plain_lines_from_a_worker_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(multiprocessing, "parent_process", object)
    assert isinstance(track(4, "raw_action_rl", console=Console(file=io.StringIO(), force_terminal=True)), LineProgress)


def test_announce_is_a_line_on_standard_error_unless_quiet(capfd: pytest.CaptureFixture[str]):
    announce("evaluate: success")
    announce("evaluate: the gate", quiet=True)
    assert capfd.readouterr() == ("", "evaluate: success\n")


def test_a_worker_says_whose_its_lines_are(capfd: pytest.CaptureFixture[str]):
    def work() -> None:
        label_lines("seed 3")
        announce("evaluate: success")
        with track(4, "pretrain") as progress:
            progress.update(4)

    copy_context().run(work)  # the label ends with it
    announce("figures of all seeds")
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "seed 3, evaluate: success"
    assert lines[1].startswith("seed 3, pretrain: 4/4")
    assert lines[2] == "figures of all seeds"


def test_quiet_writes_nothing(capfd: pytest.CaptureFixture[str]):
    with track(4, "internal RL", quiet=True) as progress:
        progress.update(4, reward=0.5)
    assert capfd.readouterr() == ("", "")


def test_default_output_is_standard_error(capfd: pytest.CaptureFixture[str]):
    with track(4, "internal RL") as progress:
        progress.update(4)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "4/4" in captured.err
