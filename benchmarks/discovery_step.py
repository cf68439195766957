"""How fast is one discovery step, and how much memory does it take? Ours beside metacontroller-pytorch 0.3.3.

A step is forward, backward and AdamW on what discovery trains, over a frozen base of 3 + 3 blocks at n_e 256 (4 heads
of 64, MLP 512, ReLU). Both libraries get the same batch of episodes of 32 steps: vectors of 588 numbers, in float32, on
as many threads. The peer is called as its README shows, and spared what discovery does not need: gradients of the
frozen base, its next-latent loss and its ratio loss are off. Ours has the precision of the presets: large products in
bfloat16 where the processor has instructions for them. Settings of the metacontroller:

- "paper": the paper's sizes, as far as the peer's arguments allow; where they do not is printed.
- "readme": the same two arguments for both, `dim_meta_controller = 256, dim_latent = 128`, the rest as each has it.
- "paper, wide" is ours alone: its history and sequence embedder as wide as the peer's have to be.
- "paper, float32": ours with all products in float32.
- "paper, autocast": the peer under PyTorch's bfloat16 autocast, which its README does not mention.

Every measurement is a process of its own, ours and the peer's in turn. Memory is the highest resident memory during the
steps, less what was resident right before the first one. Linux only: it is read from /proc.

    python benchmarks/discovery_step.py [--peer-python PATH] [--rounds 3] [--steps 5] [--output FILE.json]

Without --peer-python the peer is installed into benchmarks/out/peer-venv first; pip's environment variables apply.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# The peer's interpreter runs this file too, with the peer as `metacontroller`: no import of ours or of rich up here.

OUT = Path(__file__).parent / "out"
PEER, PEER_VERSION = "metacontroller-pytorch", "0.3.3"
EPISODE_STEPS, DIM_STATE, DIM, WARM_UPS, KL_WEIGHT = 32, 588, 256, 2, 0.1
CASES = (  # library, setting, batch
    ("ours", "paper", 64),
    ("peer", "paper", 64),
    ("ours", "readme", 64),
    ("peer", "readme", 64),
    ("ours", "paper, wide", 64),
    ("ours", "paper, float32", 64),
    ("peer", "paper, autocast", 64),
    ("ours", "paper", 512),
    ("peer", "paper", 512),
)
TARGET_SPEED, TARGET_MEMORY = 20, {64: 0.25, 512: 0.1}

README_SIZES = {"dim_meta_controller": 256, "dim_latent": 128}
OUR_PAPER_SIZES = {"dim_meta_controller": 32, "dim_latent": 8, "encoder_hidden": 64, "decoder_hidden": 32, "rank": 16}
OUR_SIZES = {
    "paper": OUR_PAPER_SIZES,
    "paper, wide": {**OUR_PAPER_SIZES, "dim_history": DIM, "embedder_dim": DIM},
    "paper, float32": OUR_PAPER_SIZES,
    "readme": README_SIZES,
}
PEER_ATTENTION = {"depth": 1, "heads": 4, "attn_dim_head": 8, "polar_pos_emb": True}
PEER_SIZES = {
    "paper": {
        "dim_meta_controller": 32,
        "dim_latent": 8,
        "decoder_expansion_factor": 4.0,
        "hypernetwork_low_rank": 7,
        "internal_sequence_embedder": {**PEER_ATTENTION, "ff_mult": 0.25},
        "action_proposer": PEER_ATTENTION,
    },
    "readme": README_SIZES,
}
PEER_SIZES["paper, autocast"] = PEER_SIZES["paper"]
UNMATCHED = (  # what, ours, the peer's; setting "paper"
    ("rank of the controller", "16", "7: must be below n_z = 8"),
    ("how the controller acts", "U e", "e scaled by the row sums of U"),
    ("width of the history GRU", "32", "256: as the residual"),
    ("width of the sequence embedder", "32", "256: as the residual"),
    ("encoder", "1 hidden layer of 64", "2 residual layers, 64 to 256 to 64"),
    ("switching unit", "1 hidden layer of 32", "GRU of 32"),
    ("controller decoder", "1 hidden layer of 32", "1 residual layer, 32 to 128 to 32"),
    ("norms and positions of the base", "layer norm, T5 bias", "RMS norm, polar embedding"),
)


# in the process that is measured


def our_modules(setting: str) -> tuple[Any, Any]:
    """Our base model and metacontroller."""
    library: Any = importlib.import_module("metacontroller")
    body = {"depth": 3, "heads": 4, "dim_head": 64, "mlp_dim": 512}
    precision = "float32" if setting.endswith("float32") else "auto"
    model = library.Transformer(
        DIM,
        action_embed_readout={"num_discrete": 4},
        state_embed_readout={"num_continuous": DIM_STATE},
        lower_body=body,
        upper_body=body,
        precision=precision,
    )
    return model, library.MetaController(DIM, **OUR_SIZES[setting], precision=precision)


def our_step(setting: str) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Our metacontroller and its loss of (states, actions)."""
    model, meta_controller = our_modules(setting)

    def loss(states: Tensor, actions: Tensor) -> Tensor:
        losses = meta_controller.discovery_loss(model, states, actions, with_state_loss=False)
        return losses.action_recon + KL_WEIGHT * losses.kl

    return meta_controller, loss


def peer_modules(setting: str) -> tuple[Any, Any]:
    """The peer's base model, frozen, and metacontroller."""
    library: Any = importlib.import_module("metacontroller")
    body = {"depth": 3, "heads": 4, "attn_dim_head": 64, "ff_mult": 2, "ff_custom_activation": nn.ReLU()}
    model = library.Transformer(
        dim=DIM,
        action_embed_readout={"num_discrete": 4},
        state_embed_readout={"num_continuous": DIM_STATE},
        lower_body=body,
        upper_body=body,
        next_latent_loss_weight=0.0,
    )
    model.requires_grad_(False)
    return model, library.MetaController(dim_model=DIM, ratio_loss_weight=0.0, **PEER_SIZES[setting])


def peer_step(setting: str) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """The peer's metacontroller and its loss of (states, actions)."""
    model, meta_controller = peer_modules(setting)

    def loss(states: Tensor, actions: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.endswith("autocast")):
            losses = model(states, actions, meta_controller=meta_controller, discovery_phase=True)
        _, action_loss, kl_loss, _ = losses
        return action_loss + KL_WEIGHT * kl_loss

    return meta_controller, loss


def resident_mb(name: str) -> float:
    """Resident memory of this process in MB: "VmRSS" now, "VmHWM" at its highest."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024 / 1e6


def measure(library: str, setting: str, batch: int, steps: int, threads: int) -> dict[str, Any]:
    """Seconds of each step after the warm-ups, and memory in MB."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    meta_controller, loss = (our_step if library == "ours" else peer_step)(setting)
    parameters = meta_controller.discovery_parameters()  # type: ignore[operator] - both have it
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.03, fused=True)
    states = torch.randn(batch, EPISODE_STEPS, DIM_STATE)
    actions = torch.randint(4, (batch, EPISODE_STEPS))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest resident memory so far
    before, times = resident_mb("VmRSS"), []
    for _ in range(WARM_UPS + steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss(states, actions).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return {
        "seconds": times[WARM_UPS:],
        "rss_before_mb": before,
        "peak_rss_mb": resident_mb("VmHWM"),
        "trained_parameters": sum(parameter.numel() for parameter in parameters),
        "torch": torch.__version__,
    }


# in the process that compares


def install_peer(path: Path) -> Path:
    """The interpreter of a virtual environment that holds the peer and our version of torch; made where missing."""
    python = path / "bin" / "python"
    if not python.exists():
        venv.create(path, with_pip=True)
    wanted = ["torch==" + torch.__version__.split("+")[0], f"{PEER}=={PEER_VERSION}"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return python


def measure_apart(python: Path, script: str, library: str, case: list[Any], threads: int) -> dict[str, Any]:
    """What ``script --case`` prints for a case in a fresh process of ``python``."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if library == "peer":
        environment.pop("PYTHONPATH", None)  # it may lead to ours, which has the same import name
    command = [python, Path(script).resolve(), "--case", json.dumps(case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{library} failed on {case} under {python}:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def check_peer(python: Path) -> None:
    """Raises ValueError where the comparison would be with another version of the peer or of torch."""
    query = f"from importlib.metadata import version; print(version('{PEER}'), version('torch').split('+')[0])"
    done = subprocess.run([python, "-c", query], capture_output=True, text=True)
    wanted = f"{PEER_VERSION} {torch.__version__.split('+')[0]}"
    if done.stdout.strip() != wanted:
        found = done.stdout.strip() or done.stderr.strip().splitlines()[-1]
        raise ValueError(
            f"{python} has {PEER} and torch {found!r}; expected {wanted!r}: install these, or leave the option out."
        )


def summary(library: str, setting: str, batch: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: medians over all steps of all rounds, and over the rounds for memory."""
    seconds = statistics.median(value for result in results for value in result["seconds"])
    before = statistics.median(result["rss_before_mb"] for result in results)
    peak = statistics.median(result["peak_rss_mb"] for result in results)
    return {
        "library": library,
        "setting": setting,
        "batch": batch,
        "seconds_per_step": seconds,
        "tokens_per_second": batch * EPISODE_STEPS / seconds,
        "step_memory_mb": peak - before,
        "rss_before_mb": before,
        "peak_rss_mb": peak,
        "trained_parameters": results[0]["trained_parameters"],
        "torch": results[0]["torch"],
        "seconds": [result["seconds"] for result in results],
    }


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours against the peer, for each setting and batch that both have."""
    by_case = {(row["library"], row["setting"], row["batch"]): row for row in rows}
    ratios = []
    for (library, setting, batch), peer in by_case.items():
        if library == "peer" and ("ours", setting, batch) in by_case:
            ours = by_case["ours", setting, batch]
            speed = ours["tokens_per_second"] / peer["tokens_per_second"]
            memory = ours["step_memory_mb"] / peer["step_memory_mb"]
            ratios.append({"setting": setting, "batch": batch, "times_the_speed": speed, "share_of_memory": memory})
    return ratios


def show(rows: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> None:
    """Prints the measurements, the ratios, and what the sizes of the two have not in common."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    from metacontroller.models.precision import prefers_bfloat16

    console.print(f"ours multiplies in {'bfloat16' if prefers_bfloat16('cpu') else 'float32'} unless named float32")
    table = Table(box=None, padding=(0, 1, 0, 0), caption="trained: parameters. MB: resident, peak - before = step")
    for name in ("library", "setting"):
        table.add_column(name, no_wrap=True)
    for name in ("batch", "trained", "ms/step", "tokens/s", "before", "peak", "step MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        names = ("tokens_per_second", "rss_before_mb", "peak_rss_mb", "step_memory_mb")
        counts = (row["trained_parameters"], 1000 * row["seconds_per_step"], *(row[name] for name in names))
        table.add_row(row["library"], row["setting"], str(row["batch"]), *(f"{count:,.0f}" for count in counts))
    console.print(table)
    for ratio in ratios:
        console.print(
            f"{ratio['setting']}, batch {ratio['batch']}: {ratio['times_the_speed']:.1f} times the peer's speed "
            f"(target {TARGET_SPEED}), {ratio['share_of_memory']:.2f} of its memory (target "
            f"{TARGET_MEMORY[ratio['batch']]})"
        )
    table = Table('not matched in "paper"', "ours", "peer")
    for entry in UNMATCHED:
        table.add_row(*entry)
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help=f"interpreter that has {PEER} {PEER_VERSION}")
    parser.add_argument("--rounds", type=int, default=3, help="processes per measurement")
    parser.add_argument("--steps", type=int, default=5, help=f"timed steps per process, after {WARM_UPS} to warm up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUT / "discovery_step.json")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)  # one measurement, for our own child
    arguments = parser.parse_args()
    for name in ("rounds", "steps", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; expected at least 1.")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.case:
        print(json.dumps(measure(*arguments.case)))
        return
    pythons = {"ours": Path(sys.executable), "peer": arguments.peer_python or install_peer(OUT / "peer-venv")}
    check_peer(pythons["peer"])
    results: dict[tuple[str, str, int], list[dict[str, Any]]] = {case: [] for case in CASES}
    for _ in range(arguments.rounds):
        for case in CASES:
            words = [*case, arguments.steps, arguments.threads]
            results[case].append(measure_apart(pythons[case[0]], __file__, case[0], words, arguments.threads))
    from metacontroller.models.precision import prefers_bfloat16

    rows = [summary(*case, results[case]) for case in CASES]
    ratios = compare(rows)
    show(rows, ratios)
    report = {
        "peer": f"{PEER} {PEER_VERSION}",
        "machine": platform.machine(),
        "threads": arguments.threads,
        "bfloat16": prefers_bfloat16("cpu"),
        "episode_steps": EPISODE_STEPS,
        "rows": rows,
        "ratios": ratios,
        "targets": {"times_the_speed": TARGET_SPEED, "share_of_memory": TARGET_MEMORY},
        "unmatched": UNMATCHED,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
