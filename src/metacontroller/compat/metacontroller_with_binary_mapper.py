"""`MetaControllerWithBinaryMapper`: the metacontroller with binary codes, under the other library's keywords."""

from __future__ import annotations

import math
from typing import Any

from .metacontroller import MetaController

__all__ = ["MetaControllerWithBinaryMapper"]

LOG_TWO = math.log(2)


class MetaControllerWithBinaryMapper(MetaController):
    """dim_code_bits: of a code. kl_loss_threshold: nats of the KL that cost nothing, the free bits times log 2."""

    def __init__(
        self,
        dim_model: int,
        *,
        dim_code_bits: int = 4,
        kl_loss_threshold: float = 0.0,
        switch_temperature: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(
            dim_model,
            dim_latent=dim_code_bits,
            code="binary",
            free_bits=kl_loss_threshold / LOG_TWO,
            switch_temperature=switch_temperature,
            **options,
        )
        own = {"dim_code_bits": dim_code_bits, "kl_loss_threshold": kl_loss_threshold}
        self.remember_arguments({"dim_model": dim_model, **own, "switch_temperature": switch_temperature, **options})
        self.dim_code_bits, self.num_codes = dim_code_bits, self.codes.dim
