"""Measuring a trained run on new layouts: success on a task, and how the gate meets true subgoal changes (Fig. 6, 8).

Axes: b episodes, t steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.analysis.switching import gate_alignment
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.trajectories import Trajectories
from metacontroller.envs.gridworld_pinpad import PinpadConfig
from metacontroller.envs.tasks import Task, check_tasks, format_task, subgoal_chunks
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
        raise ValueError(f"episodes is {episodes}; expected at least 1.")
    if policy in ("prior", "internal-rl") and meta_controller is None:
        raise ValueError(f"policy {policy!r} acts through a metacontroller; give one, or choose 'base' or 'raw'.")
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


@torch.no_grad()
def gate_on_new_layouts(
    model: Transformer,
    meta_controller: MetaController,
    generate: Generate,
    episodes: int,
    seed: int,
) -> tuple[Tensor, Trajectories]:
    """beta (b, t) along fresh episodes of ``generate``, and those episodes."""
    device = next(model.parameters()).device
    generator, noise = torch.Generator().manual_seed(seed), noise_generator(seed, device)
    meta_controller.eval()
    fresh = generate(episodes, generator).to(device)
    betas = []
    for rows in torch.arange(episodes, device=device).split(MAX_BATCH):
        batch = fresh.index(rows)
        drawn = meta_controller.draw_noise(batch.batch, batch.steps, noise)
        output = model.discover(batch.states, batch.actions, meta_controller, batch.lengths, noise=drawn)
        betas.append(F.pad(output.beta, (0, fresh.steps - batch.steps)))
    return torch.cat(betas), fresh


def gate_figures(
    model: Transformer,
    meta_controller: MetaController,
    generate: Generate,
    episodes: int,
    seed: int,
) -> dict[str, float]:
    """gate_recall, gate_precision and gate_binary_fraction over all of ``episodes`` fresh episodes together."""
    beta, fresh = gate_on_new_layouts(model, meta_controller, generate, episodes, seed)
    if fresh.segments is None:
        raise ValueError("the episodes carry no segments; give a source that labels subgoals.")
    return {name: float(value) for name, value in gate_alignment(beta, fresh.segments, fresh.lengths).items()}


def batch_sizes(total: int) -> list[int]:
    """``total`` in parts of at most `MAX_BATCH`."""
    return [min(MAX_BATCH, total - start) for start in range(0, total, MAX_BATCH)]
