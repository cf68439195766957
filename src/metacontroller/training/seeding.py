"""Seeds: a stream of random numbers for everything that draws them."""

from __future__ import annotations

import torch

from metacontroller.errors import UserError

NOISE_BIT = 2**31
"""What tells the seed of a phase's noise from that of its episodes; all seeds of presets lie below."""


def noise_generator(seed: int, device: torch.device) -> torch.Generator:
    """Random numbers for noise, unlike those of an `EpisodeStream` with the same seed."""
    return torch.Generator(device).manual_seed(seed ^ NOISE_BIT)


STREAMS = ("model", "meta_controller", "pretrain", "discover", "internal_rl", "raw_action_rl", "evaluate", "analyse")
"""What draws random numbers, each from a stream of its own."""


MAX_SEED = 2**28 - 1
"""Seeds of streams are ``seed * 8 + place``; PyTorch's CPU generator looks at 32 bits of a seed."""


def stream_seed(seed: int, stream: str) -> int:
    """Seed of one of `STREAMS`; no two of them are the same, whatever the seeds, so no layout stream is used twice."""
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed}; expected 0..{MAX_SEED}.")
    return seed * 8 + STREAMS.index(stream)
