"""How fast does a steered model act? One step of 256 environments, ours beside metacontroller-pytorch 0.3.3.

Both are called as the peer's README shows, with a cache, past actions and a metacontroller, under ``torch.no_grad``, on
the sizes and in the precision of `discovery_step.py`; what is not matched there is not matched here. A measurement is a
process of its own, ours and the peer's in turn: the mean step of an episode of 32 steps, medians over episodes.

    python benchmarks/rollout_step.py [--peer-python PATH] [--rounds 3] [--episodes 5] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from discovery_step import (
    DIM_STATE,
    EPISODE_STEPS,
    OUT,
    PEER,
    PEER_VERSION,
    check_peer,
    install_peer,
    measure_apart,
    our_modules,
    peer_modules,
)

ENVIRONMENTS, WARM_UPS, TARGET = 256, 1, 10
SETTINGS = ("paper", "readme")


@torch.no_grad()
def measure(library: str, setting: str, episodes: int, threads: int) -> dict[str, Any]:
    """Mean seconds of a step, of each episode after the warm-up."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, meta_controller = (our_modules if library == "ours" else peer_modules)(setting)
    model.eval()
    meta_controller.eval()
    states = torch.randn(EPISODE_STEPS, ENVIRONMENTS, 1, DIM_STATE)
    actions = torch.randint(4, (EPISODE_STEPS, ENVIRONMENTS, 1))
    times = []
    for _ in range(WARM_UPS + episodes):
        start, cache = time.perf_counter(), None
        for t in range(EPISODE_STEPS):
            past = None if t == 0 else actions[t]
            _, cache = model(states[t], past, meta_controller=meta_controller, cache=cache, return_cache=True)
        times.append((time.perf_counter() - start) / EPISODE_STEPS)
    return {"seconds": times[WARM_UPS:], "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help=f"interpreter that has {PEER} {PEER_VERSION}")
    parser.add_argument("--rounds", type=int, default=3, help="processes per measurement")
    parser.add_argument("--episodes", type=int, default=5, help="per process, after one to warm up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUT / "rollout_step.json")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)  # one measurement, for our own child
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(*arguments.case)))
        return
    pythons = {"ours": Path(sys.executable), "peer": arguments.peer_python or install_peer(OUT / "peer-venv")}
    check_peer(pythons["peer"])
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(arguments.rounds):
        for setting in SETTINGS:
            for library, python in pythons.items():
                case = [library, setting, arguments.episodes, arguments.threads]
                done = measure_apart(python, __file__, library, case, arguments.threads)
                seconds.setdefault((library, setting), []).extend(done["seconds"])
    medians = {case: statistics.median(values) for case, values in seconds.items()}
    rows = []
    for setting in SETTINGS:
        ours, peer = medians["ours", setting], medians["peer", setting]
        rows.append({"setting": setting, "ours_seconds": ours, "peer_seconds": peer, "times_the_speed": peer / ours})
        print(
            f"{setting:>7}: ours {1e3 * ours:.2f} ms a step, the peer {1e3 * peer:.2f} ms: {peer / ours:.1f} times the "
            f"peer's speed (target {TARGET})"
        )
    report = {
        "peer": f"{PEER} {PEER_VERSION}",
        "machine": platform.machine(),
        "threads": arguments.threads,
        "environments": ENVIRONMENTS,
        "episode_steps": EPISODE_STEPS,
        "torch": torch.__version__,
        "rows": rows,
        "target": TARGET,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
