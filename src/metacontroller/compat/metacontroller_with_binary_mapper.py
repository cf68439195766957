"""`MetaControllerWithBinaryMapper`: the metacontroller with binary codes, under the other library's keywords."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from metacontroller.control.codes import BinaryCodes

from .metacontroller import (
    ActionProposerWrapper,
    BidirectionalSequenceEmbedder,
    CausalSequenceEmbedder,
    MetaController,
    MetaControllerOutput,
    policy_loss,
    ratio_loss,
)

__all__ = [
    "ActionProposerWrapper",
    "BidirectionalSequenceEmbedder",
    "BinaryMapper",
    "CausalSequenceEmbedder",
    "MetaControllerOutput",
    "MetaControllerWithBinaryMapper",
    "policy_loss",
    "ratio_loss",
]

LOG_TWO = math.log(2)


class BinaryMapper(BinaryCodes):
    """Binary codes as a module call, which ``sample`` goes through, so that replacing it changes what is sampled.

    kl_loss_threshold: nats of the KL that cost nothing. deterministic_on_eval: whether evaluation takes the likeliest
    code.
    """

    def __init__(self, bits: int = 1, kl_loss_threshold: float = LOG_TWO, deterministic_on_eval: bool = False) -> None:
        super().__init__(bits, free_bits=kl_loss_threshold / LOG_TWO)
        self.bits, self.num_codes = bits, self.dim
        self.kl_loss_threshold, self.deterministic_on_eval = kl_loss_threshold, deterministic_on_eval

    @property
    def codes(self) -> Tensor:
        """The bits of each word, (2^h, h) bool."""
        return self.words.bool()

    def sample(
        self,
        distribution: Tensor,
        generator: torch.Generator | None = None,
        *,
        noise: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """As of `BinaryCodes`; without a generator or noise it is a call of the module."""
        if generator is None and noise is None:
            return self(distribution, temperature=temperature)[0]
        return super().sample(distribution, generator, noise=noise, temperature=temperature)

    def forward(
        self,
        logits: Tensor,
        temperature: float = 1.0,
        straight_through: bool | None = None,
        calc_aux_loss: bool | None = None,
        deterministic: bool | None = None,
        return_indices: bool = False,
        reduce_aux_kl_loss: bool = True,
    ) -> tuple[Tensor, ...]:
        """One-hot codes (..., 2^h) of logits (..., h), their KL beyond the threshold, and if asked their indices.

        straight_through: whether codes have a gradient, as they do by default. calc_aux_loss: false for a KL of 0.
        """
        likeliest = self.deterministic_on_eval and not self.training if deterministic is None else deterministic
        with torch.set_grad_enabled(torch.is_grad_enabled() and straight_through is not False):
            code = super().sample(logits, temperature=0.0 if likeliest else temperature)
        kl = self.kl(logits) if calc_aux_loss is not False else logits.new_zeros(logits.shape[:-1])
        kl = kl.mean() if reduce_aux_kl_loss else kl
        return (code, kl, code.argmax(-1)) if return_indices else (code, kl)


class MetaControllerWithBinaryMapper(MetaController):
    """dim_code_bits: of a code. kl_loss_threshold: nats of the KL that cost nothing, the free bits times log 2."""

    def __init__(
        self,
        dim_model: int,
        *,
        dim_meta_controller: int | None = 256,
        dim_code_bits: int = 4,
        decoder_expansion_factor: float = 2.0,
        decoder_depth: int = 1,
        hypernetwork_low_rank: int = 16,
        assoc_scan_kwargs: dict[str, Any] | None = None,
        internal_sequence_embedder: nn.Module | dict[str, Any] | None = None,
        bidirectional: bool = True,
        action_proposer: nn.Module | dict[str, Any] | None = None,
        kl_loss_threshold: float = 0.0,
        switch_temperature: float = 0.1,
        target_temporal_segment_len: float = 4,
        ratio_loss_weight: float = 1.0,
        pool_embedded_sequence: bool = True,
        dim_sequence_summary_embed: int = 32,
        hard_switch: bool | None = None,
        hard_switch_straight_through: bool = False,
        kl_loss_weight: float = 1.0,
        kl_loss_warmup_steps: int = 0,
        apply_kl_loss_weight: bool = True,
        ratio_loss_chunk_size: int | None = None,
        ratio_loss_final_weight: float | None = None,
        ratio_loss_warmdown_steps: int = 0,
        compact_sequence_embedding: bool = False,
        latent_action_barrier_scale: float | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        shared = {name: given[name] for name in given.keys() - {"dim_code_bits", "kl_loss_threshold"}}
        free_bits = kl_loss_threshold / LOG_TWO
        super().__init__(**shared, dim_latent=dim_code_bits, code="binary", free_bits=free_bits)
        self.remember_arguments(given)
        self.codes = BinaryMapper(dim_code_bits, kl_loss_threshold)
        self.dim_code_bits, self.num_codes = dim_code_bits, self.codes.dim

    @property
    def binary_mapper(self) -> BinaryMapper:
        return self.codes  # pyright: ignore[reportReturnType] - of this class, see __init__
