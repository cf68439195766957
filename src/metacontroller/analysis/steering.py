"""Supervised controllers: one linear controller a subgoal, trained with true labels at a layer (Fig. 4).

Where they reach their subgoals, chained in an order that training never showed, the residual can be steered linearly:
what discovery must find without labels is there to be found.

Axes: b rows, t steps, i residual in, o residual out (both n_e), g subgoals, r rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.probing import LayerConfig, labelled, layer_rows, trained_on_labels
from metacontroller.analysis.registry import Analysis, Results, TableRows, analysis
from metacontroller.data.batching import Generate
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.base import Domain
from metacontroller.errors import UserError
from metacontroller.models.precision import weights_cast_once
from metacontroller.models.protocol import SteerableModel
from metacontroller.phases.rollout import Actor, survivors
from metacontroller.report.analysis_figures import steering_figure
from metacontroller.training.progress import track
from metacontroller.training.seeding import noise_generator


class SupervisedControllers(nn.Module):
    """U_g for each subgoal g: A_g B_g^T of rank r, or a full matrix where rank is None. A, or the full U, starts at
    zero, so that nothing is steered at first."""

    def __init__(self, subgoals: int, dim_model: int, rank: int | None) -> None:
        super().__init__()
        self.subgoals, self.rank = subgoals, rank
        if rank is None:
            self.full = nn.Parameter(torch.zeros(subgoals, dim_model, dim_model))  # U: (g, o, i)
        else:
            self.read = nn.Parameter(torch.randn(subgoals, rank, dim_model) * dim_model**-0.5)  # B: (g, r, i)
            self.write = nn.Parameter(torch.zeros(subgoals, dim_model, rank))  # A: (g, o, r)

    def forward(self, residual: Tensor, subgoal: Tensor) -> Tensor:
        """residual (..., n_e), subgoal (...) int64 -> e + U_g e."""
        asked = nn.functional.one_hot(subgoal, self.subgoals)[..., None]
        if self.rank is None:
            products = torch.einsum("...i,goi->...go", residual, self.full)
            return residual + (products * asked.to(products.dtype)).sum(-2)
        v = torch.einsum("...i,gri->...gr", residual, self.read)
        return residual + torch.einsum("...gr,gor->...o", v * asked.to(v.dtype), self.write)


class SteeringResult(NamedTuple):
    """By layer, 0 first: action loss under steering on validation episodes, and success of the chained controllers."""

    action_loss: list[float]
    success: list[float]


def steer_layers(
    model: SteerableModel,
    sources: tuple[Generate, Generate],
    domain: Domain,
    config: LayerConfig,
    *,
    seed: int,
    rank: int | None = 16,
    temperature: float = 1.0,
    controlled_only: bool = False,
    quiet: bool = False,
) -> SteeringResult:
    """Trains a controller for each subgoal of ``domain`` at every layer, on labelled episodes of the first source;
    measures the action loss on episodes of the second, and plays the post-training task in as many.

    rank: of the controllers, None for full ones. temperature: of the actions in play. controlled_only: at the
    controlled layer alone. The paper's training: 3.2k steps, batches of 512, a learning rate of 1e-3. The model is left
    as it is; UserError for one that has to be split at every layer and cannot be.
    """
    if not controlled_only and type(model).resplit is SteerableModel.resplit:
        raise UserError(
            f"steering trains controllers at every layer, but a {type(model).__name__} can be steered at one only; "
            "leave this analysis out."
        )
    result, split, device = SteeringResult([], []), copy.deepcopy(model).eval(), next(model.parameters()).device
    layers: Sequence[int | None] = (None,) if controlled_only else range(model.depth + 1)

    def make() -> SupervisedControllers:
        return SupervisedControllers(len(domain.spec().subgoals), model.dim, rank)

    def loss(controllers: SupervisedControllers, batch: Trajectories) -> Tensor:
        return _steered_loss(split, controllers, batch)

    with track(config.steps * len(layers), "steer", quiet=quiet) as progress:
        for index, layer in enumerate(layers):
            if layer is not None:
                split.resplit(layer)

            def update(step: int, loss: float, index: int = index) -> None:
                progress.update(index * config.steps + step, layer=index, loss=loss)

            controllers = trained_on_labels(make, loss, sources[0], config, seed, device, update)
            judged_by = sources[1](config.episodes, noise_generator(seed, device))
            result.action_loss.append(_action_loss(split, controllers, judged_by, config.batch_size))
            result.success.append(play_chained(split, controllers, domain, config.episodes, seed, temperature))
    return result


def _steered_loss(model: SteerableModel, controllers: SupervisedControllers, batch: Trajectories) -> Tensor:
    """Mean action loss of the steps of a batch under their subgoals' controllers, a scalar."""
    labels, _ = labelled(batch)
    with torch.no_grad():
        residual = model.residual(batch.states, batch.actions)
    steered = controllers(residual, labels)
    return model.losses_under(steered, batch.states, batch.actions, batch.lengths, with_state_loss=False).action


@torch.no_grad()
def _action_loss(
    model: SteerableModel, controllers: SupervisedControllers, episodes: Trajectories, batch_size: int
) -> float:
    """The same over all steps of ``episodes``, so many episodes at a time."""
    total = 0.0
    for rows in torch.arange(episodes.batch, device=episodes.lengths.device).split(batch_size):
        batch = episodes.index(rows)
        total += float(_steered_loss(model, controllers, batch) * batch.lengths.sum())
    return total / float(episodes.lengths.sum())


def controllers_of(run: LoadedRun) -> dict[str, Any]:
    """Rank and temperature for `steer_layers`: those of the controllers that the run's discovery looks for."""
    return {"rank": run.controller.rank, "temperature": run.controller.action_temperature}


def tells_goals(domain: Domain, seed: int) -> bool:
    """Whether an episode of the post-training task tells which subgoal it asks for."""
    return bool((domain.reset(1, torch.Generator().manual_seed(seed)).goal() >= 0).any())


@torch.no_grad()
@weights_cast_once()
def play_chained(
    model: SteerableModel,
    steer: Callable[[Tensor, Tensor], Tensor],
    domain: Domain,
    episodes: int,
    seed: int,
    temperature: float = 1.0,
) -> float:
    """Share of held-out episodes in which the post-training task is done when each step is steered towards the subgoal
    that the task asks for. steer: residual (b, n_e), subgoal (b,) -> steered residual, such as `SupervisedControllers`.
    temperature: of the actions. UserError where the world does not tell which subgoal that is."""
    generator = noise_generator(seed, next(model.parameters()).device)  # a stream apart from the training episodes
    env = domain.reset(episodes, generator)
    if not tells_goals(domain, seed):
        raise UserError(
            f"steering follows the subgoal that a task asks for, which the world {domain.name} does not tell; define "
            "goal() of its episodes."
        )
    actor, done = Actor(model, env, generator, temperature=temperature), 0
    while len(env):
        residual, before = actor.look(), env.success.clone()
        actor.act(steer(residual, env.goal().clamp(min=0)))
        done += int((env.success & ~before).sum())  # finished episodes may stay on for a while
        actor.keep(survivors(~(env.terminated | env.truncated)))
    return done / episodes


@analysis("steering", command="steer", figure="4")
class Steering(Analysis):
    """Supervised controllers with true labels at every layer, chained on the post-training task (Fig. 4).

    They have the rank of the controllers that discovery looks for, and act at their temperature.
    """

    Config = LayerConfig

    def measure(self, run: LoadedRun, config: LayerConfig, *, quiet: bool = False) -> Results:
        options = {**controllers_of(run), "seed": run.analysis_seed, "quiet": quiet}
        steered = steer_layers(run.base, run.labelled_sources, run.domain, config, **options)
        return {**steered._asdict(), **config.training()}

    def draw(self, results: Sequence[Results]) -> Any:
        return steering_figure(results)

    def rows(self, results: Sequence[Results]) -> TableRows:
        return layer_rows(results)
