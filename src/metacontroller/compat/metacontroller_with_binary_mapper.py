"""`MetaControllerWithBinaryMapper`: the metacontroller with binary codes, under the other library's keywords."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from metacontroller.control.codes import BinaryCodes

from .compat_names import other_names
from .metacontroller import (
    ActionProposerWrapper,
    BidirectionalSequenceEmbedder,
    CausalSequenceEmbedder,
    MetaController,
    MetaControllerOutput,
    policy_loss,
    ratio_loss,
)

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

    def sample(self, distribution: Tensor, generator: torch.Generator | None = None, **options: Any) -> Tensor:
        """As of `BinaryCodes`; without a generator or noise it is a call of the module."""
        if generator is None and options.get("noise") is None:
            return self(distribution, temperature=options.get("temperature", 1.0))[0]
        return super().sample(distribution, generator, **options)

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


@other_names({"binary_mapper": "codes"})
class MetaControllerWithBinaryMapper(MetaController):
    """dim_code_bits: of a code. kl_loss_threshold: nats of the KL that cost nothing, the free bits times log 2.
    options: of `MetaController`."""

    def __init__(
        self,
        dim_model: int,
        *,
        dim_code_bits: int = 4,
        kl_loss_threshold: float = 0.0,
        switch_temperature: float = 0.1,
        **options: Any,
    ) -> None:
        given = dict(locals())
        codes = {"dim_latent": dim_code_bits, "code": "binary", "free_bits": kl_loss_threshold / LOG_TWO}
        super().__init__(dim_model, switch_temperature=switch_temperature, **codes, **options)
        self.remember_arguments(given)
        self.codes = BinaryMapper(dim_code_bits, kl_loss_threshold)
        self.dim_code_bits, self.num_codes = dim_code_bits, self.codes.dim
