"""Linear probes: how well does the residual after each block tell which subgoal the expert pursues (Fig. 3, A1)?

Axes: b episodes, t steps, n_e residual, l layers (0 is the input embedding), g subgoals.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.data.trajectories import Trajectories, masked_mean
from metacontroller.errors import UserError
from metacontroller.models.transformer import Transformer
from metacontroller.phases.training import EpisodeStream, Generate, noise_generator
from metacontroller.progress import track


class ProbeResult(NamedTuple):
    """accuracy: of each layer's probe, on new episodes, over all steps. at_start: over steps of first segments alone,
    where nothing but the way the expert goes can tell. majority: share of the commonest subgoal. probes: the trained
    linear maps, one a layer."""

    accuracy: list[float]
    at_start: list[float]
    majority: float
    probes: nn.ModuleList


def probe_layers(
    model: Transformer,
    generate: Generate,
    *,
    subgoals: int,
    steps: int,
    batch_size: int,
    episodes: int,
    seed: int,
    lr: float = 1e-3,
    quiet: bool = False,
) -> ProbeResult:
    """Trains one linear map a layer on labelled episodes of ``generate`` and judges it on ``episodes`` others.

    The model is frozen. subgoals: how many there are. steps, batch_size, lr: of AdamW (the paper: 8k, 512, 1e-3).
    """
    device = next(model.parameters()).device
    model.eval()
    stream = EpisodeStream(generate, batch_size, seed, device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probes = nn.ModuleList(nn.Linear(model.dim, subgoals) for _ in range(model.depth + 1)).to(device)
    optimizer = torch.optim.AdamW(probes.parameters(), lr=lr, fused=True)
    with track(steps, "probe", quiet=quiet) as progress:
        for step in range(steps):
            batch = stream.next()
            labels, mask = labelled(batch)
            loss = torch.stack([masked_mean(-_log_prob(x, labels), mask) for x in _probed(model, probes, batch)]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (step + 1) % 50 == 0 or step + 1 == steps:
                progress.update(step + 1, loss=float(loss.detach()) / len(probes))
    judged = generate(episodes, noise_generator(seed, device))  # a stream apart from the training episodes
    labels, mask = labelled(judged)
    assert judged.segments is not None
    first = mask & (judged.segments == 0)
    with torch.no_grad():
        right = [(logits.argmax(-1) == labels).float() for logits in _probed(model, probes, judged)]
    return ProbeResult(
        accuracy=[float(masked_mean(value, mask)) for value in right],
        at_start=[float(masked_mean(value, first)) for value in right],
        majority=float(torch.bincount(labels[mask]).max() / mask.sum()),
        probes=probes,
    )


def labelled(batch: Trajectories) -> tuple[Tensor, Tensor]:
    """The subgoal of each step, (b, t), 0 in the padding, and which steps are real."""
    if batch.subgoals is None:
        raise UserError("the episodes carry no subgoals; give a source that labels them.")
    return batch.subgoals.clamp(min=0), batch.mask()


def _probed(model: Transformer, probes: nn.ModuleList, batch: Trajectories) -> list[Tensor]:
    """Each layer's logits (b, t, g)."""
    with torch.no_grad():
        residuals = model.residuals(batch.states, batch.actions)
    return [probe(residual) for probe, residual in zip(probes, residuals, strict=True)]


def _log_prob(logits: Tensor, labels: Tensor) -> Tensor:
    return F.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]
