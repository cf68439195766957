"""Supervised controllers: one linear controller a subgoal, trained with true labels at a layer (Fig. 4).

If they reach their subgoals on new layouts, chained in an order that training never showed, then the residual at that
layer can be steered linearly: what discovery must find without labels is there to be found.

Axes: b rows, t steps, i residual in, o residual out (both n_e), g subgoals, r rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metacontroller.analysis.probing import labelled
from metacontroller.envs.gridworld_pinpad import PinpadConfig
from metacontroller.envs.tasks import Task, single_colors
from metacontroller.models.protocol import frozen
from metacontroller.models.transformer import Transformer
from metacontroller.phases.internal_rl import task_grids
from metacontroller.phases.rollout import Actor, survivors
from metacontroller.phases.training import EpisodeStream, Generate, noise_generator
from metacontroller.progress import track


class SupervisedControllers(nn.Module):
    """U_g = A_g B_g^T of rank r for each subgoal g; A starts at zero, so that nothing is steered at first."""

    def __init__(self, subgoals: int, dim_model: int, rank: int) -> None:
        super().__init__()
        self.read = nn.Parameter(torch.randn(subgoals, rank, dim_model) * dim_model**-0.5)  # B: (g, r, i)
        self.write = nn.Parameter(torch.zeros(subgoals, dim_model, rank))  # A: (g, o, r)

    def forward(self, residual: Tensor, subgoal: Tensor) -> Tensor:
        """residual (..., n_e), subgoal (...) int64 -> e + U_g e."""
        v = torch.einsum("...i,gri->...gr", residual, self.read)
        chosen = v * nn.functional.one_hot(subgoal, len(self.read)).to(v.dtype)[..., None]
        return residual + torch.einsum("...gr,gor->...o", chosen, self.write)


class SteeringResult(NamedTuple):
    """By layer, 0 first: action loss under steering in the last updates, and success of the chained controllers."""

    action_loss: list[float]
    success: list[float]


def steer_layers(
    model: Transformer,
    generate: Generate,
    environment: PinpadConfig,
    task: Sequence[int],
    *,
    steps: int,
    batch_size: int,
    episodes: int,
    seed: int,
    subgoals: Sequence[Task] | None = None,
    rank: int = 16,
    lr: float = 1e-3,
    quiet: bool = False,
) -> SteeringResult:
    """Trains controllers at every layer and plays ``task`` with them on ``episodes`` new layouts.

    subgoals: the vocabulary of the episodes' labels, a controller each; by default every color of the grid.
    steps, batch_size, lr: of AdamW (the paper: 3.2k, 512, 1e-3). The model is left as it is.
    """
    subgoals = single_colors(environment.num_colors) if subgoals is None else subgoals
    losses, successes = [], []
    split = copy.deepcopy(model).eval()
    with track(steps * (model.depth + 1), "steer", quiet=quiet) as progress:
        for layer in range(model.depth + 1):
            split.resplit(layer)

            def update(step: int, loss: float, layer: int = layer) -> None:
                progress.update(layer * steps + step, layer=layer, loss=loss)

            controllers, loss = _train(split, generate, len(subgoals), rank, steps, batch_size, lr, seed, update)
            losses.append(loss)
            successes.append(play_chained(split, controllers, environment, task, episodes, seed, subgoals))
    return SteeringResult(losses, successes)


def _train(
    model: Transformer,
    generate: Generate,
    subgoals: int,
    rank: int,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    update: Callable[[int, float], None],
) -> tuple[SupervisedControllers, float]:
    """Controllers that make the labelled subgoal's actions likely, and the mean action loss of the last tenth."""
    device = next(model.parameters()).device
    stream = EpisodeStream(generate, batch_size, seed, device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        controllers = SupervisedControllers(subgoals, model.dim, rank).to(device)
    optimizer = torch.optim.AdamW(controllers.parameters(), lr=lr, fused=True)
    last = []
    for step in range(1, steps + 1):
        batch = stream.next()
        labels, _ = labelled(batch)
        with torch.no_grad():
            residual = model.residual(batch.states, batch.actions)
        with frozen(model):
            hidden = model.upper(controllers(residual, labels))
            loss = model.readout_losses(hidden, batch.states, batch.actions, batch.lengths, False).action
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        if step > 0.9 * steps:
            last.append(loss.detach())
        if step % 50 == 0 or step == steps:
            update(step, float(loss.detach()))
    return controllers, float(torch.stack(last).mean())


@torch.no_grad()
def play_chained(
    model: Transformer,
    controllers: SupervisedControllers,
    environment: PinpadConfig,
    task: Sequence[int],
    episodes: int,
    seed: int,
    subgoals: Sequence[Task] | None = None,
) -> float:
    """Share of new layouts on which ``task`` is done when each step is steered towards its present subgoal, by the
    controller of that index in the vocabulary ``subgoals``, by default every color of the grid."""
    generator = noise_generator(seed, next(model.parameters()).device)  # a stream apart from the training episodes
    grids = task_grids(environment, task, episodes, generator, subgoals)
    actor, done = Actor(model, grids, generator), 0
    while len(grids):
        residual, before = actor.look(), grids.success
        actor.act(controllers(residual, grids.goal().clamp(min=0)))
        done += int((grids.success & ~before).sum())  # finished grids may stay on for a while
        actor.keep(survivors(~(grids.terminated | grids.truncated)))
    return done / episodes
