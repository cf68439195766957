"""The gate that acts in a run, along held-out episodes of experts, against true subgoal changes (Fig. 6, A3).

Axes: b episodes, t steps, n_z code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.registry import Analysis, EpisodesConfig, Results, TableRows, analysis
from metacontroller.baselines.compile import boundary_probability
from metacontroller.control.discovery_losses import discover_episodes
from metacontroller.data.trajectories import Trajectories
from metacontroller.errors import UserError
from metacontroller.metrics.switch_alignment import gate_alignment, gate_report
from metacontroller.phases.evaluate import MAX_BATCH
from metacontroller.report.analysis_figures import gate_histogram_figure
from metacontroller.training.seeding import noise_generator


class HeldOutGate(NamedTuple):
    """beta (b, t) of the gate, 1 at an episode's first step, and the code in force (b, t, n_z) along held-out
    ``episodes`` of experts; in their padding anything finite. nats (b, t, n_z): KL of what the encoder proposes against
    N(0, I), by dimension; None after CompILE. threshold: of beta at a switch. tolerance: the world's."""

    beta: Tensor
    code: Tensor
    episodes: Trajectories
    nats: Tensor | None
    threshold: float
    tolerance: int = 1

    def figures(self) -> dict[str, float]:
        """gate_recall, gate_precision and gate_binary_fraction over all episodes together."""
        return {name: float(value) for name, value in self._judged(gate_alignment).items()}

    def report(self) -> dict[str, list[float]]:
        """`metrics.switch_alignment.gate_report` over all episodes together."""
        return self._judged(gate_report)

    def switches(self) -> Tensor:
        """(b, t) bool: real steps at which a code is taken."""
        return (self.beta >= self.threshold) & self.episodes.mask()

    def _judged(self, measure: Any) -> dict[str, Any]:
        segments, lengths = self.episodes.segments, self.episodes.lengths
        if segments is None:
            raise UserError("the episodes carry no segments; give a world whose demonstrations are labelled.")
        return measure(self.beta, segments, lengths, threshold=self.threshold, tolerance=self.tolerance)


def held_out_gate(run: LoadedRun, episodes: int, seed: int) -> HeldOutGate:
    """The gate that acts in a run, along so many held-out demonstrations: whatever says something about a run's gate
    reads it here."""
    device = next(run.model.parameters()).device
    held_out = run.demonstrations("validation")(episodes, torch.Generator().manual_seed(seed)).to(device)
    return gate_along(run, held_out, seed)


@torch.no_grad()
def gate_along(run: LoadedRun, held_out: Trajectories, seed: int) -> HeldOutGate:
    """The gate that acts in a run, along experts' episodes; seed: of the noise in codes.

    It is read as in discovery, where proposals see the whole episode. After CompILE, codes and boundaries are its
    likeliest ones, and the gate is the causal one that learned to tell them from the past; the metacontroller's acausal
    encoder was never trained.
    """
    model, meta_controller, segmentation = run.model, run.meta_controller.eval(), run.segmentation
    noise, parts = noise_generator(seed, held_out.actions.device), []
    for rows in torch.arange(held_out.batch, device=held_out.actions.device).split(MAX_BATCH):
        batch = held_out.index(rows)
        if segmentation is None:
            gate_noise = meta_controller.sample_noise(batch.batch, batch.steps, noise)
            output = discover_episodes(
                meta_controller, model, batch.states, batch.actions, batch.lengths, noise=gate_noise
            )
            values = (output.beta, output.z, meta_controller.codes.kl_entries(output.distribution))
        else:
            code = segmentation(batch.states, batch.lengths).code_at()
            values = (boundary_probability(meta_controller, model.residual(batch.states, batch.actions), code), code)
        values[0][:, 0] = 1.0  # the first step takes a code, whatever the gate says
        left = held_out.steps - batch.steps
        parts.append([F.pad(value, (*[0, 0] * (value.dim() - 2), 0, left)) for value in values])
    beta, code, *nats = (torch.cat(part) for part in zip(*parts, strict=True))
    threshold = meta_controller.gate_config.threshold
    return HeldOutGate(beta, code, held_out, nats[0] if nats else None, threshold, run.domain.gate_tolerance)


@analysis("gate", command="gate", figure="6, A3", file="gate_histogram")
class Gate(Analysis):
    """The gate against true subgoal changes at three tolerances, and its histograms (Fig. 6, A3)."""

    Config = EpisodesConfig

    def measure(self, run: LoadedRun, config: EpisodesConfig, *, quiet: bool = False) -> Results:
        return {**held_out_gate(run, config.episodes, run.analysis_seed).report(), "episodes": config.episodes}

    def draw(self, results: Sequence[Results]) -> Any:
        return gate_histogram_figure(results)

    def rows(self, results: Sequence[Results]) -> TableRows:
        return [
            (f"{name} within {tolerance} steps", [result[name][index] for result in results])
            for index, tolerance in enumerate(results[0]["tolerance"])
            for name in ("recall", "precision", "f1")
        ]
