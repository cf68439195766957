"""CompILE in place of discovery's metacontroller (arXiv 1812.01483), a baseline on equal terms (arXiv 2512.20605, D.3).

Segments and their codes come from raw observations through an encoder of its own, as wide and deep as the action
model's lower body; a code steers the frozen model by the same kind of controller:

    loss = mean over real steps of  -log p(a_t | o_1:t, z_1:t)
         + (alpha_code KL(q(z) || N(0, I)) + alpha_place KL(q(b) || Poisson)) / steps  +  imitation of b_t by beta_t

Segmentation sees the future. To act, CompILE needs a termination rule that does not: the switching unit of a
metacontroller learns to tell, from what it sees so far, whether a segment begins. From there on it is a metacontroller
like any other, and internal RL runs on it unchanged.

Each step is encoded with the observation that follows it, in place of its action: the two say the same, and unlike a
direction an observation can be turned. Codes are mixed by segments' shares and decoded once, where CompILE decodes
every segment by itself: the frozen model reads its own history.

Metrics: ``loss``, ``action_loss``, ``code_kl`` and ``place_kl`` in nats per step, ``begin_loss`` of the imitation, and
for the learned gate as for the likeliest boundaries ``recall`` and ``precision``, prefixed ``gate_`` and ``segment_``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.baselines.segmenter import Segmentation, Segmenter, SegmentNoise
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.batching import Augment, Generate
from metacontroller.data.trajectories import Trajectories, length_mask, masked_mean
from metacontroller.errors import UserError
from metacontroller.metrics.gate import gate_alignment
from metacontroller.models.encoders import make_encoder
from metacontroller.models.protocol import SteerableModel
from metacontroller.storage.module_file import Saveable
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import processes
from metacontroller.training.loop import Drawn, train
from metacontroller.training.optimizer import OptimizerConfig, linear_warmup


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """The baseline CompILE; `Segmenter` says what its parts do."""

    optimizer: OptimizerConfig
    """How long and how fast."""
    segments: int = 4
    """M, the most segments in an episode."""
    hidden: int = 32
    """Hidden width of the two heads."""
    temperature: float = 1.0
    """Temperature of the Gumbel-softmax that places segment ends."""
    prior_rate: float = 10.0
    """Mean steps of a segment under the Poisson prior."""
    alpha_code: float = 0.1
    """Weight of the codes' KL, after the linear warm-up."""
    alpha_place: float = 0.1
    """Weight of the KL of segment ends."""
    alpha_warmup: tuple[int, int] = (0, 0)
    """Updates (from, to) between which the weight of the codes' KL goes linearly from 0 to alpha_code."""
    seed: int = 0
    """Seed of the episodes and, apart, of the noise; a run derives it from its own seed."""

    def __post_init__(self) -> None:
        if self.alpha_code < 0 or self.alpha_place < 0:
            raise UserError(f"alpha_code is {self.alpha_code} and alpha_place {self.alpha_place}; expected at least 0.")
        if not 0 <= self.alpha_warmup[0] <= self.alpha_warmup[1]:
            raise UserError(f"alpha_warmup is {self.alpha_warmup}; expected (from, to) with 0 <= from <= to.")

    def alpha_code_at(self, step: int) -> float:
        """Weight of the codes' KL at update number ``step``, counted from 0."""
        return self.alpha_code * linear_warmup(step, self.alpha_warmup)


class CompILE(Saveable, nn.Module):
    """From observations to segments: an encoder of single observations, then a `Segmenter` over pairs of them.

    state_embed_readout: as of `SteerableModel`. dim, depth: of the recurrent encoder. The rest: see `Segmenter`.
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
        seen = self.encoder(states)
        return self.segmenter(torch.cat([seen[:, :-1], seen[:, 1:]], -1), lengths, noise)


def build_compile(
    config: CompileConfig, model: SteerableModel, encoder: dict[str, Any], dim_latent: int, seed: int
) -> CompILE:
    """A new CompILE beside ``model``, as wide and half as deep. encoder: of a world's `DomainSpec`."""
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


def begin_probability(meta_controller: MetaController, residual: Tensor, code: Tensor) -> Tensor:
    """beta_t (b, t), causal, of a metacontroller that holds ``code`` (b, t, n_z) along the residual (b, t, n_e)."""
    read = meta_controller.norm(residual)
    history = F.pad(meta_controller.history(read)[0], (0, 0, 1, -1))
    before = F.pad(code, (0, 0, 1, -1))
    return meta_controller.switching.probability(read, history, before, torch.ones_like(before[..., 0]))


def discover_compile(
    config: CompileConfig,
    model: SteerableModel,
    segmentation: CompILE,
    meta_controller: MetaController,
    generate: Generate,
    run: RunFolder,
    *,
    augment: Augment | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> MetaController:
    """Trains ``segmentation`` and the ``meta_controller`` that acts for it, in place, on a frozen ``model``.

    Writes ``compile.safetensors`` and ``meta_controller.safetensors`` to the run; of the latter only gate, history and
    controller are trained. augment: how the segmentation sees each batch of states, as of `discover`. Without
    ``resume`` ValueError if the run holds a checkpoint of this phase.
    """
    model.eval()
    acting = (meta_controller.norm, meta_controller.history, meta_controller.switching, meta_controller.controller)
    parameters = [*segmentation.parameters(), *(value for part in acting for value in part.parameters())]

    def draw(batch: Trajectories, generator: torch.Generator) -> Drawn:
        noise = segmentation.segmenter.draw_noise(batch.batch, batch.steps, generator)
        states = batch.states if augment is None else augment(batch.states, generator)
        return {**noise._asdict(), "states": states, "later_share": _later_share(batch.lengths).expand(batch.batch)}

    def loss_function(batch: Trajectories, step: int, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        mask, lengths = batch.mask(), batch.lengths
        found = segmentation(drawn["states"], lengths, SegmentNoise(drawn["place"], drawn["code"]))
        code = found.code_at()
        with torch.no_grad():
            residual = model.residual(batch.states, batch.actions)
        steered = meta_controller.steer(residual, code)
        action_loss = model.losses_under(steered, batch.states, batch.actions, lengths, with_state_loss=False).action
        code_kl, place_kl = (kl.sum() / lengths.sum() for kl in (found.code_kl, found.place_kl))
        begin = found.begin_at().detach()
        beta = begin_probability(meta_controller, residual, code.detach())
        later = length_mask(lengths, batch.steps) & (torch.arange(batch.steps, device=mask.device) > 0)
        imitation = F.binary_cross_entropy(beta.clamp(1e-6, 1 - 1e-6), begin, reduction="none")
        # A mean over all steps but the first ones. `train` weights a process by its share of all real steps; the
        # factor, 1 in a single process, makes that the share of these steps.
        weight = _later_share(lengths) / drawn["later_share"][0]
        begin_loss = masked_mean(imitation, later) * weight
        loss = action_loss + config.alpha_code_at(step) * code_kl + config.alpha_place * place_kl + begin_loss
        metrics = {"action_loss": action_loss, "code_kl": code_kl, "place_kl": place_kl, "begin_loss": begin_loss}
        if batch.segments is not None:
            with torch.no_grad():
                for name, value in (("gate", beta), ("segment", begin)):
                    met = gate_alignment(value, batch.segments, lengths)
                    metrics |= {f"{name}_{kind}": met[f"gate_{kind}"] for kind in ("recall", "precision")}
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
        draw=draw,
        resume=resume,
        quiet=quiet,
    )
    if processes(next(model.parameters()).device.type).is_main:
        segmentation.save(run.path / "compile.safetensors")
        meta_controller.save(run.path / "meta_controller.safetensors")
    return meta_controller


def _later_share(lengths: Tensor) -> Tensor:
    """Share of the real steps of episodes of ``lengths`` (b,) that are not the first: a scalar that may divide."""
    return ((lengths - 1).sum() / lengths.sum()).clamp_min(1e-9)
