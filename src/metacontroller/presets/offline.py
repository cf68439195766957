"""Configurations for a dataset of yours, with an environment or without: debug (seconds), laptop.

All values are our choice; the dataset and the environment are set by ``--dataset`` and ``--env``.
"""

from __future__ import annotations

from dataclasses import replace

from metacontroller.control.config import MetaControllerConfig
from metacontroller.domains.offline.domain import OfflineConfig
from metacontroller.models.config import ModelConfig
from metacontroller.phases.discover import DiscoverConfig
from metacontroller.phases.evaluate import EvaluateConfig
from metacontroller.phases.policy_gradient import InternalRLConfig
from metacontroller.phases.pretrain import PretrainConfig
from metacontroller.presets import gridworld
from metacontroller.recipes.config import ExperimentConfig, with_seed
from metacontroller.recipes.study_runs import StudyConfig
from metacontroller.training.optimizer import OptimizerConfig


def laptop() -> ExperimentConfig:
    """Minutes on two cores for episodes of a few dozen steps; an environment of Python's own speed takes the most."""
    rl = InternalRLConfig(episodes=8192, batch_size=128, lr=1e-3, update_epochs=4)
    config = ExperimentConfig(
        domain=OfflineConfig(),
        model=ModelConfig(dim=64, lower_depth=1, upper_depth=2, heads=4, mlp_dim=128),
        meta_controller=MetaControllerConfig(dim_latent=4, policy_hidden=64),
        pretrain=PretrainConfig(optimizer=OptimizerConfig(steps=1000, batch_size=32, lr=2e-3)),
        discover=DiscoverConfig(
            optimizer=OptimizerConfig(steps=1500, batch_size=32, lr=2e-3, decay_steps=400),
            alpha=0.01,
            alpha_start=0.0,  # codes must mean something before they cost something
            alpha_warmup=(400, 800),
        ),
        internal_rl=rl,
        raw_action_rl=rl,
        evaluate=EvaluateConfig(episodes=256),
    )
    return with_seed(config, 0)


def debug() -> ExperimentConfig:
    """Every phase in seconds; learns nothing worth having."""
    small = gridworld.debug()
    rl = replace(small.internal_rl, episodes=32, batch_size=8)
    evaluation = replace(small.evaluate, episodes=8)
    config = replace(small, domain=OfflineConfig(), internal_rl=rl, raw_action_rl=rl, evaluate=evaluation)
    return with_seed(config, 0)


PRESETS = {"debug": debug, "laptop": laptop}

STUDIES = {"debug": gridworld.STUDIES["debug"], "laptop": StudyConfig()}
"""How much of everything `metacontroller figures` does, by preset."""
