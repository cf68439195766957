"""Evolution of the policy over codes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import Positional

from metacontroller.commands.options import Tracked, device_name
from metacontroller.errors import UserError
from metacontroller.phases.evolution import PHASE, EvolutionConfig
from metacontroller.recipes.config import read_config
from metacontroller.recipes.run_phase import run_evolution
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import processes


@dataclass(kw_only=True)
class Evolve(Tracked):
    """Phase 3 without gradients: evolve the policy over the abstract actions of RUN."""

    run: Positional[Path]
    """Folder of a run with discovered abstract actions."""
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)
    """How the policy evolves; give the same when you resume."""

    def __call__(self) -> None:
        run = RunFolder(self.run)
        if self.evolution.seed != EvolutionConfig.seed:
            raise UserError("the seed of evolution derives from the run's; leave out --evolution.seed.")
        config, device = read_config(run), device_name(self.device)
        run.refuse_begun(PHASE, resume=self.resume)
        tracked = self.tracked(run, processes(device))
        with run.locked():
            run_evolution(config, self.evolution, tracked, resume=self.resume, quiet=self.quiet, device=device)
