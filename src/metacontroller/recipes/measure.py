"""What a finished run is judged by, all of it in held-out episodes."""

from __future__ import annotations

import math
from typing import Any

import torch

from metacontroller.analysis.code_content import Walks, code_meaning, unseen_transition_share
from metacontroller.analysis.gate_alignment import held_out_gate
from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.oracle import Oracle
from metacontroller.analysis.probing import LayerConfig, probe_layers
from metacontroller.analysis.rate_distortion import is_aligned, rate_distortion
from metacontroller.analysis.steering import controllers_of, steer_layers, tells_goals
from metacontroller.phases.evaluate import Policy
from metacontroller.training.progress import announce
from metacontroller.training.seeding import stream_seed

LINK_EPISODES = 1024  # held-out episodes for a link, where a success rate has more

GATE_FIGURES = ("gate_recall", "gate_precision", "gate_binary_fraction")


def discovery_figures(run: LoadedRun, seed: int, episodes: int) -> dict[str, float | None]:
    """What discovery is judged by: the gate's alignment with subgoals in ``episodes``, and how many bits a fixed code
    tells of the subgoal that it leads to. None in a world without labels of subgoals."""
    generator = torch.Generator(run.device).manual_seed(seed)
    bits = code_meaning(run, generator).bits if run.subgoals else None
    return {**_gate_figures(run, seed, episodes), "code_subgoal_bits": bits}


def _gate_figures(run: LoadedRun, seed: int, episodes: int) -> dict[str, float | None]:
    if not run.subgoals:
        return dict.fromkeys(GATE_FIGURES)
    return {**held_out_gate(run, episodes, seed).figures()}


def links(run: LoadedRun, quiet: bool) -> dict[str, Any]:
    """Each link between demonstrations and internal RL, so that a weak one shows.

    probe_accuracy: of the subgoal, linear, at the controlled layer. supervised_success: of supervised controllers
    there, chained on the post-training task. named_success: of subgoals' mean codes, chained likewise. oracle_seen,
    oracle_unseen: success with the codes of experts, on tasks of the demonstrations and on the post-training task.
    code_nats, code_dimensions: of a code. code_readable: accuracy of what is read from codes. None where the world has
    no labels, no experts to ask or no goals to follow.
    """
    names = ("probe_accuracy", "supervised_success", "named_success", "oracle_seen", "oracle_unseen")
    found: dict[str, Any] = dict.fromkeys((*names, "code_nats", "code_dimensions", "code_readable"))
    if not run.subgoals:
        return found
    episodes = min(LINK_EPISODES, run.settings.episodes)
    config = LayerConfig(steps=run.settings.link_updates, episodes=episodes)
    options: dict[str, Any] = {"seed": run.analysis_seed, "controlled_only": True, "quiet": True}
    announce("evaluate: linear probe of the subgoal", quiet)
    probed = probe_layers(run.base, run.labelled_sources, config, subgoals=len(run.subgoals), **options)
    found["probe_accuracy"] = probed.accuracy[0]
    if tells_goals(run.domain, run.analysis_seed):
        announce("evaluate: supervised controllers", quiet)
        options |= controllers_of(run)
        steered = steer_layers(run.base, run.labelled_sources, run.domain, config, **options)
        found["supervised_success"] = steered.success[0]
    announce("evaluate: codes of experts", quiet)
    oracle = Oracle().measure(run, Oracle.Config(episodes=episodes), quiet=True)
    found |= {"oracle_seen": oracle["seen"], "oracle_unseen": oracle["unseen"], "code_nats": oracle["nats"]}
    named = oracle["named"]
    found["named_success"] = None if named is None or math.isnan(named) else named
    return found | {"code_dimensions": oracle["dimensions_used"], "code_readable": oracle["readable"]}


def measure(run: LoadedRun, quiet: bool) -> dict[str, Any]:
    """All measures of a run that has been through all phases, with the names of its task and subgoals.

    What needs labels of subgoals is None in a world that has none, as is what needs to know which subgoals follow each
    other in training.
    """
    episodes, seed = run.settings.episodes, stream_seed(run.seed, "evaluate")
    generator = torch.Generator(run.device).manual_seed(seed)
    bits = share = unseen = None
    if run.subgoals:
        announce("evaluate: what codes mean", quiet)
        meaning = code_meaning(run, generator)
        bits, share = meaning.bits, meaning.share.tolist()
        announce("evaluate: transitions that training never shows", quiet)
        unseen = unseen_transition_share(Walks(run.base, run.domain, run.walk_steps, generator), episodes)

    def success(policy: Policy) -> float:
        announce(f"evaluate: success of {policy}", quiet)
        return run.evaluate(policy, episodes=episodes, seed=seed)["success"]

    rates = {
        "internal_rl_success": success("internal-rl"),
        "raw_action_success": success("raw"),
        "prior_success": success("prior"),
        "raw_initial_success": success("base"),
    }
    announce("evaluate: the gate against subgoals", quiet)
    return {
        **rates,
        **_gate_figures(run, seed, episodes),
        "code_subgoal_bits": bits,
        **links(run, quiet),
        "unseen_transition_share": None if unseen is None or math.isnan(unseen) else unseen,
        "code_subgoal_share": share,
        **_losses(run),
        "task": run.domain.format_task(),
        "subgoals": list(run.subgoals),
    }


def _losses(run: LoadedRun) -> dict[str, float]:
    """Each phase's last action loss in training and on validation episodes, where it logged both."""
    found = {}
    for phase in ("pretrain", "discover"):
        last = run.folder.read_metrics(phase)[-1:]
        for line in last:
            names = ("action_loss", "val_action_loss") if "val_action_loss" in line else ()
            found |= {f"{phase}_{name}": line[name] for name in names}
    return found


def measure_variant(run: LoadedRun, *, reinforced: bool) -> dict[str, Any]:
    """All measures of a study's variant. reinforced: whether it has been through internal RL."""
    episodes, seed = run.settings.episodes, stream_seed(run.seed, "evaluate")
    results = rate_distortion(run, episodes, seed)
    aligned = is_aligned(results)
    if reinforced:
        results["internal_rl_success"] = run.evaluate("internal-rl", episodes=episodes, seed=seed)["success"]
    return {**results, "aligned": aligned}
