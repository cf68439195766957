"""The attention body: against a slow loop, step mode against sequence mode, causality, masks, distance buckets."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from metacontroller.models.attention import (
    AttentionBlock,
    AttentionBody,
    RelativePositionBias,
    distance_bucket,
    variance_scaling_,
)

BATCH, TIME, DIM = 4, 9, 8


def make_body(causal: bool = True) -> AttentionBody:
    """Two small blocks in float64, with weights and biases large enough to matter."""
    body = AttentionBody(DIM, depth=2, heads=2, causal=causal).double()
    for parameter in body.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return body


def states() -> Tensor:
    return torch.randn(BATCH, TIME, DIM, dtype=torch.float64)


def slow_block(block: AttentionBlock, x: Tensor) -> Tensor:
    """One causal block, query by query and head by head."""
    normed = block.attention_norm(x)
    q, k, v = block.to_qkv(normed).chunk(3, -1)
    width = q.shape[-1] // block.heads
    mixed = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for h in range(block.heads):
            columns = slice(h * width, (h + 1) * width)
            for t in range(x.shape[1]):
                scores = k[b, : t + 1, columns] @ q[b, t, columns] / width**0.5
                distances = torch.arange(t, -1, -1)  # each in a bucket of its own, as below 16
                weights = (scores + block.bias.table[h, distances]).softmax(0)
                mixed[b, t, columns] = weights @ v[b, : t + 1, columns]
    x = x + block.to_out(mixed)
    return x + block.mlp_out(torch.relu(block.mlp_in(block.mlp_norm(x))))


def test_a_causal_body_equals_the_slow_loop() -> None:
    body, x = make_body(), states()
    expected = x
    for block in body.blocks:
        assert isinstance(block, AttentionBlock)
        expected = slow_block(block, expected)
    torch.testing.assert_close(body(x), expected)


@pytest.mark.parametrize("chunks", [[1] * TIME, [3, 1, 5], [TIME]], ids=["single steps", "uneven chunks", "at once"])
@pytest.mark.parametrize("capacity", [1, 4, 32])
def test_steps_from_the_cache_equal_the_sequence(chunks: list[int], capacity: int) -> None:
    body, x = make_body(), states()
    cache = body.empty_cache(BATCH, capacity)
    stepped = torch.cat([body(chunk, cache) for chunk in x.split(chunks, dim=1)], 1)
    torch.testing.assert_close(stepped, body(x))
    assert cache.length == TIME
    assert len(cache.keys[0]) == len(cache.values[1]) >= max(TIME, capacity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_acting_reuses_memory_and_gives_the_same_bits(dtype: torch.dtype) -> None:
    body, x = make_body().to(dtype), states().to(dtype)
    recorded, acting = body.empty_cache(BATCH, 4), body.empty_cache(BATCH, 4)
    used = set()
    for step in x.split(1, 1):
        expected = body(step, recorded)
        with torch.no_grad():
            torch.testing.assert_close(body(step, acting), expected, rtol=0, atol=0)
        used |= set() if acting.scratch is None else {acting.scratch.data_ptr()}
    assert recorded.scratch is None
    assert 1 <= len(used) <= 3  # one for each capacity: 4, 8 and 16 steps


@pytest.mark.parametrize("rows", [[0, 2], [3, 1], [2]])
def test_rows_dropped_in_the_middle_leave_the_others_as_they_are(rows: list[int]) -> None:
    body, x = make_body(), states()
    whole = body(x)
    cache = body.empty_cache(BATCH, capacity=6)
    for t in range(4):
        body(x[:, t : t + 1], cache)
    kept = torch.tensor(rows)
    cache.keep(kept)
    stepped = torch.cat([body(x[kept, t : t + 1], cache) for t in range(4, TIME)], 1)
    torch.testing.assert_close(stepped, whole[kept, 4:])


def test_the_cache_carries_no_gradient() -> None:
    body, x = make_body(), states().requires_grad_()
    cache = body.empty_cache(BATCH)
    body(x[:, :3], cache)
    (gradient,) = torch.autograd.grad(body(x[:, 3:4], cache).sum(), x)
    assert gradient[:, :3].abs().max() == 0
    assert gradient[:, 3].abs().max() > 0


def test_no_output_depends_on_the_future() -> None:
    body, x = make_body(), states().requires_grad_()
    (gradient,) = torch.autograd.grad(body(x)[:, 4].square().sum(), x)
    assert gradient[:, 5:].abs().max() == 0
    assert bool((gradient[:, :5].abs().sum(-1) > 0).all())


def test_a_two_sided_body_sees_the_future_but_no_padding() -> None:
    body, x = make_body(causal=False), states().requires_grad_()
    mask = torch.arange(TIME) < torch.tensor([TIME, 6, 3, 1])[:, None]
    (gradient,) = torch.autograd.grad((body(x, mask=mask) * mask[..., None]).square().sum(), x)
    assert bool(((gradient.abs().sum(-1) > 0) == mask).all())
    (first,) = torch.autograd.grad(body(x)[:, 0].square().sum(), x)
    assert bool((first.abs().sum(-1) > 0).all())


def test_causal_buckets_are_exact_then_logarithmic() -> None:
    # exact below 16; then 16 + floor(16 log(d / 16) / log 8); the last one takes all from 128 on
    distances = {0: 0, 1: 1, 15: 15, 17: 16, 20: 17, 31: 21, 63: 26, 120: 31, 128: 31, 5000: 31}
    buckets = distance_bucket(torch.tensor(list(distances)), causal=True, buckets=32, max_distance=128)
    assert buckets.tolist() == list(distances.values())


def test_two_sided_buckets_tell_the_past_from_the_future() -> None:
    # half of the buckets a side: exact below 8; then 8 + floor(8 log(d / 8) / log 16)
    distances = {0: 0, 7: 7, 9: 8, 30: 11, 1000: 15, -1: 17, -7: 23, -30: 27, -1000: 31}
    buckets = distance_bucket(torch.tensor(list(distances)), causal=False, buckets=32, max_distance=128)
    assert buckets.tolist() == list(distances.values())


def test_the_bias_of_the_last_queries_is_the_end_of_the_whole() -> None:
    bias = RelativePositionBias(3, causal=True)
    torch.nn.init.normal_(bias.table)
    assert torch.equal(bias(2, 9), bias(9, 9)[:, -2:])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 33), (5, 33), (33, 33), (150, 300)])
def test_the_bias_equals_the_explicit_table_of_distances(queries: int, keys: int, causal: bool) -> None:
    bias = RelativePositionBias(2, causal=causal).double()
    torch.nn.init.normal_(bias.table)
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]
    buckets = distance_bucket(distance, causal=causal, buckets=bias.buckets, max_distance=bias.max_distance)
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    explicit = torch.stack([row[buckets] for row in bias.table])
    fast = bias(queries, keys)
    assert torch.equal(fast, explicit.masked_fill(~seen, -torch.inf))
    weight = torch.randn(2, queries, keys, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((fast[:, seen] * weight[:, seen]).sum(), bias.table)
    expected = torch.zeros_like(bias.table)
    for bucket in range(bias.buckets):
        expected[:, bucket] = (weight * (seen & (buckets == bucket))).sum((1, 2))
    torch.testing.assert_close(gradient, expected)


def living_bytes() -> int:
    """Bytes of all tensors that Python holds."""
    gc.collect()
    return sum(value.nbytes for value in gc.get_objects() if type(value) is Tensor)


@pytest.mark.parametrize("causal", [True, False])
def test_many_lengths_leave_little_memory_behind(causal: bool) -> None:
    bias, before = RelativePositionBias(1, causal=causal), living_bytes()
    for length in range(100, 501, 4):
        bias(length, length)
    assert living_bytes() - before < 1e6


def test_training_works_after_a_first_look_in_inference_mode() -> None:
    bias = RelativePositionBias(1, causal=True)
    with torch.inference_mode():
        bias(13, 13)
    bias(13, 13)[:, -1].sum().backward()
    assert bias.table.grad is not None
    assert bias.table.grad[0, :13].tolist() == [1.0] * 13


def test_a_body_without_blocks_passes_its_input_on() -> None:
    body, x = AttentionBody(DIM, depth=0), torch.randn(BATCH, TIME, DIM)
    cache = body.empty_cache(BATCH)
    assert torch.equal(body(x), x)
    assert torch.equal(body(x, cache), x)
    assert cache.length == TIME
    cache.keep(torch.tensor([1]))
    assert cache.length == TIME


def test_variance_scaling_has_the_papers_spread() -> None:
    weight = torch.empty(400, 250)
    variance_scaling_(weight)
    assert weight.var() * 250 == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": -1}, "depth is -1"),
        ({"depth": 1, "heads": 3}, "dim 8 is not a multiple of heads 3"),
        ({"depth": 1, "heads": 0}, "heads is 0"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionBody(DIM, **options)
