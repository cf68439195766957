"""Distributions of codes: binary ones against sums over all words, Gaussian ones against torch's; both in the house."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import gymnasium
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence

from metacontroller.control.codes import BinaryCodes, GaussianCodes, make_codes
from metacontroller.control.metacontroller import MetaController
from metacontroller.domains.registry import domain_of
from metacontroller.environments.internal_env import InternalEnv
from metacontroller.environments.internal_vector_env import InternalVectorEnv
from metacontroller.errors import UserError
from metacontroller.models.transformer import Transformer
from metacontroller.presets import preset
from metacontroller.recipes.run_phase import run_phase
from metacontroller.storage.run_folder import RunFolder

BITS = 3


def logits(*shape: int) -> Tensor:
    return (2 * torch.randn(*shape, BITS, dtype=torch.float64)).requires_grad_()


def word_probabilities(values: Tensor) -> Tensor:
    """p(word) for one step's logits (h,), word by word and bit by bit."""
    words = [tuple(number >> bit & 1 for bit in range(BITS)) for number in range(2**BITS)]
    products = [
        math.prod(torch.sigmoid(v) if bit else 1 - torch.sigmoid(v) for v, bit in zip(values, word, strict=True))
        for word in words
    ]
    return torch.stack(products)  # pyright: ignore[reportArgumentType]


def test_a_binary_sample_is_one_hot_and_passes_the_gradient_of_every_words_probability() -> None:
    codes, values, noise = BinaryCodes(BITS), logits(4, 5), torch.randn(4, 5, BITS, dtype=torch.float64)
    sample, weight = codes.sample(values, noise=noise), torch.randn(2**BITS, dtype=torch.float64)
    (fast,) = torch.autograd.grad((sample * weight).sum(), values)
    slow = torch.stack([(word_probabilities(row) * weight).sum() for row in values.flatten(0, 1)]).sum()
    torch.testing.assert_close(fast, torch.autograd.grad(slow, values)[0])
    expected = torch.zeros_like(sample)
    for b, t in itertools.product(range(4), range(5)):
        tail = 1 - Normal(0.0, 1.0).cdf(noise[b, t])
        bits = [int(tail[i] < torch.sigmoid(values[b, t, i])) for i in range(BITS)]
        expected[b, t, sum(bit << i for i, bit in enumerate(bits))] = 1
    torch.testing.assert_close(sample, expected)


def test_without_gradients_a_sample_is_exactly_one_hot() -> None:
    with torch.no_grad():
        sample = BinaryCodes(BITS).sample(logits(50))
    assert sorted(sample.unique().tolist()) == [0.0, 1.0]
    assert bool((sample.sum(-1) == 1).all())


def test_words_are_sampled_as_often_as_they_are_likely() -> None:
    values, generator = logits(1), torch.Generator().manual_seed(1)
    sample = BinaryCodes(BITS).sample(values.detach().expand(20_000, -1), generator)
    torch.testing.assert_close(sample.mean(0), word_probabilities(values[0]).detach(), atol=0.012, rtol=0)


def test_log_prob_and_kl_of_bits_are_those_of_bernoullis() -> None:
    codes, values = BinaryCodes(BITS), logits(4, 5)
    code = codes.sample(values.detach())
    bits = torch.stack([code.argmax(-1) >> bit & 1 for bit in range(BITS)], -1).double()
    expected = Bernoulli(logits=values).log_prob(bits)
    torch.testing.assert_close(codes.log_prob(values, code), expected)
    joint = torch.stack([word_probabilities(row) for row in values.flatten(0, 1)])[
        torch.arange(20), code.argmax(-1).flatten()
    ]
    torch.testing.assert_close(expected.sum(-1).flatten(), joint.log())
    uniform = Bernoulli(logits=torch.zeros_like(values))
    slow = kl_divergence(Bernoulli(logits=values), uniform)
    torch.testing.assert_close(codes.kl_entries(values), slow)
    torch.testing.assert_close(codes.kl(values), slow.sum(-1))
    gradients = [torch.autograd.grad(kl.sum(), values)[0] for kl in (codes.kl(values), slow)]
    torch.testing.assert_close(*gradients)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    entropy = Bernoulli(logits=values).entropy().sum(-1)[mask].mean()
    torch.testing.assert_close(codes.mean_entropy(values, mask), entropy)


def test_free_bits_cost_nothing_and_have_no_gradient() -> None:
    values = torch.tensor([[0.1, -0.1, 0.0], [9.0, -9.0, 0.0]], dtype=torch.float64, requires_grad=True)
    free, plain = BinaryCodes(BITS, free_bits=1.0).kl(values), BinaryCodes(BITS).kl(values)
    torch.testing.assert_close(free, torch.stack([plain[0] * 0, plain[1] - math.log(2)]))
    (gradient,) = torch.autograd.grad(free.sum(), values)
    assert bool((gradient[0] == 0).all())
    assert float(gradient[1].abs().max()) > 0


def test_gaussian_codes_are_torchs() -> None:
    codes, params = GaussianCodes(2), torch.randn(3, 4, 4, dtype=torch.float64)
    mean, log_std = params.chunk(2, -1)
    normal = Normal(mean, log_std.exp())
    noise = torch.randn(3, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(codes.sample(params, noise=noise), mean + log_std.exp() * noise)
    torch.testing.assert_close(codes.sample(params, noise=noise, temperature=0.5), mean + 0.5 * log_std.exp() * noise)
    prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    torch.testing.assert_close(codes.kl_entries(params), kl_divergence(normal, prior))
    torch.testing.assert_close(codes.kl(params), kl_divergence(normal, prior).sum(-1))
    mask = torch.ones(3, 4, dtype=torch.bool)
    torch.testing.assert_close(codes.mean_entropy(params, mask), normal.entropy().sum(-1).mean())


def test_the_metacontroller_steers_with_words_and_its_policy_starts_at_the_prior() -> None:
    steering = MetaController(6, dim_meta_controller=8, dim_latent=BITS, code="binary", rank=2)
    output = steering.discover(torch.randn(2, 7, 6))
    assert output.z.shape == (2, 7, 8)
    torch.testing.assert_close(output.z.sum(-1), torch.ones(2, 7))  # a gate mixes words
    output.steered.square().sum().backward()
    assert all(parameter.grad is not None for parameter in steering.encoder.parameters())
    residual = torch.randn(2, 1, 6)
    _, acted = steering.act(residual)
    assert bool((acted.action_dist == 0).all())
    assert bool((acted.actions.detach().sum(-1) == 1).all())
    old = steering.log_prob(acted.action_dist, acted.actions)
    torch.testing.assert_close(old, torch.full((2, 1, BITS), -math.log(2)))
    loss = steering.policy_loss(residual, old, acted.actions, torch.tensor([1.0, -2.0]), acted.switch_beta)
    loss.backward()
    assert float(steering.policy.readout.bias.grad.abs().sum()) > 0  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.slow
def test_a_run_finds_binary_codes_and_learns_over_them(tmp_path) -> None:
    config = preset("debug")
    config = replace(
        config, meta_controller=replace(config.meta_controller, code="binary", dim_latent=2, free_bits=0.5)
    )
    for phase in ("pretrain", "discover", "internal_rl"):
        run_phase(phase, config, tmp_path, True, "cpu")
    assert all(line["kl"] >= 0 for line in RunFolder(tmp_path).read_metrics("discover"))
    learned = [line for line in RunFolder(tmp_path).read_metrics("internal_rl") if "entropy_per_code" in line]
    assert all(0 < line["entropy_per_code"] <= 2 * math.log(2) + 1e-6 for line in learned)
    assert learned  # some batch had returns that differ


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("binary", 0), "0 bits"),
        (("binary", 17), "17 bits"),
        (("binary", 2, -1.0), "free_bits is -1.0"),
        (("gaussian", 2, 1.0), "free_bits is 1.0"),
    ],
)
def test_wrong_settings_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_codes(*arguments)


def test_environments_of_codes_refuse_words() -> None:
    class Box2(gymnasium.Env):
        action_space = gymnasium.spaces.Discrete(2)

    model = Transformer(
        6,
        action_embed_readout={"num_discrete": 2},
        state_embed_readout={"num_continuous": 2},
        lower_body={"depth": 1, "heads": 2},
        upper_body={"depth": 1, "heads": 2},
    )
    steering = MetaController(6, dim_meta_controller=8, dim_latent=BITS, code="binary", rank=2)
    with pytest.raises(UserError, match="binary codes"):
        InternalEnv(Box2(), model, steering)
    with pytest.raises(UserError, match="binary codes"):
        InternalVectorEnv(domain_of(preset("debug").domain), model, steering, 2)


def test_compile_refuses_binary_codes() -> None:
    config = preset("debug")
    with pytest.raises(UserError, match="CompILE finds Gaussian codes"):
        replace(config, discovery="compile", meta_controller=replace(config.meta_controller, code="binary"))


def test_a_policy_starts_from_the_prior_or_wider() -> None:
    assert GaussianCodes(2).start().tolist() == [0.0] * 4
    assert GaussianCodes(2).start(2.0).tolist() == [0.0, 0.0, pytest.approx(math.log(2)), pytest.approx(math.log(2))]
    assert BinaryCodes(3).start().tolist() == [0.0] * 3
