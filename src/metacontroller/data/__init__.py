"""Behaviour data."""

from metacontroller.data.batching import length_sorted_batches
from metacontroller.data.datasets import Dataset, load_dataset
from metacontroller.data.store import TrajectoryStore
from metacontroller.data.trajectories import Episodes, Trajectories, length_mask

__all__ = [
    "Dataset",
    "Episodes",
    "Trajectories",
    "TrajectoryStore",
    "length_mask",
    "length_sorted_batches",
    "load_dataset",
]
