"""`InternalVectorEnv` on Gymnasium environments: one call for all rows equals rows that are played one by one."""

from __future__ import annotations

import pickle
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv

from metacontroller import InternalVectorEnv, MetaController, Transformer
from metacontroller.domains import gymnasium_adapter
from metacontroller.domains.base import Domain
from metacontroller.domains.gymnasium_adapter import GymnasiumBatch, GymnasiumEnvironments

ROWS = 4


class CartPoles(Domain):
    """CartPole, at most 16 steps."""

    name = "cart-poles"

    def __init__(self) -> None:
        self.environments = GymnasiumEnvironments("CartPole-v1")

    def reset(self, n: int, generator: torch.Generator, **options: Any) -> GymnasiumBatch:
        return self.environments.reset(n, generator, 16)


def make_envs(*, by_row: bool) -> InternalVectorEnv:
    torch.manual_seed(4)  # a gate that opens now and then
    model = Transformer(
        8,
        action_embed_readout={"num_discrete": 2},
        state_embed_readout={"num_continuous": 4},
        lower_body={"depth": 1, "heads": 2},
        upper_body={"depth": 1, "heads": 2},
    )
    steering = MetaController(8, dim_meta_controller=8, dim_latent=3, rank=2)
    for weight in (steering.controller.write, steering.switching.out.weight, steering.switching.code.weight):
        torch.nn.init.normal_(weight, std=2.0)
    envs = InternalVectorEnv(CartPoles(), model.eval(), steering.eval(), ROWS)
    envs._by_row = by_row
    return envs


def play(envs: InternalVectorEnv, steps: int) -> list[tuple[Any, ...]]:
    return [envs.step(envs.sample_prior()) for _ in range(steps)]


def check_equal(one: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> None:
    for (*values, info), (*others, other_info) in zip(one, other, strict=True):
        for value, expected in zip(values, others, strict=True):
            np.testing.assert_array_equal(value, expected)
        assert info.keys() == other_info.keys()
        np.testing.assert_array_equal(info["steps"], other_info["steps"])
        for name, value in info.get("final_info", {}).items():
            over = info["_final_info"]
            np.testing.assert_array_equal(value[over], other_info["final_info"][name][over])


def test_one_call_for_all_rows_gives_the_episodes_of_single_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    results, drawn = [], 0

    def next_seed(n: int, generator: torch.Generator) -> int:
        nonlocal drawn
        drawn += n
        return drawn - n  # the same for n rows at once and for one row after the other

    monkeypatch.setattr(gymnasium_adapter, "_draw_seed", next_seed)
    for by_row in (False, True):
        drawn, envs = 0, make_envs(by_row=by_row)
        first, _ = envs.reset(seed=0)
        results.append([(first, {"steps": np.zeros(ROWS)}), *play(envs, 10)])
        made = envs.domain.environments.free  # pyright: ignore[reportAttributeAccessIssue]
        assert set(made) == ({1} if by_row else {ROWS})
        assert drawn > 2 * ROWS
    check_equal(*results)
    steps = np.concatenate([info["steps"] for *_, info in results[0]])
    assert len(set(steps.tolist())) > 3  # rows drift apart
    ends = [info["final_info"]["episode_steps"][info["_final_info"]] for *_, info in results[0] if "final_info" in info]
    assert len(set(np.concatenate(ends).tolist())) > 3


def test_the_copy_of_a_pickle_goes_on_alike_and_a_reset_uses_the_environments_again() -> None:
    envs = make_envs(by_row=False)
    envs.reset(seed=1)
    first = play(envs, 4)
    copied = pickle.loads(pickle.dumps(envs))  # noqa: S301
    check_equal(play(envs, 5), play(copied, 5))
    rows = envs._rows.env.envs  # pyright: ignore
    envs.reset(seed=1)
    assert envs._rows.env.envs is rows  # pyright: ignore
    check_equal(first, play(envs, 4))


class NotAlways(CartPoleEnv):
    """CartPole that cannot start every second time, or never."""

    asked, never = 0, False

    def reset(self, **options: Any) -> Any:
        self.asked += 1
        if self.asked % 2 == 0 or self.never:
            raise RuntimeError("not now")
        return super().reset(**options)


@pytest.mark.parametrize("by_row", [False, True])
def test_an_episode_that_cannot_start_takes_no_code_and_is_no_step(
    by_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gymnasium.register("NotAlways-v0", lambda **options: NotAlways(**options))
    try:
        envs = make_envs(by_row=by_row)
        assert isinstance(envs.domain, CartPoles)
        envs.domain.environments, ended = GymnasiumEnvironments("NotAlways-v0"), 0
        for observation, _ in (envs.reset(seed=seed) for seed in (0, 1)):
            assert envs._rows is not None
            assert not (envs._rows.env.terminated | envs._rows.env.truncated).any()
            assert len(np.unique(observation, axis=0)) == ROWS
        for *_, terminated, truncated, info in play(envs, 12):
            over = terminated | truncated
            assert (info["steps"][~over] > 0).all()
            if over.any():
                assert (info["final_info"]["steps"][over] > 0).all()
                assert (info["final_info"]["episode_steps"][over] >= info["final_info"]["steps"][over]).all()
                assert not info["final_info"]["lost"][over].any()
                ended += over.sum()
        assert ended
        monkeypatch.setattr(NotAlways, "never", True)
        with pytest.raises(ValueError, match="cart-poles could not begin an episode, 10 times in a row"):
            envs.reset()
    finally:
        del gymnasium.registry["NotAlways-v0"]
