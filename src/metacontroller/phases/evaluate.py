"""Measuring a trained run on new layouts: success on a task, and how the gate meets true subgoal changes (Fig. 6, 8).

Axes: b episodes, t steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.analysis.switching import gate_alignment
from metacontroller.baselines.compile import CompILE, begin_probability
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.trajectories import Trajectories
from metacontroller.envs.gridworld_pinpad import PinpadConfig
from metacontroller.envs.tasks import Task, check_tasks, format_task, subgoal_chunks
from metacontroller.errors import UserError
from metacontroller.models.transformer import Transformer
from metacontroller.phases.internal_rl import task_grids
from metacontroller.phases.rollout import policy_proposal, prior_proposal, rollout_abstract, rollout_raw
from metacontroller.phases.training import Generate, noise_generator

MAX_BATCH = 1024  # episodes at a time: bounds memory

Policy = Literal["base", "raw", "prior", "internal-rl"]
"""Who acts: the model's own actions before (base) and after (raw) raw-action RL, codes of prior or policy."""


def evaluate(
    model: Transformer,
    meta_controller: MetaController | None,
    environment: PinpadConfig,
    policy: Policy,
    task: Sequence[int],
    episodes: int,
    seed: int,
    *,
    subgoals: Sequence[Task] | None = None,
) -> dict[str, Any]:
    """Plays ``episodes`` on new layouts from ``seed`` and returns means over them.

    success, the share of episodes that the environment calls solved, and mean_return, with their standard errors
    success_se, of a share, and return_se, of a sample (None for a single episode); subgoals (done in order), steps,
    decisions (abstract actions; None where there are none), and what was asked for: policy, task, episodes.
    subgoals: the vocabulary in which subgoals are counted, by default every color of the grid.
    """
    check_tasks([task], environment.num_colors)
    subgoal_chunks(task, 1 if subgoals is None else len(subgoals[0]))  # refuses what is not made of whole subgoals
    if episodes < 1:
        raise UserError(f"episodes is {episodes}; expected at least 1.")
    if policy in ("prior", "internal-rl") and meta_controller is None:
        raise UserError(f"policy {policy!r} acts through a metacontroller; give one, or choose 'base' or 'raw'.")
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    model.eval()
    kept: dict[str, list[Tensor]] = {name: [] for name in ("success", "mean_return", "subgoals", "steps", "decisions")}
    for size in batch_sizes(episodes):
        grids = task_grids(environment, task, size, generator, subgoals)
        if policy in ("base", "raw"):
            rollout = rollout_raw(model, grids, generator)
        else:
            assert meta_controller is not None
            proposal = policy_proposal if policy == "internal-rl" else prior_proposal
            rollout = rollout_abstract(model, meta_controller, grids, proposal(meta_controller, generator), generator)
            kept["decisions"].append(rollout.lengths)
        kept["success"].append(rollout.success)
        kept["mean_return"].append(rollout.returns)
        kept["subgoals"].append(rollout.subgoals_done)
        kept["steps"].append(rollout.steps)
    means = {name: float(torch.cat(values).double().mean()) if values else None for name, values in kept.items()}
    success = means["success"] or 0.0
    spread = float(torch.cat(kept["mean_return"]).double().std()) if episodes > 1 else None
    return {
        "policy": policy,
        "task": format_task(task),
        "episodes": episodes,
        **means,
        "success_se": math.sqrt(success * (1 - success) / episodes),
        "return_se": None if spread is None else spread / math.sqrt(episodes),
    }


class HeldOutGate(NamedTuple):
    """beta (b, t) of the gate, 1 at an episode's first step, and the code in force (b, t, n_z) along held-out
    ``episodes`` of experts; in their padding anything finite."""

    beta: Tensor
    code: Tensor
    episodes: Trajectories

    def figures(self) -> dict[str, float]:
        """gate_recall, gate_precision and gate_binary_fraction over all episodes together; ValueError if they carry no
        segments."""
        segments, lengths = self.episodes.segments, self.episodes.lengths
        if segments is None:
            raise UserError("the episodes carry no segments; give a source that labels subgoals.")
        return {name: float(value) for name, value in gate_alignment(self.beta, segments, lengths).items()}


@torch.no_grad()
def gate_on_new_layouts(
    model: Transformer,
    meta_controller: MetaController,
    generate: Generate,
    episodes: int,
    seed: int,
    *,
    segmentation: CompILE | None = None,
) -> HeldOutGate:
    """The gate along fresh episodes of ``generate``: in discovery, where proposals see the whole episode, or, of a
    metacontroller that acts for a ``segmentation``, the causal gate along the codes of its likeliest segments."""
    device = next(model.parameters()).device
    generator, noise = torch.Generator().manual_seed(seed), noise_generator(seed, device)
    meta_controller.eval()
    fresh = generate(episodes, generator).to(device)
    betas, codes = [], []
    for rows in torch.arange(episodes, device=device).split(MAX_BATCH):
        batch = fresh.index(rows)
        if segmentation is None:
            drawn = meta_controller.draw_noise(batch.batch, batch.steps, noise)
            output = meta_controller.discover_episodes(model, batch.states, batch.actions, batch.lengths, noise=drawn)
            beta, code = output.beta, output.z
        else:
            code = segmentation(batch.states, batch.lengths).code_at()
            beta = begin_probability(meta_controller, model.residual(batch.states, batch.actions), code)
            beta[:, 0] = 1.0  # the first step takes a code, whatever the gate says
        left = fresh.steps - batch.steps
        betas.append(F.pad(beta, (0, left)))
        codes.append(F.pad(code, (0, 0, 0, left)))
    return HeldOutGate(torch.cat(betas), torch.cat(codes), fresh)


def gate_figures(
    model: Transformer,
    meta_controller: MetaController,
    generate: Generate,
    episodes: int,
    seed: int,
) -> dict[str, float]:
    """gate_recall, gate_precision and gate_binary_fraction over all of ``episodes`` fresh episodes together."""
    return gate_on_new_layouts(model, meta_controller, generate, episodes, seed).figures()


def batch_sizes(total: int) -> list[int]:
    """``total`` in parts of at most `MAX_BATCH`."""
    return [min(MAX_BATCH, total - start) for start in range(0, total, MAX_BATCH)]
