"""A run as analyses are handed it: its world and what its phases left, each part loaded when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from metacontroller.baselines.compile import CompILE
from metacontroller.control.config import MetaControllerConfig
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.batching import Generate
from metacontroller.domains.base import Domain, Split, demonstrations
from metacontroller.models.protocol import SteerableModel
from metacontroller.phases.artefacts import (
    BASE_MODEL,
    COTRAINED_MODEL,
    EVOLVED,
    META_CONTROLLER,
    POLICY,
    RAW_MODEL,
    SEGMENTATION,
    load_artefact,
)
from metacontroller.phases.evaluate import EvaluateConfig, Policy, evaluate
from metacontroller.phases.pretrain import snapshot_path
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.seeding import stream_seed


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """One run. Whoever measures or draws it takes its parts from here, so that all of them judge the same model.

    folder: its files. domain: its world. settings: how much is measured. seed: from which all its seeds derive, see
    `stream_seed`. Model: the class of its action model. cotrained: whether discovery trained the model along.
    segmented: whether CompILE stands in place of discovery. snapshots, pretraining_steps: updates after which
    pretraining kept the model, and at which it ended. new_model: makes the model as it was before pretraining.
    controller: the config of its metacontroller.
    """

    folder: RunFolder
    domain: Domain
    settings: EvaluateConfig
    seed: int
    device: str
    Model: type[SteerableModel]
    cotrained: bool
    segmented: bool
    snapshots: tuple[int, ...]
    pretraining_steps: int
    new_model: Callable[[], SteerableModel]
    controller: MetaControllerConfig

    def demonstrations(self, split: Split) -> Generate:
        """The source of one split's episodes."""
        return demonstrations(self.domain, split)

    @property
    def labelled_sources(self) -> tuple[Generate, Generate]:
        """Those from which what needs labels learns, and by which it is judged."""
        return self.demonstrations("discover"), self.demonstrations("validation")

    @property
    def analysis_seed(self) -> int:
        """Of all analyses."""
        return stream_seed(self.seed, "analyse")

    @property
    def subgoals(self) -> tuple[str, ...]:
        """Names of the subgoals, () where demonstrations carry no labels."""
        return self.domain.spec().subgoals

    @property
    def walk_steps(self) -> int:
        """Steps within which a walk may reach a subgoal."""
        limit = self.settings.walk_steps
        return max(1, self.domain.spec().max_steps // 2) if limit is None else limit

    @cached_property
    def base(self) -> SteerableModel:
        """The model that pretraining left."""
        return load_artefact(self.Model, self.folder, BASE_MODEL, self.device)

    @cached_property
    def model(self) -> SteerableModel:
        """The model that the metacontroller steers: the base, or the one that discovery trained along."""
        return load_artefact(self.Model, self.folder, COTRAINED_MODEL, self.device) if self.cotrained else self.base

    @cached_property
    def raw_model(self) -> SteerableModel:
        """The base after raw-action RL."""
        return load_artefact(self.Model, self.folder, RAW_MODEL, self.device)

    @cached_property
    def meta_controller(self) -> MetaController:
        """As discovery left it; its policy is the prior."""
        return load_artefact(MetaController, self.folder, META_CONTROLLER, self.device)

    @cached_property
    def policy(self) -> MetaController:
        """The same with the policy that internal RL trained."""
        return load_artefact(MetaController, self.folder, POLICY, self.device)

    @cached_property
    def evolved(self) -> MetaController:
        """The same with the policy that evolution trained."""
        return load_artefact(MetaController, self.folder, EVOLVED, self.device)

    def steering(self, policy: Policy) -> MetaController:
        """The metacontroller with the policy of that name; one over codes."""
        return self.evolved if policy == "evolved" else self.meta_controller if policy == "prior" else self.policy

    @cached_property
    def segmentation(self) -> CompILE | None:
        """CompILE's, where it stands in place of discovery."""
        return load_artefact(CompILE, self.folder, SEGMENTATION, self.device) if self.segmented else None

    def snapshot(self, step: int) -> SteerableModel | None:
        """The model after so many updates of pretraining, if it was kept."""
        path = snapshot_path(self.folder, step)
        return self.Model.init_and_load(path).to(self.device) if path.exists() else None

    def evaluate(self, policy: Policy, *, task: Any = None, episodes: int, seed: int) -> dict[str, Any]:
        """`phases.evaluate` with the model and metacontroller of that policy; task as of `Domain.reset`."""
        self.domain.check_acting()  # before a file is missed that nothing could have made
        if policy in ("base", "raw"):
            model, meta_controller = self.base if policy == "base" else self.raw_model, None
        else:
            model, meta_controller = self.model, self.steering(policy)
        return evaluate(model, meta_controller, self.domain, policy, task, episodes, seed)
