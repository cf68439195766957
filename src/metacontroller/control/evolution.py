"""Internal RL without gradients: evolution strategies (arXiv 2511.16652), with the package x-evolution."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metacontroller.errors import DivergedError
from metacontroller.ranges import COUNT, check_number
from metacontroller.storage.training_state import not_finite


def evolve(policy: nn.Module, fitness: Callable[[], Any], num_generations: int, **options: Any) -> Tensor:
    """Trains ``policy`` in place towards a higher fitness.

    fitness() -> a number: plays with the policy, whose weights are then those of one member of the population. If it
    raises, or is not finite, the policy's weights are restored. options: of x-evolution's ``EvoStrategy``, such as
    noise_population_size, noise_scale, learning_rate; its checkpoints are deleted unless ``checkpoint_path`` is given.
    Returns the fitness of every member, (num_generations, population, 2): with the noise added and with it subtracted.
    UserError for ``num_generations`` below 1; DivergedError, with the policy as it was before, for a fitness or weights
    that are not finite; ImportError without x-evolution.
    """
    check_number("num_generations", num_generations, COUNT)
    if importlib.util.find_spec("x_evolution") is None:
        raise ImportError("x-evolution is not installed; install it with `pip install 'metacontroller-rl[evo]'`.")
    from x_evolution import EvoStrategy

    played = 0

    def checked_fitness(_: Any) -> Any:
        nonlocal played
        played += 1
        name = not_finite(policy.state_dict())
        value = None if name else fitness()
        if name or not bool(torch.as_tensor(value).isfinite().all()):
            found = f"the parameter {name} is not finite" if name else f"the fitness is {value}"
            raise DivergedError(
                f"evolution diverged at member {played}: {found}; the policy is as it was before; mend the "
                "environment, or lower noise_scale or learning_rate."
            )
        return value

    before = {name: value.clone() for name, value in policy.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        on_cpu = next(policy.parameters()).device.type == "cpu"
        defaults = {"verbose": False, "cpu": on_cpu, "checkpoint_path": folder}
        strategy = EvoStrategy(
            policy, environment=checked_fitness, num_generations=num_generations, **(defaults | options)
        )
        try:
            return strategy().clone()  # an ordinary tensor instead of an inference-mode one
        except BaseException:
            policy.load_state_dict(before)
            raise
