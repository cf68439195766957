"""Evolution of a policy: perturbed members, which act in one batch or one after another (EGGROLL, arXiv 2511.16652).

Member 2 j has the weights W + scale E_j, member 2 j + 1 the weights W - scale E_j. Of a matrix, E = A B^T / sqrt(r)
with standard normal A and B of r columns; of a vector, E is standard normal itself. So

    (W + scale E) x = W x + scale A (B^T x) / sqrt(r)

costs one product with W for all rows, whoever they belong to, and two of rank r for each row: in a batch no member's
weights are formed. The gradient of the mean fitness is estimated by (1/n) sum_i s_i (+-E_i), with the scores s_i.

Axes: m rows of a batch, p pairs of members, i in, o out, r rank, n_e residual.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.arguments import checked_kinds
from metacontroller.control.losses import trajectory_advantages
from metacontroller.errors import DivergedError, UserError
from metacontroller.ranges import Count, Positive, check, require
from metacontroller.storage.tensor_file import not_finite


@dataclass
class _Turn:
    """Whose turn it is: of each row the pair (m,) of its member, and the signed scale (m, 1) of its perturbation."""

    pair: Tensor
    scale: Tensor


class Noise:
    """Perturbations of one parameter, for each pair: left itself, (p, ...), or of low rank, left (p, o, r) times right
    (p, i, r) over sqrt(r)."""

    def __init__(self, left: Tensor, right: Tensor | None = None) -> None:
        self.left, self.right, self.shrink = left, right, left.shape[-1] ** -0.5

    @staticmethod
    def draw(parameter: Tensor, pairs: int, rank: int | None, generator: torch.Generator | None) -> Noise:
        """Standard normal, of this rank if the parameter is a matrix."""
        options = {"generator": generator, "device": parameter.device, "dtype": parameter.dtype}
        if rank is None or parameter.dim() != 2:
            return Noise(torch.randn(pairs, *parameter.shape, **options))
        left, right = (torch.randn(pairs, size, rank, **options) for size in parameter.shape)
        return Noise(left, right)

    def of_pair(self, pair: int) -> Tensor:
        """E of one pair."""
        left = self.left[pair]
        return left if self.right is None else left @ self.right[pair].T * self.shrink

    def of_rows(self, x: Tensor, turn: _Turn) -> Tensor:
        """(m, o): each row x (m, i) times the perturbation of its member, or that of a vector, whatever x is."""
        if self.right is None:
            return self.left[turn.pair] * turn.scale
        inner = torch.einsum("mi,mir->mr", x, self.right[turn.pair])
        return torch.einsum("mr,mor->mo", inner, self.left[turn.pair]) * (turn.scale * self.shrink)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum over pairs of weights (p,) times E: one product over pairs and columns together."""
        if self.right is None:
            return (weights @ self.left.flatten(1)).view(self.left.shape[1:])
        left = (self.left * weights[:, None, None]).permute(1, 0, 2).flatten(1)
        return left @ self.right.permute(0, 2, 1).flatten(0, 1) * self.shrink


class _Member(nn.Module):
    """A layer of the policy with the perturbations of its parameters by name, and whose turn it is."""

    def __init__(self, layer: nn.Module, noise: dict[str, Noise], turn: _Turn) -> None:
        super().__init__()
        self.layer, self.noise, self.turn = layer, noise, turn

    def product(self, x: Tensor, weight: str, bias: str) -> Tensor:
        """x (m, i) times the weights of each row's member, (m, o)."""
        out = F.linear(x, getattr(self.layer, weight), getattr(self.layer, bias))
        for name in (name for name in (weight, bias) if name in self.noise):
            out = out + self.noise[name].of_rows(x, self.turn)
        return out


class _MemberLinear(_Member):
    """A linear map, (m, 1, i) -> (m, 1, o)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x[:, 0], "weight", "bias")[:, None]


class _MemberNorm(_Member):
    """A layer norm, (m, 1, i) -> (m, 1, i)."""

    def forward(self, x: Tensor, condition: None = None) -> Tensor:
        norm: Any = self.layer
        scale, shift = (self.noise[name].of_rows(x, self.turn) for name in ("weight", "bias"))
        plain = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
        return plain * (norm.weight + scale[:, None]) + (norm.bias + shift[:, None])


class _MemberGRU(_Member):
    """One step of a GRU, x (m, 1, i), state (m, h) -> (m, 1, h), (m, h); gates in PyTorch's order: r, z, n."""

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        read = self.product(x[:, 0], "weight_ih_l0", "bias_ih_l0").chunk(3, -1)
        before = self.product(state, "weight_hh_l0", "bias_hh_l0").chunk(3, -1)
        reset, update = torch.sigmoid(read[0] + before[0]), torch.sigmoid(read[1] + before[1])
        new = torch.tanh(read[2] + reset * before[2])
        after = new + update * (state - new)
        return after[:, None], after


class Perturbations:
    """One generation: noise on the parameters ``names`` of a policy, and what scores of members say of its gradient.

    members: an even number. scale: of the noise. rank: r, of matrices; None: full. generator: on the policy's device.
    UserError for values out of range.
    """

    def __init__(
        self,
        policy: nn.Module,
        names: Collection[str],
        members: int,
        *,
        scale: float,
        rank: int | None,
        generator: torch.Generator | None = None,
    ) -> None:
        require(members >= 2 and members % 2 == 0, "members", members, "an even number, in pairs of + and -")
        check("scale", scale, Positive)
        check("rank", rank, Count | None)
        self.policy, self.members, self.scale = policy, members, scale
        perturbed = {name: value for name, value in policy.named_parameters() if name in names}
        self.noise = {name: Noise.draw(value, members // 2, rank, generator) for name, value in perturbed.items()}

    def weights(self, member: int) -> dict[str, Tensor]:
        """The parameters of one member's policy, by name: what a batch never forms."""
        sign = self.scale if member % 2 == 0 else -self.scale
        weights = {name: value.detach().clone() for name, value in self.policy.named_parameters()}
        for name, noise in self.noise.items():
            weights[name] += sign * noise.of_pair(member // 2)
        return weights

    def gradient(self, scores: Tensor) -> dict[str, Tensor]:
        """The direction of a higher fitness by parameter, from scores (members,): (1/n) sum of s_i (+-E_i)."""
        weights = (scores[0::2] - scores[1::2]) / self.members
        return {name: noise.weighted_sum(weights) for name, noise in self.noise.items()}

    def set_gradient(self, fitness: Tensor) -> bool:
        """Gives the policy's parameters the gradients of a lower fitness, from that of the members (members,).

        The scores are the normalised fitness, as advantages are (C.5). False, and no gradients, if all are equal.
        """
        scores = trajectory_advantages(fitness)
        if not bool(scores.any()):
            return False
        estimate = self.gradient(scores)
        for name, parameter in self.policy.named_parameters():
            parameter.grad = -estimate[name] if name in estimate else None
        return True


class Population(Perturbations):
    """Perturbed policies that share a batch; arguments as of `Perturbations`.

    policy: one that reads switches alone (`control.policy`), else UserError; linear maps, layer norms and the GRU are
    perturbed, the convolution and the gates of a Hawk block stay as they are.
    """

    def __init__(
        self, policy: Any, members: int, *, scale: float, rank: int = 1, generator: torch.Generator | None = None
    ) -> None:
        if policy.every_step:
            raise UserError("this policy reads every step; a population acts with policies that read switches alone.")
        kinds = {nn.Linear: _MemberLinear, nn.LayerNorm: _MemberNorm, nn.GRU: _MemberGRU}
        layers = {name: layer for name, layer in policy.named_modules() if isinstance(layer, tuple(kinds))}
        names = {f"{name}.{key}" for name, layer in layers.items() for key, _ in layer.named_parameters()}
        super().__init__(policy, names, members, scale=scale, rank=rank, generator=generator)
        self.turn = _Turn(torch.zeros(0, dtype=torch.long), torch.zeros(0, 1))
        self.acting = copy.deepcopy(policy).requires_grad_(False)
        for name, layer in layers.items():
            noise = {key: self.noise[f"{name}.{key}"] for key, _ in layer.named_parameters()}
            member = next(member for kind, member in kinds.items() if isinstance(layer, kind))
            self.acting.set_submodule(name, member(layer, noise, self.turn))

    @torch.no_grad()
    def __call__(self, residual: Tensor, state: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        """One step of many rows, each with the weights of its member, int64 (m,).

        residual (m, 1, n_e), state (m, s) -> distributions (m, 1, p), next state (m, s).
        """
        self.turn.pair = member // 2
        self.turn.scale = self.scale * (1 - 2 * (member % 2)).to(residual.dtype)[:, None]
        return self.acting(residual, state)


@checked_kinds
def evolve(
    policy: nn.Module,
    fitness: Callable[[], Any],
    num_generations: Count,
    *,
    noise_population_size: Count = 30,
    noise_scale: Positive = 1e-2,
    noise_low_rank: Count | None = None,
    learning_rate: Positive = 1e-3,
) -> Tensor:
    """Trains ``policy`` in place towards a higher fitness.

    fitness() -> a number: plays with the policy, whose weights are then those of one member of the population. torch's
    random numbers are the same for all members of a generation. noise_population_size: pairs of members. noise_scale,
    noise_low_rank: of the perturbations, see `Perturbations`. learning_rate: of SGD with momentum 0.1 and weight
    decay 0.01.
    Returns the fitness of every member, (num_generations, pairs, 2): with the noise added and with it subtracted.
    UserError for values out of range; DivergedError for a fitness or weights that are not finite. The policy is as it
    was before after any error.
    """
    parameters = dict(policy.named_parameters())
    settings = {"momentum": 0.1, "nesterov": True, "weight_decay": 0.01 * noise_scale}
    optimizer = torch.optim.SGD(parameters.values(), lr=learning_rate / noise_scale, **settings)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    played: list[Tensor] = []
    try:
        for _ in range(num_generations):
            members = 2 * noise_population_size
            noise = Perturbations(policy, parameters, members, scale=noise_scale, rank=noise_low_rank)
            weights = {name: value.detach().clone() for name, value in parameters.items()}
            for member in range(members):
                policy.load_state_dict(noise.weights(member), strict=False)
                played.append(_checked(policy, fitness, len(played) + 1))
                policy.load_state_dict(weights, strict=False)
            torch.rand(())  # the next generation meets other random numbers
            if noise.set_gradient(torch.stack(played[-members:]).to(next(policy.parameters()))):
                optimizer.step()
                optimizer.zero_grad()
    except BaseException:
        policy.load_state_dict(before)
        raise
    return torch.stack(played).view(num_generations, noise_population_size, 2)


@torch.no_grad()
def _checked(policy: nn.Module, fitness: Callable[[], Any], member: int) -> Tensor:
    """The fitness of member number ``member``, a scalar; torch's random numbers are afterwards as before."""
    name = not_finite(policy.state_dict())
    problem = f"the parameter {name} is not finite"
    if name is None:
        devices = {value.device.index for value in policy.parameters() if value.device.type == "cuda"}
        with torch.random.fork_rng(devices):
            value = torch.as_tensor(fitness(), dtype=torch.float32).mean().cpu()
        if bool(value.isfinite()):
            return value
        problem = f"the fitness is {float(value)}"
    raise DivergedError(
        f"evolution diverged at member {member}: {problem}; the policy is as it was before; mend the environment, or "
        "lower noise_scale or learning_rate."
    )
