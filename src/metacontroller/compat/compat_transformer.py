"""`Transformer` under the keywords and arguments of `metacontroller-pytorch` 0.3.3; see `compat/metacontroller.py`."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.control.parameter_groups import trains_only
from metacontroller.data.trajectories import length_mask
from metacontroller.errors import UserError
from metacontroller.models.cache_store import check_unused
from metacontroller.models.protocol import frozen
from metacontroller.models.readouts import make_readout
from metacontroller.models.transformer import Transformer as HouseTransformer
from metacontroller.variants.loss_scale import LossScale
from metacontroller.variants.next_latent import NextLatent

from .compat_names import TheirSave, TheirTraining, other_name

RENAMED = {"attn_dim_head": "dim_head", "attn_heads": "heads", "pre_norm_has_final_norm": "final_norm"}
"""Options of bodies: theirs to ours."""

IGNORED = {"polar_pos_emb", "rotary_pos_emb", "use_rmsnorm", "use_adaptive_rmsnorm", "attn_flash", "flash", "pool"}
"""Options of bodies that say how, not what: positions and norms are the house's."""


class BehavioralCloningLosses(NamedTuple):
    """Losses of the next state, with next-latent prediction, and of the action; scalars."""

    state: Tensor
    action: Tensor


class DiscoveryLosses(NamedTuple):
    """State loss and action loss under steering, weighted KL and ratio loss; scalars."""

    state_pred: Tensor
    action_recon: Tensor
    kl: Tensor
    ratio: Tensor


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


def body_options(options: dict[str, Any], dim: int) -> dict[str, Any]:
    """Options of a body under our names; UserError for those that we do not have."""
    ours = {RENAMED.get(name, name): value for name, value in options.items() if name not in IGNORED}
    if ours.get("kind", "attention") == "attention" and dim % ours.get("heads", 4):
        ours.setdefault("dim_head", 64)
    if "ff_mult" in ours:
        ours["mlp_dim"] = int(ours.pop("ff_mult") * dim)
    known = {"kind", "depth", "heads", "dim_head", "mlp_dim", "width", "final_norm"}
    unknown = sorted(ours.keys() - known)
    if unknown:
        raise UserError(f"the body's option {unknown[0]!r} is unknown; known are {', '.join(sorted(known))}.")
    return ours


class Transformer(TheirSave, TheirTraining, HouseTransformer):
    """The house's action model under the other library's keywords; ``forward`` dispatches to one of four calls."""

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
        given = {name: value for name, value in locals().items() if name != "meta_controller"}
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
        names = ("bc_state", "bc_action", "discovery_state", "discovery_action")
        scales = {name: LossScale(loss_normalizer_beta) for name in names} if normalize_state_action_losses else {}
        self.loss_scales = nn.ModuleDict(scales)

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
        if discovery_phase and force_behavior_cloning:
            raise UserError("discovery_phase and force_behavior_cloning are both true; choose one.")
        steering = self.meta_controller if meta_controller is None else meta_controller
        steering = None if force_behavior_cloning else steering
        self._ensure_consistent_device(steering)
        if discovery_phase and steering is None:
            raise UserError("meta_controller is missing; discovery_phase = True needs one.")
        state = joined_states(state)
        clones = force_behavior_cloning or (steering is None and not return_raw_action_dist)
        whole = (discovery_phase or clones) and state.shape[1] > 1
        learns = whole and not return_action_cache
        if clones and state.shape[1] == 1 and cache is None and not return_cache and not return_embed:
            raise UserError("state has one step; learning needs at least 2, and acting return_cache = True.")
        lengths = None
        if learns and not return_embed:
            if actions is None:
                raise UserError("actions are missing; behavior cloning and discovery need them.")
            lengths = clamped_lengths(episode_lens, actions.shape[1])
            self.check_batch(state, actions, lengths)
        embedded = self.embed(state, actions[:, : state.shape[1] - 1] if whole and actions is not None else actions)
        if return_embed:
            return embedded
        options = {
            "discovery_phase": discovery_phase,
            "temperature": meta_controller_temperature,
            "episode_lens": lengths,
            "ablate_switch_beta": ablate_switch_beta,
            "switch_beta_frequency": switch_beta_frequency,
            "ablate_offset": 0 if cache is None else cache.cache_steps,
            "hard_switch": hard_switch,
        }
        scales = control_signal_multiplier, metacontroller_residual_stream_dropout
        residual = self._steered(embedded, steering, cache, condition, options, *scales, keep=not learns)
        with nullcontext() if steering is None else frozen(self):
            hidden = self.upper(residual.steered, residual.upper, condition)
            logits = self.action_readout(hidden)
            losses = None
            if learns and actions is not None:
                phase = "discovery" if discovery_phase else "bc"
                losses = self._losses(phase, hidden, logits, state, actions, lengths, update_loss_ema)
        if losses is None:
            steps = embedded.shape[1] + (0 if cache is None else cache.cache_steps)
            left = TransformerOutput(residual.before, Hiddens(residual.lower, residual.output, residual.upper), steps)
            return (logits, left) if return_cache or return_latents or return_action_cache else logits
        if discovery_phase:
            output = residual.output
            result = DiscoveryLosses(losses.state, losses.action, output.kl_loss, output.ratio_loss)
            return (result, output) if return_meta_controller_output else result
        extras = [logits if return_action_logits else None, residual.before if return_residual_stream else None]
        extras = [extra for extra in extras if extra is not None]
        return (losses, *extras) if extras else losses

    def _steered(
        self,
        embedded: Tensor,
        steering: Any,
        cache: TransformerOutput | None,
        condition: Tensor | None,
        options: dict[str, Any],
        multiplier: float,
        dropout: float,
        *,
        keep: bool,
    ) -> Residual:
        """The residual at the controlled layer, steered if there is a metacontroller; caches are kept if ``keep``."""
        lower = upper = None
        if keep:
            empty = self.empty_cache(len(embedded))
            lower, upper = empty.lower, empty.upper
        if cache is not None:
            lower, upper = cache.prev_hiddens.lower_body, cache.prev_hiddens.upper_body
            check_unused(lower, cache.cache_steps)
        with nullcontext() if steering is None else torch.no_grad():
            before = self.lower(embedded, lower, condition)
        if steering is None:
            return Residual(before, before, None, lower, upper)
        earlier = None if cache is None or options["discovery_phase"] else cache.prev_hiddens.meta_controller
        control, output = steering(before, cache=earlier, **options)
        kept = F.dropout(before, dropout, steering.training) if dropout else before
        return Residual(before, kept + multiplier * control, output, lower, upper)

    def _losses(
        self,
        phase: str,
        hidden: Tensor,
        logits: Tensor,
        state: Tensor,
        actions: Tensor,
        lengths: Tensor | None,
        update: bool | None,
    ) -> BehavioralCloningLosses:
        """State and action loss, scaled if the model was made so; hidden (b, states, n_e) feeds the readouts."""
        steps = actions.shape[1]
        with_state = phase == "bc" or self.discovery_phase_state_clone_loss
        losses = self.readout_losses(hidden[:, :steps], state, actions, lengths, with_state)
        state_loss, action_loss = self.mean_over_entries(losses, state)
        if with_state and self.next_latent_loss_weight > 0:
            whole = state.new_full((len(state),), hidden.shape[1], dtype=torch.long) if lengths is None else lengths
            mask = length_mask(whole, hidden.shape[1])
            latent = self.next_latent.loss(hidden, self.next_latent_action.embed(actions), mask)
            state_loss = state_loss + self.next_latent_loss_weight * latent
        if self.normalize_state_action_losses:
            if with_state:
                state_loss = self.loss_scales[f"{phase}_state"](state_loss, update)
            action_loss = self.loss_scales[f"{phase}_action"](action_loss, update)
        return BehavioralCloningLosses(state_loss, action_loss)

    # phases

    def train_discovery(self, eval_rest: bool = False, meta_controller: Any = None) -> None:
        """The model is frozen; only what discovery trains of the metacontroller gets a gradient, until ``train``."""
        steering = self._steering(meta_controller)
        trains_only(self, list(steering.parameters()))
        if eval_rest:
            self.eval()
        steering.train_discovery()

    def train_internal_rl(self, eval_rest: bool = False, meta_controller: Any = None) -> None:
        """The model is frozen, and of the metacontroller only the policy gets a gradient, until ``train``."""
        steering = self._steering(meta_controller)
        trains_only(self, list(steering.parameters()))
        if eval_rest:
            self.eval()
        steering.train_internal_rl(eval_rest)

    def _ensure_consistent_device(self, network: Any) -> None:
        """Moves a metacontroller to the model's device, where it lies on another one."""
        device = self.norm.weight.device
        if isinstance(network, nn.Module) and next(network.parameters()).device != device:
            network.to(device)

    def _steering(self, meta_controller: Any = None) -> Any:
        steering = self.meta_controller if meta_controller is None else meta_controller
        if steering is None:
            raise UserError("meta_controller is missing; give one, here or to the model.")
        return steering

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

    def _running(self, name: str) -> Tensor | None:
        scale = self._normalizer(name)
        return None if scale is None else scale.scale

    state_embed = other_name("encoder")
    dynamics_model = other_name("next_latent")
    next_latent_prediction_action_embed = other_name("next_latent_action")

    @property
    def action_embed(self) -> Any:
        """What embeds past actions, None where they are not read."""
        return self.action_readout.embed if self.condition_on_actions else None

    @property
    def has_next_latent_loss(self) -> bool:
        return self.next_latent_loss_weight > 0

    def _normalizer(self, name: str) -> Any:
        return self.loss_scales[name] if self.normalize_state_action_losses else None

    bc_state_loss_normalizer = property(lambda self: self._normalizer("bc_state"))
    bc_action_loss_normalizer = property(lambda self: self._normalizer("bc_action"))
    discovery_state_loss_normalizer = property(lambda self: self._normalizer("discovery_state"))
    discovery_action_loss_normalizer = property(lambda self: self._normalizer("discovery_action"))
    running_bc_state_loss = property(lambda self: self._running("bc_state"))
    running_bc_action_loss = property(lambda self: self._running("bc_action"))
    running_discovery_state_loss = property(lambda self: self._running("discovery_state"))
    running_discovery_action_loss = property(lambda self: self._running("discovery_action"))


def states_as_entries(options: dict[str, Any]) -> dict[str, Any]:
    """A single choice as a list of one, as the house's encoder of choices takes it."""
    number = options.get("num_discrete")
    return {**options, "num_discrete": [number]} if isinstance(number, int) else options


def joined_states(state: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """States as one tensor (b, t, ...): a single choice (b, t) as (b, t, 1), choices and numbers side by side."""
    if not isinstance(state, Tensor):
        chosen, numbers = joined_states(state[0]), state[1]
        return torch.cat([chosen.to(numbers.dtype), numbers], -1)
    return state[..., None] if state.dim() == 2 and not state.is_floating_point() else state


def clamped_lengths(lengths: Tensor | None, steps: int) -> Tensor | None:
    """Lengths of at most ``steps``, with a warning where they were longer."""
    if lengths is None or int(lengths.max()) <= steps:
        return lengths
    warnings.warn(f"episode_lens hold {int(lengths.max())}, beyond the {steps} steps given; clamped.", stacklevel=3)
    return lengths.clamp_max(steps)
