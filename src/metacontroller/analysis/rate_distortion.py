"""Rate against distortion: what codes cost and how well the expert is predicted with them (Fig. 7).

Which points are aligned with subgoals is said by a rule: at least `ALIGNED_RECALL` of the true changes have a switch
within one step, and at least `ALIGNED_PRECISION` of the switches such a change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metacontroller.analysis.switching import gate_alignment
from metacontroller.baselines.compile import CompILE, begin_probability
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.trajectories import Trajectories
from metacontroller.errors import UserError
from metacontroller.models.transformer import Transformer
from metacontroller.phases.training import Generate, noise_generator

ALIGNED_RECALL, ALIGNED_PRECISION = 0.9, 0.8


def is_aligned(found: dict[str, Any]) -> bool:
    """Whether a metacontroller's switches meet the subgoals, by the rule above."""
    return found["gate_recall"] >= ALIGNED_RECALL and found["gate_precision"] >= ALIGNED_PRECISION


@torch.no_grad()
def rate_distortion(
    model: Transformer, meta_controller: MetaController, generate: Generate, episodes: int, seed: int
) -> dict[str, float]:
    """On new episodes: rate (KL of the proposals) and distortion (steered action loss), both in nats per step, and the
    gate's recall, precision and share of decided values. Codes are sampled, the gate is without noise."""
    fresh, noise = _new_episodes(model, generate, episodes, seed)
    meta_controller.eval()
    losses, output = meta_controller.steered_losses(
        model,
        fresh.states,
        fresh.actions,
        fresh.lengths,
        with_state_loss=False,
        noise=meta_controller.draw_noise(fresh.batch, fresh.steps, noise),
    )
    rate = float(meta_controller.kl_loss(output))
    return {"rate": rate, "distortion": float(losses.action), **_met(output.beta, fresh)}


@torch.no_grad()
def rate_distortion_of_segments(
    model: Transformer,
    segmentation: CompILE,
    meta_controller: MetaController,
    generate: Generate,
    episodes: int,
    seed: int,
) -> dict[str, float]:
    """The same of CompILE, with its likeliest boundaries; the gate is the learned one that acts. segment_recall and
    segment_precision are those of the boundaries themselves."""
    fresh, noise = _new_episodes(model, generate, episodes, seed)
    drawn = segmentation.segmenter.draw_noise(fresh.batch, fresh.steps, noise)
    found = segmentation(fresh.states, fresh.lengths, drawn._replace(place=torch.full_like(drawn.place, 0.5)))
    residual = model.residual(fresh.states, fresh.actions)
    steered = meta_controller.steer(residual, found.code_at())
    losses = model.losses_under(steered, fresh.states, fresh.actions, fresh.lengths, with_state_loss=False)
    likeliest = segmentation(fresh.states, fresh.lengths)
    beta = begin_probability(meta_controller, residual, likeliest.code_at())
    segments = _met(likeliest.begin_at(), fresh)
    return {
        "rate": float(found.code_kl.sum() / fresh.lengths.sum()),
        "distortion": float(losses.action),
        **_met(beta, fresh),
        "segment_recall": segments["gate_recall"],
        "segment_precision": segments["gate_precision"],
    }


def _new_episodes(
    model: Transformer, generate: Generate, episodes: int, seed: int
) -> tuple[Trajectories, torch.Generator]:
    """Episodes apart from those of training, and a source of noise."""
    device = next(model.parameters()).device
    noise = noise_generator(seed, device)
    return generate(episodes, noise).to(device), noise


def _met(beta: Tensor, fresh: Trajectories) -> dict[str, float]:
    if fresh.segments is None:
        raise UserError("the episodes carry no segments; give a source that labels subgoals.")
    return {name: float(value) for name, value in gate_alignment(beta, fresh.segments, fresh.lengths).items()}
