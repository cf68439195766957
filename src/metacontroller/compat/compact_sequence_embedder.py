"""`CompactSequenceEmbedder`: the last state of a GRU at each episode's end, repeated."""

from metacontroller.control.sequence_embedder import LastState as CompactSequenceEmbedder

__all__ = ["CompactSequenceEmbedder"]
