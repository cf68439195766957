"""How much a study does, and its runs: the paper's baselines, and what its other figures vary."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, Literal

from metacontroller.control.switching import GateConfig
from metacontroller.ranges import Count, CountOr0, NotNegative, Positive, Probability, Rows, Warmup, check_fields
from metacontroller.recipes.config import ExperimentConfig, with_values
from metacontroller.recipes.schedule import number_name


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """How much of everything. What begins with the command of an analysis is an option of that analysis. UserError for
    values out of range."""

    forced_alpha: NotNegative | None = None
    """Weight of the KL where switching is forced, searched for that baseline; the reproduction's unless given."""
    cotrained_alpha: NotNegative | None = None
    """Weight of the KL of the co-trained baselines, likewise. CompILE's are in its own config."""
    alphas: tuple[NotNegative, ...] = (0.001, 0.004, 0.02, 0.1)
    """Weights of the KL, one for each point of the rate-distortion curves."""
    rate_steps: Count = 2400
    """Updates of discovery at each point of the rate-distortion curves."""
    discovery_steps: Count = 1600
    """Updates of discovery on variants of pretraining."""
    alpha_warmup: Warmup = (700, 1200)
    """Updates (from, to) of the KL's linear warm-up, on variants of pretraining."""
    snapshots: tuple[Count, ...] = (500, 1000)
    """Updates of pretraining after which to discover on the base model, where pretraining keeps a snapshot there."""
    weight_decays: tuple[NotNegative, ...] = (0.0,)
    """Weight decays of pretraining; a base model for each, to compare with the snapshot of as many updates."""
    state_loss_weights: tuple[NotNegative, ...] = (0.01,)
    """Weights lambda of pretraining's state loss; a base model for each."""
    epsilons: tuple[Probability, ...] = (0.1,)
    """Shares of the experts' random moves, where the world has any; a base model for each."""
    pretraining_steps: Count = 1000
    """Pretraining updates of each base model of weight_decays, state_loss_weights and epsilons."""
    episodes: Count = 50_000
    """Episodes of internal RL on each variant."""
    few_seeds: CountOr0 = 1
    """So many of the seeds have curves, variants and controls; all have the baselines."""
    probe_steps: Count = 300
    """Updates of the linear probes."""
    probe_batch_size: Rows = 128
    """Episodes of an update of the linear probes."""
    probe_lr: Positive = 3e-3
    """Learning rate of the linear probes."""
    probe_episodes: Rows = 2048
    """Held-out episodes to judge the linear probes by."""
    steer_steps: Count = 3200
    """Updates of the supervised controllers (the paper's table)."""
    steer_batch_size: Rows = 128
    """Episodes of an update of the supervised controllers."""
    steer_lr: Positive = 1e-3
    """Learning rate of the supervised controllers (the paper's table)."""
    steer_episodes: Rows = 2048
    """Held-out episodes to judge the supervised controllers by."""
    inject_walks: Rows = 1024
    """Walks for each subgoal, free and with its code forced."""
    gate_episodes: Rows = 2048
    """Held-out episodes to judge the gate by."""
    oracle_episodes: Rows = 1024
    """Held-out episodes of each kind to play experts' codes in."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One change to the reproduction. value: what is varied in its group, for axes and tables. start: from the base
    model of the seed, from one of its snapshots (the step), from one that it pretrains itself, or from new weights."""

    name: str
    group: Literal["baseline", "rate", "pretraining", "control"]
    config: ExperimentConfig
    value: float | None = None
    start: Literal["base", "pretrain", "new"] | int = "base"
    reinforces: bool = True


def study_runs(config: ExperimentConfig, study: StudyConfig) -> dict[str, StudyRun]:
    """All runs of a study by name, in the order in which they are run."""
    made = [*_baselines(config, study), *_rate_distortion(config, study), *_pretraining(config, study)]
    made += _controls(config, study)
    return {run.name: run for run in made}


def _baselines(config: ExperimentConfig, study: StudyConfig) -> list[StudyRun]:
    """The paper's baselines beside raw-action RL, which the reproduction has (Fig. 8)."""
    codes, made = config.meta_controller, []

    def add(name: str, changed: ExperimentConfig, alpha: float | None = None, **options: Any) -> None:
        weighed = changed if alpha is None else with_values(changed, {"discover.alpha": alpha})
        made.append(StudyRun(name=name, group="baseline", config=weighed, **options))

    if codes.code == "binary":  # CompILE's are Gaussian: with as many entries as a binary code's words
        codes = replace(codes, code="gaussian", dim_latent=2**codes.dim_latent, free_bits=0.0)
    add("compile", replace(config, discovery="compile", meta_controller=codes))
    add(
        "forced-switching", with_values(config, {"meta_controller.gate": GateConfig(mode="forced")}), study.forced_alpha
    )
    along = _cotrained(config)
    add("cotrained-from-pretrained", along, study.cotrained_alpha)
    steps = max(config.pretrain.optimizer.steps, config.discover.optimizer.steps)
    along = with_values(along, {"discover.optimizer.steps": steps})
    add("cotrained-from-scratch", along, study.cotrained_alpha, start="new")
    return made


def _cotrained(config: ExperimentConfig) -> ExperimentConfig:
    """The base trained along, at pretraining's learning rate."""
    lr = config.pretrain.optimizer.lr
    return with_values(config, {"discover.optimizer.lr": lr, "discover.train_model": True})


def _controls(config: ExperimentConfig, study: StudyConfig) -> list[StudyRun]:
    """Where the sequence embedder sees episodes under symmetry augmentation: without it, as in the paper, the base
    frozen and co-trained. They tell what the augmentation does for each."""
    if not config.discover.symmetry_augmentation:
        return []
    cotrained = [run for run in _baselines(config, study) if run.config.discover.train_model]
    made = []
    for run in (StudyRun(name="frozen", group="control", config=config), *cotrained):
        plain = with_values(run.config, {"discover.symmetry_augmentation": False})
        made.append(replace(run, name=f"unaugmented-{run.name}", group="control", config=plain))
    return made


def _discovery_for(config: ExperimentConfig, steps: int) -> dict[str, Any]:
    """The changes that make discovery last so many updates, as large a share of which is guided and has a falling
    learning rate."""
    discovery, share = config.discover, steps / config.discover.optimizer.steps
    return {
        "discover.optimizer.steps": steps,
        "discover.optimizer.decay_steps": round(discovery.optimizer.decay_steps * share),
        "discover.guided_updates": round(discovery.guided_updates * share),
    }


def _rate_distortion(config: ExperimentConfig, study: StudyConfig) -> list[StudyRun]:
    """Each alpha, frozen and co-trained, with the Gumbel-sigmoid gate (Fig. 7)."""
    made = []
    for alpha in study.alphas:
        for kind, base in (("frozen", config), ("cotrained", _cotrained(config))):
            changes = {"discover.alpha": alpha, "meta_controller.gate.mode": "gumbel-sigmoid"}
            changed = with_values(base, changes | _discovery_for(base, study.rate_steps))
            name = f"rate-{kind}-{number_name(alpha)}"
            made.append(StudyRun(name=name, group="rate", config=changed, value=alpha, reinforces=False))
    return made


def _pretraining(config: ExperimentConfig, study: StudyConfig) -> list[StudyRun]:
    """Base models pretrained for less time or otherwise, with the same discovery on each (Fig. A2)."""
    made = []

    def add(name: str, value: float, changes: dict[str, Any], start: Literal["pretrain"] | int = "pretrain") -> None:
        changes = {"discover.alpha_warmup": study.alpha_warmup, "internal_rl.episodes": study.episodes} | changes
        changed = with_values(config, changes | _discovery_for(config, study.discovery_steps))
        name = f"{name}-{number_name(value)}"
        made.append(StudyRun(name=name, group="pretraining", config=changed, value=value, start=start))

    for step in study.snapshots:
        if step in config.pretrain.snapshots:
            add("pretraining-steps", step, {}, start=step)
    as_at_snapshot: dict[str, Any] = {"pretrain.optimizer.steps": study.pretraining_steps}
    as_at_snapshot |= {"pretrain.optimizer.decay_steps": 0, "pretrain.snapshots": ()}
    for decay in study.weight_decays:
        add("weight-decay", decay, as_at_snapshot | {"pretrain.optimizer.weight_decay": decay})
    for weight in study.state_loss_weights:
        changes = as_at_snapshot | {"pretrain.state_loss_weight": weight}
        if config.discover.state_loss_weight > 0:  # where eq. 3 has a lambda, it is that of the model
            changes["discover.state_loss_weight"] = weight
        add("state-loss", weight, changes)
    if "epsilon" in {part.name for part in dataclasses.fields(config.domain)}:
        for epsilon in study.epsilons:
            add("epsilon", epsilon, as_at_snapshot | {"domain.epsilon": epsilon})
    return made
