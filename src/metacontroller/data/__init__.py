"""Behaviour data."""

from metacontroller.data.batching import length_sorted_batches
from metacontroller.data.store import TrajectoryStore
from metacontroller.data.trajectories import Trajectories, length_mask

__all__ = ["Trajectories", "TrajectoryStore", "length_mask", "length_sorted_batches"]
