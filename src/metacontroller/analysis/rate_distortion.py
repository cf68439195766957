"""Rate against distortion: what codes cost and how well the expert is predicted with them (Fig. 7).

Which points are aligned with subgoals is said by a rule: at least `ALIGNED_RECALL` of the true changes have a switch
within the world's tolerance, and at least `ALIGNED_PRECISION` of the switches such a change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.baselines.compile import LIKELY, CompILE, boundary_probability
from metacontroller.control.discovery_losses import kl_loss, steered_losses
from metacontroller.data.trajectories import Trajectories
from metacontroller.metrics.switch_alignment import binary_fraction, gate_alignment
from metacontroller.training.seeding import noise_generator

ALIGNED_RECALL, ALIGNED_PRECISION = 0.9, 0.8


def is_aligned(results: dict[str, Any]) -> bool:
    """Whether a metacontroller's switches meet the subgoals, by the rule above; not where there are no labels."""
    recall, precision = results["gate_recall"], results["gate_precision"]
    return recall is not None and recall >= ALIGNED_RECALL and precision >= ALIGNED_PRECISION


@torch.no_grad()
def rate_distortion(run: LoadedRun, episodes: int, seed: int) -> dict[str, float | None]:
    """In held-out episodes: rate (KL of the proposals) and distortion (steered action loss), both in nats per step, and
    the gate's recall, precision (None without labels), within the world's tolerance, and share of decided values.
    Codes are sampled, the gate is without noise.

    After CompILE it is its codes with its likeliest boundaries, and the learned gate that acts; segment_recall and
    segment_precision are those of the boundaries themselves.
    """
    meta_controller, generator = run.meta_controller.eval(), noise_generator(seed, torch.device(run.device))
    held_out = run.demonstrations("validation")(episodes, generator).to(run.device)
    if run.segmentation is not None:
        return _of_segments(run, run.segmentation, held_out, generator)
    losses, output = steered_losses(
        meta_controller,
        run.model,
        held_out.states,
        held_out.actions,
        held_out.lengths,
        with_state_loss=False,
        noise=meta_controller.sample_noise(held_out.batch, held_out.steps, generator),
    )
    alignment = _alignment(run, output.beta, held_out, meta_controller.gate_config.threshold)
    return {"rate": float(kl_loss(output)), "distortion": float(losses.action), **alignment}


def _of_segments(
    run: LoadedRun, segmentation: CompILE, held_out: Trajectories, generator: torch.Generator
) -> dict[str, float | None]:
    """`rate_distortion` after CompILE."""
    model, meta_controller = run.model, run.meta_controller
    states, actions, lengths = held_out.states, held_out.actions, held_out.lengths
    noise = segmentation.segmenter.sample_noise(held_out.batch, held_out.steps, generator)
    sampled = segmentation(states, lengths, noise._replace(boundary=torch.full_like(noise.boundary, 0.5)))
    residual = model.residual(states, actions)
    steered = meta_controller.steer(residual, sampled.code_at())
    losses = model.losses_under(steered, states, actions, lengths, with_state_loss=False)
    likeliest = segmentation(states, lengths)
    beta = boundary_probability(meta_controller, residual, likeliest.code_at())
    segments = _alignment(run, likeliest.boundary_at(), held_out, LIKELY)
    return {
        "rate": float(sampled.code_kl.sum() / lengths.sum()),
        "distortion": float(losses.action),
        **_alignment(run, beta, held_out, meta_controller.gate_config.threshold),
        "segment_recall": segments["gate_recall"],
        "segment_precision": segments["gate_precision"],
    }


def _alignment(run: LoadedRun, beta: Tensor, held_out: Trajectories, threshold: float) -> dict[str, float | None]:
    """`gate_alignment`; without labels, recall and precision are None."""
    if held_out.segments is None:
        decided = float(binary_fraction(beta, held_out.lengths))
        return {"gate_recall": None, "gate_precision": None, "gate_binary_fraction": decided}
    within = {"threshold": threshold, "tolerance": run.domain.gate_tolerance}
    alignment = gate_alignment(beta, held_out.segments, held_out.lengths, **within)
    return {name: float(value) for name, value in alignment.items()}
