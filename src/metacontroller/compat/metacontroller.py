"""The names of the package `metacontroller-pytorch` 0.3.3 over this one: its keywords, arguments and records.

Nothing is computed here. What a name stands for lies in `control`, `models` and `variants`; where the two differ, and
why, is told by docs/from-metacontroller-pytorch.md. The module is importable as ``metacontroller.metacontroller``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from metacontroller.control import losses as our_losses
from metacontroller.control.losses import binary_entropy
from metacontroller.control.losses import cross_entropy as tpo_loss
from metacontroller.control.metacontroller import MetaController as OurMetaController
from metacontroller.control.metacontroller import MetaControllerOutput
from metacontroller.control.policy_losses import policy_losses
from metacontroller.control.sequence_embedder import SequenceEmbedder
from metacontroller.control.switching import regular_switches
from metacontroller.data.trajectories import full_lengths, length_mask
from metacontroller.ranges import check_options
from metacontroller.variants.latent_prediction import NextLatent
from metacontroller.variants.loss_weights import LossScale, LossWeights
from metacontroller.variants.proposers import ModuleProposer, StepwisePolicy, as_proposer, make_proposer
from metacontroller.variants.sequence_embedders import LastState, ModuleEmbedder, PooledBody

from .compat_names import OtherNames, body_options, on_device_of, other_names
from .compat_transformer import BehavioralCloningLosses, DiscoveryLosses, Hiddens, Transformer, TransformerOutput
from .sequential_action_selection import SequentialActionSelectionOutput, perform_sequential_action_selection
from .transformer_for_symbolic_grid import TransformerForSymbolicGrid

SequentialSelectionOutput = SequentialActionSelectionOutput
ATTENTION = {"depth": 2, "heads": 8, "attn_dim_head": 32}
CALL_OPTIONS = {
    "switch_temperature": "switch_temperature",
    "hard_switch": "hard_switch",
    "hard_switch_straight_through": "straight_through",
    "latent_action_barrier_scale": "code_bound",
    "ratio_loss_chunk_size": "ratio_chunk",
}
"""Keywords and attributes that say how a call steers: theirs, and our attributes."""
LOSS_WEIGHTS = {
    "kl_loss_weight": "kl",
    "kl_loss_warmup_steps": "kl_warmup",
    "apply_kl_loss_weight": "apply_kl",
    "ratio_loss_final_weight": "ratio_final",
    "ratio_loss_warmdown_steps": "ratio_warmdown",
}
"""Those of the weights of losses: theirs, and of `LossWeights`."""
PARTS = {
    "action_proposer_mean_log_var": "policy.readout",
    "decoder": "controller",
    "switching_unit": "switching",
    "summary_gru": "history",
    "to_sequence_summary_embed": "sequence_embedder.project_out",
    "target_temporal_segment_len": "target_segment_length",
    "kl_loss_step_count": "loss_weights.count",
    "current_kl_loss_weight": "loss_weights.current_kl",
    "current_ratio_loss_weight": "loss_weights.current_ratio",
}
"""Other attributes: theirs to ours."""


def __getattr__(name: str) -> Any:
    if name != "MetaControllerWithBinaryMapper":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .metacontroller_with_binary_mapper import MetaControllerWithBinaryMapper  # which needs this module

    return MetaControllerWithBinaryMapper


class GRPOOutput(NamedTuple):
    """What internal RL stores of a step: (b, 1, n_e), (b, 1, n_z), (b, 1, entries), (b, 1)."""

    state: Tensor
    action: Tensor
    log_prob: Tensor
    switch_beta: Tensor


def policy_loss(
    meta_controller: OurMetaController,
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
    """The policy's loss on stored episodes, and if asked for the weighted KL; see our ``policy_losses``.

    mask (b, t) or (b, t, 1): switches, every step if None. switch_beta_frequency: switches at regular steps instead.
    """
    batch, steps = state.shape[:2]
    if switch_beta_frequency is not None:
        mask = regular_switches(batch, steps, switch_beta_frequency)
    advantages = advantages.flatten() if advantages.numel() == batch else advantages.view(batch, steps)
    mask = mask[..., 0] if mask is not None and mask.dim() == 3 else mask
    losses = policy_losses(
        meta_controller,
        *on_device_of(meta_controller, state, old_log_probs, actions, advantages, mask, episode_lens),
        eps_clip=eps_clip,
        objective="target" if use_tpo else "clipped",
        eta=tpo_eta,
        group=tpo_group_size,
        per_entry=per_entry,
    )
    return (losses.surrogate, losses.kl * kl_loss_weight) if return_kl_loss else losses.surrogate


def ratio_loss(
    meta_controller: OurMetaController,
    target_segment_len: float,
    switch_beta: Tensor,
    hard_switch_beta: Tensor | None = None,
    episode_lens: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """The ratio loss of given switching probabilities (b, t); hard switches are those at 0.5 and above if not given."""
    steps = switch_beta.shape[1]
    lengths = full_lengths(episode_lens, switch_beta)
    beta, hard, lengths = on_device_of(meta_controller, switch_beta, hard_switch_beta, lengths)
    return our_losses.ratio_loss(beta, length_mask(lengths, steps), target_segment_len, chunk=chunk_size, hard=hard)


def extract_grpo_data(meta_controller: Any, transformer_output: Any) -> GRPOOutput:
    """What internal RL stores of the step that left ``transformer_output``."""
    output = transformer_output.prev_hiddens.meta_controller
    log_prob = meta_controller.log_prob(output.action_dist, output.actions)
    return GRPOOutput(output.input_residual_stream, output.actions, log_prob, output.switch_beta)


def tpo_target(log_scores: Tensor, u: Tensor, eta: float = 1.0) -> Tensor:
    """See `control.losses.policy_target`."""
    return our_losses.policy_target(log_scores, u, eta)


def z_score(t: Tensor, dim: int | None = None, eps: float = 1e-8) -> Tensor:
    """See `control.losses.z_score`."""
    return our_losses.z_score(t, dim, eps)


@other_names(CALL_OPTIONS | PARTS | {theirs: f"loss_weights.{ours}" for theirs, ours in LOSS_WEIGHTS.items()})
class MetaController(OtherNames, OurMetaController):
    """Our metacontroller under the other library's keywords.

    The policy over codes (its action proposer) reads every step. The first positional arguments and defaults are those
    of the other library, but for the gate, whose ratio loss has the weight that is given. options: of our own codes.
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
        **options: Any,
    ) -> None:
        given = dict(locals())
        width = dim_model if dim_meta_controller is None else dim_meta_controller
        size = 2**dim_latent if options.get("code") == "binary" else dim_latent
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
            **options,
        )
        self.remember_arguments(given)
        self.compact_sequence_embedding = compact_sequence_embedding
        self._set_embedder(given)
        proposer = ATTENTION if action_proposer is None else action_proposer
        if isinstance(proposer, dict):
            proposer = make_proposer(dim_model, **body_options(proposer, dim_model))
        self.policy = StepwisePolicy(as_proposer(proposer), dim_model, self.codes.params)
        weights = {ours: given[theirs] for theirs, ours in LOSS_WEIGHTS.items()}
        self.loss_weights = LossWeights(ratio=ratio_loss_weight, **weights)
        for name in CALL_OPTIONS:
            setattr(self, name, given[name])

    def _set_embedder(self, given: dict[str, Any]) -> None:
        """The sequence embedder for the constructor's arguments."""
        dim, dim_sequence = given["dim_model"], given["dim_sequence_summary_embed"]
        embedder = LastState(dim) if given["compact_sequence_embedding"] else given["internal_sequence_embedder"]
        if isinstance(embedder, nn.Module):
            self.sequence_embedder = ModuleEmbedder(embedder, dim, dim_sequence)
            return
        options = {"kind": "attention", **body_options(ATTENTION if embedder is None else embedder, dim)}
        options["pooled"] = given["pool_embedded_sequence"]
        if options["kind"] == "attention" and not given["bidirectional"]:
            options |= {"kind": "causal-attention", "pooled": False}
        widths = ("dim_model", "dim_sequence", "dim")
        check_options("internal_sequence_embedder", options, SequenceEmbedder, given=widths)
        self.sequence_embedder = SequenceEmbedder(dim, dim_sequence, dim=dim, **options)

    # parts that may be replaced

    @property
    def internal_sequence_embedder(self) -> nn.Module:
        return self.sequence_embedder.body

    @internal_sequence_embedder.setter
    def internal_sequence_embedder(self, module: nn.Module) -> None:
        dim_sequence = self.sequence_embedder.project_out.out_features
        self.sequence_embedder = ModuleEmbedder(module, self.dim_model, dim_sequence)

    @property
    def emitter(self) -> nn.Module:
        return self.encoder[:-1] if isinstance(self.encoder[1], nn.ReLU) else self.encoder[0]

    @emitter.setter
    def emitter(self, module: nn.Module) -> None:
        self.encoder = nn.Sequential(module, nn.Identity(), self.encoder[-1])

    @property
    def action_proposer(self) -> nn.Module:
        return self.policy.proposer

    @action_proposer.setter
    def action_proposer(self, module: nn.Module) -> None:
        self.policy.proposer = as_proposer(module)

    @property
    def ratio_loss_weight(self) -> float:
        """Of the ratio loss at first."""
        return self.loss_weights.ratio

    @ratio_loss_weight.setter
    def ratio_loss_weight(self, value: float) -> None:
        if getattr(self, "loss_weights", None) is not None:  # which follow our own constructor
            self.loss_weights.ratio = value

    @property
    def has_ratio_loss(self) -> bool:
        return self.ratio_loss_weight > 0

    def maybe_increment_kl_loss_step(self) -> None:
        """Counts an update, for weights that change with their number."""
        self.loss_weights.step()

    def reset_kl_loss_warmup(self) -> None:
        """Begins the count again."""
        self.loss_weights.reset()

    # internal RL

    policy_loss = policy_loss  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    ratio_loss = ratio_loss

    @property
    def replay_buffer_field_dict(self) -> dict[str, Any]:
        """Fields of a replay buffer for what `extract_grpo_data` returns."""
        return {
            "states": ("float", self.dim_model),
            "log_probs": ("float", self.codes.entries),
            "switch_betas": "float",
            "latent_actions": ("float", self.dim_latent),
        }

    @staticmethod
    def create_regular_switch_beta(
        batch: int, seq_len: int, frequency: int, offset: int = 0, device: Any = None
    ) -> Tensor:
        """See `control.switching.regular_switches`."""
        return regular_switches(batch, seq_len, frequency, offset).to(device)

    def get_action_dist_for_internal_rl(
        self, residual_stream: Tensor, return_kl_loss: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The policy's distributions (b, t, p) along stored residuals, and if asked for their KL entry by entry."""
        distribution, _ = self.policy(self.in_weight_dtype(residual_stream))
        return (distribution, self.calculate_kl_loss(distribution)) if return_kl_loss else distribution

    def calculate_kl_loss(self, action_dist: Tensor) -> Tensor:
        """KL to the prior: of Gaussian codes by entry, of binary ones as a whole, beyond the free bits."""
        return self.codes.kl_entries(action_dist) if self.codes.kind == "gaussian" else self.codes.kl(action_dist)

    def log_prob(self, action_dist: Tensor, sampled_latent_action: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Log-probability of each entry of the codes, (b, t, entries)."""
        return super().log_prob(action_dist, sampled_latent_action)


class ActionProposerWrapper(OtherNames, ModuleProposer):
    """Any module as an action proposer."""

    def __init__(
        self, module: nn.Module, cache_key: str = "cache", return_cache_key: str | None = "return_hiddens"
    ) -> None:
        super().__init__(module, cache_key, return_cache_key)
        self.remember_arguments(locals())

    def forward(self, x: Tensor, cache: Any = None, keep: bool = False) -> tuple[Tensor, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x (b, t, n), after the steps of ``cache`` -> (b, t, n), next cache."""
        return super().forward(x, cache, keep)


class BidirectionalSequenceEmbedder(OtherNames, PooledBody):
    """Two-sided attention, by default its mean over real steps repeated; options: of a body."""

    def __init__(self, dim: int, pool: bool = True, **options: Any) -> None:
        super().__init__(dim, pooled=pool, **body_options(options, dim))
        self.remember_arguments(locals())


class CausalSequenceEmbedder(OtherNames, PooledBody):
    """Causal attention; options: of a body."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, pooled=False, causal=True, **body_options(options, dim))
        self.remember_arguments(locals())

    def forward(self, x: Tensor, mask: Tensor | None = None, **ignored: Any) -> Tensor:
        """x (b, t, n) -> (b, t, n); padding comes last, so that no real step sees it."""
        return super().forward(x)


@other_names({"loss_scale": "scale"})
class LossNormalizer(LossScale):
    """Losses divided by their running root mean squares."""

    def __init__(self, num_losses: int = 1, beta: float = 0.999, eps: float = 1e-6) -> None:
        super().__init__(beta, eps, count=num_losses)

    def forward(self, losses: Tensor, update_ema: bool | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """losses (num_losses,), or a scalar -> the same, scaled. update_ema: by default in training."""
        return super().forward(losses, update_ema)


class ResidualDynamics(nn.Module):
    """The next latent from the next token's embedding and the latent now, in this order."""

    def __init__(
        self, dim: int, cond_dim: int | None = None, hidden_dim: int | None = None, num_layers: int = 3
    ) -> None:
        super().__init__()
        self.net = NextLatent(dim, dim_action=cond_dim, hidden=hidden_dim, layers=num_layers)

    def forward(self, next_token_embeds: Tensor, curr_latent: Tensor) -> Tensor:
        """next_token_embeds (b, t, cond_dim), curr_latent (b, t, n) -> (b, t, n)."""
        return self.net(curr_latent, next_token_embeds)
