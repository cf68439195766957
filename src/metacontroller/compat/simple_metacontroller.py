"""`TransformerWithMetacontroller`: the single-phase model under the other library's keywords and records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metacontroller.control.losses import clipped_surrogate
from metacontroller.data.trajectories import length_mask
from metacontroller.errors import UserError
from metacontroller.variants.latent_prediction import sigreg
from metacontroller.variants.single_phase import SinglePhase, SinglePhaseCache

from .compat_losses import beside, z_score
from .compat_names import TheirSave, other_name
from .compat_transformer import body_options, clamped_lengths, joined_states, states_as_entries
from .metacontroller_with_binary_mapper import LOG_TWO, BinaryMapper

__all__ = [
    "GRPOOutput",
    "MetaControllerLosses",
    "MetaControllerOutput",
    "TransformerWithMetacontroller",
    "TransformerWithMetacontrollerCache",
    "extract_grpo_data",
    "policy_loss",
    "z_score",
]


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


class TransformerWithMetacontrollerCache(SinglePhaseCache):
    """The house's cache under the other library's names."""

    lower_body = other_name("model.lower")
    upper_body = other_name("model.upper")
    emitter_decoder = other_name("emitter")
    prev_key = other_name("key")
    prev_gated_action = property(lambda self: self.z[:, None])
    quantile_indices = other_name("quantile")
    cache_steps = other_name("steps")


class TransformerWithMetacontroller(TheirSave, SinglePhase):
    """The house's single-phase model; ``forward`` returns losses, or acts."""

    def __init__(
        self,
        dim: int,
        *,
        state_embed_readout: dict[str, Any],
        action_embed_readout: dict[str, Any],
        embed_past_actions: bool = True,
        dim_code_bits: int = 4,
        emitter_decoder: dict[str, Any] | None = None,
        lower_body: dict[str, Any] | None = None,
        upper_body: dict[str, Any] | None = None,
        temporal_sequence_embedder: dict[str, Any] | None = None,
        dim_sequence_summary_embed: int = 32,
        temporal_sequence_embed_prob: float = 1.0,
        switch_entropy_quantiles: float | Sequence[float] | None = None,
        eval_switch_entropy_quantile: float = 0.5,
        switch_entropy_quantile_lr: float = 0.1,
        dim_queries_keys: int = 256,
        target_avg_token_length: float = 8.0,
        residual_stream_dropout: float = 0.0,
        residual_stream_drop_prob: float = 0.0,
        kl_loss_weight: float = 1.0,
        kl_loss_threshold: float = 0.0,
        freeze_entropy_quantiles: bool = False,
        num_latent_pred_steps: int = 2,
        future_entropy_weights: Sequence[float] | None = None,
        predict_next_switch_embed: bool = False,
        sigreg_lambda: float = 0.05,
        sigreg_loss_kwargs: dict[str, Any] | None = None,
        assoc_scan_kwargs: dict[str, Any] | None = None,
        control_penalty_floor: float = 0.5,
    ) -> None:
        given = locals()
        quantiles = switch_entropy_quantiles
        embedder = temporal_sequence_embedder
        sliced: dict[str, Any] = {"num_slices": 256} if sigreg_loss_kwargs is None else sigreg_loss_kwargs
        super().__init__(
            dim,
            state_embed_readout=states_as_entries(state_embed_readout),
            action_embed_readout=action_embed_readout,
            lower_body=body_options(lower_body or {}, dim),
            upper_body=body_options(upper_body or {}, dim),
            emitter=body_options(emitter_decoder or {}, dim),
            condition_on_actions=embed_past_actions,
            bits=dim_code_bits,
            free_bits=kl_loss_threshold / LOG_TWO,
            switch_width=dim_queries_keys,
            target_length=target_avg_token_length,
            ahead=num_latent_pred_steps,
            control_floor=control_penalty_floor,
            dropout=residual_stream_dropout,
            drop_episodes=residual_stream_drop_prob,
            entropy_quantiles=(quantiles,) if isinstance(quantiles, (int, float)) else quantiles,
            entropy_options={
                "evaluated": eval_switch_entropy_quantile,
                "rate": switch_entropy_quantile_lr,
                "frozen": freeze_entropy_quantiles,
            },
            ahead_weights=future_entropy_weights,
            sequence_embedder=None if embedder is None else body_options(embedder, dim),
            dim_sequence=dim_sequence_summary_embed,
            sequence_share=temporal_sequence_embed_prob,
            predict_switches=predict_next_switch_embed,
            **sigreg_options(**sliced),
        )
        self.remember_arguments({name: value for name, value in given.items() if name != "__class__"})
        self.kl_loss_weight, self.sigreg_lambda = kl_loss_weight, sigreg_lambda
        self.codes = BinaryMapper(dim_code_bits, kl_loss_threshold)
        self.dim_model, self.dim_code_bits, self.num_codes = dim, dim_code_bits, self.codes.dim
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
        whole = return_loss if use_temporal_sequence_embed is None else use_temporal_sequence_embed
        options = {"whole": whole, "update": update_entropy_quantile}
        if return_loss:
            if actions is None:
                raise UserError("actions are missing; return_loss = True needs them.")
            losses, steering = self.losses(state, actions, clamped_lengths(episode_lens, actions.shape[1]), **options)
            latent = losses.latent + self.sigreg_lambda * losses.sigreg
            first = MetaControllerLosses(
                losses.state / self.model.state_entries(state),
                losses.action,
                losses.ratio,
                latent,
                losses.latent,
                losses.sigreg,
                losses.kl,
                losses.next_switch,
                losses.control,
            )
            ratio, kl, sigreg_found, control = losses.ratio, losses.kl, losses.sigreg, losses.control
        else:
            if return_cache and cache is None:
                cache = self.empty_cache(len(state))
            lengths = clamped_lengths(episode_lens, state.shape[1])
            mask = None if lengths is None else length_mask(lengths, state.shape[1])
            first, steering = self.act(state, actions, cache, mask=mask, **options)
            ratio, kl, sigreg_found, control = None, 0.0, 0.0, 0.0
        output = MetaControllerOutput(
            input_residual_stream=steering.residual,
            action_dist=steering.action_dist,
            actions=steering.actions,
            switch_beta=steering.switch_beta,
            ratio_loss=ratio,
            kl_loss=kl,
            kl_loss_weight=self.kl_loss_weight,
            latent_pred_entropy=steering.entropy,
            quantile_indices=steering.quantile,
            sigreg_loss=sigreg_found,
            control_penalty_loss=control,
        )
        return (first, output, cache) if return_cache else (first, output)

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

    # parts under the other library's names

    binary_mapper = other_name("codes")
    action_readout = other_name("model.action_readout")
    state_readout = other_name("model.state_readout")
    state_embed = other_name("model.encoder")
    lower_body = other_name("model.lower_body")
    upper_body = other_name("model.upper_body")
    emitter_decoder = other_name("emitter")
    emitter_to_binary_logits = other_name("to_logits")
    to_control_signal = other_name("to_control")
    switch_embed = other_name("switch_embedding")
    temporal_embedder = other_name("sequence_embedder")
    target_avg_token_length = other_name("target_length")
    control_penalty_floor = other_name("control_floor")
    num_latent_pred_steps = other_name("latents.ahead")

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
    num_slices: int = 1024, domain: tuple[float, float] = (-5, 5), num_knots: int = 17, reduction: str = "mean"
) -> dict[str, Any]:
    """The other library's options of SIGReg under the house's names; UserError for another reduction than "mean"."""
    if reduction != "mean":
        raise UserError(f"reduction is {reduction!r}; expected 'mean', over directions.")
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
    decided = torch.ones(batch, steps, dtype=torch.bool, device=state.device) if mask is None else mask.bool()
    decided = decided[..., 0] if decided.dim() == 3 else decided
    state, old_log_probs, actions, advantages = beside(model, state, old_log_probs, actions, advantages)
    switch_betas, decided, episode_lens, quantile_indices = beside(
        model, switch_betas, decided, episode_lens, quantile_indices
    )
    if episode_lens is not None:
        decided = decided & length_mask(episode_lens, steps)
    distribution = model.get_action_dist_for_internal_rl(state.detach(), switch_betas, quantile_indices)
    log_prob = model.log_prob(distribution, actions).sum(-1)  # pyright: ignore[reportArgumentType] - without the KL
    advantage = advantages.reshape(batch, -1).expand(-1, steps)
    return clipped_surrogate(log_prob, old_log_probs.detach().sum(-1), advantage, decided, eps_clip)


def extract_grpo_data(model: TransformerWithMetacontroller, meta_output: MetaControllerOutput) -> GRPOOutput:
    """What internal RL stores of a call."""
    log_prob = model.log_prob(meta_output.action_dist, meta_output.actions)
    stored = meta_output.input_residual_stream, meta_output.actions, log_prob, meta_output.switch_beta
    return GRPOOutput(*stored, meta_output.quantile_indices)


TransformerWithMetacontroller.policy_loss = policy_loss  # pyright: ignore[reportAttributeAccessIssue] - as theirs
