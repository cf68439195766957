"""Complete configurations of the ant-pinpad experiment: debug (seconds), short, laptop, paper; see docs/ant.md.

Table and section numbers are those of arXiv 2512.20605. Values of the presets other than paper are our choice.
"""

from __future__ import annotations

import math
from dataclasses import replace

from metacontroller.baselines.compile import CompileConfig
from metacontroller.control.config import MetaControllerConfig
from metacontroller.domains.ant_pinpad.domain import UNTRAINED, AntPinpadConfig
from metacontroller.domains.pinpad.tasks import A2_POST, TABLE_A2, transitions
from metacontroller.models.config import ModelConfig
from metacontroller.phases.discover import DiscoverConfig
from metacontroller.phases.evaluate import EvaluateConfig
from metacontroller.phases.policy_gradient import InternalRLConfig
from metacontroller.phases.pretrain import PretrainConfig
from metacontroller.presets import gridworld
from metacontroller.recipes.config import ExperimentConfig, with_seed
from metacontroller.recipes.study_runs import StudyConfig
from metacontroller.training.optimizer import OptimizerConfig


def debug() -> ExperimentConfig:
    """Every phase in seconds, with an expert of random weights; learns nothing worth having."""
    config = gridworld.debug()
    rl = replace(config.internal_rl, episodes=32, batch_size=16)
    domain = AntPinpadConfig(
        size=3, max_steps=12, post_task=(0,), expert=UNTRAINED, only_successes=False, episodes=48, threads=1
    )
    return with_seed(
        replace(
            config,
            domain=domain,
            model=replace(config.model, body="hawk", action_modes=2, min_action_std=0.3),
            meta_controller=replace(
                config.meta_controller, rank=None, embedder_kind="hawk", policy_kind="hawk", policy_hidden=16
            ),
            pretrain=replace(config.pretrain, state_loss_weight=10.0),
            internal_rl=rl,
            raw_action_rl=rl,
            evaluate=EvaluateConfig(episodes=16, codes=4, layouts_per_code=4, walk_steps=6, link_updates=5),
        ),
        0,
    )


def laptop() -> ExperimentConfig:
    """The paper's experiment with fewer blocks, updates and episodes, for two cores."""
    rl = InternalRLConfig(episodes=80 * 256, batch_size=256, lr=1e-3, update_epochs=4)
    optimizer = OptimizerConfig(steps=2000, batch_size=64, lr=1e-3, decay_steps=500)
    return with_seed(
        ExperimentConfig(
            domain=AntPinpadConfig(start_yaw=math.pi / 4),  # a quarter of the gaits to learn (log 93)
            model=ModelConfig(
                dim=128,
                lower_depth=0,  # at the embedding colors can be asked for, deeper hardly (log 96)
                upper_depth=4,
                heads=8,
                mlp_dim=256,
                body="hawk",
                action_modes=4,  # one Gaussian cannot say 'to the left or to the right' (log 92)
                min_action_std=0.3,  # the expert's own; narrower ones make errors worth more than colors (log 90)
            ),
            meta_controller=MetaControllerConfig(
                dim_latent=2,
                code="binary",  # codes that can be named, for a guided start
                decoder_hidden=0,  # a matrix for each code
                embedder_kind="hawk",
                rank=None,
                policy_hidden=64,
                policy_kind="hawk",
                action_temperature=0.0,  # twice as many tasks are done as with sampled actions (log 103)
            ),
            pretrain=PretrainConfig(
                optimizer=OptimizerConfig(steps=7000, batch_size=16, lr=2e-3, decay_steps=3000),
                choice_weight=20.0,  # the expert chooses in one step of 25 (log 93)
                muon_lr=6e-3,  # learns about three times as fast an update (log 91)
                clips=32,  # decisions are learned ten times as fast (log 109)
                state_loss_weight=0.1,  # with 10 actions are learned ten times more slowly (log 85)
                snapshots=(2000, 4000),
            ),
            discover=DiscoverConfig(
                optimizer=OptimizerConfig(steps=1500, batch_size=32, lr=2e-3, decay_steps=700),
                guided_updates=1200,  # without, discovery finds no colors (log 98, 101)
                alpha=0.05,
                alpha_start=0.05,
                clips=16,  # as in pretraining
                choice_weight=60.0,  # codes decide over little else (log 103)
                muon_lr=4e-3,
                symmetry_augmentation=True,  # quarter turns
            ),
            compile=CompileConfig(optimizer=optimizer, alpha_warmup=(500, 1000)),
            internal_rl=rl,
            raw_action_rl=rl,
            evaluate=EvaluateConfig(episodes=500, codes=32, layouts_per_code=16, walk_steps=150, link_updates=300),
        ),
        0,
    )


def short() -> ExperimentConfig:
    """The laptop preset with tasks of two colors and a post-training task of three: episodes are shorter, so that each
    phase can be looked at before the whole run. The plane is the same, and so is the expert."""
    config = laptop()
    domain = replace(
        config.domain, tasks=tuple(sorted(transitions(TABLE_A2))), post_task=(0, 1, 2), max_steps=300, episodes=8000
    )
    rl = replace(config.internal_rl, episodes=40 * 256)
    return with_seed(replace(config, domain=domain, internal_rl=rl, raw_action_rl=rl), 0)


def paper() -> ExperimentConfig:
    """The paper's ant experiment; days on a GPU, with MuJoCo on the CPU beside it. As the grid's, but for the values
    here: those of the same tables for the ant, where nothing else is said."""
    grid = gridworld.paper()
    rl = replace(grid.internal_rl, episodes=51_200 * 256, batch_size=256)  # 51.2k updates
    discovery = replace(grid.discover.optimizer, steps=32_000, batch_size=128, lr=3e-4)
    config = replace(
        grid,
        domain=AntPinpadConfig(
            size=4,  # G
            num_colors=4,  # O
            num_walls=1,  # W
            max_steps=500,  # T
            cell_size=1.5,  # our choice
            start_yaw=math.pi,  # any
            tasks=TABLE_A2,  # table A2
            post_task=A2_POST,  # table A2
            only_successes=True,  # our choice
            episodes=100_000,  # our choice
            encoder="linear",  # the paper is silent
            symmetry_augmentation=False,  # not in the paper
        ),
        model=replace(grid.model, lower_depth=4, upper_depth=4, heads=8, body="hawk"),  # D.1: 8 blocks
        meta_controller=replace(grid.meta_controller, rank=None),  # full, D.2
        pretrain=replace(
            grid.pretrain,
            optimizer=replace(grid.pretrain.optimizer, steps=204_800, batch_size=512),
            state_loss_weight=10.0,
        ),
        discover=replace(grid.discover, optimizer=discovery, state_loss_weight=10.0),
        compile=replace(grid.compile, optimizer=discovery),
        internal_rl=rl,
        raw_action_rl=rl,
        evaluate=replace(grid.evaluate, layouts_per_code=64, walk_steps=250),  # our choice
    )
    return with_seed(config, 0)


PRESETS = {"debug": debug, "short": short, "laptop": laptop, "paper": paper}

STUDIES = {
    "debug": replace(gridworld.STUDIES["debug"], episodes=16, steer_episodes=16, inject_walks=4),
    "short": StudyConfig(),
    "laptop": StudyConfig(),
    "paper": replace(
        gridworld.STUDIES["paper"],
        rate_steps=32_000,  # as the paper's discovery; all below: our choice where the paper is silent
        discovery_steps=32_000,
        state_loss_weights=(0.0, 1.0),
        epsilons=(),  # experts have none here
        probe_batch_size=256,
        probe_lr=3e-4,
        probe_episodes=512,  # as many as there are for validation
        steer_batch_size=256,  # table of supervised controllers
        steer_lr=3e-4,  # the same table
        steer_episodes=512,
        inject_walks=1024,
        gate_episodes=512,
        oracle_episodes=512,
    ),
}
"""How much of everything `metacontroller figures` does, by preset."""
