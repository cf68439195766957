"""Failures of discovery that can be seen without labels: of the gate and of the codes, on one batch after training."""

from __future__ import annotations

from typing import Any

import torch

from metacontroller.control.discovery_losses import kl_loss, steered_losses
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.batching import Generate
from metacontroller.data.trajectories import Trajectories
from metacontroller.metrics.switch_alignment import binary_fraction, codes_taken
from metacontroller.models.protocol import SteerableModel
from metacontroller.objectives.config import DiscoverConfig
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.seeding import noise_generator

MIN_CODES = 1.05
"""Mean codes per episode below which the gate counts as never opening."""

MIN_BINARY_FRACTION = 0.5
"""Share of the gate outside (0.1, 0.9) below which it counts as undecided."""

MIN_KL = 0.01
"""KL in nats per step below which codes count as collapsed to the prior."""

MIN_GAIN = 1e-3
"""Nats per step by which steering must lower the action loss."""

MIN_LEFT = 0.35
"""Nats an episode, half a bit, below which the unsteered model leaves nothing for codes to say."""


@torch.no_grad()
def measure(
    model: SteerableModel, meta_controller: MetaController, batch: Trajectories, generator: torch.Generator
) -> dict[str, Any]:
    """The measurements that `diagnose` judges, on one batch, without labels; generator: of the noise in codes and gate.

    codes: per episode, where the gate is thresholded. binary_fraction: share of beta outside (0.1, 0.9). kl,
    steered_loss, base_loss: nats per step; the last two are action losses with and without steering. left: base_loss in
    nats an episode, what codes could say at most; None for continuous actions, whose loss is no number of nats to say.
    """
    noise = meta_controller.sample_noise(batch.batch, batch.steps, generator)
    losses, output = steered_losses(
        meta_controller, model, batch.states, batch.actions, batch.lengths, with_state_loss=False, noise=noise
    )
    base = model.behavior_cloning_loss(batch.states, batch.actions, batch.lengths, with_state_loss=False, checked=True)
    codes = codes_taken(output.beta, batch.lengths, threshold=meta_controller.gate_config.threshold)
    left = float(base.action * batch.lengths.float().mean()) if hasattr(model.action_readout, "num_discrete") else None
    return {
        "codes": float(codes.float().mean()),
        "binary_fraction": float(binary_fraction(output.beta, batch.lengths)),
        "kl": float(kl_loss(output)),
        "steered_loss": float(losses.action),
        "base_loss": float(base.action),
        "left": left,
    }


def write_diagnostics(
    config: DiscoverConfig, model: SteerableModel, meta_controller: MetaController, validation: Generate, run: RunFolder
) -> list[str]:
    """Measures gate and codes on one validation batch, writes analyses/diagnostics.json and returns the warnings."""
    device = next(model.parameters()).device
    generator = noise_generator(config.seed, device)
    batch = validation(config.optimizer.batch_size, generator).to(device)
    measured = measure(model, meta_controller, batch, generator)
    warnings = diagnose(**measured)
    run.write_analysis("diagnostics", {**measured, "warnings": warnings})
    return warnings


def diagnose(
    *, codes: float, binary_fraction: float, kl: float, steered_loss: float, base_loss: float, left: float | None = None
) -> list[str]:
    """One sentence for each way in which discovery failed; the arguments are what `measure` returns.

    Where nothing is left for codes to say that is the cause of all of them, and the one sentence.

    Limits and remedies are our choice, from docs/log.md; the paper has none.
    """
    failures = []
    losses = f"the action loss is {steered_loss:.4f} nats per step with steering and {base_loss:.4f} without"
    if codes < MIN_CODES:
        failures.append(
            f"the gate never opens: {codes:.2f} codes an episode, expected at least {MIN_CODES}; train for longer, or "
            "lower alpha or dim_latent. Where experts pursue one goal an episode, one code is right."
        )
    if binary_fraction < MIN_BINARY_FRACTION:
        failures.append(
            f"the gate is undecided: a share of {binary_fraction:.2f} lies outside (0.1, 0.9), expected at least "
            f"{MIN_BINARY_FRACTION}; train for longer."
        )
    if kl < MIN_KL:
        failures.append(
            f"codes have collapsed to the prior: their KL is {kl:.4f} nats per step, expected at least {MIN_KL}; lower "
            "alpha, or warm it up more slowly (alpha_start, alpha_warmup)."
        )
    if steered_loss - base_loss >= MIN_GAIN:
        failures.append(
            f"codes make the experts' actions less likely: {losses}; train for longer, or lower the learning rate."
        )
    elif not base_loss - steered_loss >= MIN_GAIN:  # in this form, NaN is reported too
        failures.append(
            f"codes do not change the actions: {losses}, expected at least {MIN_GAIN} less; train for longer, lower "
            "alpha, or steer another layer."
        )
    if failures and left is not None and left < MIN_LEFT:
        return [
            f"nothing is left for codes to say: without them the action loss is {base_loss:.4f} nats per step, "
            f"{left:.3f} an episode, so the action model knows the experts' actions already. Codes have something to "
            "say where experts pursue goals that observations do not tell."
        ]
    return failures
