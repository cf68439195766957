"""What do the worlds of docs/own-data.md come to, by the page's own commands, and what do codes mean there?

The page's policies are written to OUT/experts.py and its commands run there as they stand, each a process of its own.
Prints a line for each command, with its wall time, and a table for each world; writes JSON. A world whose commands were
run before is measured again without running them; a new OUT begins anew.

    python benchmarks/own_worlds.py [--out runs/own-worlds] [--only taxi rooms pendulum] [--output FILE.json]

What a code means is measured at the first step of episodes of the data, where every episode takes a code: how much of
the variance of a fact a small network reads from what the model sees at that step (its residual), and from that and the
code. What the code adds is what it says. Its codes come from an encoder that has seen the whole episode.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metacontroller.analysis.gate_alignment import gate_along
from metacontroller.data.trajectories import Trajectories
from metacontroller.recipes.config import load_run, read_config
from metacontroller.storage.manifest import read_object
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.seeding import stream_seed

PAGE = Path(__file__).parents[1] / "docs" / "own-data.md"
EPISODES = 2000
UPDATES = 400
"""Of the network that reads facts."""
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
    turns = [(episodes.actions[:, :8] == way) & episodes.mask()[:, :8] for way in (0, 1)]
    return {
        "cells ahead to the goal": (moved * ahead[heading]).sum(1, keepdim=True),
        "cells right to the goal": (moved * right[heading]).sum(1, keepdim=True),
        "steps to the goal": episodes.lengths.double()[:, None],
        "first action": first,
        "turns left and right in 8 steps": torch.stack([way.sum(1) for way in turns], 1).double(),
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


def explained(known: Tensor, fact: Tensor) -> float | None:
    """The share of a fact's variance (m, d) that a small network reads from what is known (m, k), in episodes that it
    has not seen; None if the fact never varies.

    It learns from half of the episodes, and is taken as it is when it reads a quarter of them best; the rest judges.
    """
    if bool((fact == fact[0]).all()):
        return None
    half, rest = len(known) // 2, 3 * len(known) // 4
    x, y = (
        ((values - values[:half].mean(0)) / values[:half].std(0).clamp_min(1e-6)).float() for values in (known, fact)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reader = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, y.shape[1]))
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3, weight_decay=0.1)
    best, chosen = math.inf, y[rest:]
    for _ in range(UPDATES):
        optimizer.zero_grad()
        (reader(x[:half]) - y[:half]).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            error = float((reader(x[half:rest]) - y[half:rest]).square().mean())
            if error < best:
                best, chosen = error, reader(x[rest:])
    left = (y[rest:] - y[rest:].mean(0)).square().sum()
    return float(1 - (y[rest:] - chosen).square().sum() / left)


def meaning(name: str, folder: Path) -> dict[str, Any]:
    """Codes of the data's episodes: how many, how many nats, and what the first one tells."""
    run = RunFolder(folder / "runs" / name)
    loaded = load_run(run, "cpu", read_config(run))
    dataset = loaded.domain.dataset  # type: ignore[attr-defined]
    count = min(EPISODES, len(dataset.episodes))
    read = dataset.read(np.arange(count), longest=loaded.domain.config.window)
    episodes = Trajectories(states=read.states, actions=read.actions, lengths=read.lengths)
    gate = gate_along(loaded, episodes, stream_seed(loaded.seed, "analyse"))
    taken = gate.switches()
    with torch.no_grad():
        seen = loaded.model.residual(episodes.states[:, :2], episodes.actions[:, :1])[:, 0].float()
    both = torch.cat([seen, gate.code[:, 0]], 1)
    facts = FACTS[name](episodes)
    assert gate.nats is not None
    return {
        "codes_per_episode": float(taken.sum(1).double().mean()),
        "nats_of_first_code": float(gate.nats[:, 0].sum(-1).mean()),
        "nats_of_later_codes": float(gate.nats[:, 1:].sum(-1)[taken[:, 1:]].mean()) if taken[:, 1:].any() else None,
        "explained": {fact: (explained(seen, value), explained(both, value)) for fact, value in facts.items()},
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
    for fact, (without, with_code) in codes["explained"].items():
        if without is not None:
            print(f"  explained of {fact}: {without:.2f} by what the model sees, {with_code:.2f} with the first code")


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
