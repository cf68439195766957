"""Presets: functions that return a complete configuration."""

from metacontroller.presets.gridworld import GridworldConfig, debug, laptop, paper, quick

PRESETS = {"debug": debug, "laptop": laptop, "quick": quick, "paper": paper}

__all__ = ["PRESETS", "GridworldConfig", "debug", "laptop", "paper", "quick"]
