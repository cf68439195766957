"""Internal reinforcement learning: find abstract actions inside a frozen sequence model, and learn over them.

The public names are imported when they are first asked for, so that the package itself does not wait for PyTorch.
"""

from __future__ import annotations

from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metacontroller.control.metacontroller import MetaController
    from metacontroller.environments.internal_env import InternalEnv
    from metacontroller.environments.internal_vector_env import InternalVectorEnv
    from metacontroller.models.transformer import Transformer

__path__.append(str(Path(__file__).with_name("compat")))  # modules of the names of another library, see compat/

__all__ = ["InternalEnv", "InternalVectorEnv", "MetaController", "Transformer", "__version__"]

_MODULES = {
    "ActionProposerWrapper": "metacontroller",
    "InternalEnv": "environments.internal_env",
    "InternalVectorEnv": "environments.internal_vector_env",
    "MetaController": "control.metacontroller",
    "MetaControllerWithBinaryMapper": "metacontroller_with_binary_mapper",
    "binary_entropy": "metacontroller",
    "Transformer": "models.transformer",
    "TransformerForSymbolicGrid": "transformer_for_symbolic_grid",
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
