"""`TransformerForSymbolicGrid`: the action model over grids of cells with type, color and state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metacontroller.errors import UserError

from .compat_transformer import Transformer

__all__ = ["TransformerForSymbolicGrid"]


class TransformerForSymbolicGrid(Transformer):
    """States (b, t, side, side, channels) int64; see `models.grid_encoder`."""

    def __init__(
        self,
        dim: int,
        num_discrete: Sequence[int] = (11, 6, 3),
        grid_size: int = 7,
        spatial_processor_depth: int = 4,
        convnext_kernel_size: int = 3,
        **options: Any,
    ) -> None:
        if "state_embed_readout" in options:
            raise UserError("state_embed_readout is given; leave it out: num_discrete and grid_size say what is read.")
        grid = {"sizes": list(num_discrete), "side": grid_size}
        depth = {"depth": spatial_processor_depth, "kernel": convnext_kernel_size}
        super().__init__(dim, state_embed_readout={"symbolic_grid": grid | depth}, **options)
        own = {"num_discrete": list(num_discrete), "grid_size": grid_size}
        own |= {"spatial_processor_depth": spatial_processor_depth, "convnext_kernel_size": convnext_kernel_size}
        options.pop("meta_controller", None)
        self.remember_arguments({"dim": dim, **own, **options})
