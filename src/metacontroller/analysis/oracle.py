"""Oracle codes: those that the acausal encoder reads from an expert's episode, played again in the same episode.

On tasks of the demonstrations that tells whether codes can be followed. On the post-training task it also asks the
encoder to name a subgoal where training never showed it, which it may not (docs/log.md, 62), though a policy can find
the code. So codes are also played by name: the mean code of each subgoal, chained in the order of that task. Beside it
stands what the codes say: how many nats, in which dimensions, and what can be read from them.

Axes: b episodes, k codes of an episode, t steps, m codes of all episodes, n_z code, c classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.analysis.gate_alignment import HeldOutGate, gate_along, held_out_gate
from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.registry import Analysis, EpisodesConfig, Results, TableRows, analysis
from metacontroller.analysis.steering import play_chained, tells_goals
from metacontroller.data.trajectories import Trajectories, length_mask
from metacontroller.phases.rollout import Proposal, rollout_abstract
from metacontroller.ranges import Rows
from metacontroller.training.seeding import noise_generator

USED_NATS = 0.1
"""A dimension of the code counts as used when it says at least this much, in nats a code."""

READER_UPDATES, READER_LR = 500, 3e-2


class OracleCodes(NamedTuple):
    """Codes at the switches of b episodes: code (b, k, n_z), padded with zeros, and how many each has, count (b,)."""

    code: Tensor
    count: Tensor


def oracle_codes(gate: HeldOutGate) -> OracleCodes:
    """The codes taken at the first step and where beta >= threshold."""
    switch = gate.switches()
    order = torch.argsort((~switch).long(), dim=1, stable=True)  # switches first, in their order
    count = switch.sum(1)
    chosen = order[:, : int(count.max())]
    code = gate.code.gather(1, chosen[..., None].expand(-1, -1, gate.code.shape[-1]))
    return OracleCodes(code * length_mask(count, code.shape[1])[..., None], count)


def recorded_proposal(codes: OracleCodes) -> Proposal:
    """Proposes the recorded codes in their order; the last one again when there are no more."""
    taken = torch.zeros_like(codes.count)

    def propose(residual: Tensor, state: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code = codes.code[rows, torch.minimum(taken[rows], codes.count[rows] - 1)]
        taken[rows] += 1
        return code, code.new_zeros(len(rows)), state

    return propose


@torch.no_grad()
def oracle_success(run: LoadedRun, experts: Trajectories, seed: int) -> tuple[float, float]:
    """Share of experts' episodes that are solved once more, from the same starts, with the codes read from them.

    Also the mean share of subgoals done. seed: of the noise in codes and of the actions.
    """
    meta_controller, generator = run.meta_controller, noise_generator(seed, torch.device(run.device))
    codes = oracle_codes(gate_along(run, experts, seed))
    env = run.domain.restart(experts)
    rollout = rollout_abstract(run.model.eval(), meta_controller, env, recorded_proposal(codes), generator)
    assert experts.segments is not None
    asked = experts.segments.amax(1) + 1
    return float(rollout.success.double().mean()), float((rollout.subgoals_done / asked).double().mean())


@torch.no_grad()
def named_success(run: LoadedRun, gate: HeldOutGate, seed: int) -> float:
    """Success on the post-training task when each step is steered by the mean code of the subgoal asked for, mean over
    the switches of held-out demonstrations. nan if some subgoal has no code. UserError as of `play_chained`."""
    code, labels = _labelled_codes(run, gate)
    mean = torch.stack([code[labels["subgoal"] == subgoal].mean(0) for subgoal in range(len(run.subgoals))])
    if not bool(mean.isfinite().all()):
        return math.nan
    return play_chained(
        run.model.eval(),
        lambda residual, goal: run.meta_controller.steer(residual, mean[goal]),
        run.domain,
        gate.episodes.batch,
        seed,
        run.controller.action_temperature,
    )


def readable(learned: tuple[Tensor, Tensor], judged: tuple[Tensor, Tensor], seed: int) -> float:
    """How well a small network reads a label from a code, after training on ``learned``: its accuracy on ``judged``.
    Both are codes (m, n_z) and labels (m,) int64 from 0."""
    (codes, labels), (others, answers) = learned, judged
    mean, std = codes.mean(0), codes.std(0).clamp_min(1e-6)
    codes, others = (codes - mean) / std, (others - mean) / std
    classes = int(torch.cat([labels, answers]).max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = nn.Sequential(nn.Linear(codes.shape[1], 64), nn.ReLU(), nn.Linear(64, classes)).to(codes.device)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=READER_LR, weight_decay=1e-2, fused=True)
    with torch.enable_grad():
        for _ in range(READER_UPDATES):
            optimizer.zero_grad()
            F.cross_entropy(reader(codes), labels).backward()
            optimizer.step()
    with torch.no_grad():
        return float((reader(others).argmax(-1) == answers).double().mean())


def what_codes_say(run: LoadedRun, gate: HeldOutGate, seed: int) -> Results:
    """Of the codes at the switches of held-out demonstrations: nats a code, by dimension and in all (None after
    CompILE), and what can be read from them, beside the share of the commonest answer. The reader learns from as many
    demonstrations of discovery."""
    nats = None if gate.nats is None else gate.nats[gate.switches()].mean(0)
    code, labels = _labelled_codes(run, gate)
    shown = run.demonstrations("discover")(gate.episodes.batch, torch.Generator().manual_seed(seed)).to(code.device)
    known, known_labels = _labelled_codes(run, gate_along(run, shown, seed))
    return {
        "nats": None if nats is None else float(nats.sum()),
        "nats_by_dimension": None if nats is None else nats.tolist(),
        "dimensions_used": None if nats is None else int((nats >= USED_NATS).sum()),
        "readable": {
            name: readable((known, known_labels[name]), (code, label), seed) for name, label in labels.items()
        },
        "commonest": {name: float(torch.bincount(label).max() / len(label)) for name, label in labels.items()},
    }


def _labelled_codes(run: LoadedRun, gate: HeldOutGate) -> tuple[Tensor, dict[str, Tensor]]:
    """The codes at switches (m, n_z), and what each might name, by name (m,)."""
    switch, episodes = gate.switches(), gate.episodes
    assert episodes.subgoals is not None
    facts = {"subgoal": episodes.subgoals, **run.domain.facts(episodes)}
    return gate.code[switch], {name: value[switch] for name, value in facts.items()}


@analysis("oracle", command="oracle", figure="none")
class Oracle(Analysis):
    """Codes read from experts' episodes: what they reach when played again, and what they say.

    seen, unseen and the shares of subgoals done are None where a world has no ``demonstrate`` or ``restart``; named,
    the success of subgoals' mean codes, where it does not tell which subgoal is asked for.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(EpisodesConfig):
        """How much is judged."""

        episodes: Rows = 1024
        """Held-out episodes of each kind."""

    def measure(self, run: LoadedRun, config: Config, *, quiet: bool = False) -> Results:
        seed, generator = run.analysis_seed, noise_generator(run.analysis_seed, torch.device(run.device))
        results: Results = dict.fromkeys(("seen", "seen_subgoals", "unseen", "unseen_subgoals"))
        if run.domain.offers("demonstrate") and run.domain.offers("restart"):
            experts = {
                "seen": run.demonstrations("validation")(config.episodes, generator),
                "unseen": run.domain.demonstrate(None, config.episodes, generator),
            }
            for name, episodes in experts.items():
                results[name], results[f"{name}_subgoals"] = oracle_success(run, episodes, seed)
        gate = held_out_gate(run, config.episodes, seed)
        results["named"] = named_success(run, gate, seed) if tells_goals(run.domain, seed) else None
        return {**results, **what_codes_say(run, gate, seed), "episodes": config.episodes}

    def rows(self, results: Sequence[Results]) -> TableRows:
        rows = super().rows(results)
        for kind in ("readable", "commonest"):
            rows += [(f"{kind}: {name}", [result[kind].get(name) for result in results]) for name in results[0][kind]]
        return rows
