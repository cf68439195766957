"""Internal RL without gradients: evolution strategies (arXiv 2511.16652), with the package x-evolution."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from metacontroller.errors import UserError


def evolve(policy: nn.Module, fitness: Callable[[], Any], num_generations: int, **options: Any) -> Tensor:
    """Trains ``policy`` in place towards a higher fitness.

    fitness() -> a number: plays with the policy, whose weights are then those of one member of the population. If it
    raises, the policy's weights are restored. options: of x-evolution's ``EvoStrategy``, such as noise_population_size,
    noise_scale, learning_rate; its checkpoints are deleted unless ``checkpoint_path`` is given.
    Returns the fitness of every member, (num_generations, population, 2): with the noise added and with it subtracted.
    UserError for ``num_generations`` below 1; ImportError without x-evolution.
    """
    if num_generations < 1:
        raise UserError(f"num_generations is {num_generations}; expected at least 1.")
    if importlib.util.find_spec("x_evolution") is None:
        raise ImportError("x-evolution is not installed; install it with `pip install 'metacontroller-rl[evo]'`.")
    from x_evolution import EvoStrategy

    before = {name: value.clone() for name, value in policy.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        on_cpu = next(policy.parameters()).device.type == "cpu"
        defaults = {"verbose": False, "cpu": on_cpu, "checkpoint_path": folder}
        strategy = EvoStrategy(
            policy, environment=lambda _: fitness(), num_generations=num_generations, **(defaults | options)
        )
        try:
            return strategy().clone()  # an ordinary tensor instead of an inference-mode one
        except BaseException:
            policy.load_state_dict(before)
            raise
