"""Whatever reads files, with a sound folder to read: a part of `damage.py`.

A reader returns what a folder means, as text: the values of every tensor and array, and of every JSON file. Two folders
of equal text are equal in meaning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from damage import Reader
from damage_kinds import CANARY_MODULE, CANARY_SOURCE
from metacontroller import MetaController
from metacontroller.control.metacontroller import MetaController as Controlled
from metacontroller.data import Trajectories, TrajectoryStore
from metacontroller.data.datasets import Dataset, load_dataset, space_meta
from metacontroller.data.formats.minari import write_minari
from metacontroller.domains.ant_pinpad.expert import Expert
from metacontroller.phases.artefacts import load_artefact
from metacontroller.phases.evolution import EvolutionConfig
from metacontroller.presets import preset
from metacontroller.recipes import run_phase
from metacontroller.recipes.collect import CollectConfig, collect
from metacontroller.recipes.config import build_model, load_run, open_folder, read_config
from metacontroller.recipes.study_runs import StudyConfig
from metacontroller.report.html import write_report
from metacontroller.storage.config_file import from_plain
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.optimizer import Learner

MINARI = "torture/cart-v0"


def meaning(value: Any) -> str:
    """Nested values as text; a large array by its digest."""
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return f"{value.dtype} {value.shape} {digest}"
    if isinstance(value, Mapping):
        return str({str(key): meaning(entry) for key, entry in sorted(value.items(), key=str)})
    if isinstance(value, list | tuple):
        return str([meaning(entry) for entry in value])
    return repr(value)


# -- runs -------------------------------------------------------------------------------------------------------------


def _run(name: str, read: Callable[[RunFolder], Any]) -> Callable[[Path], str]:
    return lambda folder: meaning(read(RunFolder(folder / name)))


def _resumed(run: RunFolder) -> Any:
    """A checkpoint as it is resumed from."""
    config = read_config(run)
    model = build_model(config)
    optimizer = config.pretrain.optimizer
    options: dict[str, Any] = {name: getattr(optimizer, name) for name in ("lr", "weight_decay", "max_grad_norm")}
    learner = Learner(model, list(model.parameters()), torch.Generator(), **options)
    step, tensors = learner.restore(run, "pretrain", optimizer.steps)
    states = [optimizer.state_dict() for optimizer in learner.optimizers.values()]
    return [step, tensors, model.state_dict(), *states, learner.generator.get_state()]


def _checkpoint(name: str) -> Callable[[RunFolder], Any]:
    return lambda run: run.load_checkpoint(name)


def _artefact(name: str) -> Callable[[RunFolder], Any]:
    def read(run: RunFolder) -> Any:
        kind = Controlled if "controller" in name or "policy" in name else read_config(run).model.Model
        return load_artefact(kind, run, name, "cpu").state_dict()

    return read


def _snapshot(run: RunFolder) -> Any:
    model = load_run(run, "cpu").snapshot(1)
    return "there is none" if model is None else model.state_dict()


def _all_of(run: RunFolder) -> Any:
    """All that a manifest lists."""
    return [run.read_config(), run.read_summary(), run.read_metrics(), run.load_checkpoint("discover")]


def _report(folder: Path) -> str:
    with contextlib.redirect_stdout(None):
        return write_report([folder / "bare"], folder / "report.html").read_text()


# -- datasets and the rest --------------------------------------------------------------------------------------------


def _store(folder: Path) -> str:
    store = TrajectoryStore(folder)
    episodes = store.read(np.arange(len(store)))
    return meaning([{field.name: getattr(episodes, field.name) for field in fields(episodes)}, store.meta.get("env")])


def _dataset(folder: Path) -> str:
    dataset = load_dataset(str(folder))
    return _of_dataset(dataset)


def _of_dataset(dataset: Dataset) -> str:
    episodes = dataset.read(np.arange(len(dataset.episodes)))
    values = {field.name: getattr(episodes, field.name) for field in fields(episodes)}
    return meaning([values, str(dataset.observation_space), str(dataset.action_space), dataset.env])


COLLECT = CollectConfig(env="CartPole-v1", policy=f"{CANARY_MODULE}_policy:act", episodes=3)


def _collected(folder: Path) -> str:
    done = collect(COLLECT, folder / "collected", resume=True, quiet=True)
    return meaning(done) + _store(folder / "collected")


def _expert(folder: Path) -> str:
    expert, about = Expert.load(folder / "expert" / "expert.safetensors")
    return meaning([expert.state_dict(), about])


def _minari(folder: Path) -> str:
    os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari")
    return _of_dataset(load_dataset(MINARI))


NO_MANIFEST = "the folder has no manifest, as older releases wrote it"
OLD_STORE = "a store of format 1 holds no SHA-256"
NOT_OURS = "Minari's format holds no checksums"
MODULES = ("base_model", "raw_action_model", "meta_controller", "internal_rl_policy", "evolved_policy")
PHASES = ("pretrain", "discover", "internal_rl", "raw_action_rl", "evolution")
_IN_MINARI = f"minari/{MINARI}/data"

READERS: dict[str, Reader] = {
    "config.json": Reader("run/config.json", _run("run", read_config), 18),
    "summary.json": Reader("run/summary.json", _run("run", RunFolder.read_summary)),
    "analyses/NAME.json": Reader("run/analyses/gate.json", _run("run", lambda run: run.read_analysis("gate"))),
    "manifest.json": Reader("run/manifest.json", _run("run", _all_of), 24),
    "metrics.jsonl": Reader("run/metrics.jsonl", _run("run", RunFolder.read_metrics), 24),
    **{f"checkpoint {name}": Reader(f"run/{name}.safetensors", _run("run", _checkpoint(name)), 9) for name in PHASES},
    "checkpoint, resumed from": Reader("run/pretrain.safetensors", _run("run", _resumed)),
    **{f"artefact {name}": Reader(f"run/{name}.safetensors", _run("run", _artefact(name)), 9) for name in MODULES},
    "snapshot": Reader("run/snapshots/base_model-1.safetensors", _run("run", _snapshot)),
    "study/config.json": Reader(
        "run/study/config.json",
        lambda folder: meaning(from_plain(StudyConfig, RunFolder(folder / "run" / "study").read_config())),
    ),
    "module saved alone": Reader(
        "alone/m.safetensors",
        lambda folder: meaning(MetaController.init_and_load(folder / "alone" / "m.safetensors").state_dict()),
        swapped="run/base_model.safetensors",
    ),
    "store.json": Reader("store/store.json", lambda folder: _store(folder / "store"), 18),
    "store, states": Reader("store/states.npy", lambda folder: _store(folder / "store")),
    "store, lengths": Reader("store/lengths.npy", lambda folder: _store(folder / "store")),
    "dataset, store.json": Reader("store/store.json", lambda folder: _dataset(folder / "store")),
    "dataset, actions": Reader("store/actions.npy", lambda folder: _dataset(folder / "store")),
    "collect.json": Reader("collected/collect.json", _collected, 5, writes="collected"),
    "collect, a part": Reader("collected/parts/part-00000.json", _collected, 5, writes="collected"),
    "expert of the ant": Reader("expert/expert.safetensors", _expert),
    "config.json, no manifest": Reader("bare/config.json", _run("bare", read_config), 12, NO_MANIFEST, True),
    "summary.json, no manifest": Reader("bare/summary.json", _report, 1, NO_MANIFEST, True),
    "analysis, no manifest": Reader("bare/analyses/gate.json", _report, 1, NO_MANIFEST, True),
    "metrics.jsonl, no manifest": Reader(
        "bare/metrics.jsonl", _run("bare", RunFolder.read_metrics), 9, NO_MANIFEST, True
    ),
    "checkpoint, no manifest": Reader("bare/pretrain.safetensors", _run("bare", _resumed), 9, NO_MANIFEST, True),
    "artefact, no manifest": Reader(
        "bare/base_model.safetensors", _run("bare", _artefact("base_model")), 9, NO_MANIFEST, True
    ),
    "store of format 1": Reader("old/store.json", lambda folder: _dataset(folder / "old"), 9, OLD_STORE, True),
    "store of format 1, states": Reader("old/states.npy", lambda folder: _dataset(folder / "old"), 9, OLD_STORE, True),
    "Minari, data": Reader(f"{_IN_MINARI}/main_data.hdf5", _minari, 6, NOT_OURS, named=(MINARI,)),
    "Minari, metadata": Reader(f"{_IN_MINARI}/metadata.json", _minari, 6, NOT_OURS, named=(MINARI,)),
}


# -- sound files ------------------------------------------------------------------------------------------------------


def sound(folder: Path) -> None:
    """Writes every kind of file, by the code that writes them for users."""
    folder.mkdir()
    (folder / f"{CANARY_MODULE}.py").write_text(CANARY_SOURCE)
    (folder / f"{CANARY_MODULE}_policy.py").write_text("def act(observation, env):\n    return 0\n")
    _sound_run(RunFolder(folder / "run"))
    shutil.copytree(folder / "run", folder / "bare")
    (folder / "bare" / "manifest.json").unlink()
    (folder / "alone").mkdir()
    MetaController(8, dim_meta_controller=4, dim_latent=2, rank=1).save(folder / "alone" / "m.safetensors")
    _sound_stores(folder)
    (folder / "expert").mkdir()
    Expert(5, (4,)).save(folder / "expert" / "expert.safetensors", {"success": 0.5})


def _sound_run(run: RunFolder) -> None:
    config = preset("debug")
    optimizer = replace(config.pretrain.optimizer, steps=2, batch_size=4, log_every=1, checkpoint_every=1)
    reinforce = replace(config.internal_rl, episodes=8, batch_size=4)
    config = replace(
        config,
        pretrain=replace(config.pretrain, optimizer=optimizer, snapshots=(1,)),
        discover=replace(config.discover, optimizer=optimizer, alpha_warmup=(0, 1)),
        internal_rl=reinforce,
        raw_action_rl=reinforce,
    )
    open_folder(run, config, "pretrain", resume=False, option="folder")
    options: dict[str, Any] = {"resume": True, "quiet": True, "device": "cpu"}
    with contextlib.redirect_stderr(None):
        for phase in run_phase.RUN_PHASE.values():
            phase(config, run, **options)
    evolution = EvolutionConfig(generations=2, population=4)
    run_phase.run_evolution(config, run, evolution, **options)
    run.write_summary({"success": 0.5, "seed": 0, "rates": [0.25, 1.0]})
    run.write_analysis("gate", {"recall": 0.5, "precision": [0.25, 1.0]})
    RunFolder(run.path / "study").write_config(StudyConfig())


def _sound_stores(folder: Path) -> None:
    import gymnasium

    env = gymnasium.make("CartPole-v1")
    rng = np.random.default_rng(0)
    lengths, shape = (3, 2, 5), env.observation_space.shape or ()
    rows = [
        {
            "states": rng.uniform(-1, 1, (length + 1, *shape)).astype(np.float32),
            "actions": rng.integers(0, 2, length),
            "rewards": rng.uniform(0, 1, length),
            "terminated": True,
            "truncated": False,
        }
        for length in lengths
    ]
    meta = space_meta(env.observation_space, env.action_space, "CartPole-v1")
    TrajectoryStore.write(folder / "store", Trajectories.from_episodes(rows), meta)
    shutil.copytree(folder / "store", folder / "old")
    header = json.loads((folder / "old" / "store.json").read_text())
    old = {name: value for name, value in header.items() if name not in ("listed", "sealed")}
    (folder / "old" / "store.json").write_text(json.dumps({**old, "format": 1}))
    os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari")
    write_minari(MINARI, rows, env.observation_space, env.action_space)
    _sound_parts(folder)


def _sound_parts(folder: Path) -> None:
    """A collection that ended before its parts were joined."""
    from metacontroller.recipes import collect as module

    class Stopped(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stopped

    join, module._join = module._join, stop
    sys.path.insert(0, str(folder))  # where the policy is
    try:
        with contextlib.suppress(Stopped):
            collect(COLLECT, folder / "collected", quiet=True)
    finally:
        sys.path.remove(str(folder))
        module._join = join
