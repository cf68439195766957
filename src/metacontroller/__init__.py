"""Internal reinforcement learning: find abstract actions inside a frozen sequence model, and learn over them."""

from metacontroller.control.metacontroller import MetaController
from metacontroller.models.transformer import Transformer

__all__ = ["MetaController", "Transformer"]
