"""Presets: functions that return a complete configuration."""

from metacontroller.presets.gridworld import GridworldConfig, debug, laptop, paper

PRESETS = {"debug": debug, "laptop": laptop, "paper": paper}

__all__ = ["PRESETS", "GridworldConfig", "debug", "laptop", "paper"]
