"""CompILE's recognition model: against the slow definitions, and on its own toy task."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.baselines.segmenter import (
    Segmentation,
    Segmenter,
    SegmentNoise,
    categorical_kl,
    poisson_log_prior,
)
from metacontroller.data.trajectories import length_mask

BATCH, STEPS, WIDTH, SEGMENTS, CODE = 4, 7, 5, 3, 2
LENGTHS = torch.tensor([7, 5, 3, 6])


def make_segmenter(depth: int = 1) -> Segmenter:
    """Float64, small."""
    return Segmenter(WIDTH, dim_latent=CODE, segments=SEGMENTS, dim=6, depth=depth, hidden=4, prior_rate=2.5).double()


def make_noise() -> SegmentNoise:
    boundary = torch.rand(BATCH, SEGMENTS - 1, STEPS + 1, dtype=torch.float64)
    return SegmentNoise(boundary, torch.randn(BATCH, SEGMENTS, CODE, dtype=torch.float64))


def slow_segmentation(unit: Segmenter, inputs: Tensor, length: int, noise: SegmentNoise, row: int) -> Segmentation:
    """One episode, position by position, as the paper defines it."""
    x = [unit.project_in(step) for step in inputs[row, :length]] + [unit.end]
    before: list[Tensor] = []  # b_j of the segments before
    codes, shares, boundaries, kl, boundary_kl = [], [], [], torch.tensor(0.0), torch.tensor(0.0)
    for index in range(SEGMENTS):
        reached = [math.prod((b[: p + 1].sum() for b in before), start=torch.tensor(1.0)) for p in range(length + 1)]
        states = [torch.zeros(6, dtype=torch.float64) for _ in unit.layers]
        encoded = []
        for p in range(length + 1):
            value = x[p]
            for depth, cell in enumerate(unit.layers):
                value = states[depth] = reached[p] * cell(value[None], states[depth][None])[0]
            encoded.append(value)
        if index + 1 < SEGMENTS:
            logits = torch.stack([unit.boundary(value)[0] for value in encoded[1:]])  # positions 1..length
            if index == 0:
                log_q = logits.log_softmax(0)
                rate = torch.distributions.Poisson(torch.tensor(unit.prior_rate, dtype=torch.float64))
                log_p = rate.log_prob(torch.arange(1, length + 1).double()).log_softmax(0)
                boundary_kl = SEGMENTS * (log_q.exp() * (log_q - log_p)).sum()
            gumbel = -(-noise.boundary[row, index, 1 : length + 1].log()).log()
            boundary = F.pad(((logits + gumbel) / unit.temperature).softmax(0), (1, 0))
            boundaries.append(F.pad(boundary, (0, STEPS - length)))
        else:
            boundary = F.one_hot(torch.tensor(length), length + 1).double()
        shares.append(torch.stack([reached[t] * (1 - boundary[: t + 1].sum()) for t in range(length)]))
        readout = sum((boundary[p] * encoded[p - 1] for p in range(1, length + 1)), start=torch.tensor(0.0))
        mean, log_std = unit.code(readout).chunk(2)
        codes.append(mean + log_std.exp() * noise.code[row, index])
        kl = kl + 0.5 * (mean**2 + (2 * log_std).exp() - 1 - 2 * log_std).sum()
        before.append(boundary)
    return Segmentation(torch.stack(codes), torch.stack(shares), torch.stack(boundaries), kl, boundary_kl)


@pytest.mark.parametrize("depth", [1, 2])
def test_it_is_the_slow_definition_forward_and_gradient(depth: int) -> None:
    unit, noise = make_segmenter(depth), make_noise()
    inputs = torch.randn(BATCH, STEPS, WIDTH, dtype=torch.float64, requires_grad=True)
    result = unit(inputs, LENGTHS, noise)
    weights = {name: torch.randn_like(value) for name, value in result._asdict().items()}
    weights["share"] = weights["share"] * length_mask(LENGTHS, STEPS)[:, None]
    total = sum(((weights[name] * value).sum() for name, value in result._asdict().items()), start=torch.tensor(0.0))
    expected = torch.tensor(0.0)
    for row, length in enumerate(LENGTHS.tolist()):
        slow = slow_segmentation(unit, inputs, length, noise, row)
        for name, value in slow._asdict().items():
            ours = result._asdict()[name][row]
            ours = ours[..., :length] if name == "share" else ours
            assert torch.allclose(ours, value, atol=1e-10), name
            weight = weights[name][row]
            expected = expected + ((weight[..., :length] if name == "share" else weight) * value).sum()
    leaves = [inputs, *unit.parameters()]
    for ours, slow in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert torch.allclose(ours, slow, atol=1e-9)


@pytest.mark.parametrize("sampled", [True, False])
def test_every_step_belongs_to_segments_in_order(sampled: bool) -> None:
    unit = make_segmenter()
    inputs = torch.randn(BATCH, STEPS, WIDTH, dtype=torch.float64)
    result = unit(inputs, LENGTHS, make_noise() if sampled else None)
    real = length_mask(LENGTHS, STEPS)
    assert torch.allclose(result.share.sum(1)[real], torch.ones(int(real.sum()), dtype=torch.float64))
    assert torch.allclose(result.boundaries.sum(-1), torch.ones(BATCH, SEGMENTS - 1, dtype=torch.float64))
    assert not result.boundaries[..., 0].any()
    assert not result.boundaries.masked_select(~length_mask(LENGTHS + 1, STEPS + 1)[:, None]).any()
    later = (result.share * torch.arange(SEGMENTS)[:, None]).sum(1)
    assert (later.diff(dim=1)[real[:, 1:]] > -1e-12).all()  # a segment once left is never come back to
    if not sampled:
        assert set(result.share.unique().tolist()) == {0.0, 1.0}


def test_padding_has_no_influence() -> None:
    unit, noise = make_segmenter(), make_noise()
    inputs = torch.randn(BATCH, STEPS, WIDTH, dtype=torch.float64)
    changed = torch.where(length_mask(LENGTHS, STEPS)[..., None], inputs, 100 * torch.randn_like(inputs))
    for before, after in zip(unit(inputs, LENGTHS, noise), unit(changed, LENGTHS, noise), strict=True):
        real = length_mask(LENGTHS, STEPS)[:, None] if before.shape[-1] == STEPS else torch.tensor(True)
        assert torch.equal(before * real, after * real)


def test_the_prior_is_poissons_over_the_allowed_positions() -> None:
    allowed = torch.tensor([[False, True, True, True], [False, True, True, False]])
    log_prior = poisson_log_prior(allowed, 2.0)
    exact = torch.distributions.Poisson(2.0).log_prob(torch.arange(4)).exp()
    assert torch.allclose(log_prior.exp()[0, 1:], exact[1:] / exact[1:].sum())
    assert torch.allclose(log_prior.exp()[1, 1:3], exact[1:3] / exact[1:3].sum())
    assert torch.equal(log_prior == -math.inf, ~allowed)
    assert torch.allclose(categorical_kl(log_prior, log_prior), torch.zeros(2))


def toy_episodes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """CompILE's toy task: three runs of one to four equal symbols, of five; symbols (n, t), lengths, ends (n, 3)."""
    symbols = torch.rand(n, 5, generator=generator).argsort(1)[:, :3]
    ends = torch.randint(1, 5, (n, 3), generator=generator).cumsum(1)
    run = (torch.arange(12)[None, :, None] >= ends[:, None]).sum(-1).clamp(max=2)
    return symbols.gather(1, run), ends[:, -1], ends


@pytest.mark.slow
def test_it_finds_the_boundaries_of_the_toy_task() -> None:
    generator = torch.Generator().manual_seed(0)
    unit = Segmenter(5, dim_latent=8, segments=3, dim=64, hidden=64, prior_rate=3.0)
    decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 5))
    parameters = [*unit.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, 3e-3)
    for _ in range(300):
        symbols, lengths, _ = toy_episodes(128, generator)
        result = unit(F.one_hot(symbols, 5).float(), lengths, unit.sample_noise(128, 12, generator))
        log_prob = F.log_softmax(decoder(result.code), -1).gather(2, symbols[:, None].expand(-1, 3, -1))
        surprise = -(log_prob * result.share * length_mask(lengths, 12)[:, None]).sum((1, 2))
        loss = (surprise + 0.1 * result.code_kl + 0.1 * result.boundary_kl).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    symbols, lengths, ends = toy_episodes(2048, generator)
    with torch.no_grad():
        most_likely = unit(F.one_hot(symbols, 5).float(), lengths).boundaries.argmax(-1)
    accuracy = float((most_likely == ends[:, :2]).float().mean())
    assert accuracy >= 0.98


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="segments is 1"):
        Segmenter(WIDTH, dim_latent=CODE, segments=1)
    with pytest.raises(ValueError, match="temperature is 0"):
        Segmenter(WIDTH, dim_latent=CODE, segments=2, temperature=0)
