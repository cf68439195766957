"""What a variant comes to on the grid, all at one budget: gate, bits of codes, success of internal RL.

A reproduced seed of the preset `quick` gives the base model and the sizes; a variant of discovery trains a
metacontroller of its own for as many updates, a variant of the base a base model too, and a variant of the policy's
loss starts from the reference's metacontroller. Then each learns a task of four subgoals for as many episodes, and is
judged in held-out ones. Prints a JSON row a variant; a run that dies goes on by the same command.

    metacontroller reproduce --preset quick --out runs/quick
    python benchmarks/variants_grid.py runs/quick/seed-0 VARIANT ... [--out DIR] [--episodes 102400]

VARIANT: all of them if none is named.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metacontroller.control.losses import clipped_surrogate, target_policy_loss
from metacontroller.control.metacontroller import MetaController
from metacontroller.control.sequence_embedder import SequenceEmbedder
from metacontroller.data.trajectories import length_mask, masked_mean
from metacontroller.domains.registry import domain_of
from metacontroller.models.transformer import Transformer
from metacontroller.phases.artefacts import BASE_MODEL, META_CONTROLLER, load_artefact
from metacontroller.phases.discover import discover
from metacontroller.phases.evaluate import evaluate
from metacontroller.phases.internal_rl import internal_rl
from metacontroller.phases.policy_gradient import InternalRLConfig, ratio_metrics, reinforce
from metacontroller.phases.pretrain import pretrain
from metacontroller.phases.rollout import AbstractRollout, policy_proposal, rollout_abstract
from metacontroller.recipes.config import (
    ExperimentConfig,
    build_meta_controller,
    load_run,
    read_config,
    to_json,
)
from metacontroller.recipes.measure import discovery_figures
from metacontroller.recipes.run_phase import demonstrations, post_training
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.evaluation_mode import evaluation_mode
from metacontroller.training.seeding import stream_seed
from metacontroller.variants.latent_prediction import NextLatent
from metacontroller.variants.loss_weights import LossScale

EVALUATED = 4096
Surrogate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(log_prob, old) (b, t, entries) and advantage (b,), mask (b, t) -> loss."""


class Foreseeing(Transformer):
    """Learns to predict its next last residual too; the weight is 1."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        self.next_latent = NextLatent(dim)

    def behavior_cloning_loss(self, states: Tensor, actions: Tensor, episode_lens: Tensor, **options: Any) -> Any:
        hidden = self.upper(self.residual(states, actions))
        losses = self.readout_losses(hidden, states, actions, episode_lens, options["with_state_loss"])
        mask = length_mask(episode_lens, actions.shape[1])
        foreseen = self.next_latent.loss(hidden, self.action_readout.embed(actions), mask)
        return losses._replace(action=losses.action + foreseen)


class Scaled(Transformer):
    """Divides each loss of pretraining by its running root mean square."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        self.action_scale, self.state_scale = LossScale(), LossScale()

    def behavior_cloning_loss(self, *arguments: Any, **options: Any) -> Any:
        losses = super().behavior_cloning_loss(*arguments, **options)
        return losses._replace(action=self.action_scale(losses.action), state=self.state_scale(losses.state))


class Variant(NamedTuple):
    """What differs from the reference. steering: fields of the metacontroller's config. alter: changes a new
    metacontroller. Model, body, state_loss_weight: of a base model of its own: its class, options of both bodies, the
    weight of its state loss. surrogate: of the policy. prior_kl: weight of the policy's KL to the prior, in place of
    its entropy's."""

    steering: Mapping[str, Any] = MappingProxyType({})
    alter: Callable[[MetaController], None] | None = None
    Model: type[Transformer] = Transformer
    body: Mapping[str, Any] = MappingProxyType({})
    state_loss_weight: float = 0.0
    surrogate: Surrogate | None = None
    prior_kl: float | None = None

    @property
    def pretrains(self) -> bool:
        return bool(self.body) or self.Model is not Transformer or self.state_loss_weight > 0

    @property
    def discovers(self) -> bool:
        return bool(self.steering) or self.alter is not None or self.pretrains


def embedder(**options: Any) -> Callable[[MetaController], None]:
    """Puts a sequence embedder of the same widths in the place of the metacontroller's."""

    def change(meta_controller: MetaController) -> None:
        old = meta_controller.sequence_embedder
        width, inner = old.project_out.out_features, old.project_in.out_features
        meta_controller.sequence_embedder = SequenceEmbedder(meta_controller.dim_model, width, dim=inner, **options)

    return change


def ratio_loss(weight: float, length: float) -> Callable[[MetaController], None]:
    """Sets the H-Net loss towards a switch every ``length`` steps."""

    def change(meta_controller: MetaController) -> None:
        meta_controller.ratio_loss_weight, meta_controller.target_segment_length = weight, length

    return change


def deeper(meta_controller: MetaController) -> None:
    """Puts a hypernetwork of two hidden layers in the place of that of one."""
    old = meta_controller.controller
    meta_controller.controller = type(old)(
        meta_controller.dim_latent, meta_controller.dim_model, hidden=32, rank=16, depth=2
    )


def clipped(eps_clip: float | tuple[float, float], *, per_entry: bool = False) -> Surrogate:
    def loss(log_prob: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        if not per_entry:
            log_prob, old = log_prob.sum(-1), old.sum(-1)
        return clipped_surrogate(log_prob, old, advantage[:, None], mask, eps_clip)

    return loss


def target(log_prob: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum(1).clamp_min(1)
    scores, old_scores = (value.sum(-1).masked_fill(~mask, 0.0).sum(1) / count for value in (log_prob, old))
    return target_policy_loss(scores, old_scores, advantage)


VARIANTS = {
    "paper": Variant(),
    "binary-codes": Variant(steering={"code": "binary", "policy_std": 1.0}),
    "embedder-causal-attention": Variant(alter=embedder(kind="causal-attention")),
    "embedder-gru": Variant(alter=embedder(kind="gru")),
    "embedder-hawk": Variant(alter=embedder(kind="hawk")),
    "embedding-a-step": Variant(alter=embedder(kind="attention", pooled=False)),
    "deeper-hypernetwork": Variant(alter=deeper),
    "ratio-loss": Variant(alter=ratio_loss(0.1, 6.0)),
    "norm-after-last-block": Variant(body={"final_norm": True}),
    "next-latent": Variant(Model=Foreseeing),
    "state-loss": Variant(state_loss_weight=0.01),
    "normalized-losses": Variant(Model=Scaled, state_loss_weight=1.0),
    "asymmetric-clip": Variant(surrogate=clipped((0.2, 0.28))),
    "ratio-per-entry": Variant(surrogate=clipped(0.2, per_entry=True)),
    "target-policy": Variant(surrogate=target),
    "prior-kl": Variant(surrogate=clipped(0.2), prior_kl=0.003),
}


# -- one variant ------------------------------------------------------------------------------------------------------


def seeded(seed: int, make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def base_model(variant: Variant, config: ExperimentConfig, source: RunFolder, run: RunFolder) -> Any:
    """The reproduction's, or one that differs and is pretrained for as many updates."""
    if not variant.pretrains:
        return load_artefact(config.model.Model, source, BASE_MODEL, "cpu")
    spec, sizes = domain_of(config.domain).spec(), config.model
    body = {"kind": sizes.body, "heads": sizes.heads, "mlp_dim": sizes.mlp_dim, **variant.body}
    model = seeded(
        stream_seed(config.seed, "model"),
        lambda: variant.Model(
            sizes.dim,
            action_embed_readout=spec.action,
            state_embed_readout=spec.encoder,
            lower_body={"depth": sizes.lower_depth, **body},
            upper_body={"depth": sizes.upper_depth, **body},
            condition_on_actions=False,
            precision=sizes.precision,
        ),
    )
    episodes = demonstrations(domain_of(config.domain), "pretrain")
    pretraining = replace(config.pretrain, state_loss_weight=variant.state_loss_weight, snapshots=())
    return pretrain(pretraining, model, episodes, run, resume=True, quiet=True)


def steering(
    variant: Variant, config: ExperimentConfig, model: Any, source: RunFolder, run: RunFolder
) -> MetaController:
    """The reproduction's metacontroller, or one that differs, or reads another base, and is trained for as many
    updates."""
    if not variant.discovers:
        return load_artefact(MetaController, source, META_CONTROLLER, "cpu")
    changed = replace(config, meta_controller=replace(config.meta_controller, **variant.steering))
    meta_controller, alter = build_meta_controller(changed), variant.alter
    if alter is not None:
        seeded(stream_seed(config.seed, "meta_controller"), lambda: alter(meta_controller))
    domain = domain_of(config.domain)
    augment = domain.augment if config.discover.symmetry_augmentation else None
    episodes = demonstrations(domain, "discover")
    return discover(config.discover, model, meta_controller, episodes, run, augment=augment, resume=True, quiet=True)


def reinforced(
    variant: Variant, config: InternalRLConfig, model: Any, meta_controller: MetaController, reset: Any, run: RunFolder
) -> MetaController:
    """Internal RL, with the variant's loss in place of the paper's if it has one."""
    if variant.surrogate is None:
        return internal_rl(config, model, meta_controller, reset, run, resume=True, quiet=True)
    codes, policy, acting, change = (
        meta_controller.codes,
        meta_controller.policy,
        copy.deepcopy(meta_controller.policy),
        variant.surrogate,
    )
    model.eval()
    evaluation_mode(meta_controller)

    def play(n: int, generator: torch.Generator) -> AbstractRollout:
        acting.load_state_dict(policy.state_dict())  # stays as it is while an update waits
        proposal = policy_proposal(meta_controller, generator)
        return rollout_abstract(model, meta_controller, reset(n, generator), proposal, generator)

    def surrogate(rollout: AbstractRollout, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mask = length_mask(rollout.lengths, rollout.code.shape[1])
        distribution, _ = policy(rollout.residual)
        with torch.no_grad():
            old = codes.log_prob(acting(rollout.residual)[0], rollout.code)
        log_prob = codes.log_prob(distribution, rollout.code)
        loss = change(log_prob, old, advantage, mask)
        if variant.prior_kl is None:
            loss = loss - config.entropy_weight * codes.mean_entropy(distribution, mask)
        else:
            loss = loss + variant.prior_kl * masked_mean(codes.kl(distribution), mask)
        return loss, ratio_metrics(log_prob.sum(-1), rollout.log_prob, mask, config.eps_clip)

    reinforce("internal_rl", config, policy, play, surrogate, run, resume=True, quiet=True)
    return meta_controller


def measured(name: str, source: RunFolder, out: Path, task: str, episodes: int) -> dict[str, Any]:
    """The row of a variant, from where its folder stands."""
    run, variant = RunFolder(out / name), VARIANTS[name]
    if finished := run.read_summary():
        return finished
    began, config = time.monotonic(), read_config(source)
    domain = replace(config.domain, post_task=domain_of(config.domain).parse_task(task))
    config = replace(config, domain=domain, internal_rl=replace(config.internal_rl, episodes=episodes))
    run.path.mkdir(parents=True, exist_ok=True)
    run.write_config(to_json(config))
    model = base_model(variant, config, source, run)
    meta_controller = steering(variant, config, model, source, run)
    loaded = load_run(run, "cpu", config)
    vars(loaded).update(base=model, model=model, meta_controller=meta_controller)  # those in memory, not of its files
    seed = stream_seed(config.seed, "evaluate")
    found = discovery_figures(loaded, seed, EVALUATED)
    world = domain_of(config.domain)
    prior = evaluate(model, meta_controller, world, "prior", None, EVALUATED, seed)["success"]
    policy = reinforced(variant, config.internal_rl, model, meta_controller, post_training(world), run)
    after = evaluate(model, policy, world, "internal-rl", None, EVALUATED, seed)["success"]
    minutes = (time.monotonic() - began) / 60
    row = {"variant": name, "seed": config.seed, **found, "prior": prior, "internal_rl": after, "minutes": minutes}
    run.write_summary(row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a seed's folder of a reproduction")
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("runs/variants"))
    parser.add_argument("--episodes", type=int, default=100 * 1024, help="of internal RL")
    parser.add_argument("--task", default="0-1-2-3", help="of internal RL")
    arguments = parser.parse_args()
    run, rest = RunFolder(arguments.run), (arguments.out, arguments.task, arguments.episodes)
    for name in arguments.variants or VARIANTS:
        if name not in VARIANTS:
            sys.exit(f"variant {name!r} is unknown; known are {', '.join(VARIANTS)}.")
        print(json.dumps(measured(name, run, *rest)), flush=True)


if __name__ == "__main__":
    main()
