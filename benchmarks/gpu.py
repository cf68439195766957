"""Everything that wants a GPU, in one resumable script: parity with the CPU, the roofline table, the paper's preset.

(a) Parity: the same weights, data and noise on both devices; losses, gradients, the gate kernel, acting, the expert.
(b) `roofline.py` on the device.
(c) `metacontroller reproduce --preset paper`, for --minutes; the next call resumes from its last checkpoint.

Results, and what was not measured, go to --out: parity.json, roofline.json, run.json and README.md; the run itself to
--run. Without a CUDA device --device cpu tries the script out, with --preset debug and few repeats.

    python benchmarks/gpu.py [--minutes 8] [--run runs/gpu-paper] [--out docs/results/gpu]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metacontroller.control.core import DiscoveryNoise
from metacontroller.control.discovery_losses import kl_loss, steered_losses
from metacontroller.domains.pinpad.layouts import Layouts, distance_fields, sample_layouts
from metacontroller.domains.registry import domain_of
from metacontroller.kernels.gate_scan import gate_scan
from metacontroller.models.transformer import Transformer
from metacontroller.presets import preset as preset_of
from metacontroller.recipes.config import build_meta_controller, build_model
from metacontroller.recipes.machine import environment_facts
from metacontroller.recipes.run_phase import PHASES, demonstrations
from metacontroller.storage.run_folder import RunFolder
from roofline import measure, report, show

TOLERANCE = 1e-3
"""Largest relative difference between float32 on two devices that counts as the same."""


def difference(ours: Tensor, reference: Tensor) -> float:
    """Largest absolute difference, relative to the reference's largest entry."""
    ours, reference = ours.detach().double().cpu(), reference.detach().double().cpu()
    return float((ours - reference).abs().max() / reference.abs().max().clamp_min(1e-12))


def parity(device: torch.device, preset: str) -> dict[str, float]:
    """Largest relative difference between the CPU and ``device``, by what was compared; 0 is expected of the grid."""
    torch.backends.cuda.matmul.allow_tf32 = False
    config = preset_of(preset)
    model, steering = (replace(part, precision="float32") for part in (config.model, config.meta_controller))
    config = replace(config, model=model, meta_controller=steering)
    episodes = demonstrations(domain_of(config.domain), "discover")(16, torch.Generator().manual_seed(0))
    view = build_meta_controller(config).sample_noise(16, episodes.steps, torch.Generator().manual_seed(1))
    compared = {
        "pretraining": lambda where: pretraining(config, episodes, where),
        "discovery": lambda where: discovery(config, episodes, view, where),
        "gate": gate,
        "acting": lambda where: acting(config, episodes, where),
        "shortest paths": lambda where: shortest_paths(config, where),
    }
    return {name: worst(work, device) for name, work in compared.items()}


def worst(work: Callable[[torch.device], list[Tensor]], device: torch.device) -> float:
    """The largest difference between what ``work`` returns on the CPU and on the device."""
    pairs = zip(work(device), work(torch.device("cpu")), strict=True)
    return max(difference(ours, reference) for ours, reference in pairs)


def gradients(loss: Tensor, parameters: list[torch.nn.Parameter]) -> tuple[Tensor, ...]:
    """Zeros where a parameter has no part in the loss."""
    return torch.autograd.grad(loss, parameters, materialize_grads=True)


def pretraining(config: Any, episodes: Any, device: torch.device) -> list[Tensor]:
    """Loss and gradients of pretraining."""
    model, batch = build_model(config).to(device), episodes.to(device)
    losses = model.behavior_cloning_loss(batch.states, batch.actions, batch.lengths)
    return [*losses, *gradients(losses.action + losses.state, list(model.parameters()))]


def discovery(config: Any, episodes: Any, noise: DiscoveryNoise, device: torch.device) -> list[Tensor]:
    """Losses and gradients of discovery with given noise."""
    model, steering = build_model(config).to(device), build_meta_controller(config).to(device)
    batch, moved = episodes.to(device), DiscoveryNoise(*(value.to(device) for value in noise))
    losses, output = steered_losses(steering, model, batch.states, batch.actions, batch.lengths, noise=moved)
    loss = losses.action + losses.state + 0.1 * kl_loss(output)
    return [*losses, output.beta, *gradients(loss, steering.discovery_parameters())]


def gate(device: torch.device) -> list[Tensor]:
    """The kernel chosen for the device, forward and backward."""
    generator = torch.Generator().manual_seed(2)
    shapes = ((32, 40, 32), (32, 40, 8), (32, 8), (32,), ())
    inputs = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    fresh = (torch.arange(40) == 0).expand(32, -1).to(device)
    output = gate_scan(*inputs, fresh=fresh)
    return [output.z, output.beta, *torch.autograd.grad(output.z.square().sum() + output.beta.sum(), inputs)]


@torch.no_grad()
def acting(config: Any, episodes: Any, device: torch.device) -> list[Tensor]:
    """Logits of a few steps from the cache, steered by nothing."""
    model, states, cache, logits = build_model(config).to(device), episodes.states.to(device), None, []
    assert isinstance(model, Transformer)
    for t in range(4):
        step, cache = model.step(states[:, t : t + 1], cache=cache)
        logits.append(step)
    return logits


def shortest_paths(config: Any, device: torch.device) -> list[Tensor]:
    """Distances to every color on the same layouts."""
    drawn = sample_layouts(config.domain.grid, 64, torch.Generator().manual_seed(3))
    layouts = Layouts(drawn.objects.to(device), drawn.agent.to(device))
    colors = torch.arange(config.domain.num_colors, device=device).expand(64, -1)
    return [distance_fields(config.domain.grid, layouts.objects, colors)]


def waits_in_a_step(device: torch.device, preset: str) -> dict[str, str]:
    """Whether a step of pretraining and of discovery waits for the device; "not measured" without CUDA."""
    if device.type != "cuda":
        return dict.fromkeys(("pretraining", "discovery"), "not measured")
    config, found = preset_of(preset), {}
    model, steering = build_model(config).to(device), build_meta_controller(config).to(device)
    batch = demonstrations(domain_of(config.domain), "discover")(64, torch.Generator(device).manual_seed(0))

    def pretraining_step() -> None:
        losses = model.behavior_cloning_loss(batch.states, batch.actions, batch.lengths, checked=True)
        losses.action.backward()

    def discovery_step() -> None:
        losses, output = steered_losses(steering, model, batch.states, batch.actions, batch.lengths)
        (losses.action + kl_loss(output)).backward()

    for name, step in (("pretraining", pretraining_step), ("discovery", discovery_step)):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
            found[name] = "no"
        except RuntimeError as error:
            found[name] = f"yes: {error}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


def go_on(run: Path, preset: str, device: torch.device, minutes: float) -> None:
    """Reproduces the preset for so long; it is ended then, and resumes from its last checkpoint next time."""
    command = [sys.executable, "-m", "metacontroller.cli", "reproduce", "--preset", preset, "--out", str(run)]
    process = subprocess.Popen([*command, "--resume", "--device", device.type])
    try:
        status = process.wait(timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        return
    if status:
        raise RuntimeError(f"`{' '.join(command)}` failed with status {status}.")


def run_state(run: Path) -> dict[str, Any]:
    """How far the run has come: steps and last metrics of each phase, and its summary once there is one."""
    phases = {}
    folder = RunFolder(run / "seed-0")
    for phase in PHASES:
        lines = folder.read_metrics(phase)
        phases[phase] = lines[-1] if lines else "not measured"
    return {"phases": phases, "summary": RunFolder(run).read_summary() or "not measured"}


def write_page(out: Path, device: str, results: dict[str, Any]) -> None:
    """README.md: what was measured, and what was not."""
    lines = ["# On a GPU", "", f"Device: {device}. Written by `make gpu`.", "", "## Parity with the CPU, float32", ""]
    if results["parity"] is None:
        lines.append("not measured")
    else:
        lines += ["| compared | largest relative difference |", "|---|---|"]
        lines += [f"| {name} | {value:.1e} |" for name, value in results["parity"].items()]
        lines += [
            "",
            "A step waits for the device: " + ", ".join(f"{k} {v}" for k, v in results["waits"].items()) + ".",
        ]
    lines += ["", "## Roofline", ""]
    if results["roofline"] is None:
        lines.append("not measured")
    else:
        lines += ["| part | ms | limit, ms | rate |", "|---|---|---|---|"]
        for row in results["roofline"]["rows"]:
            limit, milliseconds = 1e3 * row["limit_seconds"], 1e3 * row["seconds"]
            lines.append(f"| {row['name'].strip()} | {milliseconds:.2f} | {limit:.2f} | {row['rate']} |")
    lines += ["", "## The paper's preset", ""]
    if results["run"] is None:
        lines.append("not measured")
    else:
        lines += ["| phase | step | last metrics |", "|---|---|---|"]
        for phase, line in results["run"]["phases"].items():
            if isinstance(line, str):
                lines.append(f"| {phase} | {line} | |")
            else:
                shown = {name: value for name, value in line.items() if name not in ("phase", "step")}
                lines.append(f"| {phase} | {line['step']} | {json.dumps(shown)} |")
    (out / "README.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--minutes", type=float, default=8.0, help="for the run; 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=7, help="of the roofline; 0 leaves it out")
    parser.add_argument("--run", type=Path, default=Path("runs/gpu-paper"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu"))
    arguments = parser.parse_args()
    device, out = arguments.device, arguments.out
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"parity": None, "waits": None, "roofline": None, "run": None}
    if device.type == "cuda" and not torch.cuda.is_available():
        write_page(out, "none: nothing was measured", results)
        print(f"No CUDA device: {out / 'README.md'} says 'not measured'.", file=sys.stderr)
        return 0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    results["parity"] = parity(device, arguments.preset)
    results["waits"] = waits_in_a_step(device, arguments.preset)
    facts = environment_facts()
    (out / "parity.json").write_text(
        json.dumps({"device": name, **facts, "parity": results["parity"], "waits": results["waits"]}, indent=2) + "\n"
    )
    far = [compared for compared, value in results["parity"].items() if not value <= TOLERANCE]
    if arguments.repeats:
        ceilings, rows = measure(device, arguments.repeats)
        show(rows, ceilings, name)
        results["roofline"] = report(device, torch.get_num_threads(), ceilings, rows)
        (out / "roofline.json").write_text(json.dumps(results["roofline"], indent=2) + "\n")
    if arguments.minutes:
        go_on(arguments.run, arguments.preset, device, arguments.minutes)
        results["run"] = run_state(arguments.run)
        (out / "run.json").write_text(json.dumps(results["run"], indent=2) + "\n")
    write_page(out, name, results)
    if far:
        print(f"CPU and {name} differ by more than {TOLERANCE} in: {', '.join(far)}.", file=sys.stderr)
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
