"""The three phases, each on a run folder."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import Positional

from metacontroller import presets
from metacontroller.commands.options import Tracked, chosen_config, device_name, preset_config
from metacontroller.domains.registry import domain_of
from metacontroller.errors import UserError
from metacontroller.phases.artefacts import learned_from
from metacontroller.recipes.config import (
    ExperimentConfig,
    check_phases,
    open_folder,
    read_config,
    refuse_other_recipe,
    with_seed,
)
from metacontroller.recipes.history import Phase, changed_config, keep_changes
from metacontroller.recipes.run_phase import run_discover, run_internal_rl, run_pretrain, run_raw_action_rl
from metacontroller.storage.run_folder import RunFolder
from metacontroller.storage.versions import check_versions
from metacontroller.training.distributed import Processes, processes


@dataclass(kw_only=True)
class Pretrain(Tracked):
    """Phase 1: train an action model on experts' episodes; starts the folder RUN."""

    run: Positional[Path]
    """Folder to make, or with --resume to continue in."""
    preset: str | None = None
    """Where the config starts from: laptop unless given, or a function of yours as package.module:function."""
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
    config: ExperimentConfig = field(default_factory=preset_config)
    """Change any value of the preset."""

    @classmethod
    def at_preset(cls, preset: str | None) -> Pretrain:
        """The defaults of all options."""
        return cls(run=tyro.MISSING, config=preset_config(preset))

    @staticmethod
    def preset_of_data() -> str:
        """The preset where a dataset is named and no preset."""
        return presets.OWN_DATA

    def __call__(self) -> None:
        run, device = RunFolder(self.run), device_name(self.device)
        workers = processes(device)
        if self.env_kwargs is not None and self.env is None:
            raise UserError(f"--env-kwargs {self.env_kwargs} stands beside no --env; name the environment.")
        moves = self._moves(run)
        if self.resume and self.env is not None and self.dataset is None:
            config = self._with_environment(run, write=workers.is_main)
        elif moves is not None:
            config = moved(run, read_config(run), moves)
        else:
            untold = self.dataset is None and self.env is None and self.validation_share is None
            config = self.config if untold else self._with_data()
            config = chosen_config(config, self.preset, run, self.resume)
        config = config if self.seed is None else with_seed(config, self.seed)
        check_phases(config)  # what a later phase or the data refuse leaves no folder behind
        workers.wait()  # until all have seen what was there before
        with _writing(run, workers):
            if workers.is_main and moves:
                keep_changes(run, config, "pretrain")
            if workers.is_main:
                open_folder(run, config, "pretrain", resume=self.resume, option="folder")
            workers.wait()
            started_from = read_config(run).seed
            if started_from != config.seed:
                raise UserError(
                    f"{run.path} was started from seed {started_from}, not {config.seed}; leave out --seed to "
                    "resume it, or choose another folder."
                )
            run_pretrain(config, self.tracked(run, workers), resume=self.resume, quiet=self.quiet, device=device)

    def _moves(self, run: RunFolder) -> str | None:
        """The dataset, where a run is resumed and nothing else is given: it may be in another place."""
        told = self.preset, self.env, self.env_kwargs, self.validation_share
        untouched = self.resume and told == (None,) * 4 and self.config == preset_config(presets.OWN_DATA)
        return self.dataset if untouched and run.within("config.json").exists() else None

    def _with_environment(self, run: RunFolder, *, write: bool) -> ExperimentConfig:
        """The config of a run that has learned from a dataset alone, now with an environment; written there if asked.

        UserError if it acts in another one already, or if its model cannot read this one.
        """
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
        if write:
            keep_changes(run, changed, "pretrain")
        return changed

    def _with_data(self) -> ExperimentConfig:
        """The config with the dataset and the environment asked for."""
        if self.dataset is None:
            option = f"--env {self.env}" if self.env is not None else f"--validation-share {self.validation_share}"
            raise UserError(f"{option} stands beside no dataset; give --dataset ID, which the model learns from.")
        domain = self.config.domain
        if not _holds_data(domain):
            raise UserError(
                f"--dataset {self.dataset} does not fit the preset, a world with data of its own; leave one."
            )
        share = {} if self.validation_share is None else {"validation_share": self.validation_share}
        return replace(self.config, domain=self._acting(replace(domain, dataset=self.dataset, **share)))

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
    def at_run(cls, run: str | None) -> LaterPhase:
        """The defaults of all options, the config of a run's folder among them."""
        config = preset_config() if run is None else read_config(RunFolder(run))
        return cls(run=tyro.MISSING, config=config)  # type: ignore[call-arg] - of the subclasses


@dataclass(kw_only=True)
class Discover(LaterPhase):
    """Phase 2: find abstract actions inside the frozen action model of RUN."""

    run: Positional[Path]
    """Folder of a pretrained run."""
    dataset: str | None = None
    """Where the data of a run on data of yours are now, if they were moved: the same data in another place."""

    def __call__(self) -> None:
        run = RunFolder(self.run)
        config, device = changed_config(run, self.config, "discover"), device_name(self.device)
        config = config if self.dataset is None else moved(run, config, self.dataset)
        workers = processes(device)
        run.refuse_begun("discover", resume=self.resume)
        workers.wait()  # until all have seen what was there before
        with _writing(run, workers):
            if workers.is_main:
                keep_changes(run, config, "discover")
            run_discover(config, self.tracked(run, workers), resume=self.resume, quiet=self.quiet, device=device)


@dataclass(kw_only=True)
class InternalRL(LaterPhase):
    """Phase 3: reinforcement learning over the abstract actions of RUN."""

    run: Positional[Path]
    """Folder of a run with discovered abstract actions."""
    raw: bool = False
    """The baseline instead: reinforcement learning over raw actions."""

    def __call__(self) -> None:
        name: Phase = "raw_action_rl" if self.raw else "internal_rl"
        run = RunFolder(self.run)
        config, device = changed_config(run, self.config, name), device_name(self.device)
        workers = processes(device)
        run.refuse_begun(name, resume=self.resume)
        workers.wait()  # until all have seen what was there before
        phase = run_raw_action_rl if self.raw else run_internal_rl
        with _writing(run, workers):
            if workers.is_main:
                keep_changes(run, config, name)
            phase(config, self.tracked(run, workers), resume=self.resume, quiet=self.quiet, device=device)


def _writing(run: RunFolder, workers: Processes) -> AbstractContextManager[None]:
    """Context in which no other command writes to the run; the first process holds it for all."""
    return run.locked() if workers.is_main else nullcontext()
