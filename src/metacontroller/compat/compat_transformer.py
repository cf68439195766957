"""`Transformer` under the keywords and arguments of `metacontroller-pytorch` 0.3.3; see `compat/metacontroller.py`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.control.parameter_groups import trains_only
from metacontroller.data.trajectories import full_lengths, length_mask
from metacontroller.errors import UserError
from metacontroller.models.caches import check_unused
from metacontroller.models.protocol import BehaviorCloningLosses, DiscoveryLosses, frozen
from metacontroller.models.readouts import make_readout
from metacontroller.models.transformer import Transformer as OurTransformer
from metacontroller.variants.latent_prediction import NextLatent
from metacontroller.variants.loss_weights import LossScale

from .compat_names import OtherNames, body_options, clamped_lengths, joined_states, other_names, states_as_entries

BehavioralCloningLosses = BehaviorCloningLosses
NORMALIZED = ("bc_state", "bc_action", "discovery_state", "discovery_action")
"""Losses that may be divided by their running root mean squares."""
STEERING = {
    "discovery_phase": "discovery_phase",
    "meta_controller_temperature": "temperature",
    "ablate_switch_beta": "ablate_switch_beta",
    "switch_beta_frequency": "switch_beta_frequency",
    "hard_switch": "hard_switch",
}
"""Arguments of a call that the metacontroller is called with: theirs to ours."""


class Hiddens(NamedTuple):
    """What a call leaves for the next: caches of both bodies, output of the metacontroller or None."""

    lower_body: Any
    meta_controller: Any
    upper_body: Any


class TransformerOutput(NamedTuple):
    """residual_stream_latent (b, t, n_e) before steering; what the next call needs; steps so far."""

    residual_stream_latent: Tensor
    prev_hiddens: Hiddens
    cache_steps: int


class Residual(NamedTuple):
    """A call's residual before and after steering, the control's output, and the caches of both bodies."""

    before: Tensor
    steered: Tensor
    output: Any
    lower: Any
    upper: Any


@other_names(
    {
        "state_embed": "encoder",
        "dynamics_model": "next_latent",
        "next_latent_prediction_action_embed": "next_latent_action",
    }
)
class Transformer(OtherNames, OurTransformer):
    """Our action model under the other library's keywords; ``forward`` dispatches to one of four calls."""

    def __init__(
        self,
        dim: int,
        *,
        state_embed_readout: dict[str, Any],
        action_embed_readout: dict[str, Any],
        lower_body: nn.Module | dict[str, Any],
        upper_body: nn.Module | dict[str, Any],
        meta_controller: Any = None,
        dim_condition: int | None = None,
        embed_past_actions: bool = True,
        normalize_state_action_losses: bool = False,
        loss_normalizer_beta: float = 0.999,
        lower_transformer_post_norm: bool = False,
        discovery_phase_state_clone_loss: bool = False,
        dynamics_hidden_dim: int | None = None,
        dynamics_num_layers: int = 3,
        next_latent_loss_weight: float = 1.0,
    ) -> None:
        given = dict(locals())
        bodies = [body_options(body, dim) if isinstance(body, dict) else body for body in (lower_body, upper_body)]
        if lower_transformer_post_norm and isinstance(bodies[0], dict):
            bodies[0]["final_norm"] = True
        super().__init__(
            dim,
            action_embed_readout=action_embed_readout,
            state_embed_readout=states_as_entries(state_embed_readout),
            lower_body=bodies[0],
            upper_body=bodies[1],
            condition_on_actions=embed_past_actions,
            dim_condition=dim_condition,
            meta_controller=meta_controller,
        )
        self.remember_arguments(given)
        self.discovery_phase_state_clone_loss = discovery_phase_state_clone_loss
        self.normalize_state_action_losses = normalize_state_action_losses
        self.next_latent_loss_weight = next_latent_loss_weight
        if next_latent_loss_weight > 0:
            self.next_latent = NextLatent(dim, hidden=dynamics_hidden_dim, layers=dynamics_num_layers)
            self.next_latent_action = make_readout(dim, "action_embed_readout", action_embed_readout, embeds=True)
        scaled = NORMALIZED if normalize_state_action_losses else ()
        self.loss_scales = nn.ModuleDict({name: LossScale(loss_normalizer_beta) for name in scaled})

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        state: Tensor | tuple[Tensor, Tensor],
        actions: Tensor | None = None,
        meta_controller: Any = None,
        cache: TransformerOutput | None = None,
        discovery_phase: bool = False,
        force_behavior_cloning: bool = False,
        meta_controller_temperature: float = 1.0,
        return_raw_action_dist: bool = False,
        return_latents: bool = False,
        return_cache: bool = False,
        return_action_cache: bool = False,
        episode_lens: Tensor | None = None,
        return_meta_controller_output: bool = False,
        return_residual_stream: bool = False,
        return_action_logits: bool = False,
        condition: Tensor | None = None,
        return_embed: bool = False,
        control_signal_multiplier: float = 1.0,
        ablate_switch_beta: Tensor | None = None,
        switch_beta_frequency: int | None = None,
        update_loss_ema: bool | None = None,
        hard_switch: bool | None = None,
        metacontroller_residual_stream_dropout: float = 0.0,
    ) -> Any:
        """Embeds, clones, discovers or acts, as the arguments say; UserError where they do not go together.

        state: a pair, choices (b, t) or (b, t, k) and numbers (b, t, m), where the model reads both.
        """
        call = locals()
        steering = self._steering_of_call(meta_controller, discovery_phase, force_behavior_cloning)
        state = joined_states(state)
        clones = force_behavior_cloning or (steering is None and not return_raw_action_dist)
        if clones and state.shape[1] == 1 and cache is None and not return_cache and not return_embed:
            raise UserError("state has one step; learning needs at least 2, and acting return_cache = True.")
        episodes = (discovery_phase or clones) and state.shape[1] > 1
        learns = episodes and not return_action_cache
        lengths = self._checked_lengths(state, actions, episode_lens) if learns and not return_embed else None
        embedded = self.embed(state, actions[:, : state.shape[1] - 1] if episodes and actions is not None else actions)
        if return_embed:
            return embedded
        residual = self._steered(embedded, steering, call, lengths, acts=not learns)
        with nullcontext() if steering is None else frozen(self):
            hidden = self.upper(residual.steered, residual.upper, condition)
            logits = self.action_readout(hidden)
            phase = "discovery" if discovery_phase else "bc"
            losses = self._losses(phase, hidden, state, actions, lengths, update_loss_ema) if learns else None
        if losses is None:
            steps = embedded.shape[1] + (0 if cache is None else cache.cache_steps)
            left = TransformerOutput(residual.before, Hiddens(residual.lower, residual.output, residual.upper), steps)
            return (logits, left) if return_cache or return_latents or return_action_cache else logits
        if discovery_phase:
            result = DiscoveryLosses(*losses, residual.output.kl_loss, residual.output.ratio_loss)
            return (result, residual.output) if return_meta_controller_output else result
        extras = [logits] * return_action_logits + [residual.before] * return_residual_stream
        return (losses, *extras) if extras else losses

    def _steering_of_call(self, given: Any, discovers: bool, clones: bool) -> Any:
        """The metacontroller of a call, on the model's device, or None; UserError where the arguments contradict."""
        if discovers and clones:
            raise UserError("discovery_phase and force_behavior_cloning are both true; choose one.")
        steering = None if clones else self.meta_controller if given is None else given
        self._ensure_consistent_device(steering)
        if discovers and steering is None:
            raise UserError("meta_controller is missing; discovery_phase = True needs one.")
        return steering

    def _checked_lengths(self, state: Tensor, actions: Tensor | None, lengths: Tensor | None) -> Tensor | None:
        """Lengths of a batch to learn from, within its steps; UserError for a batch that does not fit."""
        if actions is None:
            raise UserError("actions are missing; behavior cloning and discovery need them.")
        lengths = clamped_lengths(lengths, actions.shape[1])
        self.check_batch(state, actions, lengths)
        return lengths

    def _steered(
        self, embedded: Tensor, steering: Any, call: dict[str, Any], lengths: Tensor | None, *, acts: bool
    ) -> Residual:
        """The residual at the controlled layer, steered if there is a metacontroller.

        call: the arguments of ``forward``. acts: whether another call may follow, which needs caches.
        """
        cache, condition, dropout = (
            call[name] for name in ("cache", "condition", "metacontroller_residual_stream_dropout")
        )
        lower = upper = None
        if cache is not None:
            lower, upper = cache.prev_hiddens.lower_body, cache.prev_hiddens.upper_body
            check_unused(lower, cache.cache_steps)
        elif acts:
            empty = self.empty_cache(len(embedded))
            lower, upper = empty.lower, empty.upper
        with nullcontext() if steering is None else torch.no_grad():
            before = self.lower(embedded, lower, condition)
        if steering is None:
            return Residual(before, before, None, lower, upper)
        control, output = steering(
            before,
            cache=None if cache is None or call["discovery_phase"] else cache.prev_hiddens.meta_controller,
            ablate_offset=0 if cache is None else cache.cache_steps,
            episode_lens=lengths,
            **{ours: call[theirs] for theirs, ours in STEERING.items()},
        )
        remaining = F.dropout(before, dropout, steering.training) if dropout else before
        return Residual(before, remaining + call["control_signal_multiplier"] * control, output, lower, upper)

    def _losses(
        self,
        phase: str,
        hidden: Tensor,
        state: Tensor,
        actions: Any,
        lengths: Tensor | None,
        update: bool | None,
    ) -> BehavioralCloningLosses:
        """State and action loss, scaled if the model was made so; hidden (b, states, n_e) feeds the readouts."""
        steps, states = actions.shape[1], hidden.shape[1]
        with_state = phase == "bc" or self.discovery_phase_state_clone_loss
        losses = self.readout_losses(hidden[:, :steps], state, actions, lengths, with_state)
        state_loss, action_loss = self.mean_over_entries(losses, state)
        if with_state and self.next_latent_loss_weight > 0:
            mask = length_mask(full_lengths(lengths, hidden), states)
            latent = self.next_latent.loss(hidden, self.next_latent_action.embed(actions), mask)
            state_loss = state_loss + self.next_latent_loss_weight * latent
        if self.normalize_state_action_losses:
            state_loss = self.loss_scales[f"{phase}_state"](state_loss, update) if with_state else state_loss
            action_loss = self.loss_scales[f"{phase}_action"](action_loss, update)
        return BehavioralCloningLosses(state_loss, action_loss)

    # phases

    def train_discovery(self, eval_rest: bool = False, meta_controller: Any = None) -> None:
        """The model is frozen; only what discovery trains of the metacontroller gets a gradient, until ``train``."""
        self._freeze(eval_rest, meta_controller).train_discovery()

    def train_internal_rl(self, eval_rest: bool = False, meta_controller: Any = None) -> None:
        """The model is frozen, and of the metacontroller only the policy gets a gradient, until ``train``."""
        self._freeze(eval_rest, meta_controller).train_internal_rl(eval_rest)

    def _freeze(self, eval_rest: bool, given: Any) -> Any:
        """The metacontroller, beside which nothing of the model gets a gradient; UserError without one."""
        steering = self.meta_controller if given is None else given
        if steering is None:
            raise UserError("meta_controller is missing; give one, here or to the model.")
        trains_only(self, list(steering.parameters()))
        if eval_rest:
            self.eval()
        return steering

    def _ensure_consistent_device(self, network: Any) -> None:
        """Moves a metacontroller to the model's device, where it lies on another one."""
        device = self.norm.weight.device
        if isinstance(network, nn.Module) and next(network.parameters()).device != device:
            network.to(device)

    def meta_controller_maybe_increment_kl_loss_step(self) -> None:
        """Counts an update of the metacontroller, if there is one."""
        if self.meta_controller is not None:
            getattr(self.meta_controller, "module", self.meta_controller).maybe_increment_kl_loss_step()

    def meta_controller_reset_kl_loss_warmup(self) -> None:
        """Begins that count again."""
        if self.meta_controller is not None:
            self.meta_controller.reset_kl_loss_warmup()

    @property
    def meta_controller_kl_loss_weight(self) -> float | None:
        return None if self.meta_controller is None else self.meta_controller.kl_loss_weight

    @property
    def meta_controller_current_kl_loss_weight(self) -> float:
        return 0.0 if self.meta_controller is None else self.meta_controller.current_kl_loss_weight

    @property
    def action_embed(self) -> Any:
        """What embeds past actions, None where they are not read."""
        return self.action_readout.embed if self.condition_on_actions else None

    @property
    def has_next_latent_loss(self) -> bool:
        return self.next_latent_loss_weight > 0


def _scale(name: str, attribute: str | None = None) -> property:
    """What divides a loss, or an attribute of it; None where losses are not normalized."""

    def read(self: Transformer) -> Any:
        scale = dict(self.loss_scales.items()).get(name)
        return scale if scale is None or attribute is None else getattr(scale, attribute)

    return property(read)


for _loss in NORMALIZED:
    setattr(Transformer, f"{_loss}_loss_normalizer", _scale(_loss))
    setattr(Transformer, f"running_{_loss}_loss", _scale(_loss, "scale"))
