"""Videos: as many frames as episodes showed, whole files, and errors before anything is played."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import imageio_ffmpeg
import pytest
import torch

from metacontroller.analysis.episodes import Episodes
from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.video import COLORS, GATE_PIXELS, LEAST_PIXELS, gate_strip, write_video
from metacontroller.cli import main
from metacontroller.domains.base import Domain
from metacontroller.errors import UserError
from metacontroller.recipes.config import load_run
from metacontroller.storage.run_folder import RunFolder

CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    folder = tmp_path_factory.mktemp("video") / "run"
    assert main(["pretrain", str(folder), "--preset", "debug", "--quiet", *CPU]) == 0
    assert main(["discover", str(folder), "--quiet", *CPU]) == 0
    return load_run(RunFolder(folder), "cpu")


@pytest.mark.parametrize("ending", [".mp4", ".gif"])
@pytest.mark.parametrize("policy", ["base", "prior"])
def test_a_video_holds_every_step(run: LoadedRun, policy: Any, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"film{ending}"
    write_video(run, policy, path, episodes=2, seed=3)
    if ending == ".mp4":
        frames, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
        assert frames is not None
        second = run.domain.steps_a_second
        assert 2 * (2 + second) <= frames <= 2 * (run.domain.spec().max_steps + 1 + second)
    else:  # which drops frames in which nothing moves
        pictures = imageio.imread(path)
        assert pictures.shape[2] >= LEAST_PIXELS
        assert pictures.shape[1] == pictures.shape[2] + (0 if policy == "base" else GATE_PIXELS)
        assert (pictures[0] != pictures[-1]).any()
    assert list(tmp_path.iterdir()) == [path]


def test_the_gate_is_drawn_up_to_the_step() -> None:
    beta, switches = torch.tensor([1.0, 0.0, 0.5, 0.25]), torch.tensor([True, False, True, False])
    strip = gate_strip(beta, switches, 2, 40)
    assert strip.shape == (GATE_PIXELS, 40, 3)
    filled = (strip != 255).any(-1)
    assert filled.sum(0)[5::10].tolist() == [GATE_PIXELS, 3, 33, 0]  # 3 pixels where it is closed; nothing is known yet
    assert [tuple(strip[-1, column]) for column in (0, 15, 25)] == [COLORS[0], COLORS[0], COLORS[1]]
    assert filled[-40:, 25].sum() == filled[:, 25].sum()  # they stand on the ground


def test_a_quick_world_is_shown_in_its_own_time(
    run: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for steps_a_second in (5, 30):
        monkeypatch.setattr(type(run.domain), "steps_a_second", steps_a_second)
        write_video(run, "prior", path := tmp_path / f"{steps_a_second}.mp4", episodes=1, seed=3)
        counts.append(imageio_ffmpeg.count_frames_and_secs(str(path)))
    (many, long), (few, short) = counts
    steps = many - 5  # but for the second at the end
    assert steps > 6
    assert few == -(-(steps - 1) // 3) + 1 + 10  # every third, and the last
    assert (long, short) == pytest.approx((many / 5, few / 10))


def test_the_command_films_and_measures(run: LoadedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(run.folder.path), "--policy", "base", "--episodes", "8", *CPU]
    assert main([*words, "--video", str(tmp_path / "film.gif")]) == 0
    assert "success" in capsys.readouterr().out
    assert (tmp_path / "film.gif").stat().st_size > 0


def test_what_cannot_be_filmed_is_said(run: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"has the ending '\.avi'; expected one of \.mp4, \.gif"):
        write_video(run, "base", tmp_path / "film.avi", seed=0)
    with monkeypatch.context() as patched:
        patched.setattr(type(run.domain), "render", Domain.render)
        with pytest.raises(UserError, match="draws no pictures, so there is nothing to film"):
            write_video(run, "base", tmp_path / "film.gif", seed=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"imageio is not installed; videos need it: pip install .*\[viz\]"):
        write_video(run, "base", tmp_path / "film.gif", seed=0)


def test_a_world_that_this_machine_cannot_draw_is_said_and_the_report_goes_without(
    run: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(self: Domain, states: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no display")

    monkeypatch.setattr(type(run.domain), "render", fails)
    said = "the world gridworld-pinpad cannot be drawn on this machine: RuntimeError: no display."
    with pytest.raises(UserError, match=said):
        write_video(run, "base", tmp_path / "film.gif", seed=0)
    assert list(tmp_path.iterdir()) == []
    found = Episodes().measure(run, Episodes.Config(episodes=2))
    assert [episode["frames"] for episode in found["episodes"]] == [None, None]
    assert f"episodes: no pictures: {said}" in capsys.readouterr().err


def test_an_ffmpeg_that_does_not_run_is_said(run: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"ffmpeg, which writes \.mp4, does not run .*; write a \.gif"):
        write_video(run, "base", tmp_path / "film.mp4", seed=0)
