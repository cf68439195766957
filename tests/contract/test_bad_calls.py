"""Bad calls of what is public: each is answered by one sentence that names the value and what was expected."""

# pyright: reportArgumentType=false
# What is passed is wrong on purpose.

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import gymnasium
import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor

from metacontroller import InternalEnv, InternalVectorEnv, MetaController, Transformer
from metacontroller.analysis.probing import LayerConfig
from metacontroller.baselines.compile import CompileConfig
from metacontroller.control.config import MetaControllerConfig
from metacontroller.control.losses import clipped_surrogate, trajectory_advantages
from metacontroller.control.switching import GateConfig
from metacontroller.data import Trajectories, TrajectoryStore, length_sorted_batches
from metacontroller.domains.ant_pinpad.domain import AntPinpadConfig
from metacontroller.domains.babyai.domain import BabyAIConfig
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpadConfig
from metacontroller.domains.offline.domain import OfflineConfig
from metacontroller.domains.registry import domain_of
from metacontroller.errors import UserError
from metacontroller.models.config import ModelConfig
from metacontroller.phases.discover import DiscoverConfig
from metacontroller.phases.evaluate import EvaluateConfig, evaluate
from metacontroller.phases.policy_gradient import InternalRLConfig
from metacontroller.phases.pretrain import PretrainConfig
from metacontroller.presets import preset
from metacontroller.recipes.collect import CollectConfig
from metacontroller.recipes.config import build_meta_controller, build_model, from_json, to_json, with_seed
from metacontroller.recipes.reproduce import reproduce
from metacontroller.recipes.study_runs import StudyConfig
from metacontroller.recipes.sweep import sweep
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.optimizer import OptimizerConfig
from metacontroller.training.seeding import stream_seed

NAN, INF = math.nan, math.inf
Call = tuple[Callable[[], Any], str, str]
"""The call, what of the value its answer names, and what it expects instead."""


@pytest.fixture(autouse=True)
def _as_for_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and types are not checked for the user as they are in these tests: the messages are our own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def answered(call: Callable[[], Any], *parts: str) -> None:
    """The call raises a UserError of one sentence, in which all the parts stand."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert [part for part in parts if part not in text] == [], text
    assert len(re.findall(r"[.!?](?=\s|$)", text)) == 1, text
    assert text.endswith("."), text


# -- configs ----------------------------------------------------------------------------------------------------------

OPTIMIZER = OptimizerConfig(steps=10, batch_size=4, lr=0.1)
CONFIGS: dict[str, Any] = {
    "optimizer": OPTIMIZER,
    "pretrain": PretrainConfig(optimizer=OPTIMIZER),
    "discover": DiscoverConfig(optimizer=OPTIMIZER),
    "internal_rl": InternalRLConfig(episodes=8, batch_size=4),
    "evaluate": EvaluateConfig(),
    "meta_controller": MetaControllerConfig(),
    "gate": GateConfig(),
    "model": ModelConfig(dim=8, lower_depth=1, upper_depth=1, heads=2, mlp_dim=8),
    "compile": CompileConfig(optimizer=OPTIMIZER),
    "grid": GridworldPinpadConfig(),
    "ant": AntPinpadConfig(),
    "babyai": BabyAIConfig(),
    "offline": OfflineConfig(),
    "study": StudyConfig(),
    "collect": CollectConfig(env="E", policy="p:q", episodes=3),
    "probes": LayerConfig(),
}
NUMBERS = [
    (name, field.name, kind)
    for name, config in CONFIGS.items()
    for field in dataclasses.fields(config)
    for kind in (int, float)
    if get_type_hints(type(config))[field.name] in (kind, kind | None)
]


def changed(config: str, field: str, value: Any) -> Callable[[], Any]:
    return lambda: dataclasses.replace(CONFIGS[config], **{field: value})


@pytest.mark.parametrize(("config", "field", "kind"), NUMBERS, ids=lambda part: str(part))
def test_every_number_of_a_config_has_its_range(config: str, field: str, kind: type) -> None:
    """Not a number, infinite, a truth value, a fraction where whole numbers are meant, and beyond all reason."""
    for bad in (NAN, INF, -INF, True, "3"):
        answered(changed(config, field, bad), f"{field} is {bad!r}; expected ")
    if kind is int:
        answered(changed(config, field, 1.5), f"{field} is 1.5; expected ", "whole number")
        answered(changed(config, field, 2**60), f"{field} is {2**60}; expected ")
        answered(changed(config, field, -(2**60)), f"{field} is {-(2**60)}; expected ")


def test_configs_hold_as_many_numbers_as_they_have() -> None:
    assert len(NUMBERS) > 100
    assert {name for name, _, _ in NUMBERS} == CONFIGS.keys()


RANGES = [
    ("optimizer", "steps", 0, "expected at least 1"),
    ("optimizer", "batch_size", 2**21, "expected at most 1048576"),
    ("optimizer", "lr", 0.0, "expected a number above 0"),
    ("optimizer", "weight_decay", -0.1, "expected a number of at least 0"),
    ("optimizer", "decay_steps", 11, "expected 0..10, the number of steps"),
    ("optimizer", "max_grad_norm", 0.0, "expected a number above 0"),
    ("optimizer", "log_every", 0, "expected at least 1"),
    ("optimizer", "checkpoint_every", -1, "expected at least 1"),
    ("pretrain", "state_loss_weight", -1.0, "expected a number of at least 0"),
    ("pretrain", "muon_lr", -1.0, "expected a number of at least 0"),
    ("pretrain", "choice_weight", 0.0, "expected a number above 0"),
    ("pretrain", "seed", 2**31, "expected at most 2147483647"),
    ("discover", "choice_weight", 0.0, "expected a number above 0"),
    ("discover", "muon_lr", -1.0, "expected a number of at least 0"),
    ("discover", "alpha_start", -1.0, "expected a number of at least 0"),
    ("discover", "alpha_warmup", (5, 2), "expected (from, to), whole numbers with 0 <= from <= to"),
    ("discover", "alpha_warmup", (1,), "expected (from, to)"),
    ("discover", "alpha_warmup", (0.5, 2), "expected (from, to)"),
    ("internal_rl", "episodes", 0, "expected at least 1"),
    ("internal_rl", "min_better", 5, "expected 1..4, a batch's episodes"),
    ("internal_rl", "target_kl", 0.0, "expected a number above 0, or none"),
    ("internal_rl", "eps_clip", -0.2, "expected a number above 0"),
    ("internal_rl", "delta", -1e-3, "expected a number of at least 0"),
    ("evaluate", "walk_steps", 10**7, "expected at most 1000000, or none"),
    ("evaluate", "layouts_per_code", 0, "expected at least 1"),
    ("meta_controller", "dim_sequence", 2**17, "expected at most 65536"),
    ("meta_controller", "embedder_dim", 6, "expected a multiple of 4"),
    ("meta_controller", "code", "ternary", "expected one of 'gaussian', 'binary'"),
    ("meta_controller", "embedder_kind", "lstm", "expected one of 'attention', 'hawk'"),
    ("meta_controller", "policy_kind", "lstm", "expected one of 'gru', 'hawk'"),
    ("meta_controller", "precision", "half", "expected one of 'float32', 'bfloat16', 'auto'"),
    ("meta_controller", "policy_std", 0.0, "expected a number above 0"),
    ("meta_controller", "free_bits", -1.0, "expected a number of at least 0"),
    ("gate", "mode", "often", "expected one of 'soft', 'hard'"),
    ("gate", "threshold", 1.0, "expected a number between 0 and 1"),
    ("gate", "temperature", 0.0, "expected a number above 0"),
    ("gate", "period", 0, "expected at least 1"),
    ("model", "lower_depth", 2000, "expected at most 1024"),
    ("model", "dim", 2**17, "expected at most 65536"),
    ("model", "body", "lstm", "expected one of 'attention', 'hawk'"),
    ("compile", "segments", 1, "expected at least 2"),
    ("compile", "prior_rate", 0.0, "expected a number above 0"),
    ("compile", "alpha_boundary", -1.0, "expected a number of at least 0"),
    ("grid", "size", 257, "expected at most 256"),
    ("grid", "reach", 0, "expected at least 1, or none"),
    ("grid", "epsilon", 2, "expected a probability between 0 and 1"),
    ("grid", "tie_break", "left", "expected one of"),
    ("grid", "view", "above", "expected one of 'absolute', 'egocentric'"),
    ("ant", "cell_size", 0.0, "expected a number of meters above 0"),
    ("ant", "threads", 2**11, "expected at most 1024"),
    ("babyai", "room_size", 4, "expected at least 5"),
    ("babyai", "easiest", 0.0, "expected a share above 0, at most 1"),
    ("offline", "window", 0, "expected at least 1"),
    ("offline", "workers", -1, "expected at least 0"),
    ("study", "few_seeds", -1, "expected at least 0"),
    ("study", "forced_alpha", -0.1, "expected a number of at least 0, or none"),
    ("collect", "episodes", 0, "expected at least 1"),
    ("probes", "lr", 0.0, "expected a number above 0"),
]
ENTRIES = [
    ("pretrain", "snapshots", (4, 0), "snapshots[1] is 0; expected at least 1"),
    ("study", "alphas", (0.1, NAN), "alphas[1] is nan; expected a number of at least 0"),
    ("study", "epsilons", (2.0,), "epsilons[0] is 2.0; expected a probability between 0 and 1"),
    ("study", "weight_decays", (-1.0,), "weight_decays[0] is -1.0; expected a number of at least 0"),
    ("model", "dim", 2**16, "make about 3.4e+10 weights; expected at most 1.7e+10"),
    ("model", "heads", 3, "dim 8 is not a multiple of heads 3"),
    ("model", "action_modes", 0, "action_modes is 0; expected at least 1"),
    ("model", "min_action_std", 0.0, "min_action_std is 0.0; expected a number between 0.00673795 and 7.38906"),
    ("internal_rl", "minibatches", 3, "batch_size 4 is not a multiple of minibatches 3"),
    ("grid", "tasks", (), "the list of tasks is empty: give at least one task"),
    ("grid", "tasks", ((0, 9),), "task 0-9 has unknown color 9: colors run from 0 to 7"),
    ("grid", "tasks", ((0, 0.5),), "tasks[0][1] is 0.5; expected a whole number"),
    ("grid", "tasks", ((0, 0),), "task 0-0 names color 0 twice in a row"),
    ("grid", "num_walls", 48, "has 49 cells, too few for 8 colors, 48 walls"),
]


@pytest.mark.parametrize(("config", "field", "value", "expected"), RANGES)
def test_ranges(config: str, field: str, value: Any, expected: str) -> None:
    answered(changed(config, field, value), f"{field} is {value!r}; {expected}")


@pytest.mark.parametrize(("config", "field", "value", "said"), ENTRIES)
def test_values_that_do_not_fit_together(config: str, field: str, value: Any, said: str) -> None:
    answered(changed(config, field, value), said)


# -- models and metacontrollers ---------------------------------------------------------------------------------------

TENSOR = "expected a torch.Tensor, as torch.as_tensor makes of lists and arrays"
STATES, ACTIONS, RESIDUAL = torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, 8)


def model(dim: Any = 8, **options: Any) -> Transformer:
    body = {"depth": 1}
    defaults: dict[str, Any] = {"lower_body": body, "upper_body": body, "action_embed_readout": {"num_discrete": 4}}
    return Transformer(dim, **{**defaults, "state_embed_readout": {"num_continuous": 3}, **options})


def lower(**options: Any) -> Callable[[], Any]:
    return lambda: model(lower_body=options)


def states(**options: Any) -> Callable[[], Any]:
    return lambda: model(state_embed_readout=options)


def actions(**options: Any) -> Callable[[], Any]:
    return lambda: model(action_embed_readout=options)


def steering(**options: Any) -> MetaController:
    return MetaController(**{"dim_model": 8, "dim_meta_controller": 8, "dim_latent": 2, "rank": 2, **options})


def made(**options: Any) -> Callable[[], Any]:
    return lambda: steering(**options)


def continued_twice() -> None:
    acting = model(condition_on_actions=False)
    _, cache = acting(STATES[:, :1], return_cache=True)
    for _ in range(2):
        acting(STATES[:, :1], cache=cache, return_cache=True)


def loss(**change: Any) -> Callable[[], Any]:
    codes = torch.zeros(2, 5, 2)
    stored: dict[str, Any] = {"states": RESIDUAL, "old_log_probs": codes, "actions": codes}
    stored |= {"advantages": torch.zeros(2), "switch_betas": torch.ones(2, 5)}
    return lambda: steering().policy_losses(**(stored | change))


def everywhere(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value)


MODELS: dict[str, Call] = {
    "states of a list": (lambda: model()(STATES.tolist(), ACTIONS), "state is a list", TENSOR),
    "states of numpy": (lambda: model()(STATES.numpy(), ACTIONS), "state is a ndarray", TENSOR),
    "no states": (lambda: model()(None, ACTIONS), "state is None", TENSOR),
    "actions of a list": (lambda: model()(STATES, ACTIONS.tolist()), "actions is a list", TENSOR),
    "actions of numpy": (lambda: model()(STATES, ACTIONS.numpy()), "actions is a ndarray", TENSOR),
    "complex states": (lambda: model()(STATES + 0j, ACTIONS), "dtype torch.complex64", "expected floating-point"),
    "actions of bool": (lambda: model()(STATES, ACTIONS.bool()), "dtype torch.bool", "expected int64 (2, 5)"),
    "lengths of a list": (lambda: model()(STATES, ACTIONS, episode_lens=[5, 2]), "episode_lens is a list", TENSOR),
    "a name for a metacontroller": (
        lambda: model()(STATES, ACTIONS, meta_controller="mine", discovery_phase=True),
        "meta_controller is 'mine'",
        "expected a MetaController",
    ),
    "a step of a list": (lambda: model()(STATES[:, :1].tolist(), return_cache=True), "state is a list", TENSOR),
    "a past action of numpy": (
        lambda: model()(STATES[:, :1], ACTIONS[:, :1].numpy(), return_cache=True),
        "actions is a ndarray",
        TENSOR,
    ),
    "no cache": (
        lambda: model()(STATES[:, :1], ACTIONS[:, :1], cache="warm", return_cache=True),
        "cache is 'warm'",
        "expected what a step returned",
    ),
    "a cache continued twice": (continued_twice, "the cache of step 1", "continued before, up to step 2"),
    "dim 0": (lambda: model(dim=0), "dim is 0", "expected at least 1"),
    "dim of text": (lambda: model(dim="64"), "dim is '64'", "expected a whole number"),
    "dim of a fraction": (lambda: model(dim=2.5), "dim is 2.5", "expected a whole number"),
    "huge dim": (lambda: model(dim=2**30), "dim is 1073741824", "expected at most 65536"),
    "no body": (lambda: model(lower_body=None), "lower_body is None", "expected a dict"),
    "body without depth": (lower(), "lower_body is {} and lacks 'depth'", "expected depth, heads"),
    "misspelt option": (lower(depht=1), "lower_body has an unknown option 'depht'", "expected depth, heads"),
    "depth of text": (lower(depth="2"), "depth is '2'", "expected a whole number of at least 0"),
    "depth of a fraction": (lower(depth=1.5), "depth is 1.5", "expected a whole number"),
    "huge depth": (lower(depth=10**6), "depth is 1000000", "expected at most 1024"),
    "no heads": (lower(depth=1, heads=0), "heads is 0", "expected at least 1"),
    "empty heads": (lower(depth=1, dim_head=0), "dim_head is 0", "expected at least 1"),
    "empty mlp": (lower(depth=1, mlp_dim=0), "mlp_dim is 0", "expected at least 1"),
    "kind of body": (lower(depth=1, kind="lstm"), "lower_body has kind 'lstm'", "expected one of 'attention', 'hawk'"),
    "no width": (lower(depth=1, kind="hawk", width=0), "width is 0", "expected at least 1"),
    "no action readout": (lambda: model(action_embed_readout=None), "action_embed_readout is None", "expected dict("),
    "number for a readout": (lambda: model(action_embed_readout=4), "action_embed_readout is 4", "expected dict("),
    "fraction of choices": (actions(num_discrete=2.5), "num_discrete is 2.5", "expected a whole number"),
    "fractions of choices": (
        actions(num_discrete=[2.5]),
        "num_discrete[0] is 2.5",
        "expected a whole number of at least 1",
    ),
    "choices of none": (actions(num_discrete=[]), "num_discrete is []", "expected at least one"),
    "NaN of numbers": (actions(num_continuous=NAN), "num_continuous is nan", "expected a whole number"),
    "no state readout": (lambda: model(state_embed_readout=None), "state_embed_readout is None", "expected dict("),
    "text for a width": (states(num_continuous="3"), "num_continuous is '3'", "expected a whole number"),
    "NaN mean": (states(num_continuous=1, mean=[NAN], std=[1.0]), "mean[0] is nan", "expected a finite number"),
    "NaN deviation": (states(num_continuous=1, mean=[0.0], std=[NAN]), "std[0] is nan", "expected a finite number"),
    "no deviation": (states(num_continuous=1, mean=[0.0], std=[0.0]), "std is [0.0]", "expected positive numbers"),
    "means of others": (states(num_continuous=2, mean=[0.0], std=[1.0]), "mean is [0.0]", "expected 2 numbers"),
    "half a grid": (states(grid={"size": 4}), "{'size': 4} and lacks 'num_colors'", "expected size, num_colors"),
    "more than a grid": (
        states(grid={"size": 4, "num_colors": 1, "num_walls": 0, "depth": 3}),
        "has an unknown option 'depth'",
        "expected size, num_colors",
    ),
    "image without sides": (states(image=[0, 3, 3]), "image is [0, 3, 3]", "expected (height, width)"),
    "image of text": (states(image="large"), "image is 'large'", "expected (height, width)"),
    "categories of none": (states(tokens={"sizes": [0]}), "sizes[0] is 0", "expected at least 1"),
    "precision": (lambda: model(precision="half"), "precision is 'half'", "expected one of 'float32', 'b"),
    "condition of none": (lambda: model(dim_condition=0), "dim_condition is 0", "expected at least 1"),
    "too high a layer": (lambda: model().resplit(9), "lower_depth is 9", "expected 0..2"),
    "half a layer": (lambda: model().resplit(0.5), "lower_depth is 0.5", "expected 0..2"),
    "width of another model": (made(dim_model=2.5), "dim_model is 2.5", "expected a whole number"),
    "text for a code": (made(dim_latent="2"), "dim_latent is '2'", "expected a whole number"),
    "no width of the metacontroller": (made(dim_meta_controller=0), "dim_meta_controller is 0", "expected at least 1"),
    "negative history": (made(dim_history=-2), "dim_history is -2", "expected at least 1"),
    "half a rank": (made(rank=1.5), "rank is 1.5", "expected a whole number of at least 1, or none"),
    "rank of more than the residual": (made(rank=9), "rank is 9", "expected None (full) or 1..8"),
    "decoder without layers": (made(decoder_depth=0), "depth of the controller is 0", "expected at least 1"),
    "decoder of fewer than no units": (
        made(decoder_hidden=-1),
        "decoder_hidden is -1",
        "expected at least 0",
    ),
    "gate without units": (made(switch_hidden=0), "switch_hidden is 0", "expected at least 1"),
    "embedder without layers": (made(embedder_depth=-1), "embedder_depth is -1", "expected at least 1"),
    "kind of embedder": (made(embedder_kind="lstm"), "embedder_kind is 'lstm'", "expected one of 'attention', 'hawk'"),
    "name for a gate": (made(gate="hard"), "gate is 'hard'", "expected a dict of options"),
    "misspelt gate": (made(gate={"mod": "hard"}), "gate has an unknown option 'mod'", "expected mode, threshold"),
    "NaN ratio loss": (made(ratio_loss_weight=NAN), "ratio_loss_weight is nan", "expected a number of at least 0"),
    "NaN segments": (made(target_segment_length=NAN), "target_segment_length is nan", "expected a number above 1"),
    "NaN clipping": (made(eps_clip=NAN), "eps_clip is nan", "expected a number above 0"),
    "too many bits": (made(code="binary", dim_latent=20), "a binary code has 20 bits", "expected 1..16"),
    "NaN bits": (made(code="binary", free_bits=NAN), "free_bits is nan", "expected a number of at least 0"),
    "residual of numpy": (lambda: steering().act(RESIDUAL.numpy()), "the residual stream is a ndarray", TENSOR),
    "residual of a list": (lambda: steering().discover(RESIDUAL.tolist()), "the residual stream is a list", TENSOR),
    "whole residual": (lambda: steering().discover(RESIDUAL.long()), "dtype torch.int64", "expected a floating-point"),
    "lengths of discovery": (lambda: steering().discover(RESIDUAL, [5, 2]), "episode_lens is a list", TENSOR),
    "state of other rows": (
        lambda: steering().act(torch.zeros(3, 1, 8), steering().initial_state(2)),
        "the state has 2 episodes",
        "expected 3, as the residual",
    ),
    "noise of other steps": (
        lambda: steering().discover(RESIDUAL, noise=steering().sample_noise(2, 4)),
        "noise is for (episodes, steps) (2, 4)",
        "expected (2, 5)",
    ),
    "noise for none": (lambda: steering().sample_noise(0, 3), "batch is 0", "expected at least 1"),
    "distribution of a list": (lambda: steering().log_prob([0.0], RESIDUAL), "action_dist is a list", TENSOR),
    "generations of none": (
        lambda: model(meta_controller=steering()).evolve(0, lambda _: 1.0),
        "num_generations is 0",
        "expected at least 1",
    ),
    "half a generation": (
        lambda: model(meta_controller=steering()).evolve(1.5, lambda _: 1.0),
        "num_generations is 1.5",
        "expected a whole number",
    ),
}
LOSSES: dict[str, Call] = {
    "advantages of a list": (loss(advantages=[0.0, 1.0]), "advantages is a list", TENSOR),
    "NaN advantages": (loss(advantages=torch.tensor([NAN, 0.0])), "range over nan..nan", "expected finite"),
    "infinite advantages": (loss(advantages=torch.tensor([INF, 0.0])), "range over 0..inf", "expected finite"),
    "whole advantages": (loss(advantages=ACTIONS[:, 0]), "dtype torch.int64", "expected finite floating-point"),
    "NaN log-probabilities": (
        loss(old_log_probs=everywhere(NAN, 2, 5, 2)),
        "old_log_probs hold NaN",
        "expected finite",
    ),
    "NaN codes": (loss(actions=everywhere(NAN, 2, 5, 2)), "actions hold NaN", "expected finite numbers"),
    "NaN residuals": (loss(states=everywhere(NAN, 2, 5, 8)), "states hold NaN", "expected finite numbers"),
    "NaN gate": (loss(switch_betas=everywhere(NAN, 2, 5)), "switch_betas hold NaN", "expected numbers from 0 to 1"),
    "negative clipping": (loss(eps_clip=-1.0), "eps_clip is -1.0", "expected a finite number of at least 0"),
    "half a clipping": (loss(eps_clip=(0.2,)), "eps_clip is (0.2,)", "or two (below, above)"),
    "objective": (loss(objective="best"), "objective is 'best'", "expected one of 'clipped', 'target'"),
    "no temperature": (loss(objective="target", eta=0.0), "eta is 0.0", "expected a number above 0"),
    "odd groups": (loss(objective="target", group=3), "2 episodes do not divide", "into groups of 3"),
    "lengths": (loss(episode_lens=torch.tensor([5.0, 2.0])), "dtype torch.float32", "expected whole numbers (2,)"),
    "returns of a list": (lambda: trajectory_advantages([1.0, 2.0]), "returns is a list", TENSOR),
    "NaN clipping": (
        lambda: clipped_surrogate(STATES[0], STATES[0], STATES[0], STATES[0] == 0, NAN),
        "eps_clip is nan",
        "expected a finite number",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    answered(*MODELS[name])


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    answered(*LOSSES[name])


# -- data -------------------------------------------------------------------------------------------------------------

LABELS = torch.zeros(2, 5, dtype=torch.int64)


def episodes(**change: Any) -> Trajectories:
    fields: dict[str, Any] = {"states": torch.zeros(2, 6, 3), "actions": ACTIONS, "lengths": torch.tensor([5, 2])}
    return Trajectories(**(fields | change))


def batch(**change: Any) -> Callable[[], Any]:
    return lambda: episodes(**change)


def row(**change: Any) -> dict[str, Any]:
    return {"states": np.zeros((6, 3), np.float32), "actions": np.zeros(5, np.int64), **change}


def rows(*episode: Any) -> Callable[[], Any]:
    return lambda: Trajectories.from_episodes(episode)


def picked(*index: float) -> Callable[[], Any]:
    return lambda: episodes().index(torch.tensor(index))


def drawn(n: Any) -> Callable[[], Any]:
    return lambda: episodes().sample(n, torch.Generator())


DATA: dict[str, Call] = {
    "states of a list": (batch(states=[[0.0]]), "states is a list", TENSOR),
    "states of numpy": (batch(states=np.zeros((2, 6, 3))), "states is a ndarray", TENSOR),
    "no actions": (batch(actions=None), "actions is None", TENSOR),
    "actions without steps": (batch(actions=torch.zeros(5)), "actions have shape (5,)", "expected (episodes, steps"),
    "states without steps": (batch(states=torch.zeros(2)), "states have shape (2,)", "one state more than actions"),
    "lengths of a list": (batch(lengths=[5, 2]), "lengths is a list", TENSOR),
    "fractions of steps": (
        batch(lengths=torch.tensor([5.0, 2.0])),
        "dtype torch.float32",
        "expected whole numbers (2,)",
    ),
    "truths for lengths": (
        batch(lengths=torch.tensor([True, True])),
        "dtype torch.bool",
        "expected whole numbers (2,)",
    ),
    "labels too short": (batch(subgoals=LABELS[:, :4]), "subgoals have shape (2, 4)", "expected int64 (2, 5)"),
    "labels of other rows": (batch(segments=LABELS[:1]), "segments have shape (1, 5)", "expected int64 (2, 5)"),
    "fractions as labels": (batch(subgoals=LABELS.float()), "dtype torch.float32", "expected int64 (2, 5)"),
    "labels of a list": (batch(subgoals=[[0]]), "subgoals is a list", TENSOR),
    "a reward an episode": (batch(rewards=torch.zeros(2)), "rewards have shape (2,)", "expected (2, 5)"),
    "an ending a step": (batch(terminated=LABELS > 0), "terminated has shape (2, 5)", "expected bool (2,)"),
    "endings as numbers": (batch(truncated=torch.zeros(2)), "dtype torch.float32", "expected bool (2,)"),
    "seeds of others": (batch(seeds=torch.tensor([1])), "seeds have shape (1,)", "expected int64 (2,)"),
    "episodes of none": (rows(), "no episode is given", "give at least one"),
    "an episode that is none": (rows(3), "episode 0 is 3", "expected a mapping"),
    "episodes that are none": (lambda: Trajectories.from_episodes(5), "episodes is 5", "expected a list of mappings"),
    "text as actions": (rows(row(actions=["left"] * 5)), "actions ['left', 'left'", "expected an array of numbers"),
    "ragged states": (rows(row(states=[[1, 2], [3]])), "states [[1, 2], [3]]", "expected an array of numbers"),
    "unknown field": (rows(row(color=1)), "'color'", "expected the same, with states and actions"),
    "another width": (rows(row(), row(states=np.zeros((6, 4), np.float32))), "(6, 4)", "(6, 3)"),
    "another type": (rows(row(), row(actions=np.zeros(5))), "dtype float64", "dtype int64"),
    "a single action": (rows(row(actions=3)), "actions of shape ()", "expected one entry a step"),
    "two endings": (rows(row(terminated=[True, False])), "terminated of shape (2,)", "expected one value"),
    "too few rewards": (rows(row(rewards=np.zeros(4))), "4 rewards and 5 actions", "as many of the rest"),
    "a row too far": (picked(5), "rows range over 5..5", "each must lie in 0..1"),
    "half a row": (picked(0.5), "dtype torch.float32", "expected int64 (m,)"),
    "rows of a list": (lambda: episodes().index([0]), "rows is a list", TENSOR),
    "no row": (lambda: episodes().index(LABELS[0, :0]), "rows have shape (0,)", "at least one index"),
    "draw of none": (drawn(0), "n is 0", "expected at least 1"),
    "draw of a half": (drawn(1.5), "n is 1.5", "expected a whole number"),
    "draw without a generator": (lambda: episodes().sample(1, None), "generator is None", "expected Generator"),
    "batch of none": (lambda: next(length_sorted_batches(episodes(), 0)), "batch_size is 0", "expected at least 1"),
    "batch of a half": (lambda: next(length_sorted_batches(episodes(), 1.5)), "batch_size is 1.5", "a whole number"),
    "batches of a list": (lambda: next(length_sorted_batches([1], 1)), "trajectories is [1]", "expected Trajectories"),
    "store without a path": (lambda: TrajectoryStore(None), "path is None", "expected the folder"),
}
STORED: dict[str, tuple[Callable[[TrajectoryStore], Any], str, str]] = {
    "not there": (lambda store: TrajectoryStore(store.path / "no"), "is not a trajectory store", "write one with"),
    "of a list": (lambda store: store.write(store.path, [1]), "trajectories is [1]", "expected Trajectories"),
    "of objects": (lambda store: store.write(store.path, episodes(), {"x": NAN, "y": {1}}), "{1}", "values of JSON"),
    "of nothing": (lambda store: store.join(store.path, []), "parts are empty", "at least one"),
    "row too far": (lambda store: store.read([9]), "rows range over 9..9", "each must lie in 0..1"),
    "row below": (lambda store: store.read([-1]), "rows range over -1..-1", "each must lie in 0..1"),
    "half a row": (lambda store: store.read([0.5]), "dtype torch.float64", "expected whole numbers (m,)"),
    "rows in rows": (lambda store: store.read([[0]]), "shape (1, 1)", "expected whole numbers (m,)"),
    "no steps": (lambda store: store.read([0], longest=0), "longest is 0", "expected at least 1"),
    "a file": (lambda store: store.write(store.path / "store.json", episodes()), "store.json", "choose another folder"),
}


@pytest.mark.parametrize("name", DATA)
def test_data(name: str) -> None:
    answered(*DATA[name])


@pytest.mark.parametrize("name", STORED)
def test_stores(name: str, tmp_path: Path) -> None:
    call, *parts = STORED[name]
    store = TrajectoryStore.write(tmp_path / "store", episodes())
    answered(lambda: call(store), *parts)
    assert len(TrajectoryStore(tmp_path / "store")) == 2


# -- worlds, presets, measures and runs -------------------------------------------------------------------------------

DEBUG = preset("debug")
WORLD, BASE, STEERING = domain_of(DEBUG.domain), build_model(DEBUG), build_meta_controller(DEBUG)


def reset(n: Any = 2, **options: Any) -> Any:
    return WORLD.reset(n, torch.Generator(), **options)


def shown(n: Any, split: Any = "pretrain") -> Callable[[], Any]:
    return lambda: WORLD.demonstrations(split, n, torch.Generator())


def judged(policy: Any = "base", task: Any = None, n: Any = 4, seed: Any = 0, control: Any = STEERING) -> Any:
    return lambda: evaluate(BASE, control, WORLD, policy, task, n, seed)


def vector_step(actions: np.ndarray) -> None:
    envs = InternalVectorEnv(WORLD, BASE, STEERING, 2)
    envs.reset(seed=0)
    envs.step(actions)


WORLDS: dict[str, Call] = {
    "reset of none": (lambda: reset(0), "n is 0", "expected at least 1"),
    "reset of less": (lambda: reset(-1), "n is -1", "expected at least 1"),
    "reset of a half": (lambda: reset(1.5), "n is 1.5", "expected a whole number"),
    "no steps": (lambda: reset(max_steps=0), "max_steps is 0", "expected at least 1"),
    "half a step": (lambda: reset(max_steps=1.5), "max_steps is 1.5", "expected a whole number"),
    "demonstrations of none": (shown(0), "n is 0", "expected at least 1"),
    "demonstrations of a half": (shown(1.5), "n is 1.5", "expected a whole number"),
    "unknown split": (shown(2, "test"), "split is 'test'", "expected one of 'pretrain', 'discover'"),
    "task of words": (lambda: WORLD.parse_task("blue"), "task 'blue'", "write color numbers joined by '-'"),
    "too many actions": (lambda: reset().step(LABELS[0, :3]), "actions have shape (3,)", "one per grid, (2,)"),
    "actions of a list": (lambda: reset().step([0, 1]), "actions are [0, 1]", "expected an int64 tensor"),
    "fractional actions": (lambda: reset().step(torch.zeros(2)), "tensor([0., 0.])", "expected an int64 tensor"),
    "action below": (lambda: reset().step(torch.tensor([-1, 0])), "action -1", "take 0 (up)"),
    "action beyond": (lambda: reset().step(torch.tensor([4, 0])), "action 4", "take 0 (up)"),
    "evaluation of none": (judged(n=0), "episodes is 0", "expected at least 1"),
    "evaluation of a half": (judged(n=2.5), "episodes is 2.5", "expected a whole number"),
    "unknown policy": (judged("best"), "policy is 'best'", "expected one of 'base', 'raw', 'prior', 'internal-rl'"),
    "seed below": (judged(seed=-1), "seed is -1", "expected at least 0"),
    "seed beyond": (judged(seed=2**70), f"seed is {2**70}", "expected at most"),
    "half a seed": (judged(seed=1.5), "seed is 1.5", "expected a whole number"),
    "codes of nobody": (judged("prior", control=None), "policy 'prior'", "give one, or choose 'base' or 'raw'"),
    "unknown color": (judged(task=(0, 99)), "task 0-99 has unknown color 99", "colors run from 0 to 3"),
    "negative color": (judged(task=(-1,)), "unknown color -1", "colors run from 0 to 3"),
    "half a color": (judged(task=(0.5,)), "a color of a task is 0.5", "expected a whole number"),
    "task of text": (judged(task="0-1"), "task is '0-1'", "expected colors in order"),
    "empty task": (judged(task=()), "an empty task", "at least one color"),
    "unknown preset": (lambda: preset("desktop"), "preset 'desktop'", "known are"),
    "empty preset": (lambda: preset(""), "preset ''", "known are"),
    "number for a preset": (lambda: preset(5), "preset is 5", "expected a name"),
    "preset of no module": (lambda: preset("no_such:mine"), "'no_such:mine'", "write package.module:function"),
    "preset with arguments": (lambda: preset("json:dumps"), "'json:dumps'", "name a function that takes none"),
    "another residual": (lambda: InternalEnv(gymnasium.Env(), BASE, steering()), "dim_model 8", "expected 16"),
    "no rows": (lambda: InternalVectorEnv(WORLD, BASE, STEERING, 0), "num_envs is 0", "expected at least 1"),
    "half a row": (lambda: InternalVectorEnv(WORLD, BASE, STEERING, 1.5), "num_envs is 1.5", "a whole number"),
    "NaN code": (lambda: vector_step(np.full((2, 4), np.nan)), "actions are [[nan", "finite numbers of shape (2, 4)"),
    "short code": (lambda: vector_step(np.zeros((2, 1))), "actions are [[0.0], [0.0]]", "of shape (2, 4)"),
    "negative run seed": (lambda: with_seed(DEBUG, -1), "seed is -1", "expected 0..268435455"),
    "half a run seed": (lambda: with_seed(DEBUG, 1.5), "seed is 1.5", "expected 0..268435455"),
    "unknown stream": (lambda: stream_seed(0, "noise"), "stream is 'noise'", "expected one of 'model'"),
    "config of a list": (lambda: from_json([]), "config is []", "expected an object"),
    "config of nothing": (lambda: from_json({}), "lacks the field 'domain'", "add it"),
    "config of more": (lambda: from_json({**to_json(DEBUG), "gpu": 1}), "unknown field 'gpu'", "known are domain"),
}
RUNS: dict[str, tuple[Callable[[RunFolder], Any], str, str]] = {
    "outside": (lambda run: run.checkpoint_path("../x"), "Checkpoint name '../x'", "without a folder"),
    "analysis outside": (lambda run: run.write_analysis("../../x", {}), "leads to", "put the file itself there"),
    "no config": (lambda run: run.read_config(), "has no config.json", "name the folder of a run"),
    "no checkpoint": (lambda run: run.load_checkpoint("x"), "no checkpoint 'x'", "present: none"),
    "metrics of text": (lambda run: run.log_metrics("p", 1, loss="low"), "loss is 'low'", "expected a number"),
    "metrics of many": (lambda run: run.log_metrics("p", 1, loss=STATES[0, 0]), "loss is tensor", "a tensor of one"),
    "step of text": (lambda run: run.log_metrics("p", "x", loss=1.0), "step is 'x'", "expected a whole number"),
    "step below": (lambda run: run.log_metrics("p", -1, loss=1.0), "step is -1", "expected at least 0"),
    "phase of a number": (lambda run: run.log_metrics(3, 1, loss=1.0), "phase is 3", "expected its name"),
    "list for a tensor": (lambda run: run.save_checkpoint("x", {"a": [1]}, {}), "tensor a is [1]", "a torch.Tensor"),
    "no workers": (lambda run: reproduce(DEBUG, run.path, workers=0), "workers is 0", "expected at least 1"),
    "a seed twice": (lambda run: reproduce(DEBUG, run.path, seeds=[1, 1]), "seeds are [1, 1]", "each once"),
    "sweep of none": (
        lambda run: sweep(DEBUG, run.path, seeds=[], alphas=[0.1], lrs=[0.1]),
        "seeds are []",
        "give at least one",
    ),
    "NaN weight": (
        lambda run: sweep(DEBUG, run.path, seeds=[0], alphas=[NAN], lrs=[0.1]),
        "alphas[0] is nan",
        "expected a number of at least 0",
    ),
    "no rate": (
        lambda run: sweep(DEBUG, run.path, seeds=[0], alphas=[0.1], lrs=[0.0]),
        "lrs[0] is 0.0",
        "expected a number above 0",
    ),
    "model not there": (lambda run: Transformer.init_and_load(run.path / "x"), "does not exist", "give a file"),
    "folder for a model": (lambda run: Transformer.init_and_load(run.path.parent), "no regular file", "put the file"),
}


@pytest.mark.parametrize("name", WORLDS)
def test_worlds_presets_and_measures(name: str) -> None:
    answered(*WORLDS[name])


@pytest.mark.parametrize("name", RUNS)
def test_runs(name: str, tmp_path: Path) -> None:
    call, *parts = RUNS[name]
    answered(lambda: call(RunFolder(tmp_path / "run")), *parts)
