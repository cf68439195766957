"""Hawk: the unit against its equations, step mode against sequence mode, causality, precision; as attention is used."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from metacontroller import MetaController, Transformer
from metacontroller.control.sequence_embedder import SequenceEmbedder
from metacontroller.models.hawk import RGLRU, TAPS, HawkBlock, HawkBody

BATCH, TIME, DIM = 4, 9, 8


def make_body(depth: int = 2) -> HawkBody:
    body = HawkBody(DIM, depth=depth, width=12, heads=3).double()
    for name, parameter in body.named_parameters():
        if "decay_logit" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return body


def states() -> Tensor:
    return torch.randn(BATCH, TIME, DIM, dtype=torch.float64)


def slow_unit(unit: RGLRU, x: Tensor) -> Tensor:
    """Griffin's equations 1 to 4, channel by channel and step by step."""
    heads, block = unit.gates.shape[:2]
    out = torch.zeros_like(x)
    for head in range(heads):
        columns = slice(head * block, (head + 1) * block)
        for j in range(block):
            channel = head * block + j
            a = torch.sigmoid(unit.decay_logit[channel])
            for b in range(x.shape[0]):
                h = x.new_zeros(())
                for t in range(x.shape[1]):
                    seen = x[b, t, columns]
                    r = torch.sigmoid(seen @ unit.gates[head, :, j] + unit.gate_bias[head, j])
                    i = torch.sigmoid(seen @ unit.gates[head, :, block + j] + unit.gate_bias[head, block + j])
                    a_t = a ** (8 * r)
                    h = a_t * h + torch.sqrt(1 - a_t**2) * (i * x[b, t, channel])
                    out[b, t, channel] = h
    return out


@pytest.mark.parametrize("backend", ["reference", "loop", "parallel"])
def test_the_unit_equals_its_equations(backend: str) -> None:
    unit = RGLRU(6, heads=2).double()
    torch.nn.init.normal_(unit.gate_bias)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    expected, actual = slow_unit(unit, x), unit(x, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    inputs = [x, *unit.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(actual.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        rtol=1e-6,
        atol=1e-9,
    )


def test_a_block_equals_the_slow_loop() -> None:
    block, x = make_body(1).blocks[0], states()
    assert isinstance(block, HawkBlock)
    passed, entering = block.to_branches(block.recurrence_norm(x)).chunk(2, -1)
    mixed = torch.zeros_like(entering)
    for t in range(TIME):
        mixed[:, t] = block.tap_bias
        for k in range(TAPS):  # the last tap is the present step
            past = t - (TAPS - 1) + k
            if past >= 0:
                mixed[:, t] += block.taps[k] * entering[:, past]
    gelu = passed * 0.5 * (1 + torch.erf(passed / math.sqrt(2)))
    expected = x + block.to_out(slow_unit(block.unit, mixed) * gelu)
    expected = expected + block.mlp_out(torch.relu(block.mlp_in(block.mlp_norm(expected))))
    torch.testing.assert_close(block(x)[0], expected)


def test_decay_starts_between_the_bounds() -> None:
    slowest = torch.sigmoid(RGLRU(4096, heads=8).decay_logit.detach()) ** 8
    assert 0.9 <= float(slowest.min()) < 0.905
    assert 0.994 < float(slowest.max()) <= 0.9991
    assert float(slowest.mean()) == pytest.approx(0.9495, abs=0.003)


@pytest.mark.parametrize("chunks", [[1] * TIME, [3, 1, 5], [2, 7], [TIME]])
def test_steps_from_the_cache_equal_the_sequence(chunks: list[int]) -> None:
    body, x = make_body(), states()
    cache = body.empty_cache(BATCH)
    size = sum(value.numel() for value in (*cache.states, *cache.recent))
    stepped = torch.cat([body(chunk, cache) for chunk in x.split(chunks, dim=1)], 1)
    torch.testing.assert_close(stepped, body(x))
    assert cache.length == TIME
    assert sum(value.numel() for value in (*cache.states, *cache.recent)) == size  # constant in time


def test_rows_dropped_in_the_middle_leave_the_others_as_they_are() -> None:
    body, x = make_body(), states()
    cache = body.empty_cache(BATCH)
    body(x[:, :4], cache)
    kept = torch.tensor([3, 1])
    cache.keep(kept)
    torch.testing.assert_close(body(x[kept, 4:], cache), body(x)[kept, 4:])


def test_no_output_depends_on_the_future() -> None:
    body, x = make_body(), states().requires_grad_()
    (gradient,) = torch.autograd.grad(body(x)[:, 4].square().sum(), x)
    assert gradient[:, 5:].abs().max() == 0
    assert bool((gradient[:, :5].abs().sum(-1) > 0).all())


def test_the_state_is_float32_under_autocast() -> None:
    body = HawkBody(DIM, depth=1)
    cache = body.empty_cache(BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        out = body(states().float(), cache)
    assert cache.states[0].dtype == torch.float32
    assert bool(torch.isfinite(out).all())


def test_a_unit_that_never_forgets_has_a_finite_gradient() -> None:
    unit = RGLRU(4, heads=2)
    torch.nn.init.constant_(unit.gate_bias, -200.0)  # r = 0: a = 1, where the slope of sqrt(1 - a^2) is infinite
    x = torch.randn(1, 3, 4, requires_grad=True)
    unit(x).sum().backward()
    assert all(bool(torch.isfinite(value.grad).all()) for value in (x, *unit.parameters()) if value.grad is not None)


def test_depth_0_passes_its_input_on() -> None:
    x = states()
    body = HawkBody(DIM, depth=0)
    assert body(x, body.empty_cache(BATCH)) is x


def test_the_embedder_reads_the_whole_episode_and_no_padding() -> None:
    embedder = SequenceEmbedder(DIM, 3, dim=8, kind="hawk").double()
    x = states().requires_grad_()
    mask = torch.arange(TIME) < torch.tensor([TIME, 6, 3, 1])[:, None]
    (gradient,) = torch.autograd.grad(embedder(x, mask).square().sum(), x)
    assert bool(((gradient.abs().sum(-1) > 0) == mask).all())


def make_model(**changes: Any) -> Transformer:
    body: dict[str, Any] = {"kind": "hawk", "depth": 2, "heads": 2}
    options = {"lower_body": body, "upper_body": body, "action_embed_readout": {"num_discrete": 4}, **changes}
    return Transformer(DIM, state_embed_readout={"num_continuous": 5}, **options)


def test_a_hawk_model_learns_is_steered_and_acts() -> None:
    model = make_model()
    steering = MetaController(
        DIM, dim_meta_controller=8, dim_latent=3, rank=2, embedder_kind="hawk", policy_kind="hawk"
    )
    observed, actions = torch.randn(3, 7, 5), torch.randint(4, (3, 6))
    lengths = torch.tensor([6, 2, 4])
    assert model.behavior_cloning_loss(observed, actions, lengths).action.isfinite()
    losses = steering.discovery_loss(model, observed, actions, lengths)
    (losses.action_recon + losses.kl).backward()
    assert all(parameter.grad is not None for parameter in steering.sequence_embedder.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    cache = None
    for t in range(4):
        logits, cache = model.step(observed[:, t : t + 1], actions[:, t - 1 : t] if t else None, steering, cache)
    assert logits.shape == (3, 1, 4)  # pyright: ignore[reportPossiblyUnboundVariable]


def test_a_hawk_model_is_saved_loaded_and_split_elsewhere(tmp_path: Any) -> None:
    model = make_model(condition_on_actions=False)
    model.save(tmp_path / "model")
    again = Transformer.init_and_load(tmp_path / "model")
    observed, actions = torch.randn(3, 6, 5), torch.randint(4, (3, 6))
    expected = model.behavior_cloning_loss(observed, actions).action
    assert torch.equal(again.behavior_cloning_loss(observed, actions).action, expected)
    again.resplit(1)
    assert [len(again.lower_body.blocks), len(again.upper_body.blocks)] == [1, 3]
    assert torch.equal(again.behavior_cloning_loss(observed, actions).action, expected)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"kind": "mamba", "depth": 1}, "upper_body has kind 'mamba'; expected one of 'attention', 'hawk'"),
        ({"kind": "hawk", "depth": -1}, "depth is -1"),
        ({"kind": "hawk", "depth": 1, "heads": 3}, "width 8 is not a multiple of heads 3"),
    ],
)
def test_bad_bodies_are_refused(body: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(upper_body=body)


def test_bodies_of_two_kinds_cannot_exchange_blocks() -> None:
    with pytest.raises(ValueError, match="of one kind and the same sizes"):
        make_model(upper_body={"depth": 1, "heads": 2}).resplit(1)
