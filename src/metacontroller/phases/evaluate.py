"""Measuring a trained model: success on a task in held-out episodes (Fig. 8)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from metacontroller.arguments import checked_kinds
from metacontroller.control.metacontroller import MetaController
from metacontroller.domains.base import Domain
from metacontroller.errors import UserError
from metacontroller.models.protocol import SteerableModel
from metacontroller.phases.rollout import policy_proposal, prior_proposal, rollout_abstract, rollout_raw
from metacontroller.ranges import Count, CountOr0, Rows, Steps, check_fields

MAX_BATCH = 1024  # episodes at a time: bounds memory

Policy = Literal["base", "raw", "prior", "internal-rl", "evolved"]
"""What acts: the model's own actions before (base) or after (raw) raw-action RL, or codes of the prior, of the policy
that internal RL trained, or of the one that evolved."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How much is measured at the end of a run. UserError for values out of range."""

    episodes: Count = 4096
    """Held-out episodes for each success rate."""
    codes: Rows = 64
    """Codes sampled from the prior, to measure which subgoal a fixed code leads to."""
    layouts_per_code: Rows = 256
    """Held-out episodes for each of those codes."""
    walk_steps: Steps | None = None
    """Steps within which a fixed code may reach a subgoal, twice as many for two; none: half of the longest episode."""
    link_updates: Count = 1000
    """Updates of the linear probe and of the supervised controllers that a summary reports."""

    def __post_init__(self) -> None:
        check_fields(self)


@checked_kinds
def evaluate(
    model: SteerableModel,
    meta_controller: MetaController | None,
    domain: Domain,
    policy: Policy,
    task: Any,
    episodes: Count,
    seed: CountOr0,
) -> dict[str, Any]:
    """Plays ``episodes`` held-out episodes of a task and returns means over them.

    task: as for `Domain.reset`. seed: of layouts, codes and actions.
    Returns success (share of episodes that the environment reports as solved) and its binomial standard error
    success_se; mean_return and its standard error return_se (None for a single episode); the means subgoals (of the
    task done), steps and decisions (abstract actions; None for raw actions); and policy, task and episodes as given.
    Where an environment can raise, lost is the number of episodes that ended so, unsolved.
    UserError for ``episodes`` below 1 or a missing metacontroller.
    """
    raw = policy in ("base", "raw")
    if not raw and meta_controller is None:
        raise UserError(f"policy {policy!r} acts through a metacontroller; give one, or choose 'base' or 'raw'.")
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    model.eval()
    columns: dict[str, list[Tensor]] = {name: [] for name in ("success", "returns", "steps", "subgoals_done")}
    columns |= {"lengths": [], "lost": []}
    for size in batch_sizes(episodes):
        env = domain.reset(size, generator, task=task)
        if raw or meta_controller is None:
            rollout = rollout_raw(model, env, generator)
        else:
            proposal = prior_proposal if policy == "prior" else policy_proposal
            rollout = rollout_abstract(model, meta_controller, env, proposal(meta_controller, generator), generator)
        for name, column in columns.items():
            if (value := getattr(rollout, name, None)) is not None:
                column.append(value)
    played = {name: torch.cat(column).double() for name, column in columns.items() if column}
    means = {name: float(column.mean()) for name, column in played.items()}
    return {
        "policy": policy,
        "task": domain.format_task(task),
        "episodes": episodes,
        "success": means["success"],
        "mean_return": means["returns"],
        "subgoals": means["subgoals_done"],
        "steps": means["steps"],
        "decisions": means.get("lengths"),
        "success_se": math.sqrt(means["success"] * (1 - means["success"]) / episodes),
        "return_se": float(played["returns"].std()) / math.sqrt(episodes) if episodes > 1 else None,
        **({"lost": int(played["lost"].sum())} if "lost" in played else {}),
    }


def batch_sizes(total: int) -> list[int]:
    """``total`` in chunks of at most `MAX_BATCH`."""
    return [min(MAX_BATCH, total - start) for start in range(0, total, MAX_BATCH)]
