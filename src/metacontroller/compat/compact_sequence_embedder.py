"""`CompactSequenceEmbedder`: the last state of a GRU at each episode's end, repeated."""

from __future__ import annotations

from typing import Any

from metacontroller.variants.sequence_embedders import LastState

from .compat_names import OtherNames


class CompactSequenceEmbedder(OtherNames, LastState):
    """A GRU's last state at each episode's end, repeated; options: of the GRU."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        self.remember_arguments(locals())
