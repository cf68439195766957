"""Internal reinforcement learning: find abstract actions inside a frozen sequence model, and learn over them."""

from metacontroller.control.metacontroller import MetaController
from metacontroller.envs.internal_env import InternalEnv
from metacontroller.models.transformer import Transformer

__all__ = ["InternalEnv", "MetaController", "Transformer"]
