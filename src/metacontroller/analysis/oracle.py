"""Oracle codes: those that the acausal encoder reads from an expert's episode, played again in the same episode.

What they reach bounds what any policy over codes can reach: on tasks of the demonstrations, and on the post-training
task. Beside it stands what the codes say: how many nats, in which dimensions, and what can be read from them.

Axes: b episodes, k codes of an episode, t steps, m codes of all episodes, n_z code, c classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.registry import Analysis, Results, Rows, analysis
from metacontroller.control.discovery import DiscoveryOutput
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.trajectories import Trajectories, length_mask
from metacontroller.domains.base import Domain
from metacontroller.models.protocol import SteerableModel
from metacontroller.phases.rollout import Proposal, rollout_abstract
from metacontroller.storage.config_file import check_positive
from metacontroller.training.seeding import noise_generator, stream_seed

USED_NATS = 0.1
"""A dimension of the code counts as used when it says at least this much, in nats a code."""

READER_UPDATES, READER_LR = 500, 3e-2


class OracleCodes(NamedTuple):
    """Codes at the switches of b episodes: code (b, k, n_z), padded with zeros, and how many each has, count (b,)."""

    code: Tensor
    count: Tensor


def oracle_codes(output: DiscoveryOutput, lengths: Tensor, threshold: float) -> OracleCodes:
    """The mean code at each switch (beta >= threshold) and at the first step. lengths (b,)."""
    switch = switches(output, lengths, threshold)
    order = torch.argsort((~switch).long(), dim=1, stable=True)  # switches first, in their order
    count = switch.sum(1)
    chosen = order[:, : int(count.max())]
    code = output.mean.gather(1, chosen[..., None].expand(-1, -1, output.mean.shape[-1]))
    return OracleCodes(code * length_mask(count, code.shape[1])[..., None], count)


def switches(output: DiscoveryOutput, lengths: Tensor, threshold: float) -> Tensor:
    """(b, t) bool: real steps at which a code is taken. lengths (b,)."""
    switch = output.beta >= threshold
    switch[:, 0] = True
    return switch & length_mask(lengths, switch.shape[1])


def recorded_proposal(codes: OracleCodes) -> Proposal:
    """Proposes the recorded codes in their order; the last one again when there are no more."""
    taken = torch.zeros_like(codes.count)

    def propose(residual: Tensor, state: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code = codes.code[rows, torch.minimum(taken[rows], codes.count[rows] - 1)]
        taken[rows] += 1
        return code, code.new_zeros(len(rows)), state

    return propose


@torch.no_grad()
def oracle_success(
    model: SteerableModel,
    meta_controller: MetaController,
    domain: Domain,
    expert: Trajectories,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Share of an expert's episodes that are solved again, from the same starts, with the codes read from them, and the
    mean share of subgoals done."""
    output = encoded(model, meta_controller, expert, generator)
    codes = oracle_codes(output, expert.lengths, meta_controller.gate_config.threshold)
    proposal = recorded_proposal(codes)
    rollout = rollout_abstract(model, meta_controller, domain.restart(expert), proposal, generator)
    assert expert.segments is not None
    wanted = expert.segments.amax(1) + 1
    return float(rollout.success.double().mean()), float((rollout.subgoals_done / wanted).double().mean())


def encoded(
    model: SteerableModel, meta_controller: MetaController, episodes: Trajectories, generator: torch.Generator
) -> DiscoveryOutput:
    """`discover_episodes` on experts' episodes, with noise from the generator."""
    noise = meta_controller.sample_noise(episodes.batch, episodes.steps, generator)
    return meta_controller.discover_episodes(model, episodes.states, episodes.actions, episodes.lengths, noise=noise)


def readable(codes: Tensor, labels: Tensor, seed: int) -> float:
    """How well a small network reads a label from a code: accuracy on the second half of codes (m, n_z), after training
    on the first. labels (m,) int64 from 0."""
    half = len(codes) // 2
    x = (codes - codes[:half].mean(0)) / codes[:half].std(0).clamp_min(1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, int(labels.max()) + 1)).to(x.device)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=READER_LR, weight_decay=1e-2)
    with torch.enable_grad():
        for _ in range(READER_UPDATES):
            optimizer.zero_grad()
            F.cross_entropy(reader(x[:half]), labels[:half]).backward()
            optimizer.step()
    with torch.no_grad():
        return float((reader(x[half:]).argmax(-1) == labels[half:]).double().mean())


@torch.no_grad()
def what_codes_say(run: LoadedRun, episodes: int, seed: int) -> Results:
    """Of the codes at the switches of held-out demonstrations: nats a code, by dimension and in all, and what can be
    read from them beside the share of the commonest answer."""
    generator = torch.Generator(run.device).manual_seed(seed)
    batch = run.domain.demonstrations("discover", episodes, generator)
    output = encoded(run.model, run.meta_controller, batch, generator)
    switch = switches(output, batch.lengths, run.meta_controller.gate_config.threshold)
    mean, log_std = output.mean[switch], output.log_std[switch]
    nats = (0.5 * (mean**2 + (2 * log_std).exp() - 1) - log_std).mean(0)
    noisy = torch.randn(mean.shape, generator=generator, device=mean.device) * log_std.exp() + mean
    assert batch.subgoals is not None
    named = {"subgoal": batch.subgoals, **run.domain.facts(batch)}
    labels = {name: value[switch] for name, value in named.items()}
    return {
        "nats": float(nats.sum()),
        "nats_by_dimension": nats.tolist(),
        "dimensions_used": int((nats >= USED_NATS).sum()),
        "readable": {name: readable(noisy, label, seed) for name, label in labels.items()},
        "commonest": {name: float(torch.bincount(label).max() / len(label)) for name, label in labels.items()},
    }


@analysis("oracle", command="oracle", figure="none")
class Oracle(Analysis):
    """Codes read from experts' episodes: what they reach when played again, and what they say."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """How much is judged."""

        episodes: int = 1024
        """Held-out episodes of each kind."""

        def __post_init__(self) -> None:
            check_positive(self, ("episodes",))

    def measure(self, run: LoadedRun, config: Config, *, quiet: bool = False) -> Results:
        model, meta_controller, domain = run.model.eval(), run.meta_controller.eval(), run.domain
        seed = stream_seed(run.seed, "analyse")
        results: Results = {}
        generator = noise_generator(seed, run.device)
        experts = {
            "seen": domain.demonstrations("discover", config.episodes, generator),
            "unseen": domain.demonstrate(None, config.episodes, generator),
        }
        for name, expert in experts.items():
            reached = oracle_success(model, meta_controller, domain, expert, generator)
            results |= dict(zip((name, f"{name}_subgoals"), reached, strict=True))
        return {**results, **what_codes_say(run, config.episodes, seed), "episodes": config.episodes}

    def rows(self, results: Sequence[Results]) -> Rows:
        rows = super().rows(results)
        for kind in ("readable", "commonest"):
            rows += [(f"{kind}: {name}", [result[kind].get(name) for result in results]) for name in results[0][kind]]
        return rows
