"""Complete configurations of BabyAI: debug (seconds) and laptop; see docs/babyai.md.

The choice about missions, which decides what codes can mean: half of the episodes for pretraining show the mission, so
that the model learns to do what it is told and also to guess when it is told nothing. Discovery and post-training show
no mission. In discovery a shown mission would leave nothing for codes to say, since the model knows the next action
already. In post-training the task is one fixed sequence that no demonstration follows, rewarded only at its end: codes
must take the place of a mission that nobody gives. All values are our choice.
"""

from __future__ import annotations

from dataclasses import replace

from metacontroller.domains.babyai.domain import BabyAIConfig
from metacontroller.models.config import ModelConfig
from metacontroller.phases.pretrain import PretrainConfig
from metacontroller.presets import gridworld
from metacontroller.recipes.config import ExperimentConfig, with_seed
from metacontroller.recipes.study_runs import StudyConfig
from metacontroller.training.optimizer import OptimizerConfig


def debug() -> ExperimentConfig:
    """Every phase in seconds in a small room; learns nothing worth having."""
    config = gridworld.debug()
    domain = BabyAIConfig(room_size=6, max_steps=48, post_task=(0,), episodes=200, workers=1)
    return with_seed(replace(config, domain=domain), 0)


def laptop() -> ExperimentConfig:
    """Missions of three objects among four (table A2), and a post-training task of five. Where nothing is said, that
    is above all in discovery and reinforcement learning, as the grid's quick preset."""
    config = gridworld.quick()
    rl = replace(config.internal_rl, episodes=200 * 1024)
    steering = replace(config.meta_controller, policy_std=1.0)  # wider codes lead to fewer objects here (log, 78)
    return with_seed(
        replace(
            config,
            domain=BabyAIConfig(post_task=(0, 1, 2, 0, 1)),  # raw actions learn 0-1-2-3 (docs/log.md, 77, 78)
            model=ModelConfig(dim=128, lower_depth=1, upper_depth=2, heads=4, mlp_dim=256),
            meta_controller=steering,
            pretrain=PretrainConfig(optimizer=OptimizerConfig(steps=2000, batch_size=128, lr=1e-3), snapshots=(1000,)),
            internal_rl=rl,
            raw_action_rl=rl,
        ),
        0,
    )


PRESETS = {"debug": debug, "laptop": laptop}

STUDIES = {"debug": gridworld.STUDIES["debug"], "laptop": StudyConfig()}
"""How much of everything `metacontroller figures` does, by preset."""
