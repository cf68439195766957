"""The names of the package `metacontroller-pytorch` 0.3.3 over this one: its keywords, arguments and records.

Nothing is computed here. What a name stands for lies in `control` and `models`; where the two differ, and why, is told
by docs/from-metacontroller-pytorch.md. The module is importable as ``metacontroller.metacontroller``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor, nn

from metacontroller.control.metacontroller import MetaController as HouseMetaController
from metacontroller.control.sequence_embedder import LastState, ModuleEmbedder, SequenceEmbedder
from metacontroller.control.stepping import SteeringOutput as MetaControllerOutput
from metacontroller.control.switching import regular_switches
from metacontroller.ranges import check_options
from metacontroller.variants.proposers import (
    BodyProposer,
    GruProposer,
    MinGruProposer,
    MlpProposer,
    ModuleProposer,
    StepwisePolicy,
    make_proposer,
)
from metacontroller.variants.schedules import LossWeights

from . import compat_losses as losses
from .compat_losses import (
    GRPOOutput,
    binary_entropy,
    extract_grpo_data,
    policy_loss,
    ratio_loss,
    tpo_loss,
    tpo_target,
    z_score,
)
from .compat_names import TheirSave, TheirTraining, other_name
from .compat_parts import (
    ActionProposerWrapper,
    BidirectionalSequenceEmbedder,
    CausalSequenceEmbedder,
    LossNormalizer,
    ResidualDynamics,
)
from .compat_transformer import (
    BehavioralCloningLosses,
    DiscoveryLosses,
    Hiddens,
    Transformer,
    TransformerOutput,
    body_options,
)
from .sequential_action_selection import SequentialActionSelectionOutput, perform_sequential_action_selection

SequentialSelectionOutput = SequentialActionSelectionOutput

__all__ = [
    "ActionProposerWrapper",
    "BehavioralCloningLosses",
    "BidirectionalSequenceEmbedder",
    "CausalSequenceEmbedder",
    "DiscoveryLosses",
    "GRPOOutput",
    "Hiddens",
    "LossNormalizer",
    "MetaController",
    "MetaControllerOutput",
    "ResidualDynamics",
    "SequentialActionSelectionOutput",
    "SequentialSelectionOutput",
    "Transformer",
    "TransformerOutput",
    "binary_entropy",
    "extract_grpo_data",
    "perform_sequential_action_selection",
    "policy_loss",
    "ratio_loss",
    "tpo_loss",
    "tpo_target",
    "z_score",
]

LATER = {
    "MetaControllerWithBinaryMapper": "metacontroller_with_binary_mapper",
    "TransformerForSymbolicGrid": "transformer_for_symbolic_grid",
}
"""What their package offers beside these, by its module, which needs this one."""


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__package__}.{LATER[name]}"), name)


HOUSE_PROPOSERS = (ModuleProposer, BodyProposer, GruProposer, MinGruProposer, MlpProposer)
EMBEDDER_GIVEN = ("dim_model", "dim_sequence", "dim")
ATTENTION = {"depth": 2, "heads": 8, "attn_dim_head": 32}


class MetaController(TheirSave, TheirTraining, HouseMetaController):
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
        self.compact_sequence_embedding = compact_sequence_embedding
        embedder: Any = ATTENTION if internal_sequence_embedder is None else internal_sequence_embedder
        if compact_sequence_embedding:
            embedder = LastState(dim_model)
        if isinstance(embedder, dict):
            options = {"kind": "attention", **body_options(embedder, dim_model), "pooled": pool_embedded_sequence}
            if options["kind"] == "attention" and not bidirectional:
                options |= {"kind": "causal-attention", "pooled": False}
            check_options("internal_sequence_embedder", options, SequenceEmbedder, given=EMBEDDER_GIVEN)
            self.sequence_embedder = SequenceEmbedder(dim_model, dim_sequence_summary_embed, dim=dim_model, **options)
        else:
            self.sequence_embedder = ModuleEmbedder(embedder, dim_model, dim_sequence_summary_embed)
        proposer: Any = ATTENTION if action_proposer is None else action_proposer
        if isinstance(proposer, dict):
            proposer = make_proposer(dim_model, **body_options(proposer, dim_model))
        self.policy = StepwisePolicy(as_proposer(proposer), dim_model, self.codes.params)
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
        """Modules that the other library lets one replace, under its names, and the weight that has a schedule."""
        if name == "internal_sequence_embedder":
            self.sequence_embedder = ModuleEmbedder(
                value, self.dim_model, self.sequence_embedder.project_out.out_features
            )
        elif name == "emitter":
            self.encoder = nn.Sequential(value, nn.Identity(), self.encoder[-1])
        elif name == "action_proposer":
            self.policy.proposer = as_proposer(value)
        elif name == "ratio_loss_weight" and self.__dict__.get("ratio_loss_weight") is not None:
            self.loss_weights.ratio_start = self.__dict__["ratio_loss_weight"] = value  # pyright: ignore[reportOptionalMemberAccess]
        else:
            super().__setattr__(name, value)

    @property
    def internal_sequence_embedder(self) -> nn.Module:
        return self.sequence_embedder.body

    @property
    def emitter(self) -> nn.Module:
        return self.encoder[:-1] if isinstance(self.encoder[1], nn.ReLU) else self.encoder[0]

    @property
    def has_ratio_loss(self) -> bool:
        return self.ratio_loss_weight > 0

    # parts and options under the other library's names

    action_proposer = other_name("policy.proposer")
    action_proposer_mean_log_var = other_name("policy.readout")
    decoder = other_name("controller")
    switching_unit = other_name("switching")
    summary_gru = other_name("history")
    to_sequence_summary_embed = other_name("sequence_embedder.project_out")
    target_temporal_segment_len = other_name("target_segment_length")
    ratio_loss_chunk_size = other_name("ratio_chunk")
    hard_switch_straight_through = other_name("straight_through")
    latent_action_barrier_scale = other_name("code_bound")
    kl_loss_weight = other_name("loss_weights.kl")
    kl_loss_warmup_steps = other_name("loss_weights.kl_warmup")
    kl_loss_step_count = other_name("loss_weights.count")
    apply_kl_loss_weight = other_name("loss_weights.apply_kl")
    current_kl_loss_weight = other_name("loss_weights.current_kl")
    current_ratio_loss_weight = other_name("loss_weights.current_ratio")
    ratio_loss_final_weight = other_name("loss_weights.ratio_final")
    ratio_loss_warmdown_steps = other_name("loss_weights.ratio_warmdown")

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
        distribution, _ = self.policy(self.own(residual_stream))
        return (distribution, self.calculate_kl_loss(distribution)) if return_kl_loss else distribution

    def calculate_kl_loss(self, action_dist: Tensor) -> Tensor:
        """KL to the prior: of Gaussian codes by entry, of binary ones as a whole, beyond the free bits."""
        return self.codes.kl_entries(action_dist) if self.codes.kind == "gaussian" else self.codes.kl(action_dist)

    def log_prob(self, action_dist: Tensor, sampled_latent_action: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Log-probability of each entry of the codes, (b, t, entries)."""
        return super().log_prob(action_dist, sampled_latent_action)

    policy_loss = losses.policy_loss  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride] - theirs
    ratio_loss = losses.ratio_loss

    def maybe_increment_kl_loss_step(self) -> None:
        """Counts an update, for weights that change with their number."""
        self.loss_weights.step()  # pyright: ignore[reportOptionalMemberAccess] - set in __init__

    def reset_kl_loss_warmup(self) -> None:
        """Begins the count again."""
        self.loss_weights.reset()  # pyright: ignore[reportOptionalMemberAccess]


def as_proposer(module: nn.Module) -> nn.Module:
    """A module as a proposer of the house: one that is one as it is, others as they take a cache, a GRU its state."""
    if isinstance(module, HOUSE_PROPOSERS):
        return module
    return ModuleProposer(module, "hx" if isinstance(module, nn.GRU) else "cache")
