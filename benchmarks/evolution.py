"""A generation of evolution: the whole population in one rollout, beside one member after another.

Both play the same number of episodes for each member in the post-training task of a preset's world, with the model and
the metacontroller of a run, or new ones of the preset's sizes. One after another, each member's weights are formed and
loaded, and it plays its episodes in a batch of its own. The population's time holds the draw of its perturbations and
the estimate of the gradient. Prints medians and the ratio, and writes JSON; the bar is a ratio of 5.

    python benchmarks/evolution.py [RUN] [--preset quick] [--members 256] [--episodes 4] [--repeats 3] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metacontroller.control.metacontroller import MetaController
from metacontroller.control.population import Population
from metacontroller.domains.registry import domain_of
from metacontroller.models.protocol import SteerableModel
from metacontroller.phases.evolution import fitness_of, play_population
from metacontroller.phases.rollout import policy_proposal, rollout_abstract
from metacontroller.presets import preset
from metacontroller.recipes.config import build_meta_controller, build_model, load_run, read_config
from metacontroller.recipes.run_phase import post_training
from metacontroller.storage.run_folder import RunFolder

SCALE, TARGET = 0.1, 5


def parts(run: Path | None, name: str) -> tuple[SteerableModel, MetaController, Callable[..., Any]]:
    """The model, the metacontroller and what starts episodes: of a run, or new ones of a preset."""
    if run is not None:
        loaded = load_run(RunFolder(run), "cpu", read_config(RunFolder(run)))
        return loaded.model.eval(), loaded.meta_controller.eval(), post_training(loaded.domain)
    config = preset(name)
    return build_model(config).eval(), build_meta_controller(config).eval(), post_training(domain_of(config.domain))


def one_rollout(model: SteerableModel, steering: MetaController, reset: Any, members: int, episodes: int) -> None:
    """A generation as `phases.evolution` plays it."""
    generator = torch.Generator().manual_seed(0)
    population = Population(steering.policy, members, scale=SCALE, generator=generator)
    rollout = play_population(model, steering, population, reset(members * episodes, generator), generator)
    population.gradient(fitness_of(rollout, members))


def one_by_one(model: SteerableModel, steering: MetaController, reset: Any, members: int, episodes: int) -> None:
    """The same number of episodes, member after member; the policy is as before at the end."""
    generator = torch.Generator().manual_seed(0)
    population = Population(steering.policy, members, scale=SCALE, generator=generator)
    weights = [population.weights(member) for member in range(members)]
    before = {name: value.clone() for name, value in steering.policy.state_dict().items()}
    for member in weights:
        steering.policy.load_state_dict(member)
        rollout_abstract(model, steering, reset(episodes, generator), policy_proposal(steering, generator), generator)
    steering.policy.load_state_dict(before)


def seconds(play: Callable[..., None], *arguments: Any) -> float:
    """Wall time of one generation."""
    start = time.perf_counter()
    play(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="a run with discovered codes")
    parser.add_argument("--preset", default="quick", help="whose sizes and world, where no run is given")
    parser.add_argument("--members", type=int, default=256)
    parser.add_argument("--episodes", type=int, default=4, help="of each member")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "out" / "evolution.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    case = *parts(arguments.run, arguments.preset), arguments.members, arguments.episodes
    seconds(one_rollout, *case)  # to warm up
    times: dict[str, list[float]] = {"one_rollout": [], "one_by_one": []}
    for _ in range(arguments.repeats):  # in turn, so that both meet the same load
        times["one_rollout"].append(seconds(one_rollout, *case))
        times["one_by_one"].append(seconds(one_by_one, *case))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["one_by_one"] / medians["one_rollout"]
    print(f"{'generation of ' + str(arguments.members):24} {'seconds':>9}")
    for name, value in medians.items():
        print(f"{name:24} {value:9.3f}")
    print(f"{'ratio':24} {ratio:9.1f}   (bar: {TARGET})")
    result = {"members": arguments.members, "episodes": arguments.episodes, "threads": arguments.threads}
    result |= {"source": str(arguments.run or arguments.preset), "seconds": times, "ratio": ratio}
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
