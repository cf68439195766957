"""Complete configurations of the gridworld-pinpad experiment: debug (seconds), laptop, quick, paper.

A preset is a function that returns a `GridworldConfig`; variants derive from it with `dataclasses.replace`. Table and
section numbers are those of arXiv 2512.20605.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from metacontroller.baselines.compile import CompileConfig
from metacontroller.control.metacontroller import MetaController
from metacontroller.control.policy import PolicyKind
from metacontroller.control.sequence_embedder import EmbedderKind
from metacontroller.control.switching import GateConfig
from metacontroller.data.trajectories import Trajectories
from metacontroller.envs.expert import TIE_BREAKS, TieBreak, expert_trajectories
from metacontroller.envs.gridworld_pinpad import NUM_ACTIONS, PinpadConfig, turn_at_random
from metacontroller.envs.tasks import A1_POST, A2_POST, TABLE_A1, TABLE_A2, Task, check_tasks, subgoal_vocabulary
from metacontroller.errors import UserError
from metacontroller.models.transformer import Transformer
from metacontroller.phases.discover import DiscoverConfig, EmbeddedView
from metacontroller.phases.internal_rl import InternalRLConfig
from metacontroller.phases.pretrain import PretrainConfig
from metacontroller.phases.training import Generate, OptimizerConfig
from metacontroller.precision import Precision, check_precision
from metacontroller.presets.reading import from_plain

STREAMS = ("model", "meta_controller", "pretrain", "discover", "internal_rl", "raw_action_rl", "evaluate", "analyse")
"""What draws random numbers, each from a stream of its own."""

MAX_SEED = 2**28 - 1
"""Seeds of streams are ``seed * 8 + place``; PyTorch's CPU generator looks at 32 bits of a seed."""


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """Who makes behaviour data, see `expert_trajectories`."""

    tie_break: TieBreak = "random"
    """Among equally short paths: "random" as in the paper, or "fixed"."""
    epsilon: float = 0.0
    """Share of random moves, 0 to 1."""

    def __post_init__(self) -> None:
        if self.tie_break not in TIE_BREAKS:
            raise UserError(f"tie_break is {self.tie_break!r}; expected one of {', '.join(map(repr, TIE_BREAKS))}.")
        if not 0 <= self.epsilon <= 1:
            raise UserError(f"epsilon is {self.epsilon}; expected a probability between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The action model."""

    dim: int
    """n_e, width of the residual stream."""
    lower_depth: int
    """l, blocks below the controlled layer; with none, that layer is the input embedding."""
    upper_depth: int
    """Blocks above the controlled layer."""
    heads: int
    """Attention heads, or those of Hawk's gates, in each block."""
    mlp_dim: int
    """Hidden units of each block's MLP."""
    body: Literal["attention", "hawk"] = "attention"
    """Blocks of attention, or "hawk" (RG-LRU), as wide as the residual: the paper's SSM."""
    view: Literal["absolute", "egocentric"] = "absolute"
    """What the grid encoder reads: cells by their place on the grid (the paper), or as seen from the agent."""
    reach: int | None = None
    """Cells beyond which the egocentric view tells no more apart; None for the whole grid."""
    precision: Precision = "auto"
    """Type of the large matrix products; auto: bfloat16 where the device is faster in it."""

    def __post_init__(self) -> None:
        check_precision(self.precision)
        _check_positive(self, ("dim", "upper_depth", "heads", "mlp_dim"))
        if self.lower_depth < 0:
            raise UserError(f"lower_depth is {self.lower_depth}; expected at least 0.")
        if self.dim % self.heads:
            raise UserError(f"dim {self.dim} is not a multiple of heads {self.heads}; change one of them.")
        if self.body not in ("attention", "hawk"):
            raise UserError(f"body is {self.body!r}; expected 'attention' or 'hawk'.")
        if self.view not in ("absolute", "egocentric"):
            raise UserError(f"view is {self.view!r}; expected 'absolute' or 'egocentric'.")


@dataclass(frozen=True, kw_only=True)
class MetaControllerConfig:
    """The metacontroller; widths are numbers of units."""

    dim_latent: int = 8
    """n_z, numbers in a code."""
    dim_history: int = 32
    """n_h, width of the history GRU (eq. 12)."""
    dim_sequence: int = 32
    """n_s, width of the sequence embedding (eq. 13)."""
    encoder_hidden: int = 64
    """Hidden width of the encoder that proposes codes (eq. 15)."""
    decoder_hidden: int = 32
    """Hidden width of the hypernetwork that makes U from a code (eq. 18)."""
    switch_hidden: int = 32
    """Hidden width of the switching unit (eq. 16)."""
    embedder_dim: int = 64
    """Inner width of the sequence embedder, a multiple of 4."""
    embedder_depth: int = 1
    """Blocks of the sequence embedder."""
    embedder_kind: EmbedderKind = "attention"
    """Blocks of the sequence embedder: "hawk" is the paper's SSM."""
    rank: int | None = 16
    """r, rank of the controller U; None for full."""
    policy_hidden: int = 256
    """Width of the policy over codes; a multiple of 8 for hawk."""
    policy_kind: PolicyKind = "gru"
    """Recurrence of the policy over codes: "hawk" is the paper's SSM."""
    gate: GateConfig = field(default_factory=GateConfig)
    """How the switching gate is used."""
    precision: Precision = "auto"
    """Type of the sequence embedder's and controller's products; auto: bfloat16 where the device is faster in it."""

    def __post_init__(self) -> None:
        check_precision(self.precision)
        names = ("dim_latent", "dim_history", "dim_sequence", "encoder_hidden", "decoder_hidden", "switch_hidden")
        _check_positive(self, (*names, "embedder_dim", "embedder_depth", "policy_hidden"))
        for name, kinds in (("embedder_kind", ("attention", "hawk")), ("policy_kind", ("gru", "hawk"))):
            if getattr(self, name) not in kinds:
                raise UserError(f"{name} is {getattr(self, name)!r}; expected {kinds[0]!r} or {kinds[1]!r}.")
        if self.policy_kind == "hawk" and self.policy_hidden % 8:
            raise UserError(f"policy_hidden is {self.policy_hidden}; expected a multiple of 8, the gates' heads.")
        if self.embedder_dim % 4:
            raise UserError(f"embedder_dim is {self.embedder_dim}; expected a multiple of 4, its heads.")
        if self.rank is not None:
            _check_positive(self, ("rank",))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How much is measured at the end of a run."""

    episodes: int = 4096
    """Episodes on held-out layouts, for each figure."""
    codes: int = 64
    """Codes drawn from the prior, to see what a fixed code leads to."""
    layouts_per_code: int = 256
    """Held-out layouts for each of those codes."""

    def __post_init__(self) -> None:
        _check_positive(self, ("episodes", "codes", "layouts_per_code"))


def _paper_compile() -> CompileConfig:
    return CompileConfig(  # hyperparameters of the baselines
        optimizer=OptimizerConfig(steps=32_000, batch_size=512, lr=1e-3, weight_decay=0.03),
        segments=4,
        hidden=32,
        prior_rate=10.0,
        temperature=1.0,  # 0.5 or 1
        alpha_code=0.1,  # our choice among those searched: 0.003 to 1
        alpha_place=0.1,  # likewise
    )


@dataclass(frozen=True, kw_only=True)
class GridworldConfig:
    """Everything a run needs."""

    environment: PinpadConfig
    """The grid."""
    tasks: tuple[Task, ...]
    """Tasks of the behaviour data: colors to visit in order, such as 0-1-2."""
    post_task: Task
    """The task that reinforcement learning must solve."""
    expert: ExpertConfig
    """Who made the data of pretraining."""
    discovery_expert: ExpertConfig
    """Who made the data of discovery."""
    model: ModelConfig
    """The action model."""
    meta_controller: MetaControllerConfig
    """What steers the action model."""
    pretrain: PretrainConfig
    """Phase 1, pretraining."""
    discover: DiscoverConfig
    """Phase 2, discovery."""
    internal_rl: InternalRLConfig
    """Phase 3, reinforcement learning over codes."""
    raw_action_rl: InternalRLConfig
    """The baseline, reinforcement learning over raw actions."""
    evaluate: EvaluateConfig
    """Measures at the end."""
    colors_per_subgoal: int = 1
    """Colors of a task that make one of its subgoals, by which episodes are labelled and measured."""
    turned_embedding: bool = False
    """Symmetry augmentation of what discovery's sequence embedder sees (our choice); else episodes as they are."""
    discovery: Literal["metacontroller", "compile"] = "metacontroller"
    """By the metacontroller, or by the baseline CompILE."""
    compile: CompileConfig = field(default_factory=_paper_compile)
    """The baseline CompILE, where it does the discovery."""
    seed: int = 0
    """From which all other seeds derive, see `with_seed`; on the command line --seed or --seeds."""

    def __post_init__(self) -> None:
        check_tasks([*self.tasks, self.post_task], self.environment.num_colors)
        subgoals(self)  # refuses tasks that are not made of whole subgoals
        if self.discovery not in ("metacontroller", "compile"):
            raise UserError(f"discovery is {self.discovery!r}; expected 'metacontroller' or 'compile'.")
        if self.meta_controller.rank is not None and self.meta_controller.rank > self.model.dim:
            raise UserError(
                f"meta_controller.rank is {self.meta_controller.rank}; expected at most model.dim, {self.model.dim}."
            )
        stream_seed(self.seed, STREAMS[0])


def _check_positive(config: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; expected at least 1.")


# -- seeds ------------------------------------------------------------------------------------------------------------


def stream_seed(seed: int, stream: str) -> int:
    """Seed of one of `STREAMS`; no two of them are the same, whatever the seeds, so no layout stream is used twice."""
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed}; expected 0..{MAX_SEED}.")
    return seed * 8 + STREAMS.index(stream)


def with_seed(config: GridworldConfig, seed: int) -> GridworldConfig:
    """The same experiment from another seed, with the seeds of all phases derived from it."""
    phases = ("pretrain", "discover", "internal_rl", "raw_action_rl")
    seeded: dict[str, Any] = {name: replace(getattr(config, name), seed=stream_seed(seed, name)) for name in phases}
    seeded["compile"] = replace(config.compile, seed=stream_seed(seed, "discover"))
    return replace(config, seed=seed, **seeded)


# -- what a config describes ------------------------------------------------------------------------------------------


def build_model(config: GridworldConfig) -> Transformer:
    """A new action model, its weights drawn from the config's seed."""
    environment, model = config.environment, config.model
    body = {"kind": model.body, "heads": model.heads, "mlp_dim": model.mlp_dim}
    grid = {
        "size": environment.size,
        "num_colors": environment.num_colors,
        "num_walls": environment.num_walls,
        "view": model.view,
        "reach": model.reach,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config.seed, "model"))
        return Transformer(
            model.dim,
            action_embed_readout={"num_discrete": NUM_ACTIONS},
            state_embed_readout={"grid": grid},
            lower_body={"depth": model.lower_depth, **body},
            upper_body={"depth": model.upper_depth, **body},
            condition_on_actions=False,
            precision=model.precision,
        )


def build_meta_controller(config: GridworldConfig) -> MetaController:
    """A new metacontroller, its weights drawn from the config's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config.seed, "meta_controller"))
        return MetaController(config.model.dim, **vars(config.meta_controller))


def subgoals(config: GridworldConfig) -> tuple[Task, ...]:
    """The subgoals of the tasks of training and post-training, each as its colors; indices and labels refer to it."""
    tasks = [*config.tasks, config.post_task]
    return subgoal_vocabulary(tasks, config.colors_per_subgoal, config.environment.num_colors)


def generate(config: GridworldConfig, which: Literal["pretrain", "discover"]) -> Generate:
    """The source of one phase's episodes: ``generate(config, "discover")(n, generator)`` returns n fresh ones."""
    expert = {"pretrain": config.expert, "discover": config.discovery_expert}[which]
    vocabulary = subgoals(config)

    def source(n: int, generator: torch.Generator) -> Trajectories:
        return expert_trajectories(
            config.environment,
            config.tasks,
            n,
            generator=generator,
            tie_break=expert.tie_break,
            epsilon=expert.epsilon,
            subgoals=vocabulary,
            device=generator.device,
        )

    return source


def embedded_view(config: GridworldConfig) -> EmbeddedView | None:
    """How discovery's sequence embedder sees episodes; None for as they are."""
    if not config.turned_embedding:
        return None
    return lambda states, generator: turn_at_random(config.environment.size, states, generator)


def from_json(data: Any) -> GridworldConfig:
    """The config that a run's config.json holds; ValueError names the field that is unknown, missing or wrong."""
    return from_plain(GridworldConfig, data)


# -- presets ----------------------------------------------------------------------------------------------------------


def debug() -> GridworldConfig:
    """Every phase in seconds on a 5 x 5 grid; learns nothing worth having."""
    optimizer = OptimizerConfig(steps=12, batch_size=16, lr=1e-3, log_every=3, checkpoint_every=4)
    rl = InternalRLConfig(episodes=192, batch_size=32, lr=1e-3, passes=2, checkpoint_every=2)
    config = GridworldConfig(
        environment=PinpadConfig(size=5, num_colors=4, num_walls=1, max_steps=20),
        tasks=TABLE_A2,
        post_task=(0, 1),  # short: chance succeeds now and then, so that reinforcement learning has something to do
        expert=ExpertConfig(tie_break="fixed"),
        discovery_expert=ExpertConfig(tie_break="fixed"),
        model=ModelConfig(
            dim=16, lower_depth=1, upper_depth=1, heads=2, mlp_dim=32, view="egocentric", precision="float32"
        ),
        meta_controller=MetaControllerConfig(
            dim_latent=4,
            dim_history=8,
            dim_sequence=8,
            encoder_hidden=16,
            decoder_hidden=8,
            switch_hidden=8,
            embedder_dim=16,
            rank=4,
            policy_hidden=16,
            precision="float32",
        ),
        pretrain=PretrainConfig(optimizer=optimizer, snapshots=(4,)),
        discover=DiscoverConfig(optimizer=optimizer, alpha_warmup=(2, 8)),
        compile=CompileConfig(optimizer=optimizer, alpha_warmup=(2, 8)),
        internal_rl=rl,
        raw_action_rl=rl,
        evaluate=EvaluateConfig(episodes=64, codes=4, layouts_per_code=16),
    )
    return with_seed(config, 0)


def laptop() -> GridworldConfig:
    """The paper's experiment on two cores: single-color subgoals (table A2) on a grid, with the paper's stochastic
    expert. All values are our choice; docs/log.md says what each was tried against."""
    expert = ExpertConfig(tie_break="random", epsilon=0.0)
    rl = InternalRLConfig(episodes=100_000, batch_size=1024, lr=1e-3, passes=4)
    config = GridworldConfig(
        environment=PinpadConfig(size=7, num_colors=4, num_walls=2, max_steps=100),
        tasks=TABLE_A2,
        post_task=A2_POST,
        expert=expert,
        discovery_expert=expert,
        model=ModelConfig(dim=128, lower_depth=1, upper_depth=2, heads=4, mlp_dim=128, view="egocentric", reach=2),
        meta_controller=MetaControllerConfig(dim_latent=3, policy_hidden=64),
        pretrain=PretrainConfig(
            # a model that is surer of what follows is harder to lead elsewhere: longer, or to the end of a falling
            # learning rate, is worse (docs/log.md, 24, 44)
            optimizer=OptimizerConfig(steps=2000, batch_size=256, lr=1e-3),
            snapshots=(125, 250, 500, 1000),
        ),
        discover=DiscoverConfig(
            optimizer=OptimizerConfig(steps=3200, batch_size=128, lr=2e-3, decay_steps=800),
            alpha=0.004,
            alpha_start=0.0,  # codes must mean something before they cost something
            alpha_warmup=(800, 1500),
        ),
        compile=CompileConfig(
            optimizer=OptimizerConfig(steps=3200, batch_size=128, lr=2e-3, decay_steps=800),
            alpha_code=0.03,
            alpha_place=0.03,
            alpha_warmup=(800, 1500),
            prior_rate=5.0,
        ),
        internal_rl=rl,
        raw_action_rl=rl,
        evaluate=EvaluateConfig(episodes=4096, codes=256, layouts_per_code=64),
        turned_embedding=True,
    )
    return with_seed(config, 0)


def quick() -> GridworldConfig:
    """The laptop preset with a post-training task of six subgoals, whose five transitions training never shows: long
    enough that raw actions do not stumble over it, as they do now and then over four (docs/log.md, 49)."""
    config = laptop()
    rl = replace(config.internal_rl, episodes=250 * 1024)
    return with_seed(replace(config, post_task=(0, 1, 2, 3, 0, 1), internal_rl=rl, raw_action_rl=rl), 0)


def paper() -> GridworldConfig:
    """The paper's grid experiment; days on a GPU."""
    rl = InternalRLConfig(
        episodes=100_000 * 1024,  # 100k updates; hyperparameters of internal RL
        batch_size=1024,  # the same table
        lr=3e-5,  # the same table; 3e-6 to 3e-4 were searched
        weight_decay=0.0,  # our choice
        passes=1,  # our choice
        eps_clip=0.2,  # our choice
        delta=1e-3,  # C.5: about 1e-3
        max_grad_norm=1.0,  # our choice
    )
    config = GridworldConfig(
        environment=PinpadConfig(size=7, num_colors=8, num_walls=4, max_steps=100),  # G, O, W, T
        tasks=TABLE_A1,  # table A1
        post_task=A1_POST,  # table A1
        colors_per_subgoal=2,  # the same table: the pairs 0-1, 2-3, 4-5 and 6-7
        expert=ExpertConfig(tie_break="random", epsilon=0.0),  # stochastic shortest paths; 0 unless studied
        discovery_expert=ExpertConfig(tie_break="random", epsilon=0.0),
        model=ModelConfig(  # D.1: 6 blocks, controlled at mid-depth
            dim=256,
            lower_depth=3,
            upper_depth=3,
            heads=4,
            mlp_dim=512,
            view="absolute",
        ),
        meta_controller=MetaControllerConfig(
            dim_latent=8,  # hyperparameters of discovery
            dim_history=32,  # the same table
            dim_sequence=32,  # the same table
            encoder_hidden=64,  # the same table
            decoder_hidden=32,  # the same table
            switch_hidden=32,  # our choice
            embedder_dim=64,  # our choice
            embedder_depth=1,  # our choice
            embedder_kind="hawk",  # eq. 13, D.1
            rank=16,  # as the paper's supervised controllers on the grid
            policy_hidden=256,  # C.5
            policy_kind="hawk",  # C.5: an SSM of one layer
            gate=GateConfig(mode="soft", threshold=0.5),  # C.6
        ),
        pretrain=PretrainConfig(
            optimizer=OptimizerConfig(  # hyperparameters of pretraining
                steps=256_000,
                batch_size=1024,
                lr=3e-4,
                weight_decay=0.03,
                decay_steps=0,
                max_grad_norm=1.0,  # our choice
            ),
            state_loss_weight=0.01,  # 0 or 0.01
            snapshots=(10_000, 50_000, 100_000),  # our choice
        ),
        discover=DiscoverConfig(
            optimizer=OptimizerConfig(  # hyperparameters of discovery
                steps=64_000,
                batch_size=512,
                lr=1e-3,
                weight_decay=0.03,
                decay_steps=0,
                max_grad_norm=1.0,  # our choice
            ),
            alpha=0.17,  # our choice among those searched: 0, 0.05, 0.1, 0.17, 0.3, 0.5, 1
            alpha_start=0.17,  # no warm-up: the paper is silent
        ),
        internal_rl=rl,
        raw_action_rl=rl,
        evaluate=EvaluateConfig(episodes=4096, codes=64, layouts_per_code=256),  # our choice
    )
    return with_seed(config, 0)
