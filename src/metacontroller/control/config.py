"""Configuration of a metacontroller."""

from __future__ import annotations

from dataclasses import dataclass, field

from metacontroller.control.codes import CodeKind, make_codes
from metacontroller.control.policy import PolicyKind
from metacontroller.control.sequence_embedder import EmbedderKind
from metacontroller.control.switching import GateConfig
from metacontroller.errors import UserError
from metacontroller.models.precision import Precision
from metacontroller.ranges import Depth, NotNegative, Positive, Width, WidthOr0, check_fields


@dataclass(frozen=True, kw_only=True)
class MetaControllerConfig:
    """The metacontroller; widths are numbers of units. UserError for values out of range."""

    dim_latent: Width = 8
    """n_z, dimension of a Gaussian code; number of bits of a binary one."""
    code: CodeKind = "gaussian"
    """Codes: "gaussian", the paper's; "binary": one of 2^dim_latent words (Free Transformer)."""
    free_bits: NotNegative = 0.0
    """Bits a step of a binary code that cost no KL."""
    dim_history: Width = 32
    """n_h, width of the history GRU (eq. 12)."""
    dim_sequence: Width = 32
    """n_s, width of the sequence embedding (eq. 13)."""
    encoder_hidden: Width = 64
    """Hidden width of the encoder that proposes codes (eq. 15)."""
    decoder_hidden: WidthOr0 = 32
    """Hidden width of the hypernetwork that makes U from a code (eq. 18); 0: U is linear in the code."""
    switch_hidden: Width = 32
    """Hidden width of the switching unit (eq. 16)."""
    embedder_dim: Width = 64
    """Inner width of the sequence embedder, a multiple of 4."""
    embedder_depth: Depth = 1
    """Blocks of the sequence embedder."""
    embedder_kind: EmbedderKind = "attention"
    """Blocks of the sequence embedder: "hawk" is the paper's SSM."""
    rank: Width | None = 16
    """r, rank of the controller U; None for full."""
    policy_hidden: Width = 256
    """Width of the policy over codes; a multiple of 8 for hawk."""
    policy_kind: PolicyKind = "gru"
    """Recurrence of the policy over codes: "hawk" is the paper's SSM."""
    policy_std: Positive = 1.0
    """Standard deviation of the policy's codes before it learns; 1 is that of the prior. For Gaussian codes."""
    action_temperature: NotNegative = 1.0
    """Of the frozen model's actions while codes steer it in a world; 1 samples them, 0 takes the likeliest (of a
    mixture, the mean of the likeliest mode)."""
    gate: GateConfig = field(default_factory=GateConfig)
    """How the switching gate is used."""
    precision: Precision = "auto"
    """Of the matrix products in sequence embedder and controller; auto: bfloat16 where the device is faster in it."""

    def __post_init__(self) -> None:
        check_fields(self)
        make_codes(self.code, self.dim_latent, self.free_bits).start(self.policy_std)
        if self.policy_kind == "hawk" and self.policy_hidden % 8:
            raise UserError(f"policy_hidden is {self.policy_hidden}; expected a multiple of 8, the gates' heads.")
        if self.embedder_dim % 4:
            raise UserError(f"embedder_dim is {self.embedder_dim}; expected a multiple of 4, its heads.")
