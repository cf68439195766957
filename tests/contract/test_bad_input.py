"""Bad input: each mistake gives one sentence that names the value and what was expected."""

from __future__ import annotations

import re
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from metacontroller import MetaController, Transformer
from metacontroller.data import Trajectories, length_sorted_batches

BATCH, TIME, WIDTH, STATE, ACTIONS, CODE = 2, 5, 8, 3, 4, 2
GRID = {"size": 4, "num_colors": 2, "num_walls": 1}


@pytest.fixture(autouse=True)
def _as_for_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and types are not checked for the user as they are in these tests: the messages are our own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def make_model(kind: str = "discrete", **options: Any) -> Transformer:
    defaults: dict[str, Any] = {
        "action_embed_readout": {"num_continuous": ACTIONS} if kind == "continuous" else {"num_discrete": ACTIONS},
        "state_embed_readout": {"grid": GRID} if kind == "grid" else {"num_continuous": STATE},
        "lower_body": {"depth": 1},
        "upper_body": {"depth": 1},
    }
    return Transformer(WIDTH, **(defaults | options))


def make_steering(**options: Any) -> MetaController:
    defaults: dict[str, Any] = {"dim_model": WIDTH, "dim_meta_controller": 8, "dim_latent": CODE, "rank": 2}
    return MetaController(**(defaults | options))


def states(*shape: int) -> Tensor:
    return torch.randn(*(shape or (BATCH, TIME)), STATE)


def actions(*shape: int, last: int = 0) -> Tensor:
    values = torch.zeros(*(shape or (BATCH, TIME)), dtype=torch.int64)
    values[..., -1:] = last
    return values


def tokens(last: int = 0) -> Tensor:
    values = torch.zeros(BATCH, TIME, 4, dtype=torch.int64)
    values[..., -1] = last
    return values


def refused(message: str, call: Any, *arguments: Any, **options: Any) -> None:
    """The call raises a ValueError of one sentence that holds ``message``."""
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert re.findall(r"[.!?](?=\s|$)", text) == ["."], text
    assert text.endswith("."), text


BATCHES = {
    "state without time": (states(BATCH), actions(), {}, "state has shape (2, 3)"),
    "state of another width": (torch.randn(BATCH, TIME, 7), actions(), {}, "state has shape (2, 5, 7)"),
    "whole-number state": (torch.zeros(BATCH, TIME, STATE).long(), actions(), {}, "dtype torch.int64; expected float"),
    "no episodes": (states(0, TIME), actions(0, TIME), {}, "state has shape (0, 5, 3); expected a non-empty"),
    "no steps": (states(BATCH, 0), actions(BATCH, 0), {}, "state has shape (2, 0, 3); expected a non-empty"),
    "NaN state": (states().index_fill(1, torch.tensor([2]), torch.nan), actions(), {}, "state holds NaN"),
    "infinite state": (states().index_fill(1, torch.tensor([2]), torch.inf), actions(), {}, "state holds NaN or inf"),
    "too few actions": (states(), actions(BATCH, 3), {}, "actions have shape (2, 3) beside a state of shape (2, 5, 3)"),
    "too many actions": (states(), actions(BATCH, 6), {}, "actions have shape (2, 6)"),
    "actions of other rows": (states(), actions(3, TIME), {}, "actions have shape (3, 5)"),
    "action too large": (states(), actions(last=4), {}, "actions range over 0..4; each must lie in 0..3"),
    "action below zero": (states(), actions(last=-1), {}, "actions range over -1..0"),
    "float actions": (states(), actions().float(), {}, "dtype torch.float32; expected int64 (2, 5)"),
    "int32 actions": (states(), actions().int(), {}, "dtype torch.int32; expected int64 (2, 5)"),
    "one-hot actions": (states(), actions(BATCH, TIME, 4), {}, "actions have shape (2, 5, 4)"),
    "length over the padding": (
        states(),
        actions(),
        {"lens": [5, 6]},
        "episode_lens range over 5..6; each must lie in",
    ),
    "length zero": (states(), actions(), {"lens": [0, 5]}, "episode_lens range over 0..5"),
    "too few lengths": (states(), actions(), {"lens": [5]}, "episode_lens have shape (1,)"),
    "float lengths": (states(), actions(), {"lens": [5.0, 2.0]}, "dtype torch.float32; expected whole numbers (2,)"),
    "float grid": (tokens().float(), actions(), {"kind": "grid"}, "dtype torch.float32; expected int64 (2, 5, 4)"),
    "grid of other objects": (tokens()[..., :3], actions(), {"kind": "grid"}, "state has shape (2, 5, 3)"),
    "cell off the grid": (
        tokens(16),
        actions(),
        {"kind": "grid"},
        "[..., 3] ranges over 16..16; each must lie in 0..15",
    ),
    "cell below zero": (tokens(-1), actions(), {"kind": "grid"}, "state[..., 3] ranges over -1..-1"),
    "whole-number torques": (
        states(),
        torch.zeros(BATCH, TIME, ACTIONS).long(),
        {"kind": "continuous"},
        "expected floating-point (2, 5, 4)",
    ),
    "torques of another width": (states(), states(), {"kind": "continuous"}, "actions have shape (2, 5, 3)"),
    "NaN torques": (
        states(),
        torch.full((BATCH, TIME, ACTIONS), torch.nan),
        {"kind": "continuous"},
        "actions hold NaN",
    ),
}


@pytest.mark.parametrize("discovery", [False, True], ids=["cloning", "discovery"])
@pytest.mark.parametrize("name", BATCHES)
def test_batches(name: str, discovery: bool) -> None:
    state, action, extra, message = BATCHES[name]
    lens = torch.tensor(extra["lens"]) if "lens" in extra else None
    phase = {"meta_controller": make_steering(), "discovery_phase": True} if discovery else {}
    refused(message, make_model(extra.get("kind", "discrete")), state, action, episode_lens=lens, **phase)


def test_good_batches_of_every_kind_are_taken() -> None:
    for kind, state, action in (
        ("discrete", states(), actions(last=3)),
        ("discrete", states().double(), actions(BATCH, TIME - 1)),
        ("continuous", states(), torch.randn(BATCH, TIME, ACTIONS, dtype=torch.float64)),
        ("grid", tokens(15), actions()),
    ):
        losses = make_model(kind)(state, action, episode_lens=torch.tensor([action.shape[1], 1]))
        assert all(bool(loss.isfinite()) for loss in losses)


STEPS = {
    "several steps": (states(), None, "state has shape (2, 5, 3); expected (batch, 1, entries"),
    "no rows": (states(0, 1), None, "state has shape (0, 1, 3)"),
    "no time axis": (states(BATCH), None, "state has shape (2, 3)"),
    "NaN": (torch.full((BATCH, 1, STATE), torch.nan), None, "state holds NaN"),
    "several past actions": (states(BATCH, 1), actions(), "actions have shape (2, 5)"),
    "past action without time": (states(BATCH, 1), actions(BATCH), "actions have shape (2,)"),
    "past action out of range": (states(BATCH, 1), actions(BATCH, 1, last=9), "actions range over 9..9"),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps(name: str) -> None:
    state, past, message = STEPS[name]
    refused(message, make_model(), state, past, return_cache=True)


def test_steps_that_do_not_fit_the_cache() -> None:
    model = make_model()
    _, cache = model(states(BATCH, 1), return_cache=True)
    refused("state has 3 rows but the cache 2", model, states(3, 1), actions(3, 1), cache=cache, return_cache=True)
    refused("conditioned on them", model, states(BATCH, 1), cache=cache, return_cache=True)
    refused("cache is given but return_cache is False", model, states(BATCH, 1), actions(BATCH, 1), cache=cache)


def test_calls_that_lack_something() -> None:
    refused("actions are missing", make_model(), states())
    refused(
        "meta_controller is None; expected a MetaController", make_model(), states(), actions(), discovery_phase=True
    )
    steering = make_steering(dim_model=2 * WIDTH)
    refused(
        "expected (batch, time, 16)", make_model(), states(), actions(), meta_controller=steering, discovery_phase=True
    )
    refused("expected (batch, time, 16)", make_model(), states(BATCH, 1), meta_controller=steering, return_cache=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": torch.zeros(BATCH, TIME, 3)}, "the residual stream has shape (2, 5, 3); expected (batch, time, 8)"),
        ({"states": torch.zeros(0, TIME, WIDTH)}, "the residual stream has shape (0, 5, 8)"),
        ({"old_log_probs": torch.zeros(BATCH, TIME)}, "old_log_probs has shape (2, 5); expected (2, 5, 2)"),
        ({"actions": torch.zeros(BATCH, TIME, 3)}, "actions has shape (2, 5, 3); expected (2, 5, 2)"),
        ({"advantages": torch.zeros(3)}, "advantages has shape (3,)"),
        ({"switch_betas": torch.zeros(BATCH)}, "switch_betas has shape (2,)"),
        ({"episode_lens": torch.tensor([1, 9])}, "episode_lens range over 1..9"),
    ],
)
def test_policy_loss(change: dict[str, Tensor], message: str) -> None:
    good = {
        "states": torch.zeros(BATCH, TIME, WIDTH),
        "old_log_probs": torch.zeros(BATCH, TIME, CODE),
        "actions": torch.zeros(BATCH, TIME, CODE),
        "advantages": torch.zeros(BATCH),
        "switch_betas": torch.ones(BATCH, TIME),
    }
    refused(message, make_steering().policy_loss, **(good | change))


def test_codes_and_residuals_of_other_widths() -> None:
    steering = make_steering()
    refused(
        "action_dist has shape (2, 1, 4) and actions (2, 1, 3)",
        steering.log_prob,
        states(2, 1, 4)[..., 0],
        states(2, 1),
    )
    refused("the residual stream has 5 steps; expected 1", steering.act, torch.zeros(BATCH, TIME, WIDTH))
    refused("the residual stream has shape (2, 8)", steering.act, torch.zeros(BATCH, WIDTH))
    refused("expected (batch, time, 8)", steering.discover, states())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action_embed_readout": {"num_discrete": 1}}, "num_discrete is 1"),
        ({"action_embed_readout": {"number": 4}}, "action_embed_readout is {'number': 4}"),
        ({"state_embed_readout": {}}, "state_embed_readout is {}"),
        (
            {"state_embed_readout": {"num_discrete": 4}},
            "state_embed_readout is {'num_discrete': 4}; expected dict(num_continuous = ...) for vectors, "
            "dict(num_discrete = [...]) for choices, both for choices and numbers, dict(image = [...]) for images, or "
            "dict(KIND = dict(...)) for one of tokens, grid, plane, picture, symbolic_grid.",
        ),
        ({"state_embed_readout": {"num_continuous": 0}}, "num_continuous is 0"),
        ({"state_embed_readout": {"grid": GRID | {"size": 1}}}, "size is 1; expected at least 2"),
        ({"state_embed_readout": {"grid": GRID | {"view": "above"}}}, "view is 'above'"),
        ({"lower_body": {"depth": -1}}, "depth is -1"),
        ({"upper_body": {"depth": 1, "heads": 3}}, "dim 8 is not a multiple of heads 3"),
    ],
)
def test_models_that_cannot_be(options: dict[str, Any], message: str) -> None:
    refused(message, make_model, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim_latent": 0}, "dim_latent is 0"),
        ({"rank": 9}, "rank is 9; expected None (full) or 1..8"),
        ({"gate": {"mode": "often"}}, "mode is 'often'"),
        ({"gate": {"threshold": 2.0}}, "threshold is 2.0"),
        ({"target_segment_length": 1.0}, "target_segment_length is 1.0"),
        ({"eps_clip": 0.0}, "eps_clip is 0.0"),
    ],
)
def test_metacontrollers_that_cannot_be(options: dict[str, Any], message: str) -> None:
    refused(message, make_steering, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([5, 6])}, "lengths range over 5..6"),
        ({"lengths": torch.tensor([5])}, "lengths have shape (1,)"),
        ({"states": states()}, "one state more than actions"),
        ({"actions": actions(0, TIME)}, "actions have shape (0, 5); expected a non-empty (episodes, steps"),
    ],
)
def test_trajectories(change: dict[str, Tensor], message: str) -> None:
    good = {"states": states(BATCH, TIME + 1), "actions": actions(), "lengths": torch.tensor([5, 2])}
    refused(message, Trajectories, **(good | change))
    refused("batch_size 3 is larger than the 2 episodes", next, length_sorted_batches(Trajectories(**good), 3))
