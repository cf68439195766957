"""Complete configurations of the gridworld-pinpad experiment: debug (seconds), laptop, quick, paper.

A preset is a function that returns an `ExperimentConfig`; variants derive from it with `dataclasses.replace`. Table and
section numbers are those of arXiv 2512.20605.
"""

from __future__ import annotations

from dataclasses import replace

from metacontroller.baselines.compile import CompileConfig
from metacontroller.control.config import MetaControllerConfig
from metacontroller.control.switching import GateConfig
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpadConfig
from metacontroller.domains.pinpad.tasks import A1_POST, A2_POST, TABLE_A1, TABLE_A2
from metacontroller.models.config import ModelConfig
from metacontroller.phases.discover import DiscoverConfig
from metacontroller.phases.evaluate import EvaluateConfig
from metacontroller.phases.policy_gradient import InternalRLConfig
from metacontroller.phases.pretrain import PretrainConfig
from metacontroller.recipes.config import ExperimentConfig, with_seed
from metacontroller.recipes.study_runs import StudyConfig
from metacontroller.training.optimizer import OptimizerConfig


def debug() -> ExperimentConfig:
    """Every phase in seconds on a 5 x 5 grid; learns nothing worth having."""
    optimizer = OptimizerConfig(steps=12, batch_size=16, lr=1e-3, log_every=3, checkpoint_every=4)
    rl = InternalRLConfig(episodes=192, batch_size=32, lr=1e-3, update_epochs=2, checkpoint_every=2)
    config = ExperimentConfig(
        domain=GridworldPinpadConfig(
            size=5,
            num_colors=4,
            num_walls=1,
            max_steps=20,
            tasks=TABLE_A2,
            post_task=(0, 1),  # short: chance succeeds now and then, so that reinforcement learning has something to do
            colors_per_subgoal=1,
            tie_break="fixed",
            view="egocentric",
        ),
        model=ModelConfig(dim=16, lower_depth=1, upper_depth=1, heads=2, mlp_dim=32, precision="float32"),
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
        evaluate=EvaluateConfig(episodes=64, codes=4, layouts_per_code=16, walk_steps=20, link_updates=5),
    )
    return with_seed(config, 0)


def laptop() -> ExperimentConfig:
    """The paper's experiment on two cores: single-color subgoals (table A2) on a grid, with the paper's stochastic
    expert. All values are our choice; docs/log.md says what each was tried against."""
    rl = InternalRLConfig(episodes=100_000, batch_size=1024, lr=1e-3, update_epochs=4)
    optimizer = OptimizerConfig(steps=3200, batch_size=128, lr=2e-3, decay_steps=800)
    config = ExperimentConfig(
        domain=GridworldPinpadConfig(
            size=7,
            num_colors=4,
            num_walls=2,
            max_steps=100,
            tasks=TABLE_A2,
            post_task=A2_POST,
            colors_per_subgoal=1,
            tie_break="random",
            view="egocentric",
            reach=2,
        ),
        model=ModelConfig(dim=128, lower_depth=1, upper_depth=2, heads=4, mlp_dim=128),
        meta_controller=MetaControllerConfig(dim_latent=3, policy_hidden=64),
        pretrain=PretrainConfig(
            # an overconfident model is harder to steer elsewhere: longer, or to the end of a falling
            # learning rate, is worse (docs/log.md, 24, 44)
            optimizer=OptimizerConfig(steps=2000, batch_size=256, lr=1e-3),
            snapshots=(125, 250, 500, 1000),
        ),
        discover=DiscoverConfig(
            optimizer=optimizer,
            alpha=0.004,
            alpha_start=0.0,  # codes must mean something before they cost something
            alpha_warmup=(800, 1500),
            symmetry_augmentation=True,
        ),
        compile=CompileConfig(
            optimizer=optimizer, alpha_code=0.03, alpha_boundary=0.03, alpha_warmup=(800, 1500), prior_rate=5.0
        ),
        internal_rl=rl,
        raw_action_rl=rl,
        evaluate=EvaluateConfig(episodes=4096, codes=256, layouts_per_code=64, walk_steps=28),
    )
    return with_seed(config, 0)


def quick() -> ExperimentConfig:
    """The laptop preset with a post-training task of six subgoals, whose five transitions training never shows: long
    enough that raw actions do not stumble over it, as they do now and then over four (docs/log.md, 49). First successes
    are rare: the policy starts wider than the prior, an update waits for some of them, each is learned from as far as
    target_kl allows, and a little entropy is kept (docs/log.md, 65, 66)."""
    config = laptop()
    rl = replace(
        config.internal_rl,
        episodes=400 * 1024,
        min_better=4,
        update_epochs=32,
        target_kl=0.05,
        entropy_weight=0.003,
    )
    domain = replace(config.domain, post_task=(0, 1, 2, 3, 0, 1))
    steering = replace(config.meta_controller, policy_std=2.0)
    return with_seed(replace(config, domain=domain, meta_controller=steering, internal_rl=rl, raw_action_rl=rl), 0)


PAPER_RL = InternalRLConfig(
    episodes=100_000 * 1024,  # 100k updates; hyperparameters of internal RL
    batch_size=1024,  # the same table
    lr=3e-5,  # the same table; 3e-6 to 3e-4 were searched
    weight_decay=0.0,  # our choice
    update_epochs=1,  # our choice
    eps_clip=0.2,  # our choice
    delta=1e-3,  # C.5: about 1e-3
    max_grad_norm=1.0,  # our choice
)
PAPER_METACONTROLLER = MetaControllerConfig(
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
)
PAPER_OPTIMIZER = OptimizerConfig(
    steps=256_000,  # hyperparameters of pretraining
    batch_size=1024,  # the same table
    lr=3e-4,  # the same table
    weight_decay=0.03,  # the same table, and those of discovery and of the baselines
    decay_steps=0,  # the same tables
    max_grad_norm=1.0,  # our choice
)


def paper() -> ExperimentConfig:
    """The paper's grid experiment; days on a GPU. ``ant.paper`` is this, but for what its tables say otherwise."""
    config = ExperimentConfig(
        domain=GridworldPinpadConfig(
            size=7,  # G
            num_colors=8,  # O
            num_walls=4,  # W
            max_steps=100,  # T
            tasks=TABLE_A1,  # table A1
            post_task=A1_POST,  # table A1
            colors_per_subgoal=2,  # the same table: the pairs 0-1, 2-3, 4-5 and 6-7
            tie_break="random",  # stochastic shortest paths
            epsilon=0.0,  # unless studied
            discovery_epsilon=0.0,
            view="absolute",
        ),
        # D.1: 6 blocks, controlled at mid-depth
        model=ModelConfig(dim=256, lower_depth=3, upper_depth=3, heads=4, mlp_dim=512),
        meta_controller=PAPER_METACONTROLLER,
        pretrain=PretrainConfig(
            optimizer=PAPER_OPTIMIZER,
            state_loss_weight=0.01,  # 0 or 0.01
            snapshots=(10_000, 50_000, 100_000),  # our choice
        ),
        discover=DiscoverConfig(
            optimizer=replace(PAPER_OPTIMIZER, steps=64_000, batch_size=512, lr=1e-3),  # hyperparameters of discovery
            alpha=0.17,  # our choice among those searched: 0, 0.05, 0.1, 0.17, 0.3, 0.5, 1
            alpha_start=0.17,  # no warm-up: the paper is silent
            state_loss_weight=0.01,  # eq. 3 has the lambda of pretraining
        ),
        compile=CompileConfig(  # hyperparameters of the baselines
            optimizer=replace(PAPER_OPTIMIZER, steps=32_000, batch_size=512, lr=1e-3),
            segments=4,
            hidden=32,
            prior_rate=10.0,
            temperature=1.0,  # 0.5 or 1
            alpha_code=0.1,  # our choice among those searched: 0.003 to 1
            alpha_boundary=0.1,  # likewise
        ),
        internal_rl=PAPER_RL,
        raw_action_rl=PAPER_RL,
        evaluate=EvaluateConfig(episodes=4096, codes=64, layouts_per_code=256, walk_steps=56),  # our choice
    )
    return with_seed(config, 0)


PRESETS = {"debug": debug, "laptop": laptop, "quick": quick, "paper": paper}

STUDIES = {
    "debug": StudyConfig(
        alphas=(0.01,),
        rate_steps=6,
        discovery_steps=6,
        alpha_warmup=(1, 4),
        snapshots=(4,),
        weight_decays=(0.1,),
        state_loss_weights=(0.1,),
        epsilons=(0.1,),
        pretraining_steps=4,
        episodes=64,
        probe_steps=5,
        probe_episodes=64,
        steer_steps=5,
        steer_episodes=64,
        inject_walks=16,
        gate_episodes=64,
        oracle_episodes=64,
    ),
    "laptop": StudyConfig(),
    "quick": StudyConfig(
        forced_alpha=0.001,  # searched on seed 0; CompILE's weights made no difference (docs/log.md, 74)
        cotrained_alpha=0.001,  # likewise
        episodes=250 * 1024,  # internal RL leaves zero after 73,000 to 196,000
    ),
    "paper": StudyConfig(
        alphas=(0.0, 0.05, 0.1, 0.17, 0.3, 0.5, 1.0),  # the alphas searched
        rate_steps=64_000,  # as the paper's discovery; all below: our choice where the paper is silent
        discovery_steps=64_000,
        alpha_warmup=(0, 0),
        snapshots=(10_000, 50_000, 100_000),
        weight_decays=(0.0, 0.01, 0.1),
        state_loss_weights=(0.0, 0.1),
        epsilons=(0.05, 0.1, 0.2),  # §4
        pretraining_steps=100_000,
        episodes=1_000_000,
        few_seeds=3,
        probe_steps=8000,  # table of probes
        probe_batch_size=512,  # the same table
        probe_lr=1e-3,  # the same table
        probe_episodes=4096,
        steer_steps=3200,  # table of supervised controllers
        steer_batch_size=512,  # the same table
        steer_lr=1e-3,  # the same table
        steer_episodes=4096,
        inject_walks=4096,
        gate_episodes=4096,
        oracle_episodes=4096,
    ),
}
"""How much of everything `metacontroller figures` does, by preset."""
