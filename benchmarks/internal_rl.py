"""Episodes a second of internal RL as a run does it, rollout and update, in one process and in several.

One process has a thread for every core; several have one each and share the batches, as under ``torchrun``. The policy
is the one that the run has learned, so episodes are as long as at the end of learning. Prints medians and writes JSON.

    python benchmarks/internal_rl.py [RUN] [--processes 1 2] [--repeats 5] [--output FILE.json]

RUN: a finished run; that of ``make reproduce`` unless given, and if that is not there nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from metacontroller.phases.internal_rl import internal_rl
from metacontroller.recipes.config import load_run, read_config
from metacontroller.recipes.jobs import usable_cores
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import leave, processes

UPDATES = 8


def rates(path: Path, repeats: int) -> list[float]:
    """Episodes a second of `UPDATES` updates, again and again, in the processes that a launcher started."""
    workers, folder = processes("cpu"), RunFolder(path)
    run, config = load_run(folder, "cpu"), read_config(folder).internal_rl
    settings = replace(config, episodes=UPDATES * config.batch_size, checkpoint_every=1000)
    found = []
    with tempfile.TemporaryDirectory() as out:
        for repeat in range(1 + repeats):
            workers.wait()
            start = time.perf_counter()
            internal_rl(
                settings, run.model, run.policy, run.domain.reset, RunFolder(Path(out, str(repeat))), quiet=True
            )
            found.append(settings.episodes / (time.perf_counter() - start))
    return found[1:]  # the first was to warm up


def launch(path: Path, count: int, repeats: int) -> dict[str, Any]:
    """A row: as many processes as asked for, which share the cores."""
    threads = max(1, usable_cores() // count)
    words = ["--nproc-per-node", str(count), __file__, str(path), "--repeats", str(repeats), "--measured"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    return {"processes": count, "threads": threads, "episodes_per_second": statistics.median(found), "all": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/laptop/seed-0"))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "out" / "internal_rl.json")
    parser.add_argument("--measured", action="store_true", help=argparse.SUPPRESS)  # in our own children
    arguments = parser.parse_args()
    if arguments.measured:
        found = rates(arguments.run, arguments.repeats)
        if processes("cpu").is_main:
            print(json.dumps(found))
        leave()
        return
    if not RunFolder(arguments.run).read_summary():
        print(f"not measured: {arguments.run} is no finished run.")
        return
    rows = [launch(arguments.run, count, arguments.repeats) for count in arguments.processes]
    for row in rows:
        print("{processes} processes of {threads} threads: {episodes_per_second:,.0f} episodes/s".format(**row))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
