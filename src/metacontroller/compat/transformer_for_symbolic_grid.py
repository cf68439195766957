"""`TransformerForSymbolicGrid`: the action model over grids of cells with type, color and state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metacontroller.errors import UserError

from .compat_transformer import Transformer


class TransformerForSymbolicGrid(Transformer):
    """States (b, t, side, side, channels) int64; see `models.encoders`. options: of `Transformer`."""

    def __init__(
        self,
        dim: int,
        num_discrete: Sequence[int] = (11, 6, 3),
        grid_size: int = 7,
        spatial_processor_depth: int = 4,
        convnext_kernel_size: int = 3,
        **options: Any,
    ) -> None:
        given = dict(locals())
        if "state_embed_readout" in options:
            raise UserError("state_embed_readout is given; leave it out: num_discrete and grid_size say what is read.")
        sizes = {"sizes": list(num_discrete), "side": grid_size}
        network = {"depth": spatial_processor_depth, "kernel": convnext_kernel_size}
        super().__init__(dim, state_embed_readout={"symbolic_grid": sizes | network}, **options)
        self.remember_arguments(given)
