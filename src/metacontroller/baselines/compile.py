"""CompILE (arXiv 1812.01483) as a baseline for discovery (arXiv 2512.20605, D.3).

An encoder of its own, as wide and deep as the action model's lower body, reads raw observations and infers segments and
their codes. A code steers the frozen model through the same kind of controller:

    loss = mean over real steps of  -log p(a_t | o_1:t, z_1:t)
         + (alpha_code KL(q(z) || N(0, I)) + alpha_boundary KL(q(b) || Poisson)) / steps
         + cross-entropy of beta_t with b_t

Segmentation sees the future. To act, CompILE needs a termination rule that does not: the switching unit of a
metacontroller learns to predict the boundaries from the past alone. The result is a metacontroller like any other, and
internal RL runs on it unchanged.

Each step is encoded with the observation that follows it instead of its action: the two carry the same information, and
symmetry augmentation applies to observations. Codes are mixed by the segments' shares and decoded once, where CompILE
decodes every segment by itself, because the frozen model reads its own history.

Metrics: ``loss``, ``action_loss``, ``code_kl`` and ``boundary_kl`` in nats per step; ``boundary_loss``, the
cross-entropy; ``recall`` and ``precision`` of the learned gate (prefix ``gate_``) and of the segmentation's boundaries
(prefix ``segment_``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.arguments import checked_kinds
from metacontroller.baselines.segmenter import Segmentation, Segmenter, SegmentNoise
from metacontroller.control.core import read_residual
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.batching import Augment, Generate
from metacontroller.data.trajectories import Ratio, Trajectories, length_mask, masked_mean
from metacontroller.metrics.switch_alignment import gate_sums
from metacontroller.models.encoders import make_encoder
from metacontroller.models.protocol import SteerableModel
from metacontroller.phases.artefacts import META_CONTROLLER, SEGMENTATION, save_artefacts
from metacontroller.ranges import MOST_DEPTH, NOT_NEGATIVE, POSITIVE, SEED, WIDTH, Whole, check_fields, check_warmup
from metacontroller.storage.module_file import Saveable
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import processes
from metacontroller.training.evaluation_mode import evaluation_mode
from metacontroller.training.loop import BatchExtras, train
from metacontroller.training.optimizer import OptimizerConfig, linear_warmup

LIKELY = 0.5
"""A boundary of a segment is where its probability is at least this."""


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """The baseline CompILE, see `Segmenter`. UserError for values out of range."""

    optimizer: OptimizerConfig
    """How long and how fast."""
    segments: int = 4
    """M, the maximum number of segments in an episode."""
    hidden: int = 32
    """Hidden width of the two heads."""
    temperature: float = 1.0
    """Temperature of the boundaries' Gumbel-softmax."""
    prior_rate: float = 10.0
    """Mean steps of a segment under the Poisson prior."""
    alpha_code: float = 0.1
    """Weight of the codes' KL, after the linear warm-up."""
    alpha_boundary: float = 0.1
    """Weight of the boundaries' KL."""
    alpha_warmup: tuple[int, int] = (0, 0)
    """Updates (from, to) between which the weight of the codes' KL goes linearly from 0 to alpha_code."""
    seed: int = 0
    """Seed of the episodes and, in a separate stream, of the noise; a run derives it from its own seed."""

    def __post_init__(self) -> None:
        check_fields(self, segments=Whole(2, MOST_DEPTH), hidden=WIDTH, temperature=POSITIVE, prior_rate=POSITIVE)
        check_fields(self, alpha_code=NOT_NEGATIVE, alpha_boundary=NOT_NEGATIVE, seed=SEED)
        check_warmup("alpha_warmup", self.alpha_warmup)

    def alpha_code_at(self, step: int) -> float:
        """Weight of the codes' KL at update number ``step``, counted from 0."""
        return self.alpha_code * linear_warmup(step, self.alpha_warmup)


class CompILE(Saveable, nn.Module):
    """From observations to segments: an encoder of single observations, then a `Segmenter` over consecutive pairs.

    state_embed_readout: as for `Transformer`. dim, depth: of the recurrent encoder. The rest: see `Segmenter`.
    """

    def __init__(
        self,
        dim: int,
        *,
        state_embed_readout: dict[str, Any],
        depth: int,
        dim_latent: int,
        segments: int,
        hidden: int,
        temperature: float,
        prior_rate: float,
    ) -> None:
        super().__init__()
        self.remember_arguments(locals())
        self.encoder = make_encoder(dim, state_embed_readout)
        self.segmenter = Segmenter(
            2 * dim,
            dim_latent=dim_latent,
            segments=segments,
            dim=dim,
            depth=depth,
            hidden=hidden,
            temperature=temperature,
            prior_rate=prior_rate,
        )

    def forward(self, states: Tensor, lengths: Tensor, noise: SegmentNoise | None = None) -> Segmentation:
        """states (b, T + 1, ...), one more than actions, lengths (b,) -> the segmentation of T steps."""
        encoded = self.encoder(states)
        return self.segmenter(torch.cat([encoded[:, :-1], encoded[:, 1:]], -1), lengths, noise)


@checked_kinds
def build_compile(
    config: CompileConfig, model: SteerableModel, encoder: dict[str, Any], dim_latent: int, seed: int
) -> CompILE:
    """A new CompILE, as wide as ``model`` and half as deep. encoder: of a world's `DomainSpec`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CompILE(
            model.dim,
            state_embed_readout=encoder,
            depth=max(1, model.depth // 2),
            dim_latent=dim_latent,
            segments=config.segments,
            hidden=config.hidden,
            temperature=config.temperature,
            prior_rate=config.prior_rate,
        )


def boundary_probability(meta_controller: MetaController, residual: Tensor, code: Tensor) -> Tensor:
    """beta_t (b, t), causal (eq. 16), along residual (b, t, n_e), where code (b, t, n_z) is the code held at each step.

    The first step has no meaning: there a metacontroller always takes a new code.
    """
    read, history, _ = read_residual(meta_controller, residual)
    never = torch.zeros(code.shape[:2], dtype=torch.bool, device=code.device)
    return meta_controller.switching.held(read, history, code, never).beta


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
    trained = (meta_controller.norm, meta_controller.history, meta_controller.switching, meta_controller.controller)
    parameters = [*segmentation.parameters(), *(value for module in trained for value in module.parameters())]

    def sample_extras(batch: Trajectories, step: int, generator: torch.Generator) -> BatchExtras:
        noise = segmentation.segmenter.sample_noise(batch.batch, batch.steps, generator)
        states = batch.states if augment is None else augment(batch.states, generator)
        return {**noise._asdict(), "states": states, "later_share": _later_share(batch.lengths).expand(batch.batch)}

    def loss_function(batch: Trajectories, step: int, extras: BatchExtras) -> tuple[Tensor, dict[str, Tensor | Ratio]]:
        mask, lengths = batch.mask(), batch.lengths
        result = segmentation(extras["states"], lengths, SegmentNoise(extras["boundary"], extras["code"]))
        code = result.code_at()
        with torch.no_grad():
            residual = model.residual(batch.states, batch.actions)
        steered = meta_controller.steer(residual, code)
        action_loss = model.losses_under(steered, batch.states, batch.actions, lengths, with_state_loss=False).action
        code_kl, boundary_kl = (kl.sum() / lengths.sum() for kl in (result.code_kl, result.boundary_kl))
        boundary = result.boundary_at().detach()
        beta = boundary_probability(meta_controller, residual, code.detach())
        later = length_mask(lengths, batch.steps) & (torch.arange(batch.steps, device=mask.device) > 0)
        cross_entropy = F.binary_cross_entropy(beta.clamp(1e-6, 1 - 1e-6), boundary, reduction="none")
        # A mean over all steps but the first ones. `train` weights a process by its share of all real steps; the
        # factor, 1 in a single process, makes that the share of these steps.
        weight = _later_share(lengths) / extras["later_share"][0]
        boundary_loss = masked_mean(cross_entropy, later) * weight
        loss = action_loss + config.alpha_code_at(step) * code_kl + config.alpha_boundary * boundary_kl + boundary_loss
        metrics: dict[str, Tensor | Ratio] = {
            "action_loss": action_loss,
            "code_kl": code_kl,
            "boundary_kl": boundary_kl,
            "boundary_loss": boundary_loss,
        }
        if batch.segments is not None:
            with torch.no_grad():
                threshold = meta_controller.gate_config.threshold
                for name, value, least in (("gate", beta, threshold), ("segment", boundary, LIKELY)):
                    options = {"threshold": least, "tolerance": gate_tolerance}
                    sums = gate_sums(value, batch.segments, lengths, **options)
                    metrics |= {f"{name}_{kind}": sums[f"gate_{kind}"] for kind in ("recall", "precision")}
        return loss, metrics

    train(
        "discover",
        config.optimizer,
        nn.ModuleDict({"segmentation": segmentation, "meta_controller": meta_controller}),
        parameters,
        generate,
        loss_function,
        run,
        seed=config.seed,
        sample_extras=sample_extras,
        validation=validation,
        resume=resume,
        quiet=quiet,
    )
    workers = processes(next(model.parameters()).device.type)
    save_artefacts(run, workers, {SEGMENTATION: segmentation, META_CONTROLLER: meta_controller})
    return meta_controller


def _later_share(lengths: Tensor) -> Tensor:
    """Share of real steps that are not the first of their episode, a scalar above 0. lengths (b,)."""
    return ((lengths - 1).sum() / lengths.sum()).clamp_min(1e-9)
