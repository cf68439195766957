"""Internal reinforcement learning: find abstract actions inside a frozen sequence model, and learn over them.

The public names are imported when they are first asked for, so that the package itself does not wait for PyTorch.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metacontroller.control.metacontroller import MetaController
    from metacontroller.models.transformer import Transformer
    from metacontroller.phases.internal_env import InternalEnv
    from metacontroller.phases.internal_vector_env import InternalVectorEnv

__all__ = ["InternalEnv", "InternalVectorEnv", "MetaController", "Transformer", "__version__"]

_MODULES = {
    "InternalEnv": "phases.internal_env",
    "InternalVectorEnv": "phases.internal_vector_env",
    "MetaController": "control.metacontroller",
    "Transformer": "models.transformer",
}


def _installed_version() -> str:
    try:
        return metadata.version("metacontroller-rl")
    except metadata.PackageNotFoundError:
        return "0+unknown"  # read from its folder, without having been installed


__version__ = _installed_version()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
