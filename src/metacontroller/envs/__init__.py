"""Environments: gridworld-pinpad, its tasks and its expert. Importing this registers the Gymnasium ids."""

from metacontroller.envs.expert import distance_fields, expert_trajectories
from metacontroller.envs.gridworld_pinpad import Layouts, PinpadBatch, PinpadConfig, sample_layouts, tokens_to_onehot
from metacontroller.envs.gymnasium_envs import ENV_ID, GridworldPinpadEnv, GridworldPinpadVectorEnv, register
from metacontroller.envs.rendering import render_rgb
from metacontroller.envs.tasks import A1_POST, A2_POST, TABLE_A1, TABLE_A2, format_task, parse_task

register()

__all__ = [
    "A1_POST",
    "A2_POST",
    "ENV_ID",
    "TABLE_A1",
    "TABLE_A2",
    "GridworldPinpadEnv",
    "GridworldPinpadVectorEnv",
    "Layouts",
    "PinpadBatch",
    "PinpadConfig",
    "distance_fields",
    "expert_trajectories",
    "format_task",
    "parse_task",
    "render_rgb",
    "sample_layouts",
    "tokens_to_onehot",
]
