"""What do the worlds of docs/own-data.md come to, by the page's own commands, and what do codes mean there?

The page's policies are written to OUT/experts.py and its commands run there as they stand, each a process of its own.
Prints a line for each command, with its wall time, and a table for each world; writes JSON. A world whose commands were
run before is measured again without running them; a new OUT begins anew.

    python benchmarks/own_worlds.py [--out runs/own-worlds] [--only taxi rooms pendulum] [--output FILE.json]

What a code means is measured at the first step of episodes of the data, where every episode takes a code: how much of
the variance of a fact is explained by the code, by the mean of the 20 nearest codes of other episodes. Facts are things
that the model cannot know at that step, or that it sees; one that it sees anyway needs no code.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metacontroller.analysis.gate import held_out_gate
from metacontroller.analysis.oracle import switches
from metacontroller.data.trajectories import Trajectories
from metacontroller.recipes.config import load_run, read_config
from metacontroller.storage.files import read_object
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.seeding import stream_seed

PAGE = Path(__file__).parents[1] / "docs" / "own-data.md"
EPISODES = 2000
NEIGHBOURS = 20
POLICIES = {"internal-rl": "after internal RL", "prior": "codes of the prior", "base": "the model without codes"}


def page_worlds() -> tuple[str, dict[str, list[str]]]:
    """The page's policies, and its command lines by the name of the run folder they fill."""
    text = PAGE.read_text(encoding="utf-8")
    experts = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[0]
    blocks = re.findall(r"^```shell\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    worlds = {}
    for block in blocks:
        run = re.search(r"pretrain runs/(\w+)", block)
        if run is not None:
            worlds[run[1]] = [line.partition("#")[0].strip() for line in block.splitlines() if line.strip()]
    return experts, worlds


def run_commands(lines: list[str], folder: Path) -> list[dict[str, Any]]:
    """Runs a world's commands one after the other, up to the first that fails."""
    done = []
    for line in lines:
        words = shlex.split(line)[1:]
        start = time.perf_counter()
        status = subprocess.run([sys.executable, "-m", "metacontroller.cli", *words], cwd=folder).returncode
        done.append({"command": line, "seconds": time.perf_counter() - start, "exit": status})
        print(f"{done[-1]['seconds']:>7.1f} s  exit {status}  {line}", flush=True)
        if status:
            break
    return done


# -- what codes mean --------------------------------------------------------------------------------------------------


def taxi_facts(episodes: Trajectories) -> dict[str, Tensor]:
    """Where the passenger waits and wants to go, which the first observation shows."""
    first = episodes.states[:, 0, 0]
    passenger, drop_off = first // 4 % 5, first % 4
    return {
        "passenger, seen": torch.nn.functional.one_hot(passenger, 5).double(),
        "drop-off, seen": torch.nn.functional.one_hot(drop_off, 4).double(),
    }


def rooms_facts(episodes: Trajectories) -> dict[str, Tensor]:
    """Where the goal lies as seen from the start, found by following the expert, who never bumps into a wall."""
    ahead, right = torch.tensor([1.0, 0.0, -1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, -1.0])
    turn = torch.where(episodes.actions == 0, -1, torch.where(episodes.actions == 1, 1, 0)) * episodes.mask()
    heading = turn.cumsum(1) % 4
    moved = ((episodes.actions == 2) & episodes.mask()).double()
    first = torch.nn.functional.one_hot(episodes.actions[:, 0], 3).double()
    return {
        "cells ahead to the goal": (moved * ahead[heading]).sum(1, keepdim=True),
        "cells right to the goal": (moved * right[heading]).sum(1, keepdim=True),
        "steps to the goal": episodes.lengths.double()[:, None],
        "first action": first,
    }


def pendulum_facts(episodes: Trajectories) -> dict[str, Tensor]:
    """The pendulum's state where the code is taken, which the model sees, and the torque that the expert gives."""
    cos, sin, speed = episodes.states[:, 0].double().unbind(-1)
    return {
        "height, seen": cos[:, None],
        "side, seen": sin[:, None],
        "speed, seen": speed[:, None],
        "mean torque of the next 10 steps": episodes.actions[:, :10].double().mean(1),
    }


FACTS: dict[str, Callable[[Trajectories], dict[str, Tensor]]] = {
    "taxi": taxi_facts,
    "rooms": rooms_facts,
    "pendulum": pendulum_facts,
}


def explained(codes: Tensor, fact: Tensor) -> float | None:
    """The share of a fact's variance (m, d) that codes (m, n_z) explain; None if the fact never varies.

    Each episode's fact is predicted by the mean of the nearest codes of the others. 0: the codes say nothing of it.
    """
    left = (fact - fact.mean(0)).square().sum()
    if float(left) == 0:
        return None
    distance = torch.cdist(codes, codes).fill_diagonal_(torch.inf)
    nearest = distance.topk(min(NEIGHBOURS, len(codes) - 1), largest=False).indices
    return float(1 - (fact - fact[nearest].mean(1)).square().sum() / left)


def meaning(name: str, folder: Path) -> dict[str, Any]:
    """Codes of the data's episodes: how many, how many nats, and what the first one tells."""
    run = RunFolder(folder / "runs" / name)
    loaded = load_run(run, "cpu", read_config(run))
    gate = held_out_gate(loaded, EPISODES, stream_seed(loaded.seed, "analyse"))
    taken = switches(gate, loaded.meta_controller.gate_config.threshold)
    codes = gate.code[:, 0].double()
    assert gate.nats is not None
    return {
        "codes_per_episode": float(taken.sum(1).double().mean()),
        "nats_of_first_code": float(gate.nats[:, 0].sum(-1).mean()),
        "nats_of_later_codes": float(gate.nats[:, 1:].sum(-1)[taken[:, 1:]].mean()) if taken[:, 1:].any() else None,
        "explained": {fact: explained(codes, value) for fact, value in FACTS[name](gate.episodes).items()},
    }


# -- results ----------------------------------------------------------------------------------------------------------


def results(name: str, folder: Path) -> dict[str, Any]:
    """What the commands left in the folders of a world."""
    run = RunFolder(folder / "runs" / name)
    evaluations = {policy: run.read_analysis(f"evaluation-{policy}") for policy in POLICIES}
    return {
        "experts": read_object(folder / "data" / name / "store.json")["collected"],
        "diagnostics": run.read_analysis("diagnostics"),
        "evaluations": {policy: found for policy, found in evaluations.items() if found},
        "codes": meaning(name, folder),
    }


def print_world(name: str, found: dict[str, Any]) -> None:
    experts, codes = found["experts"], found["codes"]
    print(f"\n{name}")
    row = "  {:<28} {:>8} {:>18} {:>7} {:>9}"
    print(row.format("", "success", "return", "steps", "decisions"))
    spread = "" if experts["return_se"] is None else f" ± {experts['return_se']:.2g}"
    steps = experts["steps"] / experts["kept"]
    print(
        row.format("experts", f"{experts['success']:.3f}", f"{experts['mean_return']:.4g}{spread}", f"{steps:.1f}", "")
    )
    for policy, says in POLICIES.items():
        if policy in found["evaluations"]:
            one = found["evaluations"][policy]
            decisions = "" if one["decisions"] is None else f"{one['decisions']:.2f}"
            gained = f"{one['mean_return']:.4g} ± {one['return_se']:.2g}"
            print(row.format(says, f"{one['success']:.3f}", gained, f"{one['steps']:.1f}", decisions))
    later = codes["nats_of_later_codes"]
    rest = "" if later is None else f", of a later one {later:.2f}"
    first, many = codes["nats_of_first_code"], codes["codes_per_episode"]
    print(f"  codes an episode {many:.2f}; nats of the first {first:.2f}{rest}")
    for fact, share in codes["explained"].items():
        print(f"  the first code explains {'nothing, it never varies' if share is None else f'{share:.2f}'} of: {fact}")


def main() -> None:
    experts, worlds = page_worlds()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/own-worlds"), help="folder in which the commands run")
    parser.add_argument("--only", nargs="+", choices=list(worlds), default=list(worlds))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "out" / "own_worlds.json")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "experts.py").write_text(experts, encoding="utf-8")
    report: dict[str, Any] = {"machine": platform.machine(), "torch": torch.__version__, "worlds": {}}
    failed = False
    for name in arguments.only:
        times = arguments.out / f"{name}.json"
        found = read_object(times) if times.exists() else {"commands": run_commands(worlds[name], arguments.out)}
        if any(command["exit"] for command in found["commands"]):
            failed = True
        else:
            times.write_text(json.dumps(found))
            found |= results(name, arguments.out)
            print_world(name, found)
        report["worlds"][name] = found
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
