"""The three phases, and evolution in place of the third, each on a run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from metacontroller import presets
from metacontroller.commands.options import (
    FromPreset,
    Tracked,
    defaults_of,
    device_name,
    early_option,
    preset_config,
)
from metacontroller.domains.registry import domain_of
from metacontroller.errors import UserError
from metacontroller.phases.artefacts import learned_from
from metacontroller.phases.evolution import PHASE, EvolutionConfig
from metacontroller.recipes.config import (
    ExperimentConfig,
    check_phases,
    open_folder,
    read_config,
    refuse_other_recipe,
    with_seed,
)
from metacontroller.recipes.history import Phase, changed_config, keep_changes
from metacontroller.recipes.run_phase import RUN_PHASE, run_evolution, run_pretrain
from metacontroller.storage.run_folder import RunFolder
from metacontroller.storage.versions import check_versions
from metacontroller.training.distributed import Processes, processes


@dataclass(kw_only=True)
class Pretrain(FromPreset, Tracked):
    """Phase 1: train an action model on experts' episodes; starts the folder RUN."""

    run: Positional[Path]
    """Folder to make, or with --resume to continue in."""
    dataset: str | None = None
    """Learn from data of yours: a folder that `collect` wrote, package.module:function, or the ID of a Minari dataset
    on this machine. The preset is then one for such data unless given."""
    env: str | None = None
    """Gymnasium ID of the environment in which the later phases act, beside --dataset, or data: the one in which that
    was recorded; with --resume alone, given to a run that has none yet."""
    env_kwargs: str | None = None
    """Keywords with which it is made, as JSON, such as '{"is_slippery": false}'."""
    validation_share: float | None = None
    """Share of the episodes of --dataset on which nothing is trained, for validation; 0.1 unless given, 0: none."""
    seed: int | None = None
    """From which all randomness derives."""

    @classmethod
    def defaults(cls, words: Sequence[str]) -> Any:
        """The defaults of all options; without a --preset, a --dataset decides those of --config."""
        preset = early_option(words, "preset")
        if preset is None and early_option(words, "dataset") is not None:
            preset = presets.OWN_DATA
        return defaults_of(cls, config=preset_config(preset))

    def __call__(self) -> None:
        run, device = RunFolder(self.run), device_name(self.device)
        workers = processes(device)
        if self.env_kwargs is not None and self.env is None:
            raise UserError(f"--env-kwargs {self.env_kwargs} stands beside no --env; name the environment.")
        changed = self._changed(run)
        config = self._started(run) if changed is None else changed
        config = config if self.seed is None else with_seed(config, self.seed)
        check_phases(config)  # what a later phase or the data refuse leaves no folder behind
        workers.wait()  # until all have seen what was there before
        with _writing(run, workers):
            if workers.is_main:
                if changed is not None:
                    keep_changes(run, changed, "pretrain")
                open_folder(run, config, "pretrain", resume=self.resume, option="folder")
            workers.wait()
            started_from = read_config(run).seed
            if started_from != config.seed:
                raise UserError(
                    f"{run.path} was started from seed {started_from}, not {config.seed}; leave out --seed to "
                    "resume it, or choose another folder."
                )
            run_pretrain(config, self.tracked(run, workers), resume=self.resume, quiet=self.quiet, device=device)

    def _changed(self, run: RunFolder) -> ExperimentConfig | None:
        """The config of a run that is resumed with its dataset in another place, or with an environment that it lacked;
        None where neither is asked for."""
        if self.resume and self.env is not None and self.dataset is None:
            return self._with_environment(run)
        others = (self.preset, self.env, self.env_kwargs, self.validation_share)
        untouched = others == (None,) * 4 and self.config == preset_config(presets.OWN_DATA)
        if self.resume and self.dataset is not None and untouched and run.within("config.json").exists():
            return moved(run, read_config(run), self.dataset)
        return None

    def _with_environment(self, run: RunFolder) -> ExperimentConfig:
        """UserError if the run acts in another environment already, or if its model cannot read this one."""
        refuse_other_recipe(run, "pretrain")
        config = read_config(run)
        if self.preset is not None or self.config != preset_config():
            raise UserError(f"--env gives {run.path} an environment and changes nothing else; leave out --config.")
        changed = replace(config, domain=self._acting(config.domain)) if _holds_data(config.domain) else None
        if changed is None or (config.domain.env is not None and config != changed):
            raise UserError(f"{run.path} has a world of its own already; choose another folder for --env {self.env}.")
        before, after = (domain_of(one.domain).spec() for one in (config, changed))
        if (before.encoder, before.action) != (after.encoder, after.action):
            raise UserError(
                f"the model in {run.path} has the actions {before.action} and env {self.env!r} {after.action}; "
                "pretrain anew with --dataset and --env, in another folder."
            )
        return changed

    def _started(self, run: RunFolder) -> ExperimentConfig:
        """The config of the preset, with the dataset and the environment asked for."""
        config, domain = self.config, self.config.domain
        if self.dataset is not None:
            if not _holds_data(domain):
                raise UserError(
                    f"--dataset {self.dataset} does not fit the preset, a world with data of its own; leave one."
                )
            share = {} if self.validation_share is None else {"validation_share": self.validation_share}
            config = replace(config, domain=self._acting(replace(domain, dataset=self.dataset, **share)))
        elif self.env is not None or self.validation_share is not None:
            option = f"--validation-share {self.validation_share}" if self.env is None else f"--env {self.env}"
            raise UserError(f"{option} stands beside no dataset; give --dataset ID, which the model learns from.")
        return self.chosen(config, run, resume=self.resume)

    def _acting(self, domain: Any) -> Any:
        """The config of a world with the environment asked for."""
        if self.env == OF_DATA:
            domain = domain_of(domain).acting_where_recorded()  # pyright: ignore[reportAttributeAccessIssue]
        elif self.env is not None:
            domain = replace(domain, env=self.env)
        return domain if self.env_kwargs is None else replace(domain, env_kwargs=self.env_kwargs)


OF_DATA = "data"
"""What --env says for the environment in which the data were recorded."""


def _holds_data(domain: Any) -> bool:
    """Whether the config of a world names a dataset and an environment."""
    return {"dataset", "env", "env_kwargs"} <= {part.name for part in fields(domain)}


def moved(run: RunFolder, config: ExperimentConfig, dataset: str) -> ExperimentConfig:
    """The run's config with its dataset in another place; UserError unless that is what the run learned from."""
    if not _holds_data(config.domain):
        raise UserError(f"{run.path} has a world with data of its own; leave out --dataset {dataset}.")
    changed = replace(config, domain=replace(config.domain, dataset=dataset))
    if changed != config:
        check_versions(run.path, learned_from(run), domain_of(changed.domain).data_versions())
    return changed


@dataclass(kw_only=True)
class LaterPhase(Tracked):
    """A phase of a run that has begun: its own part of the config can be changed until it has begun too."""

    config: ExperimentConfig = field(default_factory=preset_config)
    """Change settings of this phase, from those of RUN; other settings of a run are fixed."""

    @classmethod
    def defaults(cls, words: Sequence[str]) -> Any:
        """The defaults of all options: the config is that of the run among the words."""
        runs = (word for word in words if not word.startswith("-") and Path(word, "config.json").is_file())
        run = next(runs, None)
        return defaults_of(cls, config=preset_config() if run is None else read_config(RunFolder(run)))


@dataclass(kw_only=True)
class Discover(LaterPhase):
    """Phase 2: find abstract actions inside the frozen action model of RUN."""

    run: Positional[Path]
    """Folder of a pretrained run."""
    dataset: str | None = None
    """Where the data of a run on data of yours are now, if they were moved: the same data in another place."""

    def __call__(self) -> None:
        run = RunFolder(self.run)
        config = changed_config(run, self.config, "discover")
        _go_on(self, "discover", run, config if self.dataset is None else moved(run, config, self.dataset))


@dataclass(kw_only=True)
class InternalRL(LaterPhase):
    """Phase 3: reinforcement learning over the abstract actions of RUN."""

    run: Positional[Path]
    """Folder of a run with discovered abstract actions."""
    raw: bool = False
    """The baseline instead: reinforcement learning over raw actions."""

    def __call__(self) -> None:
        phase: Phase = "raw_action_rl" if self.raw else "internal_rl"
        run = RunFolder(self.run)
        _go_on(self, phase, run, changed_config(run, self.config, phase))


@dataclass(kw_only=True)
class Evolve(Tracked):
    """Phase 3 without gradients: evolve the policy over the abstract actions of RUN."""

    run: Positional[Path]
    """Folder of a run with discovered abstract actions."""
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)
    """How the policy evolves; give the same when you resume."""

    def __call__(self) -> None:
        if self.evolution.seed != EvolutionConfig.seed:
            raise UserError("the seed of evolution derives from the run's; leave out --evolution.seed.")
        run = RunFolder(self.run)
        _go_on(self, PHASE, run, read_config(run), partial(run_evolution, settings=self.evolution))


def _go_on(
    options: Tracked, phase: str, run: RunFolder, config: ExperimentConfig, work: Callable[..., Any] | None = None
) -> None:
    """Does a phase of a run that has begun, after the changes of its config have been written. work: as those of
    `RUN_PHASE`, which has it unless given."""
    device = device_name(options.device)
    workers = processes(device)
    run.refuse_begun(phase, resume=options.resume)
    workers.wait()  # until all have seen what was there before
    work = RUN_PHASE[phase] if work is None else work
    with _writing(run, workers):
        if workers.is_main:
            keep_changes(run, config, phase)
        work(config, options.tracked(run, workers), resume=options.resume, quiet=options.quiet, device=device)


def _writing(run: RunFolder, workers: Processes) -> AbstractContextManager[None]:
    """Context in which no other command writes to the run; the first process holds it for all."""
    return run.locked() if workers.is_main else nullcontext()


COMMANDS = {"pretrain": Pretrain, "discover": Discover, "internal-rl": InternalRL, "evolve": Evolve}
