"""Does memory grow in line with the length of episodes? One update of pretraining and of discovery, preset ant-laptop.

A measurement is a process of its own: the highest resident memory during an update, less what was resident before.
Random observations and actions, 16 episodes. Prints a table, with megabytes a step of an episode: constant if linear.

    python benchmarks/long_episodes.py [--lengths 125 250 500 1000 2000] [--batch 16]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch
from rich.console import Console
from rich.table import Table

from metacontroller.control.discovery_losses import kl_loss, steered_losses
from metacontroller.domains.registry import domain_of
from metacontroller.presets import preset
from metacontroller.recipes.config import build_meta_controller, build_model
from variants import resident

PHASES = ("pretrain", "discover")


def measure(phase: str, length: int, batch: int) -> float:
    """Megabytes of an update."""
    config = preset("ant-laptop")
    spec = domain_of(config.domain).spec()
    model, steering = build_model(config), build_meta_controller(config)
    states = torch.randn(batch, length + 1, spec.encoder["plane"]["dim_state"])
    actions, lengths = torch.randn(batch, length, spec.action["num_continuous"]), torch.full((batch,), length)
    before = resident()
    if phase == "pretrain":
        losses = model.behavior_cloning_loss(states, actions, lengths, with_state_loss=True)
        (losses.action + losses.state).backward()
    else:
        model.requires_grad_(False)
        losses, output = steered_losses(steering, model, states, actions, lengths, with_state_loss=False)
        (losses.action + kl_loss(output)).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[125, 250, 500, 1000, 2000])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)  # one measurement, for our own child
    arguments = parser.parse_args()
    if arguments.case:
        phase, length = arguments.case
        print(measure(phase, int(length), arguments.batch))
        return
    table = Table("steps", *(f"{phase}: {unit}" for phase in PHASES for unit in ("MB", "MB a step")))
    for length in arguments.lengths:
        cells = []
        for phase in PHASES:
            words = [sys.executable, __file__, "--batch", str(arguments.batch), "--case", phase, str(length)]
            found = float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            cells += [f"{found:.0f}", f"{found / length:.2f}"]
        table.add_row(str(length), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
