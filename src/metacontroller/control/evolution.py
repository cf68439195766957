"""Evolution strategies for a policy whose members play one after another (arXiv 2511.16652)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metacontroller.arguments import checked_kinds
from metacontroller.control.population import Perturbations
from metacontroller.errors import DivergedError
from metacontroller.ranges import Count, Positive
from metacontroller.storage.tensor_file import not_finite


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
    noise_low_rank: of the perturbations, see `control.population`. learning_rate: of SGD with momentum 0.1 and weight
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
