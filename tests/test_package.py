from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

import metacontroller
from metacontroller.control.metacontroller import MetaController
from metacontroller.environments.internal_env import InternalEnv
from metacontroller.models.transformer import Transformer


def test_the_public_names_are_those_of_their_modules() -> None:
    public = [getattr(metacontroller, name) for name in ("InternalEnv", "MetaController", "Transformer")]
    assert public == [InternalEnv, MetaController, Transformer]
    assert {"InternalEnv", "MetaController", "Transformer", "__version__"} <= set(dir(metacontroller))
    with pytest.raises(AttributeError, match="no attribute 'Metacontroller'"):
        _ = metacontroller.Metacontroller


def test_the_package_waits_for_torch_until_a_name_is_asked_for() -> None:
    script = """
import sys, metacontroller
assert "torch" not in sys.modules
from metacontroller import Transformer
assert "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_version_is_the_installed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert metacontroller.__version__ == metadata.version("metacontroller-rl")

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert metacontroller._installed_version() == "0+unknown"
