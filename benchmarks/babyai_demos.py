"""How many demonstrations a second does minigrid's bot make, as the preset babyai-laptop asks for them?

For each number of processes, the episodes of pretraining (10% random moves) and of discovery (none): by the wall clock,
the start of the processes included. Beside them minigrid's bot as it is, with its own observations, in the same rooms
and one process. Prints a table and writes JSON.

    python benchmarks/babyai_demos.py [--episodes 4000] [--processes 1 2] [--output benchmarks/out/babyai_demos.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from minigrid.utils.baby_ai_bot import BabyAIBot

from metacontroller.domains.babyai.dataset import Recipe, generate
from metacontroller.domains.babyai.domain import BabyAI
from metacontroller.domains.babyai.level import Room
from metacontroller.presets.babyai import laptop


def own_rate(wanted: Recipe, episodes: int, processes: int) -> tuple[float, float]:
    """Episodes a second, and steps of a mean episode."""
    start = time.perf_counter()
    made = generate(replace(wanted, workers=processes), episodes)
    return episodes / (time.perf_counter() - start), float(made.lengths.float().mean())


def plain_rate(wanted: Recipe, episodes: int) -> float:
    """Successful episodes a second of minigrid's bot, with minigrid's own view of each step."""
    rooms = [Room(wanted.objects, task, size=wanted.room_size, max_steps=wanted.max_steps) for task in wanted.tasks]
    start, solved = time.perf_counter(), 0
    for seed in range(episodes):
        room = rooms[seed % len(rooms)]
        room.reset(seed=seed)
        bot, action, ended, truncated, reward = BabyAIBot(room), None, False, False, 0.0
        while not (ended or truncated):
            try:
                action = bot.replan(action)
            except AssertionError:  # it knows no way
                break
            if action is None:  # it takes the mission for done
                break
            _, reward, ended, truncated, _ = room.step(action)
            room.gen_obs()
        solved += float(reward) > 0
    return solved / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=4000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/out/babyai_demos.json"))
    options = parser.parse_args()

    world = BabyAI(laptop().domain)
    rows: list[dict[str, Any]] = []
    for split in ("pretrain", "discover"):
        wanted = world.recipe(split)
        for processes in options.processes:
            rate, steps = own_rate(wanted, options.episodes, processes)
            rows.append({"epsilon": wanted.epsilon, "processes": processes, "episodes_s": rate, "steps": steps})
    plain = plain_rate(replace(wanted, epsilon=0.0), max(1, options.episodes // 4))

    print(f"{platform.processor() or platform.machine()}, {options.episodes} episodes each\n")
    print("| random moves | processes | demonstrations/s | steps each |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['epsilon']:.0%} | {row['processes']} | {row['episodes_s']:.0f} | {row['steps']:.1f} |")
    print(f"| minigrid's bot and view as they are | 1 | {plain:.0f} | – |")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"rows": rows, "plain_episodes_s": plain}, indent=2) + "\n")


if __name__ == "__main__":
    main()
