"""The names of the package `metacontroller-pytorch` 0.3.3 over this one: its keywords, arguments and records.

Nothing is computed here. What a name stands for lies in `control` and `models`; where the two differ, and why, is told
by docs/from-metacontroller-pytorch.md. The module is importable as ``metacontroller.metacontroller``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metacontroller.control.codes import bounded
from metacontroller.control.losses import ratio_loss as house_ratio_loss
from metacontroller.control.losses import target_policy_loss, z_score
from metacontroller.control.metacontroller import MetaController as HouseMetaController
from metacontroller.control.proposers import ModuleProposer, StepwisePolicy, make_proposer
from metacontroller.control.schedules import LossWeights
from metacontroller.control.sequence_embedder import LastState, ModuleEmbedder, SequenceEmbedder
from metacontroller.control.stepping import SteeringOutput as MetaControllerOutput
from metacontroller.control.switching import regular_switches
from metacontroller.data.trajectories import length_mask
from metacontroller.models.loss_scale import LossScale as LossNormalizer
from metacontroller.models.next_latent import NextLatent as ResidualDynamics

from .compat_transformer import (
    BehavioralCloningLosses,
    DiscoveryLosses,
    Hiddens,
    Transformer,
    TransformerOutput,
    body_options,
)

__all__ = [
    "ActionProposerWrapper",
    "BehavioralCloningLosses",
    "DiscoveryLosses",
    "GRPOOutput",
    "Hiddens",
    "LossNormalizer",
    "MetaController",
    "MetaControllerOutput",
    "ResidualDynamics",
    "Transformer",
    "TransformerOutput",
    "binary_entropy",
    "bounded",
    "extract_grpo_data",
    "policy_loss",
    "ratio_loss",
    "target_policy_loss",
    "z_score",
]

ATTENTION = {"depth": 2, "heads": 8, "attn_dim_head": 32}


class GRPOOutput(NamedTuple):
    """What internal RL stores of a step: (b, 1, n_e), (b, 1, n_z), (b, 1, entries), (b, 1)."""

    state: Tensor
    action: Tensor
    log_prob: Tensor
    switch_beta: Tensor


class ActionProposerWrapper(ModuleProposer):
    """Any module as an action proposer."""

    def __init__(
        self, module: nn.Module, cache_key: str = "cache", return_cache_key: str | None = "return_hiddens"
    ) -> None:
        super().__init__(module, cache_key, return_cache_key)


class MetaController(HouseMetaController):
    """The house's metacontroller under the other library's keywords.

    The policy over codes (its action proposer) reads every step. The first positional arguments and defaults are those
    of the other library, but for the gate, whose ratio loss has the weight that is given.
    """

    dim_code_bits: int | None = None

    def __init__(
        self,
        dim_model: int,
        *,
        dim_meta_controller: int | None = 256,
        dim_latent: int = 128,
        decoder_expansion_factor: float = 2.0,
        decoder_depth: int = 1,
        hypernetwork_low_rank: int = 16,
        assoc_scan_kwargs: dict[str, Any] | None = None,
        internal_sequence_embedder: nn.Module | dict[str, Any] | None = None,
        compact_sequence_embedding: bool = False,
        bidirectional: bool = True,
        pool_embedded_sequence: bool = True,
        dim_sequence_summary_embed: int = 32,
        action_proposer: nn.Module | dict[str, Any] | None = None,
        switch_temperature: float = 1.0,
        target_temporal_segment_len: float = 4,
        ratio_loss_weight: float = 1.0,
        ratio_loss_chunk_size: int | None = None,
        hard_switch: bool | None = None,
        hard_switch_straight_through: bool = False,
        kl_loss_weight: float = 1.0,
        kl_loss_warmup_steps: int = 0,
        apply_kl_loss_weight: bool = True,
        ratio_loss_final_weight: float | None = None,
        ratio_loss_warmdown_steps: int = 0,
        latent_action_barrier_scale: float | None = None,
        **codes: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name != "codes"}
        width = dim_model if dim_meta_controller is None else dim_meta_controller
        size = 2**dim_latent if codes.get("code") == "binary" else dim_latent
        super().__init__(
            dim_model,
            dim_meta_controller=width,
            dim_latent=dim_latent,
            dim_sequence=dim_sequence_summary_embed,
            encoder_hidden=2 * width,
            decoder_hidden=int(size * decoder_expansion_factor),
            decoder_depth=decoder_depth,
            embedder_dim=4,
            policy_hidden=1,
            rank=min(hypernetwork_low_rank, dim_model),
            ratio_loss_weight=ratio_loss_weight,
            target_segment_length=target_temporal_segment_len,
            **codes,
        )
        self.remember_arguments(given | codes)
        embedder: Any = ATTENTION if internal_sequence_embedder is None else internal_sequence_embedder
        if compact_sequence_embedding:
            embedder = LastState(dim_model)
        if isinstance(embedder, dict):
            self.sequence_embedder = SequenceEmbedder(
                dim_model,
                dim_sequence_summary_embed,
                dim=dim_model,
                kind="attention" if bidirectional else "causal-attention",
                pooled=bidirectional and pool_embedded_sequence,
                **body_options(embedder, dim_model),
            )
        else:
            self.sequence_embedder = ModuleEmbedder(embedder, dim_model, dim_sequence_summary_embed)
        proposer: Any = ATTENTION if action_proposer is None else action_proposer
        if isinstance(proposer, dict):
            proposer = make_proposer(dim_model, **body_options(proposer, dim_model))
        elif not hasattr(proposer, "cache_key"):
            proposer = ModuleProposer(proposer)
        self.policy = StepwisePolicy(proposer, dim_model, self.codes.params)
        self.switch_temperature, self.hard_switch = switch_temperature, hard_switch
        self.straight_through, self.code_bound = hard_switch_straight_through, latent_action_barrier_scale
        self.ratio_chunk = ratio_loss_chunk_size
        self.loss_weights = LossWeights(
            kl=kl_loss_weight,
            kl_warmup=kl_loss_warmup_steps,
            ratio=ratio_loss_weight,
            ratio_final=ratio_loss_final_weight,
            ratio_warmdown=ratio_loss_warmdown_steps,
            apply_kl=apply_kl_loss_weight,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Modules that the other library lets one replace, under its names."""
        if name == "internal_sequence_embedder":
            self.sequence_embedder = ModuleEmbedder(
                value, self.dim_model, self.sequence_embedder.project_out.out_features
            )
        elif name == "emitter":
            self.encoder = nn.Sequential(value, nn.Identity(), self.encoder[-1])
        elif name == "action_proposer":
            self.policy.proposer = value
        else:
            super().__setattr__(name, value)

    @property
    def internal_sequence_embedder(self) -> nn.Module:
        return self.sequence_embedder.body

    @property
    def emitter(self) -> nn.Module:
        return self.encoder[:-1] if isinstance(self.encoder[1], nn.ReLU) else self.encoder[0]

    @property
    def action_proposer(self) -> nn.Module:
        return self.policy.proposer

    @property
    def decoder(self) -> nn.Module:
        return self.controller

    @property
    def switching_unit(self) -> nn.Module:
        return self.switching

    @property
    def summary_gru(self) -> nn.Module:
        return self.history

    @property
    def target_temporal_segment_len(self) -> float:
        return self.target_segment_length

    # internal RL

    @property
    def replay_buffer_field_dict(self) -> dict[str, Any]:
        """Fields of a replay buffer for what `extract_grpo_data` returns."""
        return {
            "states": ("float", self.dim_model),
            "log_probs": ("float", self.codes.entries),
            "switch_betas": "float",
            "latent_actions": ("float", self.dim_latent),
        }

    create_regular_switch_beta = staticmethod(
        lambda batch, seq_len, frequency, offset=0, device=None: regular_switches(batch, seq_len, frequency, offset).to(
            device
        )
    )

    def get_action_dist_for_internal_rl(
        self, residual_stream: Tensor, return_kl_loss: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The policy's distributions (b, t, p) along stored residuals, and if asked for their KL entry by entry."""
        distribution, _ = self.policy(residual_stream)
        return (distribution, self.calculate_kl_loss(distribution)) if return_kl_loss else distribution

    def calculate_kl_loss(self, action_dist: Tensor) -> Tensor:
        """KL to the prior: of Gaussian codes by entry, of binary ones as a whole, beyond the free bits."""
        return self.codes.kl_entries(action_dist) if self.codes.kind == "gaussian" else self.codes.kl(action_dist)

    def policy_loss(self, *arguments: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `policy_loss`."""
        return policy_loss(self, *arguments, **options)

    def ratio_loss(self, *arguments: Any, **options: Any) -> Tensor:
        """See `ratio_loss`."""
        return ratio_loss(self, *arguments, **options)

    # weights of losses

    @property
    def kl_loss_weight(self) -> float:
        return self.loss_weights.kl if self.loss_weights is not None else 1.0

    @property
    def current_kl_loss_weight(self) -> float:
        return self.loss_weights.current_kl if self.loss_weights is not None else 1.0

    @property
    def current_ratio_loss_weight(self) -> float:
        return self.loss_weights.current_ratio if self.loss_weights is not None else self.ratio_loss_weight

    def maybe_increment_kl_loss_step(self) -> None:
        """Counts an update, for weights that change with their number."""
        if self.loss_weights is not None:
            self.loss_weights.step()

    def reset_kl_loss_warmup(self) -> None:
        """Begins the count again."""
        if self.loss_weights is not None:
            self.loss_weights.reset()


def policy_loss(
    meta_controller: HouseMetaController,
    state: Tensor,
    old_log_probs: Tensor,
    actions: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    episode_lens: Tensor | None = None,
    eps_clip: float | tuple[float, float] = 0.2,
    switch_beta_frequency: int | None = None,
    return_kl_loss: bool = False,
    kl_loss_weight: float = 0.0,
    use_tpo: bool = False,
    tpo_eta: float = 1.0,
    tpo_group_size: int | None = None,
    per_entry: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The policy's loss on stored episodes, and if asked for the weighted KL; see ``policy_losses`` of the house.

    mask (b, t) or (b, t, 1): switches, every step if None. switch_beta_frequency: switches at regular steps instead.
    """
    batch, steps = state.shape[:2]
    if switch_beta_frequency is not None:
        mask = regular_switches(batch, steps, switch_beta_frequency).to(state.device)
    losses = HouseMetaController.policy_losses(
        meta_controller,
        state,
        old_log_probs,
        actions,
        advantages.flatten() if advantages.numel() == batch else advantages.view(batch, steps),
        mask[..., 0] if mask is not None and mask.dim() == 3 else mask,
        episode_lens,
        eps_clip,
        objective="target" if use_tpo else "clipped",
        eta=tpo_eta,
        group=tpo_group_size,
        per_entry=per_entry,
    )
    return (losses.surrogate, losses.kl * kl_loss_weight) if return_kl_loss else losses.surrogate


def ratio_loss(
    meta_controller: HouseMetaController,
    target_segment_len: float,
    switch_beta: Tensor,
    hard_switch_beta: Tensor | None = None,
    episode_lens: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """The ratio loss of given switching probabilities (b, t); hard switches are those at 0.5 and above if not given."""
    steps = switch_beta.shape[1]
    lengths = switch_beta.new_full((len(switch_beta),), steps) if episode_lens is None else episode_lens
    return house_ratio_loss(
        switch_beta, length_mask(lengths, steps), target_segment_len, chunk=chunk_size, hard=hard_switch_beta
    )


def extract_grpo_data(meta_controller: Any, transformer_output: Any) -> GRPOOutput:
    """What internal RL stores of the step that left ``transformer_output``."""
    output = transformer_output.prev_hiddens.meta_controller
    log_prob = meta_controller.log_prob(output.action_dist, output.actions)
    return GRPOOutput(output.input_residual_stream, output.actions, log_prob, output.switch_beta)


def binary_entropy(probability: Tensor) -> Tensor:
    """Entropy of Bernoullis in nats, elementwise."""
    return torch.special.entr(probability) + torch.special.entr(1 - probability)
