"""Internal RL without gradients: evolution of the policy, the whole population in one rollout (arXiv 2511.16652).

As in `phases.internal_rl` the frozen model, gate and controller together with the task are the environment. A
generation plays ``population`` perturbed policies side by side, ``episodes`` episodes each, in one batch. A member's
fitness is the mean return of its episodes; AdamW follows the gradient that `control.population` estimates from it.
Codes and actions are sampled as in internal RL, so that what evolves is the policy that is evaluated.

Metrics: of the generation's episodes, see `phases.updates`; ``best`` and ``fitness_std``, the highest fitness and the
standard deviation; ``grad_norm``, unless all members are equally fit and teach nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metacontroller.arguments import checked_kinds
from metacontroller.control.metacontroller import MetaController
from metacontroller.control.population import Population
from metacontroller.domains.base import BatchedEnv
from metacontroller.errors import UserError
from metacontroller.models.protocol import SteerableModel
from metacontroller.phases.artefacts import EVOLVED, save_artefacts
from metacontroller.phases.policy_gradient import Reset
from metacontroller.phases.rollout import AbstractRollout, policy_proposal, rollout_abstract
from metacontroller.phases.updates import PlayedUpdates
from metacontroller.ranges import Count, Positive, Rows, Seed, Width, check_fields, require
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.divergence import check_returns
from metacontroller.training.optimizer import Learner
from metacontroller.training.repeat import repeat_updates

PHASE = "evolution"


@dataclass(frozen=True, kw_only=True)
class EvolutionConfig:
    """Evolution of the policy. UserError for values out of range."""

    generations: Count = 100
    """Updates of the policy."""
    population: Rows = 256
    """Members of a generation, an even number."""
    episodes: Rows = 4
    """Episodes of each member."""
    scale: Positive = 0.1
    """Standard deviation of the perturbations."""
    rank: Width = 1
    """Rank of the perturbations of matrices."""
    lr: Positive = 1e-2
    """Learning rate of AdamW."""
    checkpoint_every: Count = 10
    """Generations from one checkpoint to the next."""
    seed: Seed = 0
    """Seed of perturbations, layouts, codes and actions."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.population % 2 == 0, "population", self.population, "an even number, in pairs of + and -")


@checked_kinds
def evolution(
    config: EvolutionConfig,
    model: SteerableModel,
    meta_controller: MetaController,
    reset: Reset,
    run: RunFolder,
    *,
    resume: bool = False,
    quiet: bool = False,
) -> MetaController:
    """Evolves the policy of ``meta_controller`` in place on episodes from ``reset(n, generator)``.

    Writes the metacontroller, of which only the policy has changed, to ``evolved_policy.safetensors`` in the run.
    UserError if the run holds a checkpoint of this phase and ``resume`` is false, or one of other settings: only there
    may be more generations; DivergedError at the first return or parameter that is not finite.
    """
    model.eval()
    meta_controller.eval()
    parameters = list(meta_controller.policy.parameters())
    generator = torch.Generator(parameters[0].device).manual_seed(config.seed)
    policy = meta_controller.policy
    learner = Learner(policy, parameters, generator, lr=config.lr, weight_decay=0.0, max_grad_norm=math.inf)
    episodes = config.population * config.episodes
    updates = _Evolution(PHASE, learner, episodes, quiet, config, model, meta_controller, reset)
    run.begin(PHASE, resume=resume)
    if resume:
        _refuse_other_settings(config, run)
    first = learner.restore(run, PHASE, config.generations)[0] if resume else 0
    updates.facts = {"settings": vars(config)}
    repeat_updates(PHASE, updates, first, config.generations, config.checkpoint_every, run, quiet=quiet)
    save_artefacts(run, learner.processes, {EVOLVED: meta_controller})
    return meta_controller


@dataclass
class _Evolution(PlayedUpdates):
    """Generations of `evolution`."""

    config: EvolutionConfig
    model: SteerableModel
    meta_controller: MetaController
    reset: Reset

    def play(self) -> tuple[AbstractRollout, AbstractRollout]:
        config, generator, policy = self.config, self.learner.generator, self.meta_controller.policy
        options = {"scale": config.scale, "rank": config.rank, "generator": generator}
        self.population = Population(policy, config.population, **options)
        env = self.reset(self.episodes, generator)
        rollout = play_population(self.model, self.meta_controller, self.population, env, generator)
        return rollout, rollout

    def learn(self, rollout: AbstractRollout) -> dict[str, Tensor]:
        check_returns(rollout.returns)
        fitness = fitness_of(rollout, self.config.population)
        metrics = {"best": fitness.max(), "fitness_std": fitness.std(correction=0)}
        if self.population.set_gradient(fitness):
            metrics["grad_norm"] = self.learner.optimizer_step(-fitness.mean())
        return metrics


def _refuse_other_settings(config: EvolutionConfig, run: RunFolder) -> None:
    """UserError if the run's checkpoint was made with other settings, which would count its episodes as theirs."""
    if not run.has_checkpoint(PHASE):
        return
    begun = run.load_checkpoint(PHASE)[1].get("settings")
    settings = begun if isinstance(begun, dict) else {}  # older checkpoints have none
    for name, value in vars(config).items():
        if name not in ("generations", "checkpoint_every") and settings.get(name, value) != value:
            raise UserError(
                f"{run.path} was evolved with {name} {settings[name]}, not {value}; resume with the same settings."
            )


def play_population(
    model: SteerableModel,
    meta_controller: MetaController,
    population: Population,
    env: BatchedEnv,
    generator: torch.Generator | None = None,
) -> AbstractRollout:
    """Plays every row of ``env`` to its end, the same number of rows for each member, side by side in order.

    UserError unless the rows divide among the members.
    """
    if len(env) % population.members:
        raise UserError(f"{len(env)} episodes do not divide among {population.members} members.")
    member = torch.arange(len(env), device=env.steps.device) // (len(env) // population.members)

    def policy(residual: Tensor, state: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return population(residual, state, member[rows])

    proposal = policy_proposal(meta_controller, generator, policy)
    return rollout_abstract(model, meta_controller, env, proposal, generator)


def fitness_of(rollout: AbstractRollout, members: int) -> Tensor:
    """(members,): the mean return of each member's episodes, which lie side by side.

    An episode that could not start says nothing about its member: it counts as the mean one of those that could.
    """
    started, returns = rollout.decisions > 0, rollout.returns
    if bool(started.any()) and not bool(started.all()):
        returns = torch.where(started, returns, returns[started].mean())
    return returns.view(members, -1).mean(1)
