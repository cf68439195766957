"""How much a study does, and its variants: the paper's baselines, and what its other figures vary."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Literal

from metacontroller.control.switching import GateConfig
from metacontroller.phases.discover import DiscoverConfig
from metacontroller.ranges import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    ROWS,
    Number,
    Whole,
    check_each,
    check_fields,
    check_warmup,
)
from metacontroller.recipes.config import ExperimentConfig, number_name


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """How much of everything. What begins with the command of an analysis is an option of that analysis. UserError for
    values out of range."""

    forced_alpha: float | None = None
    """Weight of the KL where switching is forced, searched for that baseline; the reproduction's unless given."""
    cotrained_alpha: float | None = None
    """Weight of the KL of the co-trained baselines, likewise. CompILE's are in its own config."""
    alphas: tuple[float, ...] = (0.001, 0.004, 0.02, 0.1)
    """Weights of the KL, one for each point of the rate-distortion curves."""
    rate_steps: int = 2400
    """Updates of discovery at each point of the rate-distortion curves."""
    discovery_steps: int = 1600
    """Updates of discovery on variants of pretraining."""
    alpha_warmup: tuple[int, int] = (700, 1200)
    """Updates (from, to) of the KL's linear warm-up, on variants of pretraining."""
    snapshots: tuple[int, ...] = (500, 1000)
    """Updates of pretraining after which to discover on the base model, where pretraining keeps a snapshot there."""
    weight_decays: tuple[float, ...] = (0.0,)
    """Weight decays of pretraining; a base model for each, to compare with the snapshot of as many updates."""
    state_loss_weights: tuple[float, ...] = (0.01,)
    """Weights lambda of pretraining's state loss; a base model for each."""
    epsilons: tuple[float, ...] = (0.1,)
    """Shares of the experts' random moves, where the world has any; a base model for each."""
    pretraining_steps: int = 1000
    """Pretraining updates of each base model of weight_decays, state_loss_weights and epsilons."""
    episodes: int = 50_000
    """Episodes of internal RL on each variant."""
    few_seeds: int = 1
    """So many of the seeds have curves, variants and controls; all have the baselines."""
    probe_steps: int = 300
    """Updates of the linear probes."""
    probe_batch_size: int = 128
    """Episodes of an update of the linear probes."""
    probe_lr: float = 3e-3
    """Learning rate of the linear probes."""
    probe_episodes: int = 2048
    """Held-out episodes to judge the linear probes by."""
    steer_steps: int = 3200
    """Updates of the supervised controllers (the paper's table)."""
    steer_batch_size: int = 128
    """Episodes of an update of the supervised controllers."""
    steer_lr: float = 1e-3
    """Learning rate of the supervised controllers (the paper's table)."""
    steer_episodes: int = 2048
    """Held-out episodes to judge the supervised controllers by."""
    inject_walks: int = 1024
    """Walks for each subgoal, free and with its code forced."""
    gate_episodes: int = 2048
    """Held-out episodes to judge the gate by."""
    oracle_episodes: int = 1024
    """Held-out episodes of each kind to play experts' codes in."""

    def __post_init__(self) -> None:
        weight, learning_rate = Number(0, none=True), POSITIVE
        check_fields(self, forced_alpha=weight, cotrained_alpha=weight, probe_lr=learning_rate, steer_lr=learning_rate)
        check_fields(self, rate_steps=COUNT, discovery_steps=COUNT, pretraining_steps=COUNT, episodes=COUNT)
        check_fields(self, few_seeds=Whole(0), probe_steps=COUNT, steer_steps=COUNT)
        check_fields(self, probe_batch_size=ROWS, steer_batch_size=ROWS)
        check_fields(self, probe_episodes=ROWS, steer_episodes=ROWS, inject_walks=ROWS, gate_episodes=ROWS)
        check_fields(self, oracle_episodes=ROWS)
        for name in ("alphas", "weight_decays", "state_loss_weights"):
            check_each(name, getattr(self, name), NOT_NEGATIVE)
        check_each("snapshots", self.snapshots, COUNT)
        check_each("epsilons", self.epsilons, PROBABILITY)
        check_warmup("alpha_warmup", self.alpha_warmup)


Group = Literal["baseline", "rate", "pretraining", "control"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One change to the reproduction. value: what is varied in its group, for axes and tables. start: from the base
    model of the seed, from one of its snapshots (the step), from a base model of its own, or from new weights."""

    name: str
    group: Group
    config: ExperimentConfig
    value: float | None = None
    start: Literal["base", "own", "new"] | int = "base"
    reinforces: bool = True


def _lasting(config: DiscoverConfig, steps: int) -> DiscoverConfig:
    """The same for so many updates, as large a share of which is guided and has a falling learning rate."""
    optimizer, share = config.optimizer, steps / config.optimizer.steps
    changed = replace(optimizer, steps=steps, decay_steps=round(optimizer.decay_steps * share))
    return replace(config, optimizer=changed, guided_updates=round(config.guided_updates * share))


def variants(config: ExperimentConfig, study: StudyConfig) -> dict[str, Variant]:
    """All variants by name, in the order in which they are run."""
    made = [*_baselines(config, study), *_rate_distortion(config, study), *_pretraining(config, study)]
    made += _controls(config, study)
    return {variant.name: variant for variant in made}


def _weighed(config: ExperimentConfig, alpha: float | None) -> ExperimentConfig:
    """Discovery with this weight of the KL at the end of its warm-up, or as it is."""
    return config if alpha is None else replace(config, discover=replace(config.discover, alpha=alpha))


def _baselines(config: ExperimentConfig, study: StudyConfig) -> list[Variant]:
    """The paper's baselines beside raw-action RL, which the reproduction has (Fig. 8)."""
    forced = replace(config, meta_controller=replace(config.meta_controller, gate=GateConfig(mode="forced")))
    forced = _weighed(forced, study.forced_alpha)
    cotrained = _weighed(_cotrained(config), study.cotrained_alpha)
    joint = replace(
        cotrained.discover.optimizer, steps=max(config.pretrain.optimizer.steps, config.discover.optimizer.steps)
    )
    scratch = replace(cotrained, discover=replace(cotrained.discover, optimizer=joint))
    return [
        Variant(name="compile", group="baseline", config=_compile(config)),
        Variant(name="forced-switching", group="baseline", config=forced),
        Variant(name="cotrained-from-pretrained", group="baseline", config=cotrained),
        Variant(name="cotrained-from-scratch", group="baseline", config=scratch, start="new"),
    ]


def _compile(config: ExperimentConfig) -> ExperimentConfig:
    """CompILE, whose codes are Gaussian: with as many entries as a binary code's words."""
    codes = config.meta_controller
    if codes.code == "binary":
        codes = replace(codes, code="gaussian", dim_latent=2**codes.dim_latent, free_bits=0.0)
    return replace(config, discovery="compile", meta_controller=codes)


def _cotrained(config: ExperimentConfig) -> ExperimentConfig:
    """The base trained along, at pretraining's learning rate."""
    optimizer = replace(config.discover.optimizer, lr=config.pretrain.optimizer.lr)
    return replace(config, discover=replace(config.discover, optimizer=optimizer, train_model=True))


def _controls(config: ExperimentConfig, study: StudyConfig) -> list[Variant]:
    """Where the sequence embedder sees episodes under symmetry augmentation: without it, as in the paper, the base
    frozen and co-trained. They tell what the augmentation does for each."""
    if not config.discover.symmetry_augmentation:
        return []
    compared = (Variant(name="frozen", group="control", config=config), *_baselines(config, study))
    return [
        replace(
            variant,
            name=f"unaugmented-{variant.name}",
            group="control",
            config=replace(variant.config, discover=replace(variant.config.discover, symmetry_augmentation=False)),
        )
        for variant in compared
        if variant.name == "frozen" or variant.config.discover.train_model
    ]


def _rate_distortion(config: ExperimentConfig, study: StudyConfig) -> list[Variant]:
    """Each alpha, frozen and co-trained, with the Gumbel-sigmoid gate (Fig. 7)."""
    made = []
    gate = replace(config.meta_controller.gate, mode="gumbel-sigmoid")
    for alpha in study.alphas:
        for kind, base in (("frozen", config), ("cotrained", _cotrained(config))):
            discovery = replace(_lasting(base.discover, study.rate_steps), alpha=alpha)
            changed = replace(base, discover=discovery, meta_controller=replace(base.meta_controller, gate=gate))
            name = f"rate-{kind}-{number_name(alpha)}"
            made.append(Variant(name=name, group="rate", config=changed, value=alpha, reinforces=False))
    return made


def _pretraining(config: ExperimentConfig, study: StudyConfig) -> list[Variant]:
    """Base models pretrained for less time or otherwise, with the same discovery on each (Fig. A2)."""
    rl = replace(config.internal_rl, episodes=study.episodes)
    discovery = replace(_lasting(config.discover, study.discovery_steps), alpha_warmup=study.alpha_warmup)
    config = replace(config, discover=discovery, internal_rl=rl)
    made = []
    for step in (step for step in study.snapshots if step in config.pretrain.snapshots):
        name = f"pretraining-steps-{step}"
        made.append(Variant(name=name, group="pretraining", config=config, value=step, start=step))
    optimizer = replace(config.pretrain.optimizer, steps=study.pretraining_steps, decay_steps=0)  # as at a snapshot
    config = replace(config, pretrain=replace(config.pretrain, optimizer=optimizer, snapshots=()))

    def add(name: str, value: float, changed: ExperimentConfig) -> None:
        made.append(Variant(name=name, group="pretraining", config=changed, value=value, start="own"))

    for decay in study.weight_decays:
        decayed = replace(config.pretrain, optimizer=replace(optimizer, weight_decay=decay))
        add(f"weight-decay-{number_name(decay)}", decay, replace(config, pretrain=decayed))
    for weight in study.state_loss_weights:
        changed = replace(config, pretrain=replace(config.pretrain, state_loss_weight=weight))
        if config.discover.state_loss_weight > 0:  # where eq. 3 has a lambda, it is that of the model
            changed = replace(changed, discover=replace(discovery, state_loss_weight=weight))
        add(f"state-loss-{number_name(weight)}", weight, changed)
    if "epsilon" in {part.name for part in dataclasses.fields(config.domain)}:
        for epsilon in study.epsilons:
            changed = replace(config, domain=replace(config.domain, epsilon=epsilon))
            add(f"epsilon-{number_name(epsilon)}", epsilon, changed)
    return made
