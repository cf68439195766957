"""`TransformerWithMetacontroller`: the single-phase model under the other library's keywords and records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metacontroller.control.codes import BinaryCodes
from metacontroller.control.losses import clipped_surrogate, z_score
from metacontroller.control.single_phase import SinglePhase, SinglePhaseCache
from metacontroller.data.trajectories import length_mask
from metacontroller.errors import UserError

from .compat_transformer import body_options, clamped_lengths, states_as_entries
from .metacontroller_with_binary_mapper import LOG_TWO

__all__ = [
    "GRPOOutput",
    "MetaControllerLosses",
    "MetaControllerOutput",
    "TransformerWithMetacontroller",
    "extract_grpo_data",
    "policy_loss",
    "z_score",
]


class MetaControllerLosses(NamedTuple):
    """Scalars; latent_loss is latent_ar_loss and the weighted sigreg_loss. next_switch_pred_loss is always 0."""

    bc_state_loss: Tensor
    bc_action_loss: Tensor
    ratio_loss: Tensor
    latent_loss: Tensor
    latent_ar_loss: Tensor
    sigreg_loss: Tensor
    kl_loss: Tensor
    next_switch_pred_loss: Tensor
    control_penalty_loss: Tensor


class MetaControllerOutput(NamedTuple):
    """Of one call: input_residual_stream (b, t, n_e), action_dist (b, t, h), actions (b, t, 2^h), switch_beta (b, t);
    then what the losses say of it."""

    input_residual_stream: Tensor
    action_dist: Tensor
    actions: Tensor
    switch_beta: Tensor
    ratio_loss: Tensor | None
    kl_loss: Tensor | float
    kl_loss_weight: float
    sigreg_loss: Tensor | float
    control_penalty_loss: Tensor | float


class GRPOOutput(NamedTuple):
    """What internal RL stores: (b, t, n_e), (b, t, 2^h), (b, t, h), (b, t)."""

    state: Tensor
    action: Tensor
    log_prob: Tensor
    switch_beta: Tensor


@dataclass
class BinaryMapper:
    """The codes under the other library's name; deterministic_on_eval: whether evaluation takes the likeliest one."""

    codes: BinaryCodes
    deterministic_on_eval: bool = False


class TransformerWithMetacontroller(SinglePhase):
    """The house's single-phase model; ``forward`` returns losses, or acts."""

    def __init__(
        self,
        dim: int,
        *,
        state_embed_readout: dict[str, Any],
        action_embed_readout: dict[str, Any],
        embed_past_actions: bool = True,
        dim_code_bits: int = 4,
        emitter_decoder: dict[str, Any],
        lower_body: dict[str, Any],
        upper_body: dict[str, Any],
        dim_queries_keys: int = 256,
        target_avg_token_length: float = 8.0,
        residual_stream_dropout: float = 0.0,
        kl_loss_weight: float = 1.0,
        kl_loss_threshold: float = 0.0,
        num_latent_pred_steps: int = 2,
        sigreg_lambda: float = 0.05,
        sigreg_loss_kwargs: dict[str, Any] | None = None,
        control_penalty_floor: float = 0.5,
        **others: Any,
    ) -> None:
        if others:
            raise UserError(f"{min(others)} is no option here; leave it out (docs/from-metacontroller-pytorch.md).")
        given = locals()
        super().__init__(
            dim,
            state_embed_readout=states_as_entries(state_embed_readout),
            action_embed_readout=action_embed_readout,
            lower_body=body_options(lower_body, dim),
            upper_body=body_options(upper_body, dim),
            emitter=body_options(emitter_decoder, dim),
            condition_on_actions=embed_past_actions,
            bits=dim_code_bits,
            free_bits=kl_loss_threshold / LOG_TWO,
            switch_width=dim_queries_keys,
            target_length=target_avg_token_length,
            ahead=num_latent_pred_steps,
            directions=(sigreg_loss_kwargs or {}).get("num_slices", 256),
            control_floor=control_penalty_floor,
            dropout=residual_stream_dropout,
        )
        self.remember_arguments({name: value for name, value in given.items() if name not in ("others", "__class__")})
        self.kl_loss_weight, self.sigreg_lambda = kl_loss_weight, sigreg_lambda
        self.dim_model, self.dim_code_bits, self.num_codes = dim, dim_code_bits, self.codes.dim
        self.binary_mapper = BinaryMapper(self.codes)

    def forward(
        self,
        state: Tensor,
        actions: Tensor | None = None,
        episode_lens: Tensor | None = None,
        return_loss: bool = True,
        cache: SinglePhaseCache | None = None,
        return_cache: bool = False,
    ) -> Any:
        """Losses and output, or without ``return_loss`` the action's distribution and output; then the cache if asked.

        A cache is brought up to date in place, and can be used once. UserError for missing actions.
        """
        state = state[..., None] if state.dim() == 2 and not state.is_floating_point() else state
        if return_loss:
            if actions is None:
                raise UserError("actions are missing; return_loss = True needs them.")
            losses, steering = self.losses(state, actions, clamped_lengths(episode_lens, actions.shape[1]))
            latent = losses.latent + self.sigreg_lambda * losses.sigreg
            first = MetaControllerLosses(
                losses.state,
                losses.action,
                losses.ratio,
                latent,
                losses.latent,
                losses.sigreg,
                losses.kl,
                latent.new_zeros(()),
                losses.control,
            )
            measured = losses.ratio, losses.kl, self.kl_loss_weight, losses.sigreg, losses.control
        else:
            if return_cache and cache is None:
                cache = self.empty_cache(len(state))
            certain = self.binary_mapper.deterministic_on_eval and not self.training
            first, steering = self.act(state, actions, cache, temperature=0.0 if certain else 1.0)
            measured = None, 0.0, self.kl_loss_weight, 0.0, 0.0
        output = MetaControllerOutput(
            steering.residual, steering.action_dist, steering.actions, steering.switch_beta, *measured
        )
        return (first, output, cache) if return_cache else (first, output)

    # internal RL

    @property
    def replay_buffer_field_dict(self) -> dict[str, Any]:
        """Fields of a replay buffer for what `extract_grpo_data` returns."""
        return {
            "state": ("float", self.dim),
            "action": ("float", self.codes.dim),
            "log_prob": ("float", self.codes.entries),
            "switch_beta": "float",
        }

    def internal_metacontroller_parameters(self) -> list[Tensor]:
        """What internal RL trains: the emitter."""
        return [
            parameter
            for part in (self.emitter, self.emitter_norm, self.to_logits, self.switch_embedding)
            for parameter in part.parameters()
        ]

    def get_action_dist_for_internal_rl(self, residual_stream: Tensor, switch_betas: Tensor | None = None) -> Tensor:
        """Logits of the bits (b, t, h) along stored residuals; switches at the first step alone if not given."""
        if switch_betas is None:
            switch_betas = torch.zeros_like(residual_stream[..., 0])
            switch_betas[:, 0] = 1
        return self.action_dist(residual_stream, switch_betas)

    def log_prob(self, dist_params: Tensor, actions: Tensor) -> Tensor:
        """Log-probability of each bit, (b, t, h)."""
        return self.codes.log_prob(dist_params, actions)

    def policy_loss(self, *arguments: Any, **options: Any) -> Tensor:
        """See `policy_loss`."""
        return policy_loss(self, *arguments, **options)


def policy_loss(
    model: TransformerWithMetacontroller,
    state: Tensor,
    old_log_probs: Tensor,
    actions: Tensor,
    advantages: Tensor,
    switch_betas: Tensor | None = None,
    mask: Tensor | None = None,
    episode_lens: Tensor | None = None,
    eps_clip: float | tuple[float, float] = 0.2,
) -> Tensor:
    """The clipped surrogate of the emitter on stored steps; the ratio is that of a whole code, as in the paper.

    mask (b, t) or (b, t, 1): decisions, every step if None. advantages (b,), or as mask.
    """
    batch, steps = state.shape[:2]
    decided = torch.ones(batch, steps, dtype=torch.bool, device=state.device) if mask is None else mask.bool()
    decided = decided[..., 0] if decided.dim() == 3 else decided
    if episode_lens is not None:
        decided = decided & length_mask(episode_lens, steps)
    distribution = model.get_action_dist_for_internal_rl(state.detach(), switch_betas)
    log_prob = model.log_prob(distribution, actions).sum(-1)
    advantage = advantages.reshape(batch, -1).expand(-1, steps)
    return clipped_surrogate(log_prob, old_log_probs.detach().sum(-1), advantage, decided, eps_clip)


def extract_grpo_data(model: TransformerWithMetacontroller, meta_output: MetaControllerOutput) -> GRPOOutput:
    """What internal RL stores of a call."""
    log_prob = model.log_prob(meta_output.action_dist, meta_output.actions)
    return GRPOOutput(meta_output.input_residual_stream, meta_output.actions, log_prob, meta_output.switch_beta)
