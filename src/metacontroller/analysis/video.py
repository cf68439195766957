"""Videos of episodes as a policy plays them, by the world's own pictures. Needs imageio (the extra ``viz``)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.errors import UserError
from metacontroller.phases.evaluate import Policy
from metacontroller.phases.rollout import policy_proposal, prior_proposal, rollout_abstract, rollout_raw
from metacontroller.storage.files import replacing

FORMATS = (".mp4", ".gif")
FRAMES_A_SECOND = 5
LEAST_PIXELS = 320
"""Pictures are enlarged, pixel by pixel, to at least this height."""


def check_video(run: LoadedRun, path: Path) -> None:
    """Raises UserError, before anything is played, where no video can be written."""
    if path.suffix not in FORMATS:
        raise UserError(f"video {path} has the ending {path.suffix!r}; expected one of {', '.join(FORMATS)}.")
    needed = ["imageio", *(["imageio_ffmpeg"] if path.suffix == ".mp4" else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{missing[0]} is not installed; videos need it: pip install 'metacontroller-rl[viz]'.")
    if not run.domain.offers("render"):
        raise UserError(f"the world {run.domain.name} draws no pictures, so there is nothing to film.")


def write_video(run: LoadedRun, policy: Policy, path: Path, *, task: Any = None, episodes: int = 4, seed: int) -> None:
    """Films ``episodes`` held-out episodes of a policy, one after the other; replaced only when the video is whole.

    task: as of `Domain.reset`. seed: of layouts, codes and actions. The ending of ``path`` chooses MP4 or GIF.
    """
    check_video(run, path)
    import imageio.v3 as imageio

    generator = torch.Generator(run.device).manual_seed(seed)
    frames = []
    for _ in range(episodes):
        states = _play(run, policy, task, generator)
        pictures = run.domain.render(states.cpu()).numpy()
        frames += [*pictures, *[pictures[-1]] * FRAMES_A_SECOND]  # a second to see how it ended
    enlarged = np.stack(frames).repeat(factor := -(-LEAST_PIXELS // frames[0].shape[0]), 1).repeat(factor, 2)
    even = enlarged[:, : enlarged.shape[1] // 2 * 2, : enlarged.shape[2] // 2 * 2]  # as MP4 needs
    with replacing(path) as draft:
        named = draft.with_suffix(path.suffix)
        options: dict[str, Any] = {"duration": 1000 / FRAMES_A_SECOND, "loop": 0}
        if path.suffix == ".mp4":
            options = {"fps": FRAMES_A_SECOND, "macro_block_size": 2}
        imageio.imwrite(named, even, **options)
        named.replace(draft)


def _play(run: LoadedRun, policy: Policy, task: Any, generator: torch.Generator) -> Tensor:
    """What one episode showed, (t + 1, *obs)."""
    env = run.domain.reset(1, generator, task=task)
    states, step = [env.observation[0]], env.step

    def remembered(actions: Tensor) -> Tensor:
        rewards = step(actions)
        states.append(env.observation[0])
        return rewards

    env.step = remembered
    if policy in ("base", "raw"):
        rollout_raw(run.base if policy == "base" else run.raw_model, env, generator)
    else:
        steering = run.steering(policy)
        proposal = prior_proposal if policy == "prior" else policy_proposal
        rollout_abstract(run.model, steering, env, proposal(steering, generator), generator)
    return torch.stack(states)
