"""The script that measures variants on the grid, at a size at which nothing is learned."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from helpers import load_script, untrained_run
from metacontroller.control.metacontroller import MetaController
from metacontroller.domains.registry import domain_of
from metacontroller.presets import preset
from metacontroller.recipes.run_phase import post_training
from metacontroller.storage.run_folder import RunFolder

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "variants_grid.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    module = load_script(SCRIPT)
    vars(module)["EVALUATED"] = 32
    return module


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """What the script reads of a reproduced seed, with models that were not trained."""
    return untrained_run(tmp_path_factory.mktemp("seed-0"))


def test_the_papers_loss_on_the_path_of_variants_is_internal_rl(
    script: ModuleType, source: RunFolder, tmp_path: Path
) -> None:
    config = preset("debug")
    ended = []
    for name, variant in (("paper", script.Variant()), ("same", script.Variant(surrogate=script.clipped(0.2)))):
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        model = script.base_model(variant, config, source, run)
        steering = script.steering(variant, config, model, source, run)
        before = [value.clone() for value in steering.policy.parameters()]
        reset = post_training(domain_of(config.domain))
        after: MetaController = script.reinforced(variant, config.internal_rl, model, steering, reset, run)
        assert not all(map(torch.equal, before, after.policy.parameters()))
        ended.append(list(after.policy.parameters()))
    assert all(map(torch.equal, *ended))


@pytest.mark.slow
def test_every_variant_has_a_row(script: ModuleType, source: RunFolder, tmp_path: Path) -> None:
    rows = [script.measured(name, source, tmp_path, "0-1", 16) for name in script.VARIANTS]
    figures = {"variant", "gate_recall", "gate_precision", "code_subgoal_bits", "prior", "internal_rl"}
    assert all(figures <= row.keys() for row in rows)
    assert script.measured("paper", source, tmp_path, "0-1", 16) == rows[0]  # read, not run again
