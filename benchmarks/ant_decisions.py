"""Does the base model of an ant know the plane? Its loss where the expert decides, on held-out demonstrations.

Almost everywhere an ant goes on as before. It decides where an episode begins, where it has come to a color, and where
it comes to a new cell: there the way to the next color turns, or goes straight on. Of arrivals, those are apart where
all colors that may follow lie in the same direction: a model that knows the plane has nothing to guess there. Beside
the loss in nats stands its part that is about which mode of the mixture it is; two equally likely ones cost 0.69.

    python benchmarks/ant_decisions.py RUN [--model base_model.safetensors] [--episodes 512]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from metacontroller.domains.ant_pinpad.layouts import direction_fields
from metacontroller.domains.ant_pinpad.observation import objects_of, parts_of
from metacontroller.domains.registry import domain_of
from metacontroller.models.readouts import GaussianMixtureReadout, gaussian_log_prob
from metacontroller.models.transformer import Transformer
from metacontroller.recipes.config import from_json
from metacontroller.storage.run_folder import RunFolder

ROWS = 64
"""Episodes that the model reads at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", default="base_model.safetensors", help="its file in RUN, such as one of snapshots/")
    parser.add_argument("--episodes", type=int, default=512)
    arguments = parser.parse_args()
    domain = domain_of(from_json(RunFolder(arguments.run).read_config()).domain)
    batch = domain.demonstrations("validation", arguments.episodes, torch.Generator().manual_seed(0))
    model = Transformer.init_and_load(arguments.run / arguments.model).eval()
    losses, choices = [], []
    with torch.no_grad():
        for first in range(0, arguments.episodes, ROWS):
            actions = batch.actions[first : first + ROWS]
            params = model.action_readout(model.upper(model.residual(batch.states[first : first + ROWS], actions)))
            losses.append(-model.action_readout.log_prob(params, actions))
            choices.append(choice(model.action_readout, params, actions))
    loss, chosen = torch.cat(losses), torch.cat(choices)
    print(f"{'where':<34}{'steps':>8}{'nats':>8}{'of choice':>11}")
    for name, where in decisions(domain, batch).items():
        print(f"{name:<34}{int(where.sum()):>8}{float(loss[where].mean()):>8.2f}{float(chosen[where].mean()):>11.2f}")


def choice(readout, params: Tensor, actions: Tensor) -> Tensor:
    """(b, t): nats that the action costs beyond those under the mode that fits it best; 0 for a single Gaussian."""
    if not isinstance(readout, GaussianMixtureReadout):
        return torch.zeros(actions.shape[:2])
    weights, gaussians = readout.parts(params)
    each = gaussian_log_prob(gaussians, actions[:, :, None]).sum(-1)
    return each.amax(-1) - torch.logsumexp(weights + each, -1)


def decisions(domain, batch) -> dict[str, Tensor]:
    """(b, t) bool by name: the steps of each kind."""
    arena, real = domain.config.arena, batch.mask()
    fields = direction_fields(arena, objects_of(arena, batch.states[:, 0]))  # (b, colors, cells)
    cell = arena.cell(parts_of(arena, batch.states[:, :-1].double()).place * arena.half).clamp(min=0)
    ways = fields.gather(2, cell[:, None].expand(-1, arena.num_colors, -1))  # (b, colors, t)
    way = ways.gather(1, batch.subgoals.clamp(min=0)[:, None]).squeeze(1)
    first, arrived, entered, turned = (torch.zeros_like(real) for _ in range(4))
    first[:, 0] = True
    arrived[:, 1:] = (batch.segments[:, 1:] != batch.segments[:, :-1]) & real[:, 1:]
    entered[:, 1:] = (cell[:, 1:] != cell[:, :-1]) & real[:, 1:] & ~arrived[:, 1:]
    turned[:, 1:] = way[:, 1:] != way[:, :-1]
    follows = domain.seen_transitions() & ~torch.eye(arena.num_colors, dtype=torch.bool)
    before = torch.cat([batch.subgoals[:, :1], batch.subgoals[:, :-1]], 1).clamp(min=0)
    may = follows[before].transpose(1, 2)  # (b, colors, t)
    same = ((ways == way[:, None]) | ~may).all(1)
    return {
        "first step": first,
        "at a color, one direction": arrived & same,
        "at a color, several directions": arrived & ~same,
        "new cell, the way turns": entered & turned,
        "new cell, straight on": entered & ~turned,
        "all others": real & ~first & ~arrived & ~entered,
    }


if __name__ == "__main__":
    main()
