"""The config of an experiment: every value that a run depends on, as dataclasses and as config.json.

In JSON the world and the model carry a name: ``"domain": {"name": "corridor", ...}``. It picks the class that reads the
rest, see `domains.registry` and `models.config`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.arguments import checked_kinds
from metacontroller.baselines.compile import CompileConfig
from metacontroller.control.config import MetaControllerConfig
from metacontroller.control.metacontroller import MetaController
from metacontroller.domains.registry import domain_class, domain_of
from metacontroller.errors import UserError
from metacontroller.models.config import model_config_class
from metacontroller.models.protocol import SteerableModel
from metacontroller.objectives.guided import check_nameable
from metacontroller.objectives.registry import OBJECTIVES, objective_names
from metacontroller.phases.discover import DiscoverConfig
from metacontroller.phases.evaluate import EvaluateConfig
from metacontroller.phases.policy_gradient import InternalRLConfig
from metacontroller.phases.pretrain import PretrainConfig
from metacontroller.ranges import check_choice, check_fields, require
from metacontroller.storage.config_file import from_plain
from metacontroller.storage.files import left_behind
from metacontroller.storage.run_folder import RunFolder
from metacontroller.storage.user_function import refuse_unknown_code
from metacontroller.training.optimizer import OptimizerConfig
from metacontroller.training.seeding import STREAMS, stream_seed


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything a run needs. The seeds of phases derive from the run's, see `with_seed`."""

    domain: Any
    """The world: the config of a `Domain`."""
    model: Any
    """The action model, such as `ModelConfig`: a dataclass with ``name``, ``Model``, ``dim`` and ``build``."""
    meta_controller: MetaControllerConfig
    """What steers the action model."""
    pretrain: PretrainConfig
    """Phase 1, pretraining."""
    discover: DiscoverConfig
    """Phase 2, discovery."""
    internal_rl: InternalRLConfig
    """Phase 3, reinforcement learning over codes."""
    raw_action_rl: InternalRLConfig
    """The baseline of phase 3, reinforcement learning over raw actions."""
    evaluate: EvaluateConfig
    """Measures at the end."""
    discovery: str = "metacontroller"
    """What finds abstract actions: the metacontroller, the baseline "compile" (CompILE), or an objective by name."""
    compile: CompileConfig = dataclasses.field(
        default_factory=lambda: CompileConfig(optimizer=OptimizerConfig(steps=3200, batch_size=128, lr=1e-3))
    )
    """The baseline CompILE, where it does the discovery: short where a preset does not compare with it."""
    seed: int = 0
    """From which all other seeds derive, see `with_seed`; on the command line --seed or --seeds."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.discovery not in (*OBJECTIVES, "compile"):  # entry points take long to read
            check_choice("discovery", self.discovery, ("compile", *objective_names()))
        code, rank = self.meta_controller.code, self.meta_controller.rank
        if self.discovery == "compile":
            expected = "'gaussian' (CompILE finds Gaussian codes), or discovery 'metacontroller'"
            require(code == "gaussian", "meta_controller.code", code, expected)
        fits = rank is None or rank <= self.model.dim
        require(fits, "meta_controller.rank", rank, f"at most model.dim, {self.model.dim}")
        stream_seed(self.seed, STREAMS[0])


Config = TypeVar("Config")


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The same config with other values, by the dotted names of their fields: ``{"discover.optimizer.lr": 1e-3}``."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        first, _, rest = name.partition(".")
        parts.setdefault(first, {})[rest] = value
    nested = {
        name: part[""] if "" in part else with_values(getattr(config, name), part) for name, part in parts.items()
    }
    return replace(config, **nested)  # type: ignore[type-var]


@checked_kinds
def with_seed(config: ExperimentConfig, seed: int) -> ExperimentConfig:
    """The same experiment from another seed, with the seeds of all phases derived from it."""
    phases = ("pretrain", "discover", "internal_rl", "raw_action_rl")
    seeds = {f"{phase}.seed": stream_seed(seed, phase) for phase in phases}
    return with_values(config, {"seed": seed, "compile.seed": stream_seed(seed, "discover"), **seeds})


@checked_kinds
def build_model(config: ExperimentConfig) -> SteerableModel:
    """A new action model, its weights drawn from the config's seed."""
    domain = domain_of(config.domain)
    spec = domain.spec()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config.seed, "model"))
        model = config.model.build(spec.encoder, spec.action)
    if spec.window is not None:
        model.limit_context(spec.window)
    model.versions = domain.data_versions()
    return model


@checked_kinds
def build_meta_controller(config: ExperimentConfig) -> MetaController:
    """A new metacontroller, its weights drawn from the config's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config.seed, "meta_controller"))
        meta_controller = MetaController(config.model.dim, **vars(config.meta_controller))
    meta_controller.versions = domain_of(config.domain).data_versions()
    return meta_controller


def check_phases(config: ExperimentConfig) -> None:
    """UserError for what only a later phase could refuse, so that the first one does before hours are spent: guided
    updates and clips without what they need, and settings that ask for what the world lacks.

    Also for a world whose data cannot be read.
    """
    domain, discovery = domain_of(config.domain), config.discover
    domain.spec()
    guided = config.discovery != "compile" and discovery.guided_updates > 0
    if guided:
        check_nameable(config.meta_controller.code)
    elif config.discovery != "compile" and discovery.clips:
        raise UserError(
            f"discover.clips is {discovery.clips}, but updates are not guided; expected 0, or discover.guided_updates "
            "above 0."
        )
    clips = config.pretrain.clips or (guided and discovery.clips)
    asked = {"augment": discovery.symmetry_augmentation, "positions": guided, "decisions": clips}
    for method, wanted in asked.items():
        if wanted and not domain.offers(method):
            raise domain.lacking(method)


# -- config.json ------------------------------------------------------------------------------------------------------


@checked_kinds
def to_json(config: ExperimentConfig) -> dict[str, Any]:
    """What config.json holds of a config; `from_json` reads it."""
    content = _fields(config)
    content["domain"] = {"name": domain_of(config.domain).name, **_fields(config.domain)}
    content["model"] = {"name": config.model.name, **_fields(config.model)}
    return content


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def from_json(data: Any) -> ExperimentConfig:
    """The config that config.json holds; UserError names the field that is unknown, missing or wrong."""
    require(isinstance(data, Mapping), "config", data, "an object with the fields of ExperimentConfig")
    kinds: dict[str, Callable[[str], type[Any]]] = {
        "domain": lambda name: domain_class(name).Config,
        "model": model_config_class,
    }
    chosen = {part: _chosen(data[part], f"config.{part}", kind) for part, kind in kinds.items() if part in data}
    return from_plain(ExperimentConfig, {**data, **chosen})


def _chosen(content: Any, where: str, kind: Callable[[str], type[Any]]) -> Any:
    """The config in ``content``, of the class that its name picks."""
    has_name = isinstance(content, Mapping) and isinstance(content.get("name"), str)
    require(has_name, where, content, "an object with a name")
    rest = {name: value for name, value in content.items() if name != "name"}
    return from_plain(kind(content["name"]), rest, where)


# -- run folders ------------------------------------------------------------------------------------------------------

_RECIPE = "recipe"  # in config.json: what a folder of several runs is; a run has none
_KINDS = {"pretrain": "run", "reproduce": "reproduction", "figures": "reproduction", "sweep": "sweep"}
_KINDS |= dict.fromkeys(("discover", "internal_rl", "raw_action_rl"), "run")


@checked_kinds
def read_config(run: RunFolder) -> ExperimentConfig:
    """The config in a run folder; UserError if it names code that the user has not, see `storage.user_function`."""
    content, path = run.read_config(), run.path / "config.json"
    refuse_unknown_code(content, path)
    try:
        return from_json({name: value for name, value in content.items() if name != _RECIPE})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def refuse_other_recipe(folder: RunFolder, command: str) -> None:
    """UserError if the folder is that of another recipe, whose files the command would take for its own."""
    if not (folder.path / "config.json").exists():
        return
    is_run = folder.metrics_path.exists() or any(folder.path.glob("*.safetensors"))
    kind = folder.read_config().get(_RECIPE, "run" if is_run else None)
    if kind not in (None, _KINDS[command]):
        raise UserError(f"{folder.path} is a {kind}; give {command} a folder of its own.")


@checked_kinds
def open_folder(folder: RunFolder, config: ExperimentConfig, command: str, *, resume: bool, option: str) -> None:
    """Writes the config, and which recipe the folder belongs to, into a new folder, or checks that a resumed one holds
    the same."""
    refuse_other_recipe(folder, command)
    if not (folder.path / "config.json").exists():
        if folder.path.is_dir() and any(not left_behind(path) for path in folder.path.iterdir()):
            raise UserError(f"{folder.path} holds files of something else; choose another {option}.")
        check_phases(config)
        kind = _KINDS[command]
        folder.write_config(to_json(config) | ({} if kind == "run" else {_RECIPE: kind}))
        return
    if not resume:
        raise UserError(f"{folder.path} holds a run; add --resume to resume it, or choose another {option}.")
    if with_seed(read_config(folder), config.seed) != with_seed(config, config.seed):
        raise UserError(
            f"{folder.path} was started with another configuration; leave out --preset and --config to resume it, or "
            f"choose another {option}."
        )


@checked_kinds
def load_run(folder: RunFolder, device: str, config: ExperimentConfig | None = None) -> LoadedRun:
    """The run in a folder, as its config.json says unless a config is given."""
    config = read_config(folder) if config is None else config
    domain = domain_of(config.domain)
    folder.versions = domain.versions()
    return LoadedRun(
        folder=folder,
        domain=domain,
        settings=config.evaluate,
        seed=config.seed,
        device=device,
        Model=config.model.Model,
        cotrained=config.discover.train_model,
        segmented=config.discovery == "compile",
        snapshots=config.pretrain.snapshots,
        pretraining_steps=config.pretrain.optimizer.steps,
        new_model=lambda: build_model(config),
        controller=config.meta_controller,
    )
