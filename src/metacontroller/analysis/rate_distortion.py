"""Rate against distortion: what codes cost and how well the expert is predicted with them (Fig. 7).

Which points are aligned with subgoals is said by a rule: at least `ALIGNED_RECALL` of the true changes have a switch
within the world's tolerance, and at least `ALIGNED_PRECISION` of the switches such a change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metacontroller.baselines.compile import LIKELY, CompILE, boundary_probability
from metacontroller.control.discovery_losses import kl_loss, steered_losses
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.batching import Generate
from metacontroller.data.trajectories import Trajectories
from metacontroller.metrics.switch_alignment import binary_fraction, gate_alignment
from metacontroller.models.protocol import SteerableModel
from metacontroller.training.seeding import noise_generator

ALIGNED_RECALL, ALIGNED_PRECISION = 0.9, 0.8


def is_aligned(results: dict[str, Any]) -> bool:
    """Whether a metacontroller's switches meet the subgoals, by the rule above; not where there are no labels."""
    recall, precision = results["gate_recall"], results["gate_precision"]
    return recall is not None and recall >= ALIGNED_RECALL and precision >= ALIGNED_PRECISION


@torch.no_grad()
def rate_distortion(
    model: SteerableModel,
    meta_controller: MetaController,
    generate: Generate,
    episodes: int,
    seed: int,
    *,
    gate_tolerance: int = 1,
) -> dict[str, float | None]:
    """In held-out episodes: rate (KL of the proposals) and distortion (steered action loss), both in nats per step, and
    the gate's recall, precision (None without labels), within ``gate_tolerance`` steps, and share of decided values.
    Codes are sampled, the gate is without noise."""
    held_out, generator = _held_out_episodes(model, generate, episodes, seed)
    meta_controller.eval()
    losses, output = steered_losses(
        meta_controller,
        model,
        held_out.states,
        held_out.actions,
        held_out.lengths,
        with_state_loss=False,
        noise=meta_controller.sample_noise(held_out.batch, held_out.steps, generator),
    )
    rate = float(kl_loss(output))
    alignment = _alignment(output.beta, held_out, meta_controller.gate_config.threshold, gate_tolerance)
    return {"rate": rate, "distortion": float(losses.action), **alignment}


@torch.no_grad()
def rate_distortion_of_segments(
    model: SteerableModel,
    segmentation: CompILE,
    meta_controller: MetaController,
    generate: Generate,
    episodes: int,
    seed: int,
    *,
    gate_tolerance: int = 1,
) -> dict[str, float | None]:
    """The same of CompILE, with its likeliest boundaries; the gate is the learned one that acts. segment_recall and
    segment_precision are those of the boundaries themselves."""
    held_out, generator = _held_out_episodes(model, generate, episodes, seed)
    noise = segmentation.segmenter.sample_noise(held_out.batch, held_out.steps, generator)
    sampled = segmentation(
        held_out.states, held_out.lengths, noise._replace(boundary=torch.full_like(noise.boundary, 0.5))
    )
    residual = model.residual(held_out.states, held_out.actions)
    steered = meta_controller.steer(residual, sampled.code_at())
    losses = model.losses_under(steered, held_out.states, held_out.actions, held_out.lengths, with_state_loss=False)
    likeliest = segmentation(held_out.states, held_out.lengths)
    beta = boundary_probability(meta_controller, residual, likeliest.code_at())
    segments = _alignment(likeliest.boundary_at(), held_out, LIKELY, gate_tolerance)
    return {
        "rate": float(sampled.code_kl.sum() / held_out.lengths.sum()),
        "distortion": float(losses.action),
        **_alignment(beta, held_out, meta_controller.gate_config.threshold, gate_tolerance),
        "segment_recall": segments["gate_recall"],
        "segment_precision": segments["gate_precision"],
    }


def _held_out_episodes(
    model: SteerableModel, generate: Generate, episodes: int, seed: int
) -> tuple[Trajectories, torch.Generator]:
    """Episodes of a source, which should be one for validation, and a source of noise."""
    device = next(model.parameters()).device
    generator = noise_generator(seed, device)
    return generate(episodes, generator).to(device), generator


def _alignment(beta: Tensor, held_out: Trajectories, threshold: float, tolerance: int) -> dict[str, float | None]:
    """`gate_alignment`; without labels, recall and precision are None."""
    if held_out.segments is None:
        decided = float(binary_fraction(beta, held_out.lengths))
        return {"gate_recall": None, "gate_precision": None, "gate_binary_fraction": decided}
    alignment = gate_alignment(beta, held_out.segments, held_out.lengths, threshold=threshold, tolerance=tolerance)
    return {name: float(value) for name, value in alignment.items()}
