"""What a finished run is judged by, all of it in held-out episodes."""

from __future__ import annotations

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

STAGE_EPISODES = 1024  # held-out episodes for a stage, where a success rate has more
SUCCESS: dict[str, Policy] = {
    "internal_rl_success": "internal-rl",
    "raw_action_success": "raw",
    "prior_success": "prior",
    "raw_initial_success": "base",
}
"""Success rates of a run, and who acts."""


def discovery_figures(run: LoadedRun, seed: int, episodes: int) -> dict[str, float | None]:
    """What discovery is judged by: the gate's alignment with subgoals in ``episodes``, and how many bits a fixed code
    tells of the subgoal that it leads to. None in a world without labels of subgoals."""
    generator = torch.Generator(run.device).manual_seed(seed)
    bits = code_meaning(run, generator).bits if run.subgoals else None
    return {**_gate_figures(run, seed, episodes), "code_subgoal_bits": bits}


def _gate_figures(run: LoadedRun, seed: int, episodes: int) -> dict[str, float | None]:
    if not run.subgoals:
        return dict.fromkeys(("gate_recall", "gate_precision", "gate_binary_fraction"))
    return {**held_out_gate(run, episodes, seed).figures()}


def measure_stages(run: LoadedRun, quiet: bool) -> dict[str, Any]:
    """Each stage between demonstrations and internal RL, so that a weak one shows.

    probe_accuracy: of the subgoal, linear, at the controlled layer. supervised_success: of supervised controllers
    there, chained on the post-training task. named_success: of subgoals' mean codes, chained likewise. oracle_seen,
    oracle_unseen: success with the codes of experts, on tasks of the demonstrations and on the post-training task.
    code_nats, code_dimensions: of a code. code_readable: accuracy of what is read from codes. None where the world has
    no labels, no experts to ask or no goals to follow.
    """
    names = ("probe_accuracy", "supervised_success", "named_success", "oracle_seen", "oracle_unseen")
    names += ("code_nats", "code_dimensions", "code_readable")
    results: dict[str, Any] = dict.fromkeys(names)
    if not run.subgoals:
        return results
    episodes = min(STAGE_EPISODES, run.settings.episodes)
    config = LayerConfig(steps=run.settings.link_updates, episodes=episodes)
    options: dict[str, Any] = {"seed": run.analysis_seed, "controlled_only": True, "quiet": True}
    announce("evaluate: linear probe of the subgoal", quiet)
    probed = probe_layers(run.base, run.labelled_sources, config, subgoals=len(run.subgoals), **options)
    results["probe_accuracy"] = probed.accuracy[0]
    if tells_goals(run.domain, run.analysis_seed):
        announce("evaluate: supervised controllers", quiet)
        options |= controllers_of(run)
        steered = steer_layers(run.base, run.labelled_sources, run.domain, config, **options)
        results["supervised_success"] = steered.success[0]
    announce("evaluate: codes of experts", quiet)
    oracle = Oracle().measure(run, Oracle.Config(episodes=episodes), quiet=True)
    results |= {"oracle_seen": oracle["seen"], "oracle_unseen": oracle["unseen"], "named_success": oracle["named"]}
    results |= {"code_nats": oracle["nats"], "code_dimensions": oracle["dimensions_used"]}
    return results | {"code_readable": oracle["readable"]}


def measure(run: LoadedRun, quiet: bool) -> dict[str, Any]:
    """All measures of a run that has been through all phases, with the names of its task and subgoals.

    What needs labels of subgoals is None in a world that has none, and NaN what needs to know which subgoals follow
    each other in training where nothing does.
    """
    episodes, seed = run.settings.episodes, stream_seed(run.seed, "evaluate")
    generator = torch.Generator(run.device).manual_seed(seed)
    results: dict[str, Any] = {}
    bits = share = unseen = None
    if run.subgoals:
        announce("evaluate: what codes mean", quiet)
        meaning = code_meaning(run, generator)
        bits, share = meaning.bits, meaning.share.tolist()
        announce("evaluate: transitions that training never shows", quiet)
        unseen = unseen_transition_share(Walks(run.base, run.domain, run.walk_steps, generator), episodes)
    for name, policy in SUCCESS.items():
        announce(f"evaluate: success of {policy}", quiet)
        results[name] = run.evaluate(policy, episodes=episodes, seed=seed)["success"]
    announce("evaluate: the gate against subgoals", quiet)
    return {
        **results,
        **_gate_figures(run, seed, episodes),
        "code_subgoal_bits": bits,
        **measure_stages(run, quiet),
        "unseen_transition_share": unseen,
        "code_subgoal_share": share,
        **_losses(run),
        "task": run.domain.format_task(),
        "subgoals": list(run.subgoals),
    }


def _losses(run: LoadedRun) -> dict[str, float]:
    """Each phase's last action loss in training and on validation episodes, where it logged both."""
    losses = {}
    for phase in ("pretrain", "discover"):
        for line in run.folder.read_metrics(phase)[-1:]:
            if "val_action_loss" in line:
                losses |= {f"{phase}_{name}": line[name] for name in ("action_loss", "val_action_loss")}
    return losses


def measure_discovery(run: LoadedRun, *, reinforced: bool) -> dict[str, Any]:
    """All measures of a run of a study. reinforced: whether it has been through internal RL."""
    episodes, seed = run.settings.episodes, stream_seed(run.seed, "evaluate")
    results = rate_distortion(run, episodes, seed)
    aligned = is_aligned(results)
    if reinforced:
        results["internal_rl_success"] = run.evaluate("internal-rl", episodes=episodes, seed=seed)["success"]
    return {**results, "aligned": aligned}
