"""Videos of episodes as a policy plays them, by the world's own pictures. Needs imageio (the extra ``viz``)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.arguments import checked_kinds
from metacontroller.domains.base import Domain
from metacontroller.errors import UserError, last_line
from metacontroller.phases.evaluate import Policy
from metacontroller.phases.rollout import policy_proposal, prior_proposal, rollout_abstract, rollout_raw
from metacontroller.storage.manifest import replacing

FORMATS = (".mp4", ".gif")
LEAST_PIXELS = 320
"""Pictures are enlarged, pixel by pixel, to at least this height."""
GATE_PIXELS = 64
"""Height of the gate below them."""
COLORS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75))
"""Of one abstract action after the other."""
PICTURES_A_SECOND = 10
"""At most; of a world with more steps a second some are left out."""
END_SECONDS = 1.0
"""How long the last picture of an episode stays."""


class Film(NamedTuple):
    """What an episode showed, states (t + 1, *obs), and its gate: beta, switches (t,); None where nothing steers."""

    states: Tensor
    gate: tuple[Tensor, Tensor] | None


def check_video(run: LoadedRun, path: Path) -> None:
    """UserError, before anything is played, where no video can be written."""
    if path.suffix not in FORMATS:
        raise UserError(f"video {path} has the ending {path.suffix!r}; expected one of {', '.join(FORMATS)}.")
    if missing := _missing(path.suffix):
        raise UserError(f"{missing[0]} is not installed; videos need it: pip install 'metacontroller-rl[viz]'.")
    if path.suffix == ".mp4":
        _check_ffmpeg()
    if not run.domain.offers("render"):
        raise UserError(f"the world {run.domain.name} draws no pictures, so there is nothing to film.")


def drawn(domain: Domain, states: Tensor) -> np.ndarray:
    """Pictures of the states (t, *obs) of one episode, uint8 (t, y, x, 3); UserError if this machine cannot draw them,
    whatever the world's own renderer raises then."""
    try:
        return domain.render(states.cpu()).numpy()
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"the world {domain.name} cannot be drawn on this machine: {last_line(error)}.") from error


def can_film(domain: Domain, name: str) -> bool:
    """Whether the world has pictures, and what writes a video of such a name is installed."""
    return domain.offers("render") and not _missing(Path(name).suffix)


def _missing(ending: str) -> list[str]:
    """The packages that are not installed and needed for it."""
    needed = ["imageio", *(["imageio_ffmpeg"] if ending == ".mp4" else [])]
    return [name for name in needed if importlib.util.find_spec(name) is None]


def _check_ffmpeg() -> None:
    """UserError unless imageio's ffmpeg runs: it may name a file that is not there, or is another program."""
    import imageio_ffmpeg

    try:
        imageio_ffmpeg.get_ffmpeg_version()
    except Exception as error:
        raise UserError(f"ffmpeg, which writes .mp4, does not run ({last_line(error)}); write a .gif.") from error


@checked_kinds
def write_video(run: LoadedRun, policy: Policy, path: Path, *, task: Any = None, episodes: int = 4, seed: int) -> None:
    """Films ``episodes`` held-out episodes of a policy, one after the other, into a file that is complete or as before.

    Below the pictures is the gate so far, in a new color for each abstract action. task: as of `Domain.reset`. seed: of
    layouts, codes and actions. The ending of ``path`` chooses MP4 or GIF.
    """
    check_video(run, path)
    import imageio.v3 as imageio

    generator, frames = torch.Generator(run.device).manual_seed(seed), []
    every = max(1, run.domain.steps_a_second // PICTURES_A_SECOND)
    rate = run.domain.steps_a_second / every
    for _ in range(episodes):
        shown = _frames(run, _play(run, policy, task, generator), every)
        frames += [*shown, *[shown[-1]] * round(END_SECONDS * rate)]
    even = np.stack(frames)[:, : frames[0].shape[0] // 2 * 2, : frames[0].shape[1] // 2 * 2]  # as MP4 needs
    with replacing(path) as draft:
        options: dict[str, Any] = {"duration": 1000 / rate, "loop": 0}
        if path.suffix == ".mp4":
            options = {"fps": rate, "macro_block_size": 2}
        with_ending = draft.with_suffix(path.suffix)  # by which imageio chooses the format
        imageio.imwrite(with_ending, even, **options)
        with_ending.replace(draft)


def _frames(run: LoadedRun, film: Film, every: int) -> list[np.ndarray]:
    """The pictures of an episode, (y, x, 3) uint8, the last state among them."""
    steps = sorted({*range(0, len(film.states), every), len(film.states) - 1})
    pictures = drawn(run.domain, film.states[steps])
    factor = -(-LEAST_PIXELS // pictures.shape[1])
    large = pictures.repeat(factor, 1).repeat(factor, 2)
    if film.gate is None:
        return list(large)
    return [
        np.concatenate([picture, gate_strip(*film.gate, step, picture.shape[1])])
        for step, picture in zip(steps, large, strict=True)
    ]


def gate_strip(beta: Tensor, switches: Tensor, step: int, width: int) -> np.ndarray:
    """The gate up to a step as bars over the whole episode, (GATE_PIXELS, width, 3) uint8. beta, switches (t,)."""
    column = np.arange(width) * len(beta) // width  # the step that each column of pixels shows
    height = beta.cpu().numpy()[column] * (GATE_PIXELS - 3) + 3  # a line where it is 0
    color = np.array(COLORS, np.uint8)[(switches.cpu().numpy().cumsum()[column] - 1) % len(COLORS)]
    above = np.arange(GATE_PIXELS, 0, -1)[:, None]
    filled = (above <= height) & (column <= step)
    return np.where(filled[..., None], color, np.uint8(255))


def _play(run: LoadedRun, policy: Policy, task: Any, generator: torch.Generator) -> Film:
    """One episode, noted by what stands in place of the environment's step, and step by step of the rollout."""
    env = run.domain.reset(1, generator, task=task)
    states, step = [env.observation[0]], env.step

    def step_noted(actions: Tensor) -> Tensor:
        rewards = step(actions)
        states.append(env.observation[0])
        return rewards

    env.step = step_noted
    if policy in ("base", "raw"):
        rollout_raw(run.base if policy == "base" else run.raw_model, env, generator)
        return Film(torch.stack(states), None)
    steering = run.steering(policy)
    beta: list[Tensor] = []
    proposal = prior_proposal if policy == "prior" else policy_proposal
    proposed = proposal(steering, generator)
    rollout_abstract(run.model, steering, env, proposed, generator, watch=lambda span: beta.append(span.beta[0, 0]))
    gate = torch.stack(beta)
    return Film(torch.stack(states), (gate, gate >= steering.gate_config.threshold))
