"""How far is each phase from what this machine can do?

First the machine's ceilings are measured: matrix products in float32 and bfloat16, and copying memory. Then each part
of the work at the paper's grid sizes (`presets.gridworld.paper`; fewer episodes a batch on a CPU): its time, the
matrix operations that it takes (counted by PyTorch as they run, attention scores and gradients among them) and the
bytes that it must at least move (parameters, what it is given and what it returns; in training gradients and AdamW's
state too). The limit is the longer of operations / ceiling, that of the faster type, and bytes / bandwidth; "share" is
limit / time. Medians.

    python benchmarks/roofline.py [--device cpu] [--threads N] [--repeats 7] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from metacontroller.control.discovery_losses import kl_loss, steered_losses
from metacontroller.control.losses import clipped_surrogate
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.trajectories import Trajectories, length_mask
from metacontroller.domains.gridworld_pinpad.expert import expert_trajectories
from metacontroller.domains.gridworld_pinpad.simulator import PinpadBatch, start_grids
from metacontroller.domains.pinpad.layouts import Layouts
from metacontroller.domains.registry import domain_of
from metacontroller.models.chunked_losses import chunked_losses
from metacontroller.models.protocol import SteerableModel, frozen
from metacontroller.models.readouts import gaussian_log_prob
from metacontroller.phases.rollout import Actor
from metacontroller.presets.gridworld import paper
from metacontroller.recipes.config import ExperimentConfig, build_meta_controller, build_model
from metacontroller.recipes.jobs import usable_cores
from metacontroller.recipes.run_phase import demonstrations

OUT = Path(__file__).parent / "out"
BATCHES = {"cpu": (64, 64), "cuda": (1024, 512)}
"""Episodes a batch in pretraining and in discovery."""

ROLLOUT_ENVIRONMENTS, ROLLOUT_STEPS, RL_EPISODES, RL_DECISIONS = 256, 24, 1024, 12
ENVIRONMENTS, EXPERT_EPISODES = 16_384, 4096


@dataclass(frozen=True)
class Ceilings:
    """Matrix operations a second in float32 and bfloat16, bytes a second read and written by a copy."""

    float32: float
    bfloat16: float
    bandwidth: float


@dataclass(frozen=True)
class Row:
    """seconds: median. operations: of matrix products. moved: bytes at least. rate: "1,234 unit/s", if there is one."""

    name: str
    seconds: float
    operations: float = 0.0
    moved: float = 0.0
    rate: str = ""

    def limit(self, ceilings: Ceilings) -> float:
        """Seconds below which the machine cannot go, with products in the faster of the two types."""
        return max(self.operations / max(ceilings.float32, ceilings.bfloat16), self.moved / ceilings.bandwidth)


class Bench:
    """Times work on a device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def seconds(self, work: Callable[[], Any], repeats: int | None = None) -> float:
        """Median time of a call, after two to warm up."""
        times = []
        for _ in range(2 + (repeats or self.repeats)):
            self._wait()
            start = time.perf_counter()
            work()
            self._wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    def row(
        self,
        name: str,
        work: Callable[[], Any],
        moved: float,
        rate: Callable[[float], str] | None = None,
        counted: Callable[[], Any] | None = None,
    ) -> Row:
        """Time and operations of some work that moves so many bytes at least.

        counted: the same operations where PyTorch's counter cannot look into the work itself.
        """
        seconds = self.seconds(work)
        with FlopCounterMode(display=False) as counter:
            (counted or work)()
        return Row(name, seconds, counter.get_total_flops(), moved, rate(seconds) if rate else "")

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_ceilings(bench: Bench) -> Ceilings:
    """Square products large enough to be at their best, and a copy far larger than any cache."""
    width = 8192 if bench.device.type == "cuda" else 1024

    def operations_a_second(dtype: torch.dtype) -> float:
        a, b = (torch.randn(width, width, device=bench.device).to(dtype) for _ in range(2))
        return 2 * width**3 / bench.seconds(lambda: a @ b, 15)

    source = torch.ones(2**26, device=bench.device)
    target = torch.empty_like(source)
    copying = bench.seconds(lambda: target.copy_(source), 15)
    return Ceilings(
        operations_a_second(torch.float32), operations_a_second(torch.bfloat16), 2 * source.nbytes / copying
    )


def total_bytes(values: Iterable[Tensor]) -> float:
    return float(sum(value.nbytes for value in values))


def training_bytes(parameters: Iterable[nn.Parameter]) -> float:
    """Parameters read forward and back, gradients written and read, AdamW's two moments and the weights updated."""
    return 10 * total_bytes(parameters)


def there_and_back(work: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], None]:
    """Forward and backward of ``work``, down to its parameters and the inputs that need a gradient."""

    def run() -> None:
        out = work(*inputs)
        out.backward(torch.ones_like(out))

    return run


def optimizer_of(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return torch.optim.AdamW(parameters, lr=1e-6, fused=True)


# the phases


def pretraining_rows(bench: Bench, config: ExperimentConfig, batch_size: int) -> list[Row]:
    """One pretraining step: forward, backward, AdamW."""
    model = build_model(config).to(bench.device)
    parameters = list(model.parameters())
    optimizer = optimizer_of(parameters)
    source, rng = demonstrations(domain_of(config.domain), "pretrain"), torch.Generator().manual_seed(0)
    batch = source(batch_size, rng).to(bench.device)

    def step() -> None:
        optimizer.zero_grad()
        losses = model.behavior_cloning_loss(batch.states, batch.actions, batch.lengths, checked=True)
        (losses.action + 0.01 * losses.state).backward()
        optimizer.step()

    moved = training_bytes(parameters) + batch.states.nbytes
    tokens = batch.batch * batch.steps
    return [bench.row(f"pretraining step, {batch_size} episodes", step, moved, lambda s: f"{tokens / s:,.0f} tokens/s")]


def discovery_rows(bench: Bench, config: ExperimentConfig, batch_size: int) -> list[Row]:
    """One discovery step and its parts, forward and backward each."""
    model, steering = build_model(config).to(bench.device), build_meta_controller(config).to(bench.device)
    parameters = steering.discovery_parameters()
    optimizer = optimizer_of(parameters)
    source, rng = demonstrations(domain_of(config.domain), "discover"), torch.Generator().manual_seed(0)
    batch = source(batch_size, rng).to(bench.device)

    def step() -> None:
        optimizer.zero_grad()
        losses, output = steered_losses(
            steering, model, batch.states, batch.actions, batch.lengths, with_state_loss=False
        )
        (losses.action + 0.17 * kl_loss(output)).backward()
        optimizer.step()

    rows = discovery_parts(bench, model, steering, batch, config.meta_controller.dim_sequence)
    rows.append(bench.row("  optimizer", optimizer.step, 7 * total_bytes(parameters)))
    moved = training_bytes(parameters) + total_bytes(model.parameters()) + batch.states.nbytes
    seconds = bench.seconds(step)
    rate = f"{batch.batch * batch.steps / seconds:,.0f} tokens/s"
    operations = sum(row.operations for row in rows)
    return [Row(f"discovery step, {batch_size} episodes", seconds, operations, moved, rate), *rows]


def discovery_parts(
    bench: Bench, model: SteerableModel, steering: MetaController, batch: Trajectories, dim_sequence: int | None
) -> list[Row]:
    """The parts of a discovery step but the optimizer's. dim_sequence: width of the sequence embedding."""
    assert dim_sequence is not None
    states, lengths, steps = batch.states, batch.lengths, batch.steps
    with torch.no_grad():
        with_last = model.lower(model.embed(states))  # T + 1 entries, as the sequence embedder reads them
        residual = with_last[:, :steps].contiguous()
        output = steering.discover(residual, lengths, embedded_residual=with_last)
        read = steering.norm(residual)
        history = steering.history(read)[0]
        embedded = history.new_zeros(*history.shape[:2], dim_sequence)
        encoded = torch.cat([read, history, embedded], -1)
        lower = bench.row("  lower body", lambda: model.lower(model.embed(states)), with_last.nbytes + states.nbytes)
    z, z_tilde = output.z.clone().requires_grad_(), output.z.clone().requires_grad_()
    fresh = (torch.arange(steps, device=bench.device) == 0).expand(len(states), -1)
    mask = length_mask(lengths + 1, steps + 1)
    weights = {name: 2 * total_bytes(part.parameters()) for name, part in steering.named_children()}
    parts: dict[str, tuple[Callable[..., Tensor], float]] = {
        "history": (
            lambda: steering.history(steering.norm(residual))[0],
            residual.nbytes + 2 * history.nbytes + weights["history"],
        ),
        "sequence embedder": (
            lambda: steering.sequence_embedder(steering.norm(with_last), mask),
            with_last.nbytes + weights["sequence_embedder"],
        ),
        "encoder": (lambda: steering.encoder(encoded), encoded.nbytes + weights["encoder"]),
        "gate": (lambda: steering.switching(read, history, z_tilde, fresh).z, read.nbytes + 4 * z.nbytes),
        "controller": (
            lambda: steering.steer(residual, z),
            4 * residual.nbytes + 2 * z.nbytes + weights["controller"],
        ),
    }
    rows = [bench.row(f"  {name}", there_and_back(work), moved) for name, (work, moved) in parts.items()]
    return [lower, *rows, upper_row(bench, model, batch, output.steered)]


def upper_row(bench: Bench, model: SteerableModel, batch: Trajectories, steered: Tensor) -> Row:
    """The upper body and the losses of a discovery step, on residuals that controllers have changed."""
    states, actions, lengths = batch.states, batch.actions, batch.lengths
    steered = steered.clone().requires_grad_()

    def in_parts() -> Tensor:
        def of_part(part: Tensor, rows: slice) -> Tensor:
            hidden = model.upper(part)
            return model.readout_losses(hidden, states[rows], actions[rows], lengths[rows], False).action[None]

        return chunked_losses(steered, of_part)

    def at_once() -> Tensor:
        return model.readout_losses(model.upper(steered), states, actions, lengths, False).action

    with frozen(model):
        moved, counted = 2 * steered.nbytes, there_and_back(at_once)
        return bench.row("  upper body, losses", there_and_back(in_parts), moved, counted=counted)


def rollout_row(bench: Bench, config: ExperimentConfig) -> Row:
    """One environment step of steered grids, `ROLLOUT_ENVIRONMENTS` at once; mean over an episode's first steps."""
    model, steering = build_model(config).to(bench.device).eval(), build_meta_controller(config).to(bench.device).eval()
    count, generator = ROLLOUT_ENVIRONMENTS, torch.Generator(bench.device).manual_seed(0)
    first = start_grids(config.domain.grid, config.domain.post_task, count, generator)

    @torch.no_grad()
    def play() -> None:
        grids = PinpadBatch(first.board, Layouts(first.objects, first.agent), first.tasks, first.task_lengths)
        actor, state = Actor(model, grids, generator), steering.initial_state(count)
        for _ in range(ROLLOUT_STEPS):
            residual = actor.look()
            beta, state = steering.observe(residual, state)
            distribution, policy = steering.policy(residual[:, None], state.policy)
            switch = beta >= steering.gate_config.threshold
            proposed = distribution[:, 0, : steering.dim_latent]
            state = steering.integrate(state, switch, proposed)
            state.policy = torch.where(switch[:, None], policy, state.policy)
            actor.act(steering.steer(residual, state.z))

    weights = total_bytes([*model.parameters(), *steering.parameters()])
    cache = 2 * 4 * model.depth * count * model.dim * ROLLOUT_STEPS / 2  # keys and values, half of the steps on average
    row = bench.row("", play, ROLLOUT_STEPS * (weights + cache))
    return Row(
        f"rollout step, {count} environments",
        row.seconds / ROLLOUT_STEPS,
        row.operations / ROLLOUT_STEPS,
        row.moved / ROLLOUT_STEPS,
        f"{count * ROLLOUT_STEPS / row.seconds:,.0f} steps/s",
    )


def update_row(bench: Bench, config: ExperimentConfig) -> Row:
    """One epoch of the clipped surrogate over stored decisions."""
    steering: MetaController = build_meta_controller(config).to(bench.device)
    parameters = list(steering.policy.parameters())
    optimizer = optimizer_of(parameters)
    residual = torch.randn(RL_EPISODES, RL_DECISIONS, config.model.dim, device=bench.device)
    code = torch.randn(RL_EPISODES, RL_DECISIONS, steering.dim_latent, device=bench.device)
    mask = torch.ones(RL_EPISODES, RL_DECISIONS, dtype=torch.bool, device=bench.device)
    advantage, old = torch.randn(RL_EPISODES, 1, device=bench.device), torch.zeros_like(code[..., 0])

    def step() -> None:
        optimizer.zero_grad()
        log_prob = gaussian_log_prob(steering.policy(residual)[0], code).sum(-1)
        clipped_surrogate(log_prob, old, advantage, mask, 0.2).backward()
        optimizer.step()

    moved = training_bytes(parameters) + residual.nbytes + 3 * code.nbytes
    return bench.row(
        f"RL update, one epoch over {RL_EPISODES} episodes", step, moved, lambda s: f"{RL_EPISODES / s:,.0f} episodes/s"
    )


def environment_rows(bench: Bench, config: ExperimentConfig) -> list[Row]:
    """Grid steps, and expert episodes from fresh layouts; no matrix products in them, so bytes alone limit them."""
    generator = torch.Generator(bench.device).manual_seed(0)
    grids = start_grids(config.domain.grid, config.domain.post_task, ENVIRONMENTS, generator)
    layouts = Layouts(grids.objects, grids.agent)
    actions = torch.randint(4, (8, ENVIRONMENTS), device=bench.device)

    def play() -> None:
        batch = PinpadBatch(grids.board, layouts, grids.tasks, grids.task_lengths)
        for action in actions:
            batch.step(action)

    def begin() -> None:
        PinpadBatch(grids.board, layouts, grids.tasks, grids.task_lengths)

    seconds = (bench.seconds(play) - bench.seconds(begin)) / len(actions)
    kept = total_bytes([grids.agent, grids.colors_done, grids.steps, grids.terminated, grids.truncated, actions[0]])
    environment = Row(
        f"grid step, {ENVIRONMENTS:,} grids", seconds, 0.0, 2 * kept, f"{ENVIRONMENTS / seconds:,.0f} steps/s"
    )

    def expert() -> Any:
        return expert_trajectories(
            config.domain.grid, config.domain.tasks, EXPERT_EPISODES, generator=generator, device=bench.device
        )

    made = expert()
    moved = total_bytes([made.states, made.actions])
    moved += 2.0 * EXPERT_EPISODES * config.domain.num_colors * config.domain.size**2  # int16 distances
    seconds = bench.seconds(expert)
    rate = f"{EXPERT_EPISODES / seconds:,.0f} episodes/s"
    return [environment, Row(f"expert, {EXPERT_EPISODES:,} episodes", seconds, 0.0, moved, rate)]


def show(rows: list[Row], ceilings: Ceilings, title: str) -> None:
    """Prints ceilings and rows."""
    console = Console(width=110)
    console.print(
        f"{title}\nceilings: {ceilings.float32 / 1e9:,.0f} Gflop/s float32, {ceilings.bfloat16 / 1e9:,.0f} bfloat16, "
        f"{ceilings.bandwidth / 1e9:.1f} GB/s"
    )
    table = Table(box=None)
    table.add_column("part", no_wrap=True)
    for name in ("ms", "Gflop", "MB", "limit ms", "share", "rate"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        limit = row.limit(ceilings)
        share = f"{limit / row.seconds:.0%}" if limit else ""
        numbers = (f"{1e3 * row.seconds:.2f}", f"{row.operations / 1e9:.2f}", f"{row.moved / 1e6:.1f}")
        table.add_row(row.name, *numbers, f"{1e3 * limit:.2f}", share, row.rate)
    console.print(table)


def measure(device: torch.device, repeats: int) -> tuple[Ceilings, list[Row]]:
    """Everything on one device."""
    bench, config = Bench(device, repeats), paper()
    pretraining, discovery = BATCHES[device.type]
    ceilings = measure_ceilings(bench)
    rows = [
        *pretraining_rows(bench, config, pretraining),
        *discovery_rows(bench, config, discovery),
        rollout_row(bench, config),
        update_row(bench, config),
        *environment_rows(bench, config),
    ]
    return ceilings, rows


def report(device: torch.device, threads: int, ceilings: Ceilings, rows: list[Row]) -> dict[str, Any]:
    """What is written as JSON."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": threads,
        "torch": torch.__version__,
        "ceilings": vars(ceilings),
        "rows": [{**vars(row), "limit_seconds": row.limit(ceilings)} for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=OUT / "roofline.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ceilings, rows = measure(arguments.device, arguments.repeats)
    show(rows, ceilings, f"{arguments.device}, {arguments.threads} threads, torch {torch.__version__}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    content = report(arguments.device, arguments.threads, ceilings, rows)
    arguments.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
