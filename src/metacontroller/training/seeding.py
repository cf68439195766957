"""Seeds: a separate stream of random numbers for everything that samples."""

from __future__ import annotations

import torch

from metacontroller.ranges import Whole, check_choice, require

NOISE_BIT = 2**31
"""Makes the seed of a phase's noise differ from that of its episodes; the seeds of presets are all below it."""


def noise_generator(seed: int, device: torch.device) -> torch.Generator:
    """A generator for noise, with a seed different from that of an `EpisodeStream` with the same ``seed``."""
    return torch.Generator(device).manual_seed(seed ^ NOISE_BIT)


STREAMS = ("model", "meta_controller", "pretrain", "discover", "internal_rl", "raw_action_rl", "evaluate", "analyse")
"""What samples, each from a stream of its own. The noise of the first is that of validation episodes, see
`data.batching.apart`."""

MAX_SEED = 2**28 - 1
"""Seeds of streams are ``seed * 8 + index``; PyTorch's CPU generator uses 32 bits of a seed."""


def stream_seed(seed: int, stream: str) -> int:
    """Seed of one of `STREAMS`, different for every pair of seed and stream; UserError for a seed out of range."""
    check_choice("stream", stream, STREAMS)
    require(not Whole(0, MAX_SEED).expected(seed), "seed", seed, f"0..{MAX_SEED}")
    return seed * 8 + STREAMS.index(stream)
