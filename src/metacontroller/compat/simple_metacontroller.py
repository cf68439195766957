"""`TransformerWithMetacontroller`: the single-phase model under the other library's keywords and records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metacontroller.control.losses import clipped_surrogate
from metacontroller.data.trajectories import length_mask
from metacontroller.errors import UserError
from metacontroller.ranges import check_choice
from metacontroller.variants.latent_prediction import sigreg
from metacontroller.variants.single_phase import SinglePhase, SinglePhaseCache

from .compat_names import (
    OtherNames,
    body_options,
    clamped_lengths,
    joined_states,
    on_device_of,
    other_names,
    renamed,
    states_as_entries,
)
from .metacontroller import z_score
from .metacontroller_with_binary_mapper import LOG_TWO, BinaryMapper

KEYWORDS = {
    "embed_past_actions": "condition_on_actions",
    "dim_code_bits": "bits",
    "dim_queries_keys": "switch_width",
    "dim_sequence_summary_embed": "dim_sequence",
    "temporal_sequence_embed_prob": "sequence_share",
    "target_avg_token_length": "target_length",
    "residual_stream_dropout": "dropout",
    "residual_stream_drop_prob": "drop_episodes",
    "num_latent_pred_steps": "ahead",
    "future_entropy_weights": "ahead_weights",
    "predict_next_switch_embed": "predict_switches",
    "control_penalty_floor": "control_floor",
}
"""Keywords of the model, theirs to ours; the defaults are the same."""
ENTROPY = {
    "eval_switch_entropy_quantile": "evaluated",
    "switch_entropy_quantile_lr": "rate",
    "freeze_entropy_quantiles": "frozen",
}
"""Those of switches by entropy, theirs to ours."""
PARTS = {
    "binary_mapper": "codes",
    "action_readout": "model.action_readout",
    "state_readout": "model.state_readout",
    "state_embed": "model.encoder",
    "lower_body": "model.lower_body",
    "upper_body": "model.upper_body",
    "emitter_decoder": "emitter",
    "emitter_to_binary_logits": "to_logits",
    "to_control_signal": "to_control",
    "switch_embed": "switch_embedding",
    "temporal_embedder": "sequence_embedder",
    "target_avg_token_length": "target_length",
    "control_penalty_floor": "control_floor",
    "num_latent_pred_steps": "latents.ahead",
}
"""Attributes, theirs to ours."""


class MetaControllerLosses(NamedTuple):
    """Scalars; latent_loss is latent_ar_loss and the weighted sigreg_loss."""

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
    """Of one call: input_residual_stream (b, t, n_e), action_dist (b, t, h), actions (b, t, 2^h), switch_beta (b, t),
    what the losses say of it, the entropy of the predicted residuals (b, t), and which quantile of it an episode
    switches at, (b,) or None."""

    input_residual_stream: Tensor
    action_dist: Tensor
    actions: Tensor
    switch_beta: Tensor
    ratio_loss: Tensor | None
    kl_loss: Tensor | float
    kl_loss_weight: float
    latent_pred_entropy: Tensor
    quantile_indices: Tensor | None = None
    sigreg_loss: Tensor | float = 0.0
    control_penalty_loss: Tensor | float = 0.0


class GRPOOutput(NamedTuple):
    """What internal RL stores: (b, t, n_e), (b, t, 2^h), (b, t, h), (b, t), and (b,) or None."""

    state: Tensor
    action: Tensor
    log_prob: Tensor
    switch_beta: Tensor
    quantile_indices: Tensor | None = None


@other_names(
    {
        "lower_body": "model.lower",
        "upper_body": "model.upper",
        "emitter_decoder": "emitter",
        "prev_key": "key",
        "quantile_indices": "quantile",
        "cache_steps": "steps",
    }
)
class TransformerWithMetacontrollerCache(SinglePhaseCache):
    """Our cache under the other library's names."""

    prev_gated_action = property(lambda self: self.z[:, None])


@other_names(PARTS)
class TransformerWithMetacontroller(OtherNames, SinglePhase):
    """Our single-phase model; ``forward`` returns losses, or acts.

    options: see `KEYWORDS` and `ENTROPY`.
    """

    def __init__(
        self,
        dim: int,
        *,
        state_embed_readout: dict[str, Any],
        action_embed_readout: dict[str, Any],
        emitter_decoder: dict[str, Any] | None = None,
        lower_body: dict[str, Any] | None = None,
        upper_body: dict[str, Any] | None = None,
        temporal_sequence_embedder: dict[str, Any] | None = None,
        switch_entropy_quantiles: float | Sequence[float] | None = None,
        kl_loss_weight: float = 1.0,
        kl_loss_threshold: float = 0.0,
        sigreg_lambda: float = 0.05,
        sigreg_loss_kwargs: dict[str, Any] | None = None,
        assoc_scan_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        given = dict(locals())
        quantiles, embedder = switch_entropy_quantiles, temporal_sequence_embedder
        slices: dict[str, Any] = {"num_slices": 256} if sigreg_loss_kwargs is None else sigreg_loss_kwargs
        known = renamed({name: value for name, value in options.items() if name not in ENTROPY}, KEYWORDS)
        super().__init__(
            dim,
            state_embed_readout=states_as_entries(state_embed_readout),
            action_embed_readout=action_embed_readout,
            lower_body=body_options(lower_body or {}, dim),
            upper_body=body_options(upper_body or {}, dim),
            emitter=body_options(emitter_decoder or {}, dim),
            sequence_embedder=None if embedder is None else body_options(embedder, dim),
            free_bits=kl_loss_threshold / LOG_TWO,
            entropy_quantiles=(quantiles,) if isinstance(quantiles, (int, float)) else quantiles,
            entropy_options={ours: options[theirs] for theirs, ours in ENTROPY.items() if theirs in options},
            **sigreg_options(**slices),
            **known,
        )
        self.remember_arguments(given)
        self.kl_loss_weight, self.sigreg_lambda = kl_loss_weight, sigreg_lambda
        self.codes = BinaryMapper(self.codes.entries, kl_loss_threshold)
        self.dim_model, self.dim_code_bits, self.num_codes = dim, self.codes.bits, self.codes.dim
        self.num_quantiles = 0 if self.switch is not None else len(self.entropy_switch.quantiles)

    def forward(
        self,
        state: Tensor | tuple[Tensor, Tensor],
        actions: Tensor | None = None,
        episode_lens: Tensor | None = None,
        return_loss: bool = True,
        cache: SinglePhaseCache | None = None,
        return_cache: bool = False,
        use_temporal_sequence_embed: bool | None = None,
        update_entropy_quantile: bool | None = None,
    ) -> Any:
        """Losses and output, or without ``return_loss`` the action's distribution and output; then the cache if asked.

        A cache is brought up to date in place, and can be used once. use_temporal_sequence_embed: whether the switch
        reads the summary of the episode, by default where there are losses. UserError for missing actions.
        """
        state = joined_states(state)
        summary = return_loss if use_temporal_sequence_embed is None else use_temporal_sequence_embed
        options = {"use_summary": summary, "update": update_entropy_quantile}
        if not return_loss:
            if return_cache and cache is None:
                cache = self.empty_cache(len(state))
            lengths = clamped_lengths(episode_lens, state.shape[1])
            mask = None if lengths is None else length_mask(lengths, state.shape[1])
            result, steering = self.act(state, actions, cache, mask=mask, **options)
            ratio, kl, others = None, 0.0, ()
        elif actions is None:
            raise UserError("actions are missing; return_loss = True needs them.")
        else:
            losses, steering = self.losses(state, actions, clamped_lengths(episode_lens, actions.shape[1]), **options)
            state_loss, latent = losses.state / self.model.state_entries(state), losses.latent
            weighted = latent + self.sigreg_lambda * losses.sigreg
            result = MetaControllerLosses(state_loss, losses.action, losses.ratio, weighted, latent, *losses[4:])
            ratio, kl, others = losses.ratio, losses.kl, (losses.sigreg, losses.control)
        switches = steering.entropy, steering.quantile
        output = MetaControllerOutput(*steering[:4], ratio, kl, self.kl_loss_weight, *switches, *others)
        return (result, output, cache) if return_cache else (result, output)

    def empty_cache(self, batch: int, capacity: int = 32) -> TransformerWithMetacontrollerCache:
        """As of `SinglePhase`."""
        return TransformerWithMetacontrollerCache(**vars(super().empty_cache(batch, capacity)))

    @staticmethod
    def sigreg_loss(x: Tensor, mask: Tensor | None = None, num_slices: int = 1024, **options: Any) -> Tensor:
        """See `variants.latent_prediction.sigreg`, of the vectors of x (b, t, n) at real steps, mask (b, t) bool.

        options: domain, num_knots, and reduction, which is "mean".
        """
        chosen = sigreg_options(num_slices, **options)
        directions = torch.randn(chosen["directions"], x.shape[-1], device=x.device, dtype=x.dtype)
        vectors = x.flatten(0, -2) if mask is None else x[mask]
        if not len(vectors):
            return vectors.sum()
        return sigreg(vectors, directions, chosen["sigreg_domain"], chosen["sigreg_points"])

    @property
    def switch_entropy_quantiles(self) -> tuple[float, ...] | None:
        return None if self.switch is not None else self.entropy_switch.quantiles

    @property
    def running_entropy_quantiles(self) -> Tensor:
        """The entropy beyond which a step switches, of each quantile; AttributeError unless they go by it."""
        return self.entropy_switch.running

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

    def get_action_dist_for_internal_rl(
        self,
        residual_stream: Tensor,
        switch_betas: Tensor | None = None,
        quantile_indices: Tensor | None = None,
        return_kl_loss: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of the bits (b, t, h) along stored residuals, and if asked their KL (b, t).

        switch_betas (b, t): at the first step alone if not given. quantile_indices (b,) or (b, t): as stored.
        """
        if switch_betas is None:
            switch_betas = torch.zeros_like(residual_stream[..., 0])
            switch_betas[:, 0] = 1
        logits = self.action_dist(residual_stream, switch_betas, quantile_indices)
        return (logits, self.calculate_kl_loss(logits)) if return_kl_loss else logits

    def calculate_kl_loss(self, binary_logits: Tensor) -> Tensor:
        """KL of codes to their prior beyond the free bits, (b, t, h) -> (b, t)."""
        return self.codes.kl(binary_logits)

    def log_prob(self, dist_params: Tensor, actions: Tensor) -> Tensor:
        """Log-probability of each bit, (b, t, h)."""
        return self.codes.log_prob(dist_params, actions)


def sigreg_options(
    num_slices: int = 1024, domain: Sequence[float] = (-5, 5), num_knots: int = 17, reduction: str = "mean"
) -> dict[str, Any]:
    """The other library's options of SIGReg under our names; UserError for another reduction than "mean"."""
    check_choice("reduction", reduction, ("mean",))
    return {"directions": num_slices, "sigreg_domain": tuple(domain), "sigreg_points": num_knots}


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
    quantile_indices: Tensor | None = None,
) -> Tensor:
    """The clipped surrogate of the emitter on stored steps; the ratio is that of a whole code, as in the paper.

    mask (b, t) or (b, t, 1): decisions, every step if None. advantages (b,), or as mask.
    """
    batch, steps = state.shape[:2]
    decided = torch.ones(batch, steps, dtype=torch.bool) if mask is None else mask.bool().reshape(batch, steps)
    if episode_lens is not None:
        decided = decided & length_mask(episode_lens, steps).to(decided.device)
    state, old_log_probs, actions, advantages, decided, *options = on_device_of(
        model, state.detach(), old_log_probs.detach(), actions, advantages, decided, switch_betas, quantile_indices
    )
    distribution = model.get_action_dist_for_internal_rl(state, *options)
    log_prob = model.log_prob(distribution, actions).sum(-1)  # pyright: ignore[reportArgumentType] - without the KL
    advantage = advantages.reshape(batch, -1).expand(-1, steps)
    return clipped_surrogate(log_prob, old_log_probs.sum(-1), advantage, decided, eps_clip)


def extract_grpo_data(model: TransformerWithMetacontroller, meta_output: MetaControllerOutput) -> GRPOOutput:
    """What internal RL stores of a call."""
    log_prob = model.log_prob(meta_output.action_dist, meta_output.actions)
    stored = meta_output.input_residual_stream, meta_output.actions, log_prob, meta_output.switch_beta
    return GRPOOutput(*stored, meta_output.quantile_indices)


TransformerWithMetacontroller.policy_loss = policy_loss  # pyright: ignore[reportAttributeAccessIssue] - as theirs
