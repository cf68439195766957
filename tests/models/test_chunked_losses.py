"""Losses in chunks against the whole batch at once, values and gradients, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metacontroller import MetaController, Transformer
from metacontroller.control.discovery_losses import kl_loss, steered_losses
from metacontroller.models import chunked_losses as module
from metacontroller.models.chunked_losses import chunked_losses, row_chunks


@pytest.mark.parametrize("tokens", [1, 6, 8, 1000])
def test_parts_add_up_to_the_whole(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.TOKENS_AT_ONCE, "cpu", tokens)
    residual = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(5, 3, 4, dtype=torch.float64)
    sizes: list[int] = []

    def chunk_losses(chunk: Tensor, rows: slice) -> Tensor:
        sizes.append(len(chunk))
        return torch.stack([(chunk * scale[rows]).square().sum(), chunk.exp().sum()])

    expected = torch.stack([(residual * scale).square().sum(), residual.exp().sum()])
    actual = chunked_losses(residual, chunk_losses)
    torch.testing.assert_close(actual, expected)
    assert sum(sizes) == 5
    assert max(sizes) == min(5, max(1, tokens // 3))
    weight = torch.tensor([0.3, -2.0], dtype=torch.float64)
    gradient, reference = (torch.autograd.grad((value * weight).sum(), residual)[0] for value in (actual, expected))
    torch.testing.assert_close(gradient, reference)
    with torch.no_grad():
        torch.testing.assert_close(chunked_losses(residual, chunk_losses), expected)


@pytest.mark.parametrize("with_state_loss", [True, False])
@pytest.mark.parametrize("extra", [0, 1])
def test_discovery_does_not_depend_on_the_parts(
    with_state_loss: bool, extra: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    body: dict[str, Any] = {"depth": 1, "heads": 2}
    model = Transformer(
        8,
        action_embed_readout={"num_discrete": 4},
        state_embed_readout={"num_continuous": 5},
        lower_body=body,
        upper_body=body,
    ).double()
    steering = MetaController(8, dim_meta_controller=8, dim_latent=3, rank=2).double()
    states, actions = torch.randn(6, 5 + extra, 5, dtype=torch.float64), torch.randint(4, (6, 5))
    lengths, noise = torch.tensor([5, 1, 3, 1, 1, 4]), steering.sample_noise(6, 5)

    def losses_and_gradients() -> list[Tensor]:
        losses, output = steered_losses(
            steering, model, states, actions, lengths, with_state_loss=with_state_loss, noise=noise
        )
        loss = losses.action + 0.7 * losses.state + 0.1 * kl_loss(output)
        return [*losses, *torch.autograd.grad(loss, steering.discovery_parameters())]

    whole = losses_and_gradients()
    monkeypatch.setitem(module.TOKENS_AT_ONCE, "cpu", 10)
    torch.testing.assert_close(losses_and_gradients(), whole)


def test_every_part_has_a_row() -> None:
    chunks = row_chunks(torch.empty(3, 10**6, 0))
    assert [(rows.start, rows.stop) for rows in chunks] == [(0, 1), (1, 2), (2, 3)]
    assert len(row_chunks(torch.empty(64, 32, 5))) == 1
