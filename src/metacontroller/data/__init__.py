"""Behaviour data."""

from metacontroller.data.trajectories import Trajectories, TrajectoryStore, length_mask, length_sorted_batches

__all__ = ["Trajectories", "TrajectoryStore", "length_mask", "length_sorted_batches"]
