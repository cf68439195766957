"""Long episodes at the sizes of the ant: acting from the cache equals reading whole episodes, and memory is linear."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from metacontroller.domains.registry import domain_of
from metacontroller.models.hawk import HawkCache
from metacontroller.models.transformer import Transformer
from metacontroller.presets import preset
from metacontroller.recipes.config import build_meta_controller, build_model

CONFIG = preset("ant-laptop")
CONFIG = replace(CONFIG, model=replace(CONFIG.model, precision="float32"))
STEPS = CONFIG.domain.max_steps
OBSERVATION = domain_of(CONFIG.domain).spec().encoder["plane"]["dim_state"]
ACTION = domain_of(CONFIG.domain).spec().action["num_continuous"]


def ant_model() -> Transformer:
    """The preset's model in float64, with weights so large that the past matters."""
    model = build_model(CONFIG).double().eval()
    assert isinstance(model, Transformer)
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    return model


def elements(cache: object) -> int:
    assert isinstance(cache, HawkCache)
    return sum(values.numel() for values in (*cache.states, *cache.recent))


@pytest.mark.slow
@torch.no_grad()
def test_acting_equals_reading_whole_episodes_with_resets_in_the_batch() -> None:
    model, rows = ant_model(), [[STEPS], [123, 377], [40, 1, 200, 259]]  # episodes of each row, one after the other
    assert [sum(lengths) for lengths in rows] == [STEPS] * 3
    states = torch.randn(3, STEPS, OBSERVATION, dtype=torch.float64)
    begins = torch.zeros(3, STEPS, dtype=torch.bool)
    for row, lengths in enumerate(rows):
        begins[row, torch.tensor([0, *lengths]).cumsum(0)[:-1]] = True

    store: Any = model.cache_store(3)
    every = torch.arange(3)
    lower, upper = store.lower.take(every), store.upper.take(every)
    size, stepped = elements(lower) + elements(upper), []
    for t in range(STEPS):
        if begins[:, t].any():
            store.lower.put(every, lower, every, 1)
            store.upper.put(every, upper, every, 1)
            store.restart(begins[:, t].nonzero().squeeze(1))
            lower, upper = store.lower.take(every), store.upper.take(every)
        residual = model.lower(model.embed(states[:, t : t + 1]), lower)
        stepped.append(torch.cat([residual, model.action_readout(model.upper(residual, upper)).flatten(2)], -1))
    acted = torch.cat(stepped, 1)
    assert size > 0
    assert elements(lower) + elements(upper) == size  # the cache does not grow at all

    for row, lengths in enumerate(rows):
        for episode, found in zip(states[row].split(lengths), acted[row].split(lengths), strict=True):
            residual = model.lower(model.embed(episode[None]))
            read = torch.cat([residual, model.action_readout(model.upper(residual)).flatten(2)], -1)[0]
            torch.testing.assert_close(found, read, rtol=1e-9, atol=1e-9)
    unbroken = model.action_readout(model.upper(model.lower(model.embed(states[1:2])))).flatten(2)[0, 123:130]
    assert not torch.allclose(unbroken, acted[1, 123:130, model.dim :])  # a reset forgets


@pytest.mark.parametrize("discovering", [False, True])
def test_what_training_keeps_grows_linearly_with_the_episode(discovering: bool) -> None:
    model, steering = build_model(CONFIG), build_meta_controller(CONFIG)
    assert isinstance(model, Transformer)

    def kept(steps: int) -> int:
        """Elements of all tensors that are saved for the gradient of one episode's loss."""
        saved: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        states, actions = torch.randn(1, steps + 1, OBSERVATION), torch.rand(1, steps, ACTION)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if discovering:
                model(states, actions, meta_controller=steering, discovery_phase=True)
            else:
                model(states, actions)
        return sum(saved)

    quarter, half, three, whole = (kept(share * STEPS // 4) for share in (1, 2, 3, 4))
    assert whole - three == three - half == half - quarter > 0
