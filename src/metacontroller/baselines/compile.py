"""CompILE (arXiv 1812.01483) as a baseline for discovery (arXiv 2512.20605, D.3).

An encoder of its own, as wide and deep as the action model's lower body, reads raw observations and infers segments and
their codes. A code steers the frozen model through the same kind of controller:

    loss = mean over real steps of  -log p(a_t | o_1:t, z_1:t)
         + (alpha_code KL(q(z) || N(0, I)) + alpha_boundary KL(q(b) || Poisson)) / steps
         + cross-entropy of beta_t with b_t

Segmentation sees the future. What acts must not: the switching unit of a metacontroller learns to predict the
boundaries from the past alone. The result is a metacontroller like any other, on which internal RL runs unchanged.

Each step is encoded with the observation that follows it instead of its action: the two carry the same information, and
symmetry augmentation applies to observations. Codes are mixed by the segments' shares and decoded once, where CompILE
decodes every segment by itself, because the frozen model reads its own history.

Metrics: ``loss``, ``action_loss``, ``code_kl`` and ``boundary_kl`` in nats per step; ``boundary_loss``, the
cross-entropy; recall and precision of the learned gate (``gate_``) and of the segmentation (``segment_``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.arguments import checked_kinds
from metacontroller.baselines.segmenter import Segmentation, Segmenter, SegmentNoise
from metacontroller.control.core import beta_along, read_residual
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.batching import Augment, Generate
from metacontroller.data.trajectories import Ratio, Trajectories
from metacontroller.metrics.switch_alignment import gate_sums, later_steps
from metacontroller.models.encoders import make_encoder
from metacontroller.models.protocol import SteerableModel
from metacontroller.objectives.base import Setup, mean_over, share_of
from metacontroller.phases.artefacts import META_CONTROLLER, SEGMENTATION, save_artefacts
from metacontroller.ranges import MOST_DEPTH, NotNegative, Positive, Seed, Warmup, Whole, Width, check_fields
from metacontroller.storage.module_file import Saveable
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import processes
from metacontroller.training.evaluation_mode import evaluation_mode
from metacontroller.training.loop import BatchExtras, Metrics, train
from metacontroller.training.optimizer import OptimizerConfig, linear_warmup

LIKELY = 0.5
"""A boundary of a segment is where its probability is at least this."""


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """The baseline CompILE, see `Segmenter`. UserError for values out of range."""

    optimizer: OptimizerConfig
    """How long and how fast."""
    segments: Annotated[int, Whole(2, MOST_DEPTH)] = 4
    """M, the maximum number of segments in an episode."""
    hidden: Width = 32
    """Hidden width of the two heads."""
    temperature: Positive = 1.0
    """Temperature of the boundaries' Gumbel-softmax."""
    prior_rate: Positive = 10.0
    """Mean steps of a segment under the Poisson prior."""
    alpha_code: NotNegative = 0.1
    """Weight of the codes' KL, after the linear warm-up."""
    alpha_boundary: NotNegative = 0.1
    """Weight of the boundaries' KL."""
    alpha_warmup: Warmup = (0, 0)
    """Updates (from, to) between which the weight of the codes' KL goes linearly from 0 to alpha_code."""
    seed: Seed = 0
    """Seed of the episodes and, in a separate stream, of the noise; a run derives it from its own seed."""

    def __post_init__(self) -> None:
        check_fields(self)

    def alpha_code_at(self, step: int) -> float:
        """Weight of the codes' KL at update number ``step``, counted from 0."""
        return self.alpha_code * linear_warmup(step, self.alpha_warmup)


class CompILE(Saveable, nn.Module):
    """From observations to segments: an encoder of single observations, then a `Segmenter` over consecutive pairs.

    state_embed_readout: as for `Transformer`. options: of the segmenter, as wide as ``dim``.
    """

    def __init__(self, dim: int, *, state_embed_readout: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.remember_arguments({"dim": dim, "state_embed_readout": state_embed_readout, **options})
        self.encoder = make_encoder(dim, state_embed_readout)
        self.segmenter = Segmenter(2 * dim, dim=dim, **options)

    def forward(self, states: Tensor, lengths: Tensor, noise: SegmentNoise | None = None) -> Segmentation:
        """states (b, T + 1, ...), one more than actions, lengths (b,) -> the segmentation of T steps."""
        encoded = self.encoder(states)
        return self.segmenter(torch.cat([encoded[:, :-1], encoded[:, 1:]], -1), lengths, noise)


@checked_kinds
def build_compile(
    config: CompileConfig, model: SteerableModel, encoder: dict[str, Any], dim_latent: int, seed: int
) -> CompILE:
    """A new CompILE, as wide as ``model`` and half as deep. encoder: of a world's `DomainSpec`."""
    options = {name: getattr(config, name) for name in ("segments", "hidden", "temperature", "prior_rate")}
    options |= {"dim_latent": dim_latent, "depth": max(1, model.depth // 2)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CompILE(model.dim, state_embed_readout=encoder, **options)


def boundary_probability(meta_controller: MetaController, residual: Tensor, code: Tensor) -> Tensor:
    """beta_t (b, t), causal (eq. 16), along residual (b, t, n_e), where code (b, t, n_z) is the code held at each step.

    The first step has no meaning: there a metacontroller always takes a new code.
    """
    reading = read_residual(meta_controller, residual)
    return beta_along(meta_controller, reading.normed, reading.history, code)


class Segmenting:
    """The loss of CompILE (`objectives.base.Objective`)."""

    def __init__(self, config: CompileConfig, setup: Setup, segmentation: CompILE) -> None:
        acting = setup.meta_controller
        trained = (segmentation, acting.norm, acting.history, acting.switching, acting.controller)
        self.config, self.setup, self.segmentation = config, setup, segmentation
        self.module = nn.ModuleDict({"segmentation": segmentation, "meta_controller": acting})
        self.parameters = [value for module in trained for value in module.parameters()]

    def prepare(self, batch: Trajectories, step: int, generator: torch.Generator) -> BatchExtras:
        noise, states = self.segmentation.segmenter.sample_noise(batch.batch, batch.steps, generator), batch.states
        if self.setup.augment is not None:
            states = self.setup.augment(states, generator)
        share = share_of(later_steps(batch.lengths, batch.steps), batch)
        return {**noise._asdict(), "states": states, "later_share": share.expand(batch.batch)}

    def loss(self, batch: Trajectories, step: int, extras: BatchExtras) -> tuple[Tensor, Metrics]:
        model, meta_controller, lengths = self.setup.model, self.setup.meta_controller, batch.lengths
        result = self.segmentation(extras["states"], lengths, SegmentNoise(extras["boundary"], extras["code"]))
        code, boundary = result.code_at(), result.boundary_at().detach()
        with torch.no_grad():
            residual = model.residual(batch.states, batch.actions)
        steered = meta_controller.steer(residual, code)
        action_loss = model.losses_under(steered, batch.states, batch.actions, lengths, with_state_loss=False).action
        code_kl, boundary_kl = (kl.sum() / lengths.sum() for kl in (result.code_kl, result.boundary_kl))
        beta = boundary_probability(meta_controller, residual, code.detach())
        cross_entropy = F.binary_cross_entropy(beta.clamp(1e-6, 1 - 1e-6), boundary, reduction="none")
        boundary_loss = mean_over(cross_entropy, later_steps(lengths, batch.steps), batch, extras["later_share"])
        parts = {"action_loss": action_loss, "code_kl": code_kl, "boundary_kl": boundary_kl}
        loss = action_loss + self.config.alpha_code_at(step) * code_kl + self.config.alpha_boundary * boundary_kl
        metrics = {**parts, "boundary_loss": boundary_loss, **self._alignment(batch, beta, boundary)}
        return loss + boundary_loss, metrics

    @torch.no_grad()
    def _alignment(self, batch: Trajectories, beta: Tensor, boundary: Tensor) -> dict[str, Ratio]:
        """Recall and precision of the learned gate and of the segmentation, where there are labels."""
        if batch.segments is None:
            return {}
        metrics, threshold = {}, self.setup.meta_controller.gate_config.threshold
        for name, value, least in (("gate", beta, threshold), ("segment", boundary, LIKELY)):
            options = {"threshold": least, "tolerance": self.setup.gate_tolerance}
            sums = gate_sums(value, batch.segments, batch.lengths, **options)
            metrics |= {f"{name}_{kind}": sums[f"gate_{kind}"] for kind in ("recall", "precision")}
        return metrics


@checked_kinds
def discover_compile(
    config: CompileConfig,
    model: SteerableModel,
    segmentation: CompILE,
    meta_controller: MetaController,
    generate: Generate,
    run: RunFolder,
    *,
    augment: Augment | None = None,
    validation: Generate | None = None,
    gate_tolerance: int = 1,
    resume: bool = False,
    quiet: bool = False,
) -> MetaController:
    """Trains ``segmentation`` and the ``meta_controller`` that acts for it, in place, on a frozen ``model``.

    Writes ``compile.safetensors`` and ``meta_controller.safetensors`` to the run; of the latter only gate, history and
    controller are trained. augment, gate_tolerance: as in `discover`; the segmentation reads the augmented states.
    UserError if the run holds a checkpoint of this phase and ``resume`` is false.
    """
    evaluation_mode(model)
    setup = Setup(model, meta_controller, generate, augment, gate_tolerance=gate_tolerance)
    objective = Segmenting(config, setup, segmentation)
    train(
        "discover",
        config.optimizer,
        objective.module,
        objective.parameters,
        generate,
        objective.loss,
        run,
        seed=config.seed,
        sample_extras=objective.prepare,
        validation=validation,
        resume=resume,
        quiet=quiet,
    )
    workers = processes(next(model.parameters()).device.type)
    save_artefacts(run, workers, {SEGMENTATION: segmentation, META_CONTROLLER: meta_controller})
    return meta_controller
