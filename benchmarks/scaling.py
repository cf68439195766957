"""How does cost grow with the batch and with the length of episodes? Time of each part, forward and backward.

For every part a power law time = c * size^k is fitted over the larger half of the sizes, where fixed costs no longer
count; k is printed and drawn. Attention's scores grow with the square of the length: what they cost at each length is
counted and named. Widths are the paper's (n_e 256).

    python benchmarks/scaling.py [--threads N] [--repeats 5] [--output FILE.json]     writes a figure beside the JSON
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from metacontroller.control.metacontroller import MetaController
from metacontroller.models.attention import AttentionBody
from metacontroller.models.hawk import HawkBody
from metacontroller.recipes.jobs import usable_cores
from metacontroller.report.figures import require_matplotlib

OUT = Path(__file__).parent / "out"
DIM, HEADS, DIM_HEAD, MLP_DIM = 256, 4, 64, 512
LENGTHS, BATCH_OF_LENGTHS = (16, 32, 64, 128, 256, 512), 16
BATCHES, LENGTH_OF_BATCHES = (4, 8, 16, 32, 64, 128), 32
LINEAR = ("Hawk block", "gate")
BOUND = 1.1

Part = Callable[[int, int], Callable[[], None]]


def there_and_back(work: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        out = work()
        out.backward(torch.ones_like(out))

    return run


def hawk(batch: int, steps: int) -> Callable[[], None]:
    body, x = HawkBody(DIM, depth=1, mlp_dim=MLP_DIM), torch.randn(batch, steps, DIM)
    return there_and_back(lambda: body(x))


def attention(batch: int, steps: int) -> Callable[[], None]:
    body = AttentionBody(DIM, depth=1, heads=HEADS, dim_head=DIM_HEAD, mlp_dim=MLP_DIM)
    x = torch.randn(batch, steps, DIM)
    return there_and_back(lambda: body(x))


def steering() -> MetaController:
    return MetaController(
        DIM, dim_meta_controller=32, dim_latent=8, encoder_hidden=64, embedder_dim=64, embedder_kind="hawk"
    )


def gate(batch: int, steps: int) -> Callable[[], None]:
    unit = steering().switching
    read, history = torch.randn(batch, steps, DIM), torch.randn(batch, steps, 32)
    proposals = torch.randn(batch, steps, 8, requires_grad=True)
    fresh = (torch.arange(steps) == 0).expand(batch, -1)
    return there_and_back(lambda: unit(read, history, proposals, fresh).z)


def metacontroller(batch: int, steps: int) -> Callable[[], None]:
    whole, residual = steering(), torch.randn(batch, steps, DIM)
    return there_and_back(lambda: whole.discover(residual).steered)


PARTS: dict[str, Part] = {
    "Hawk block": hawk,
    "attention block": attention,
    "gate": gate,
    "metacontroller (Hawk embedder)": metacontroller,
}


def seconds(work: Callable[[], None], repeats: int) -> float:
    """Median, after one call to warm up."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def exponent(sizes: tuple[int, ...], times: list[float]) -> float:
    """Slope of log time against log size over the larger half of the sizes, by least squares."""
    half = len(sizes) // 2
    x = [math.log(size) for size in sizes[half:]]
    y = [math.log(value) for value in times[half:]]
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def quadratic_share(steps: int) -> float:
    """Share of an attention block's matrix operations that its scores and their mixing take at a length."""
    scores = 2 * steps * HEADS * DIM_HEAD
    linear = 4 * DIM * HEADS * DIM_HEAD + 2 * DIM * MLP_DIM
    return scores / (scores + linear)


def draw(report: dict[str, Any], path: Path) -> None:
    """Time against size, both on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, along, sizes in zip(axes, ("length", "batch"), (LENGTHS, BATCHES), strict=True):
        for name, row in report[along].items():
            axis.loglog(sizes, [1e3 * value for value in row["seconds"]], "o-", label=f"{name}: {row['exponent']:.2f}")
        axis.set(xlabel={"length": "steps an episode", "batch": "episodes a batch"}[along], ylabel="ms")
        axis.set_xticks(sizes, map(str, sizes))
        axis.minorticks_off()
        axis.legend(title="exponent", fontsize="small")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=OUT / "scaling.json")
    arguments = parser.parse_args()
    require_matplotlib()
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {"threads": arguments.threads, "torch": torch.__version__, "length": {}, "batch": {}}
    console = Console()
    for along, sizes in (("length", LENGTHS), ("batch", BATCHES)):
        table = Table(box=None, title=f"ms by {along}")
        table.add_column("part", no_wrap=True)
        for size in sizes:
            table.add_column(str(size), justify="right")
        table.add_column("exponent", justify="right")
        for name, part in PARTS.items():
            shapes = [(BATCH_OF_LENGTHS, size) if along == "length" else (size, LENGTH_OF_BATCHES) for size in sizes]
            times = [seconds(part(*shape), arguments.repeats) for shape in shapes]
            slope = exponent(sizes, times)
            report[along][name] = {"sizes": sizes, "seconds": times, "exponent": slope}
            verdict = ("" if slope <= BOUND else f" > {BOUND}") if name in LINEAR else ""
            table.add_row(name, *(f"{1e3 * value:.2f}" for value in times), f"{slope:.2f}{verdict}")
        console.print(table)
    shares = {steps: quadratic_share(steps) for steps in LENGTHS}
    report["attention_quadratic_share"] = shares
    console.print(
        "attention's quadratic part, of a block's matrix operations: "
        + ", ".join(f"{share:.0%} at {steps}" for steps, share in shares.items())
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    draw(report, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
