"""Sweeps: what is shared is made once, a failed job is reported and the rest run, a killed sweep ends the same."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from metacontroller.cli import main
from metacontroller.presets.gridworld import debug, laptop
from metacontroller.recipes.config import ExperimentConfig, with_seed, with_values
from metacontroller.recipes.sweep import SweepJob, alpha_of, job_config, sweep
from metacontroller.storage.run_folder import RunFolder

GRID: dict[str, Any] = {"seeds": [0, 1], "alphas": [0.1, 0.3], "lrs": [1e-3, 3e-3]}


def tiny() -> ExperimentConfig:
    """The debug preset, shorter and with fewer episodes to judge by."""
    lengths = {f"{phase}.optimizer.steps": 4 for phase in ("pretrain", "discover")}
    return with_values(debug(), {**lengths, "internal_rl.episodes": 64, "evaluate.episodes": 16})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that was never interrupted."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    sweep(tiny(), out, **GRID, quiet=True)
    return out


def test_every_combination_has_a_row(whole: Path) -> None:
    rows = RunFolder(whole).read_summary()["jobs"]
    combinations = [(seed, alpha, lr) for seed in (0, 1) for alpha in (0.1, 0.3) for lr in (1e-3, 3e-3)]
    assert [(row["seed"], row["alpha"], row["lr"]) for row in rows] == combinations
    assert {row["status"] for row in rows} == {"finished"}
    assert all(0 <= row["internal_rl_success"] <= 1 and row["gate_recall"] is not None for row in rows)


def test_what_is_shared_is_made_once(whole: Path) -> None:
    assert len(list(whole.rglob("pretrain.safetensors"))) == 2
    assert len(list(whole.rglob("discover.safetensors"))) == 4
    assert len(list(whole.rglob("internal_rl.safetensors"))) == 8
    base = (whole / "seed-1" / "base_model.safetensors").read_bytes()
    assert {path.read_bytes() for path in (whole / "seed-1").rglob("base_model.safetensors")} == {base}


def test_a_job_has_its_own_values() -> None:
    config = job_config(laptop(), SweepJob(3, 0.01, 3e-4))
    assert (config.discover.alpha, config.discover.alpha_start) == (0.01, laptop().discover.alpha_start)
    assert (config.seed, config.internal_rl.lr) == (3, 3e-4)
    assert config.pretrain == with_seed(laptop(), 3).pretrain
    constant = dataclasses.replace(debug(), discover=dataclasses.replace(debug().discover, alpha=0.3, alpha_start=0.3))
    assert job_config(constant, SweepJob(0, 0.5)).discover.alpha_start == 0.5


def test_alpha_is_that_of_compile_where_compile_discovers() -> None:
    config = dataclasses.replace(laptop(), discovery="compile")
    swept = job_config(config, SweepJob(0, 0.5))
    assert (swept.compile.alpha_code, swept.compile.alpha_boundary) == (0.5, 0.5)
    assert swept.discover == job_config(config, SweepJob(0)).discover
    assert alpha_of(config) == config.compile.alpha_code != alpha_of(laptop()) == laptop().discover.alpha


def test_a_failed_job_is_reported_and_the_rest_go_on(tmp_path: Path, whole: Path) -> None:
    grid = {**GRID, "lrs": [1e-3]}
    out = shutil.copytree(whole, tmp_path / "out")
    for folder in ("seed-1/alpha-0.1", "seed-1/alpha-0.3/lr-0.001"):
        shutil.rmtree(out / folder)
    broken = out / "seed-1" / "alpha-0.1"
    broken.mkdir()
    (broken / "discover.safetensors").write_bytes(b"torn")
    rows = sweep(tiny(), out, **grid, resume=True, quiet=True)
    status = {(row["seed"], row["alpha"]): row["status"] for row in rows}
    assert status.pop((1, 0.1)).startswith("not run: failed in seed-1/alpha-0.1: metacontroller.errors.UserError: ")
    assert set(status.values()) == {"finished"}
    (broken / "discover.safetensors").unlink()
    rows = sweep(tiny(), out, **grid, resume=True, quiet=True)
    assert rows == [row for row in RunFolder(whole).read_summary()["jobs"] if row["lr"] == 1e-3]
    assert not (broken / "error.txt").exists()


def test_finished_jobs_are_not_run_again(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}
    monkeypatch.setattr("metacontroller.recipes.sweep.RUN_PHASE", {})
    rows = sweep(tiny(), whole, **GRID, resume=True, quiet=True)
    assert {row["status"] for row in rows} == {"finished"}
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, "seeds are []; give at least one"),
        ({"alphas": [0.1, 0.1]}, "alphas are"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        sweep(tiny(), tmp_path / "out", **{**GRID, **options}, quiet=True)


def command(out: Path, *more: str) -> list[str]:
    return ["sweep", "--out", str(out), "--preset", "debug", "--seeds", "0", "1", "--device", "cpu", *more]


@pytest.mark.slow  # make torture kills sweeps too
def test_a_sweep_that_was_killed_ends_with_the_same_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(command(whole)) == 0  # in this process: sooner done
    assert "finished" in capsys.readouterr().out
    words = [*command(killed), "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "metacontroller.cli", *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(killed.glob("seed-*/*/discover.safetensors")):  # not in folders of drafts, which come and go
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # its workers end with it
    assert not (killed / "summary.json").exists()
    assert main(command(killed, "--workers", "2", "--resume", "--quiet")) == 0
    assert json.loads((killed / "summary.json").read_text()) == json.loads((whole / "summary.json").read_text())


def test_engines_that_are_not_installed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("submitit", "ray"):
        monkeypatch.setitem(sys.modules, package, None)
    for engine, package in (("slurm", "submitit"), ("ray", "ray")):
        with pytest.raises(ValueError, match=f"{package} is not installed"):
            sweep(tiny(), tmp_path / engine, **GRID, engine=engine, quiet=True)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_slurm_jobs_give_the_same_table(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed (extra: cluster)")
    rows = sweep(tiny(), tmp_path / "out", **GRID, engine="slurm", address="local", workers=2, minutes=10, quiet=True)
    assert rows == RunFolder(whole).read_summary()["jobs"]


def task_of(out: Path) -> int:
    """The process in which submitit runs a job whose logs are below this folder."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # a process that has just ended
            words = path.read_bytes().decode(errors="replace").split("\0")
            if "submitit.core._submit" in words and str(out / "slurm") in words:
                return int(path.parent.name)
    raise AssertionError("no job is running")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
def test_a_slurm_job_that_is_preempted_is_queued_again_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = pytest.importorskip("submitit", reason="submitit is not installed (extra: cluster)")
    config, grid = tiny(), {"seeds": [0], "alphas": [0.1], "lrs": [1e-3]}
    optimizer = dataclasses.replace(config.pretrain.optimizer, steps=800, checkpoint_every=10)
    config = dataclasses.replace(config, pretrain=dataclasses.replace(config.pretrain, optimizer=optimizer))
    rows, out = sweep(config, tmp_path / "whole", **grid, quiet=True), tmp_path / "out"
    checkpoint, wait, preempted = out / "seed-0" / "pretrain.safetensors", submitit.LocalJob.exception, []

    def preempt_the_first(job: Any) -> Any:
        if not preempted:
            deadline = time.monotonic() + 120
            while not checkpoint.exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            preempted.append(job.job_id)
            os.kill(task_of(out), signal.SIGUSR2)  # as Slurm does, to the process that works
        return wait(job)

    monkeypatch.setattr(submitit.LocalJob, "exception", preempt_the_first)
    assert sweep(config, out, **grid, engine="slurm", address="local", minutes=60, quiet=True) == rows
    said = "".join(path.read_text() for path in (out / "slurm").glob(f"{preempted[0]}_*log*"))
    assert "this job is preempted" in said
    assert said.count("Loading pickle") == 2  # once more after it was queued again
    steps = [json.loads(line)["step"] for line in (out / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*list(range(3, 800, 3)), 800]


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_gives_the_same_table(whole: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed (extra: cluster)")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    try:
        rows = sweep(tiny(), tmp_path / "out", **GRID, engine="ray", address=cluster.address, quiet=True)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert rows == RunFolder(whole).read_summary()["jobs"]
