"""Caches of episodes that do not step together: a row taken out with others goes on as it would alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from metacontroller.models.protocol import SteerableModel
from metacontroller.models.transformer import Transformer

ROWS, STEPS = 5, 40  # more steps than stores and batches have room for at first


BODIES = [{"heads": 2}, {"kind": "hawk", "heads": 2}, {"heads": 2, "depth": 0}]
NAMES = ["attention", "hawk", "steered at the embedding"]


def make_model(**body: Any) -> Transformer:
    model = Transformer(
        8,
        action_embed_readout={"num_discrete": 3},
        state_embed_readout={"num_continuous": 2},
        lower_body={"depth": 2, **body},
        upper_body={**body, "depth": 1},
        condition_on_actions=False,
    ).double()
    for name, parameter in model.named_parameters():
        if "bias.table" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("body", BODIES, ids=NAMES)
@torch.no_grad()
def test_rows_that_step_in_changing_company_equal_whole_episodes(body: dict[str, Any]) -> None:
    model = make_model(**body)
    states = torch.randn(ROWS, STEPS, 2, dtype=torch.float64)
    expected = model.upper(model.lower(model.embed(states)))
    store: Any = model.cache_store(ROWS)
    generator = torch.Generator().manual_seed(0)
    at = torch.zeros(ROWS, dtype=torch.long)
    seen: list[list[torch.Tensor]] = [[] for _ in range(ROWS)]
    while bool((at < STEPS).any()):
        left = (at < STEPS).nonzero().squeeze(1)
        rows = left[torch.rand(len(left), generator=generator).argsort()[: 1 + int(at.sum()) % len(left)]]
        lower, upper, taken = store.lower.take(rows), store.upper.take(rows), 0
        while len(rows):
            residual = model.lower(model.embed(states[rows, at[rows]][:, None]), lower)
            hidden = model.upper(residual, upper)[:, 0]
            for row, value in zip(rows.tolist(), hidden, strict=True):
                seen[row].append(value)
            at[rows] += 1
            taken += 1
            done = (torch.rand(len(rows), generator=generator) < 0.4) | (at[rows] == STEPS)
            places = done.nonzero().squeeze(1)
            for body_store, cache in ((store.lower, lower), (store.upper, upper)):
                body_store.put(rows[places], cache, places, taken)
                cache.keep((~done).nonzero().squeeze(1))
            rows = rows[~done]
    torch.testing.assert_close(torch.stack([torch.stack(row) for row in seen]), expected)


@pytest.mark.parametrize("body", BODIES, ids=NAMES)
@torch.no_grad()
def test_a_row_begins_again_beside_another_that_goes_on(body: dict[str, Any]) -> None:
    model = make_model(**body)
    states = torch.randn(2, STEPS, 2, dtype=torch.float64)
    store: Any = model.cache_store(2)
    both = torch.arange(2)
    cache = store.lower.take(both)
    for step in range(3):
        model.lower(model.embed(states[:, step : step + 1]), cache)
    store.lower.put(both, cache, both, 3)
    store.restart(torch.tensor([1]))
    cache = store.lower.take(both)
    found = torch.cat([model.lower(model.embed(states[:, step : step + 1]), cache) for step in range(3, STEPS)], 1)
    torch.testing.assert_close(found[0], model.lower(model.embed(states))[0, 3:])
    torch.testing.assert_close(found[1], model.lower(model.embed(states[:, 3:]))[1])


def test_a_model_without_a_store_is_named() -> None:
    class Bare(SteerableModel): ...

    with pytest.raises(ValueError, match="a Bare has no cache for episodes that do not step together"):
        Bare().cache_store(1)
