"""Many cells of one experiment: seeds x alpha x learning rate of internal RL. What is shared is made once.

    OUT/config.json, summary.json        what the sweep varies, and its table
    OUT/seed-0/                          a base model
    OUT/seed-0/alpha-0.004/              a metacontroller on it
    OUT/seed-0/alpha-0.004/lr-0.001/     internal RL with it

Every folder is a run and its cell is finished when it has a summary; a finished cell is not run again, one that was
interrupted goes on from its last checkpoint, one that failed leaves ``error.txt``, and the rest go on. Cells run in
this process, in processes, on Slurm or on a Ray cluster: always the same function, `attempt`, on one folder that all
can reach.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from metacontroller.errors import UserError
from metacontroller.phases.cells import in_own_processes
from metacontroller.phases.reproduce import (
    BASE_MODEL,
    COTRAINED_MODEL,
    META_CONTROLLER,
    RUN_PHASE,
    SEGMENTATION,
    LoadedRun,
    copy_artefact,
    discovery_figures,
    evaluate_run,
    open_folder,
    read_config,
)
from metacontroller.presets.gridworld import GridworldConfig, stream_seed, with_seed
from metacontroller.progress import track
from metacontroller.run_folder import RunFolder

Engine = Literal["processes", "slurm", "ray"]

MEASURES = ("internal_rl_success", "gate_recall", "gate_precision", "gate_binary_fraction", "code_subgoal_bits")


@dataclass(frozen=True)
class Cell:
    """One run: without alpha it makes the base model of its seed, without lr a metacontroller on that."""

    seed: int
    alpha: float | None = None
    lr: float | None = None

    @property
    def folder(self) -> str:
        """Where it is, below the sweep's folder."""
        parts = [f"seed-{self.seed}"]
        parts += [] if self.alpha is None else [f"alpha-{self.alpha:g}"]
        parts += [] if self.lr is None else [f"lr-{self.lr:g}"]
        return "/".join(parts)

    @property
    def parent(self) -> Cell | None:
        """The cell whose artefacts it starts from."""
        if self.alpha is None:
            return None
        return Cell(self.seed) if self.lr is None else Cell(self.seed, self.alpha)


def cell_config(config: GridworldConfig, cell: Cell) -> GridworldConfig:
    """The sweep's config with the cell's values; where alpha does not rise, it starts as it ends."""
    config = with_seed(config, cell.seed)
    if cell.alpha is not None:
        rises = config.discover.alpha_start != config.discover.alpha
        start = config.discover.alpha_start if rises else cell.alpha
        config = replace(config, discover=replace(config.discover, alpha=cell.alpha, alpha_start=start))
    if cell.lr is not None:
        config = replace(config, internal_rl=replace(config.internal_rl, lr=cell.lr))
    return config


# -- one cell ---------------------------------------------------------------------------------------------------------


def attempt(out: str, cell: Cell, device: str) -> None:
    """Runs a cell, or goes on with it; what went wrong is written to its ``error.txt``."""
    path = Path(out) / cell.folder
    failure = path / "error.txt"
    try:
        run_cell(Path(out), cell, device)
        failure.unlink(missing_ok=True)
    except Exception:
        path.mkdir(parents=True, exist_ok=True)
        failure.write_text(traceback.format_exc())


def run_cell(out: Path, cell: Cell, device: str) -> None:
    """One phase in the cell's folder, and its summary."""
    run = RunFolder(out / cell.folder)
    if run.read_summary():
        return
    config = cell_config(read_config(RunFolder(out)), cell)
    run.write_config(config)
    if cell.parent:
        for artefact in (BASE_MODEL, COTRAINED_MODEL, META_CONTROLLER, SEGMENTATION):
            copy_artefact(artefact, out / cell.parent.folder, run.path)
    phase = "pretrain" if cell.alpha is None else "discover" if cell.lr is None else "internal_rl"
    RUN_PHASE[phase](config, run, resume=True, quiet=True, device=device)
    run.write_summary({**vars(cell), **_measure(config, run, cell, device)})


def _measure(config: GridworldConfig, run: RunFolder, cell: Cell, device: str) -> dict[str, Any]:
    """What the cell's phase is judged by, on new layouts."""
    if cell.alpha is None:
        return {}
    loaded = LoadedRun(folder=run, config=config, device=device)
    episodes, seed = config.evaluate.episodes, stream_seed(config.seed, "evaluate")
    if cell.lr is None:
        return discovery_figures(loaded, seed, episodes)
    return {"internal_rl_success": evaluate_run(loaded, "internal-rl", episodes=episodes, seed=seed)["success"]}


# -- all cells --------------------------------------------------------------------------------------------------------

Job = tuple[str, Cell, str]
Run = Callable[[Sequence[Job], Callable[[], None]], None]
"""Attempts all jobs, whatever becomes of each, and says so after each."""


def sweep(
    config: GridworldConfig,
    out: str | os.PathLike[str],
    *,
    seeds: Sequence[int],
    alphas: Sequence[float],
    lrs: Sequence[float],
    engine: Engine = "processes",
    workers: int = 1,
    address: str | None = None,
    minutes: int = 24 * 60,
    resume: bool = False,
    quiet: bool = False,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Runs all cells; writes ``out/summary.json`` and returns its rows, one a combination, in their order.

    engine "processes": ``workers`` at the same time, one thread each; with one worker in this process. "slurm": by
    submitit, ``workers`` jobs at the same time of ``minutes`` at most; address "local" tries it out on this machine.
    "ray": on the cluster at ``address``, or on this machine. A row holds seed, alpha, lr, status ("finished" or why
    not) and `MEASURES`; nothing in it depends on interruptions.
    """
    for name, values in (("seeds", seeds), ("alphas", alphas), ("lrs", lrs)):
        if not values or len(set(values)) < len(values):
            raise UserError(f"{name} are {list(values)}; give at least one, each once.")
    if workers < 1:
        raise UserError(f"workers is {workers}; expected at least 1.")
    folder = RunFolder(out)
    open_folder(folder, config, resume=resume, option="--out")
    run = _engine(engine, folder.path, workers, address, minutes)
    waves = [
        [Cell(seed) for seed in seeds],
        [Cell(seed, alpha) for seed in seeds for alpha in alphas],
        [Cell(seed, alpha, lr) for seed in seeds for alpha in alphas for lr in lrs],
    ]
    done = 0
    with track(sum(map(len, waves)), "sweep", quiet=quiet) as progress:

        def advance() -> None:
            nonlocal done
            done += 1
            progress.update(done)

        for cells in waves:
            waiting = [cell for cell in cells if not _finished(folder.path, cell)]
            ready = [cell for cell in waiting if cell.parent is None or _finished(folder.path, cell.parent)]
            for _ in range(len(cells) - len(ready)):
                advance()
            if ready:
                run([(str(folder.path), cell, device) for cell in ready], advance)
    rows = [_row(folder.path, cell) for cell in waves[-1]]
    folder.write_summary({"cells": rows})
    return rows


def _finished(out: Path, cell: Cell) -> bool:
    return bool(RunFolder(out / cell.folder).read_summary())


def _row(out: Path, cell: Cell) -> dict[str, Any]:
    """The cell's line of the table, with what its metacontroller was judged by."""
    assert cell.parent is not None
    found = {**RunFolder(out / cell.parent.folder).read_summary(), **RunFolder(out / cell.folder).read_summary()}
    measured = {name: found.get(name) for name in MEASURES}
    return {**vars(cell), "status": _status(out, cell), **measured}


def _status(out: Path, cell: Cell) -> str:
    if _finished(out, cell):
        return "finished"
    if cell.parent is not None and not _finished(out, cell.parent):
        return f"not run: {_status(out, cell.parent)}"
    failure = out / cell.folder / "error.txt"
    if failure.exists():
        return f"failed in {cell.folder}: {failure.read_text().strip().splitlines()[-1]}"
    return f"failed in {cell.folder}: it ended without a word, perhaps killed"


def _engine(engine: Engine, out: Path, workers: int, address: str | None, minutes: int) -> Run:
    if engine == "slurm":
        return lambda jobs, advance: _on_slurm(jobs, advance, out, workers, address, minutes)
    if engine == "ray":
        return lambda jobs, advance: _on_ray(jobs, advance, address)
    return _here if workers == 1 else lambda jobs, advance: _in_processes(jobs, advance, workers)


def _here(jobs: Sequence[Job], advance: Callable[[], None]) -> None:
    for job in jobs:
        attempt(*job)
        advance()


def _in_processes(jobs: Sequence[Job], advance: Callable[[], None], workers: int) -> None:
    left = list(jobs)
    in_own_processes(attempt, lambda: left.pop(0) if left else None, workers, advance)


def _on_slurm(
    jobs: Sequence[Job], advance: Callable[[], None], out: Path, workers: int, address: str | None, minutes: int
) -> None:
    submitit = _need("submitit")
    executor = submitit.AutoExecutor(folder=out / "slurm", cluster=address)
    executor.update_parameters(timeout_min=minutes, cpus_per_task=1, slurm_array_parallelism=workers)
    with executor.batch():
        submitted = [executor.submit(attempt, *job) for job in jobs]
    for job in submitted:
        job.exception()  # waits; what became of the cell is read from its folder
        advance()


def _on_ray(jobs: Sequence[Job], advance: Callable[[], None], address: str | None) -> None:
    ray = _need("ray")
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    remote = ray.remote(num_cpus=1, max_retries=0)(attempt)
    left = [remote.remote(*job) for job in jobs]
    while left:
        ended, left = ray.wait(left)  # one that was killed has ended, too; its folder says so
        for _ in ended:
            advance()


def _need(package: str) -> Any:
    """A package of the extra ``cluster``."""
    try:
        return __import__(package)
    except ImportError as error:
        raise UserError(
            f"{package} is not installed; install it by: pip install 'metacontroller-rl[cluster]'."
        ) from error
