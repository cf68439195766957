"""Readouts: log-probabilities against torch.distributions, samples against their distribution."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from metacontroller.models.readouts import (
    MAX_LOG_STD,
    MIN_LOG_STD,
    CategoricalReadout,
    GaussianMixtureReadout,
    GaussianReadout,
    MultiCategoricalReadout,
    clamp_with_inward_gradient,
    emphasized_choices,
    gaussian_log_prob,
    make_readout,
    sample_gaussian,
)
from metacontroller.presets.gridworld import debug


def test_categorical_log_prob_and_gradient() -> None:
    readout = CategoricalReadout(6, 4).double()
    hidden = torch.randn(3, 5, 6, dtype=torch.float64)
    values = torch.randint(0, 4, (3, 5))
    logits = readout(hidden)
    expected = Categorical(logits=logits).log_prob(values)
    torch.testing.assert_close(readout.log_prob(logits, values), expected)
    (fast,) = torch.autograd.grad(readout.log_prob(logits, values).sum(), readout.linear.weight, retain_graph=True)
    (slow,) = torch.autograd.grad(expected.sum(), readout.linear.weight)
    torch.testing.assert_close(fast, slow)


def test_gaussian_log_prob_and_gradient() -> None:
    readout = GaussianReadout(6, 3).double()
    hidden = torch.randn(3, 5, 6, dtype=torch.float64)
    values = torch.randn(3, 5, 3, dtype=torch.float64)
    params = readout(hidden)
    mean, log_std = params.chunk(2, -1)
    expected = Normal(mean, log_std.exp()).log_prob(values).sum(-1)
    torch.testing.assert_close(readout.log_prob(params, values), expected)
    (fast,) = torch.autograd.grad(readout.log_prob(params, values).sum(), readout.linear.weight, retain_graph=True)
    (slow,) = torch.autograd.grad(expected.sum(), readout.linear.weight)
    torch.testing.assert_close(fast, slow)


def test_constant_values_do_not_make_the_gaussian_loss_diverge() -> None:
    torch.manual_seed(0)
    readout = GaussianReadout(6, 3)
    optimizer = torch.optim.AdamW(readout.parameters(), lr=0.1)
    hidden, values = torch.randn(8, 5, 6), torch.full((8, 5, 3), 0.7)
    bound = 3 * (MIN_LOG_STD + 0.5 * math.log(2 * math.pi))  # at the mean, as narrow as allowed
    for _ in range(300):
        loss = -readout.log_prob(readout(hidden), values).mean()
        assert bool(torch.isfinite(loss))
        assert loss >= bound - 1e-4
        optimizer.zero_grad()
        loss.backward()
        assert all(bool(torch.isfinite(value.grad).all()) for value in readout.parameters() if value.grad is not None)
        optimizer.step()
    assert readout(hidden)[..., 3:].min() == MIN_LOG_STD


def test_gaussian_parameters_are_the_linear_map_with_log_std_clamped() -> None:
    readout = GaussianReadout(6, 3).double()
    hidden = 20 * torch.randn(3, 5, 6, dtype=torch.float64)
    plain = readout.linear(hidden)
    assert plain[..., 3:].min() < MIN_LOG_STD
    assert plain[..., 3:].max() > MAX_LOG_STD
    expected = torch.cat([plain[..., :3], plain[..., 3:].clamp(MIN_LOG_STD, MAX_LOG_STD)], -1)
    assert torch.equal(readout(hidden), expected)
    samples = readout.sample(readout(hidden), torch.Generator().manual_seed(0))
    noise = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(samples, expected[..., :3] + expected[..., 3:].exp() * noise)


def test_only_a_push_outward_loses_its_gradient_at_a_limit() -> None:
    values = torch.tensor([-6.0, -5.0, 0.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    clamped = clamp_with_inward_gradient(values, -5.0, 2.0)
    assert clamped.tolist() == [-5.0, -5.0, 0.0, 2.0, 2.0]
    for sign, kept in ((1, [0, 1, 1, 1, 1]), (-1, [1, 1, 1, 1, 0])):  # descent lowers values where sign is 1
        (gradient,) = torch.autograd.grad(sign * clamped.sum(), values, retain_graph=True)
        assert gradient.tolist() == [sign * share for share in kept]


def test_categorical_samples_follow_the_probabilities() -> None:
    readout = CategoricalReadout(6, 3)
    probabilities = torch.tensor([0.2, 0.7, 0.1])
    samples = readout.sample(probabilities.log().expand(20_000, 1, 3), torch.Generator().manual_seed(0))
    shares = torch.bincount(samples.flatten(), minlength=3) / samples.numel()
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)


def test_gaussian_log_prob_is_entry_by_entry() -> None:
    params = torch.randn(3, 5, 6, dtype=torch.float64)
    values = torch.randn(3, 5, 3, dtype=torch.float64)
    mean, log_std = params.chunk(2, -1)
    torch.testing.assert_close(gaussian_log_prob(params, values), Normal(mean, log_std.exp()).log_prob(values))


def test_gaussian_samples_have_the_mean_and_spread_and_carry_gradients() -> None:
    params = torch.tensor([1.0, -2.0, 0.0, -1.0]).expand(20_000, 4).requires_grad_()
    samples = sample_gaussian(params, torch.Generator().manual_seed(0))
    torch.testing.assert_close(samples.mean(0), torch.tensor([1.0, -2.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(samples.std(0), torch.tensor([0.0, -1.0]).exp(), atol=0.03, rtol=0)
    (gradient,) = torch.autograd.grad(samples.sum(), params)
    mean, _ = params.chunk(2, -1)
    torch.testing.assert_close(gradient, torch.cat([torch.ones_like(mean), samples - mean], -1))


@pytest.mark.parametrize("readout", [CategoricalReadout(6, 4), GaussianReadout(6, 4)])
def test_samples_repeat_with_the_seed(readout: CategoricalReadout | GaussianReadout) -> None:
    params = readout(torch.randn(8, 9, 6))
    first, again, other = (readout.sample(params, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_discrete": 4, "num_continuous": 2}, {"classes": 4}, {"num_discrete": 1}, {"num_continuous": 0}],
)
def test_unclear_readouts_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"num_discrete|num_continuous"):
        make_readout(6, "action_embed_readout", options)


@pytest.mark.parametrize("options", [{"num_discrete": 4}, {"num_continuous": 4}])
def test_only_a_readout_that_embeds_has_an_embedding(options: dict[str, int]) -> None:
    names = {name.split(".")[0] for name, _ in make_readout(6, "state", options).named_parameters()}
    assert names == {"linear"}
    readout = make_readout(6, "action", options, embeds=True)
    assert {name.split(".")[0] for name, _ in readout.named_parameters()} == {"linear", "embedding"}
    values = torch.randint(0, 4, (2, 3)) if "num_discrete" in options else torch.randn(2, 3, 4)
    assert readout.embed(values).shape == (2, 3, 6)


def test_the_option_chooses_the_readout() -> None:
    assert isinstance(make_readout(6, "action_embed_readout", {"num_discrete": 4}), CategoricalReadout)
    assert isinstance(make_readout(6, "action_embed_readout", {"num_continuous": 4}), GaussianReadout)


# -- several choices, and data in units of their own ------------------------------------------------------------------


def test_several_choices_are_independent_softmaxes() -> None:
    readout = MultiCategoricalReadout(6, [3, 2, 4]).double()
    values = torch.stack([torch.randint(0, n, (3, 5)) for n in (3, 2, 4)], -1)
    logits = readout(torch.randn(3, 5, 6, dtype=torch.float64))
    blocks = zip(logits.split([3, 2, 4], -1), values.unbind(-1), strict=True)
    expected = torch.stack([Categorical(logits=block).log_prob(value) for block, value in blocks]).sum(0)
    torch.testing.assert_close(readout.log_prob(logits, values), expected)


def test_several_choices_are_sampled_by_their_shares() -> None:
    readout = MultiCategoricalReadout(6, [3, 2])
    shares = [torch.tensor([0.5, 0.2, 0.3]), torch.tensor([0.9, 0.1])]
    samples = readout.sample(torch.cat(shares).log().expand(1, 20_000, 5), torch.Generator().manual_seed(0))
    for share, values in zip(shares, samples[0].unbind(-1), strict=True):
        torch.testing.assert_close(values.bincount() / 20_000, share, atol=0.015, rtol=0)


def test_several_choices_are_checked_and_embedded() -> None:
    readout = make_readout(6, "action", {"num_discrete": [3, 2]}, embeds=True)
    assert isinstance(readout, MultiCategoricalReadout)
    values = torch.tensor([[[2, 1]]])
    readout.check(values, (1, 1))
    torch.testing.assert_close(readout.embed(values)[0, 0], readout.embedding.weight[2] + readout.embedding.weight[4])
    with pytest.raises(ValueError, match=r"actions\[\.\.\., 1\] ranges over 2\.\.2; each must lie in 0\.\.1"):
        readout.check(torch.tensor([[[2, 2]]]), (1, 1))
    with pytest.raises(ValueError, match=r"expected int64 \(1, 1, 2\)"):
        readout.check(torch.tensor([[2]]), (1, 1))


def test_statistics_change_the_units_and_nothing_else() -> None:
    plain = GaussianReadout(6, 2, embeds=True).double()
    scaled = GaussianReadout(6, 2, embeds=True, mean=[100.0, -3.0], std=[50.0, 0.01]).double()
    scaled.load_state_dict(plain.state_dict())  # statistics are no weights
    mean, std = torch.tensor([[100.0, -3.0], [50.0, 0.01]], dtype=torch.float64)
    hidden, values = torch.randn(3, 5, 6, dtype=torch.float64), torch.randn(3, 5, 2, dtype=torch.float64)
    raw = mean + std * values
    torch.testing.assert_close(scaled.embed(raw), plain.embed(values))
    expected = plain.log_prob(plain(hidden), values) - std.log().sum()
    torch.testing.assert_close(scaled.log_prob(scaled(hidden), raw), expected)
    one, other = (readout.sample(readout(hidden), torch.Generator().manual_seed(1)) for readout in (plain, scaled))
    torch.testing.assert_close(other, mean + std * one)


@pytest.mark.parametrize("statistics", [{"mean": [1.0], "std": [1.0]}, {"mean": [1.0, 2.0], "std": [1.0, 0.0]}])
def test_statistics_that_do_not_fit_are_refused(statistics: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        GaussianReadout(6, 2, **statistics)


def test_entropies_are_those_of_torch_distributions() -> None:
    hidden = torch.randn(3, 4, 6, dtype=torch.float64)
    one, several, gaussian = CategoricalReadout(6, 5), MultiCategoricalReadout(6, [3, 2]), GaussianReadout(6, 2)
    logits = one.double()(hidden)
    torch.testing.assert_close(one.entropy(logits), Categorical(logits=logits).entropy())
    logits = several.double()(hidden)
    blocks = [Categorical(logits=block).entropy() for block in logits.split([3, 2], -1)]
    torch.testing.assert_close(several.entropy(logits), blocks[0] + blocks[1])
    params = gaussian.double()(hidden)
    mean, log_std = params.chunk(2, -1)
    torch.testing.assert_close(gaussian.entropy(params), Normal(mean, log_std.exp()).entropy().sum(-1))


def mixture_by_torch(params: torch.Tensor, modes: int) -> MixtureSameFamily:
    weights, gaussians = params[..., :modes], params[..., modes:].unflatten(-1, (modes, -1))
    mean, log_std = gaussians.chunk(2, -1)
    return MixtureSameFamily(Categorical(logits=weights), Independent(Normal(mean, log_std.exp()), 1))


def test_mixture_log_prob_and_gradient() -> None:
    readout = GaussianMixtureReadout(6, 3, modes=4).double()
    hidden = torch.randn(2, 5, 6, dtype=torch.float64)
    values = torch.randn(2, 5, 3, dtype=torch.float64)
    params = readout(hidden)
    expected = mixture_by_torch(params, 4).log_prob(values)
    torch.testing.assert_close(readout.log_prob(params, values), expected)
    (fast,) = torch.autograd.grad(readout.log_prob(params, values).sum(), readout.linear.weight, retain_graph=True)
    (slow,) = torch.autograd.grad(expected.sum(), readout.linear.weight)
    torch.testing.assert_close(fast, slow)


def test_a_mixture_of_equal_modes_is_one_gaussian() -> None:
    """Also with statistics of the data and a limit of the deviation, which hold for each mode."""
    options = {"mean": [1.0, -1.0], "std": [2.0, 0.5], "min_std": 0.7}
    one, several = GaussianReadout(6, 2, **options), GaussianMixtureReadout(6, 2, modes=3, **options)
    with torch.no_grad():
        several.linear.weight[3:] = one.linear.weight.repeat(3, 1)
        several.linear.bias[3:] = one.linear.bias.repeat(3)
    hidden, values = torch.randn(2, 5, 6), torch.randn(2, 5, 2)
    torch.testing.assert_close(
        several.log_prob(several(hidden), values), one.log_prob(one(hidden), values), rtol=1e-4, atol=1e-4
    )


def test_mixture_samples_have_the_modes_shares_and_spreads() -> None:
    readout = GaussianMixtureReadout(1, 1, modes=2)
    gaussians = torch.tensor([[-5.0, math.log(0.5)], [5.0, 0.0]])
    params = torch.cat([torch.tensor([0.25, 0.75]).log(), gaussians.flatten()]).expand(20_000, 1, -1)
    samples = readout.sample(params, torch.Generator().manual_seed(0))[:, 0, 0]
    low, high = samples[samples < 0], samples[samples > 0]
    assert len(low) / len(samples) == pytest.approx(0.25, abs=0.02)
    assert (float(low.mean()), float(low.std())) == pytest.approx((-5.0, 0.5), abs=0.05)
    assert (float(high.mean()), float(high.std())) == pytest.approx((5.0, 1.0), abs=0.05)
    assert torch.equal(readout.sample(params, temperature=0.0), torch.full((20_000, 1, 1), 5.0))


def test_entropy_of_a_mixture_bounds_that_of_its_samples_and_is_close_where_modes_lie_apart() -> None:
    readout = GaussianMixtureReadout(1, 1, modes=2)
    for apart, gap in ((20.0, 0.02), (1.0, 1.0)):
        params = torch.tensor([0.3, 0.7, 0.0, 0.0, apart, 0.0])[None, None]
        params[..., :2] = params[..., :2].log()
        generator = torch.Generator().manual_seed(1)
        many = params.expand(20_000, 1, -1)
        measured = -float(readout.log_prob(many, readout.sample(many, generator)).mean())
        bound = float(readout.entropy(params))
        assert measured < bound + 0.02
        assert bound - measured < gap


def test_a_limit_of_the_deviation_holds() -> None:
    readout = make_readout(6, "action", {"num_continuous": 2, "min_std": 0.3})
    assert float(readout(100 * torch.randn(9, 1, 6)).detach().chunk(2, -1)[1].exp().min()) == pytest.approx(0.3)


@pytest.mark.parametrize(("name", "value"), [("modes", 1), ("min_std", 0.0), ("min_std", math.nan)])
def test_modes_and_limits_that_make_no_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        make_readout(6, "action", {"num_continuous": 2, name: value})


def test_a_model_of_discrete_actions_has_no_mixture() -> None:
    config = replace(debug().model, action_modes=2)
    with pytest.raises(ValueError, match=r"action_modes is 2 .* but the world's actions are discrete"):
        config.build({"num_continuous": 3}, {"num_discrete": 4})
    readout = config.build({"num_continuous": 3}, {"num_continuous": 4}).action_readout
    assert isinstance(readout, GaussianMixtureReadout)
    assert readout.modes == 2


def test_emphasized_choices_add_a_cross_entropy_to_the_gradient_and_nothing_to_the_value() -> None:
    """Against the slow version: -log p, and (weight - 1) times the cross-entropy under the modes' responsibilities."""
    readout = GaussianMixtureReadout(6, 3, modes=4).double()
    hidden = torch.randn(2, 5, 6, dtype=torch.float64)
    values = torch.randn(2, 5, 3, dtype=torch.float64)
    with emphasized_choices(readout, 20.0):
        fast = -readout.log_prob(readout(hidden), values).sum()
    params = readout(hidden)
    plain = -readout.log_prob(params, values).sum()
    assert float(fast.detach()) == pytest.approx(float(plain.detach()), rel=1e-12)
    weights, gaussians = readout.parts(params)
    joint = weights + gaussian_log_prob(gaussians, values[..., None, :]).sum(-1)
    slow = plain - 19.0 * (joint.softmax(-1).detach() * weights).sum()
    (expected,) = torch.autograd.grad(slow, readout.linear.weight)
    (gradient,) = torch.autograd.grad(fast, readout.linear.weight)
    torch.testing.assert_close(gradient, expected)
    assert readout.choice_weight == 1.0
    with emphasized_choices(GaussianReadout(6, 3), 1.0):
        pass
    refused = pytest.raises(ValueError, match=r"choice_weight is 2\.0, but actions are no mixture")
    with refused, emphasized_choices(GaussianReadout(6, 3), 2.0):
        pass
