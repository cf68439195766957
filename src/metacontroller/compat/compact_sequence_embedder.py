"""`CompactSequenceEmbedder`: the last state of a GRU at each episode's end, repeated."""

from .compat_parts import CompactSequenceEmbedder
