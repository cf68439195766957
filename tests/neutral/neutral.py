"""Did a change that should change nothing change a number? `make neutral` trains short runs and compares them.

Three phases of each preset, with at most 200 updates a phase, on one thread. Of each phase it keeps the SHA-256 of its
losses and of its weights. --write notes them; --against compares with what was noted, names what differs and exits
with status 1. Both must run on one machine: other hardware rounds otherwise.

    python tests/neutral/neutral.py [--presets debug laptop ant-debug babyai-debug] (--write FILE | --against FILE)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from metacontroller.presets import preset
from metacontroller.recipes.config import ExperimentConfig
from metacontroller.recipes.run_phase import PHASES, run_phase

PRESETS = ("debug", "laptop", "ant-debug", "babyai-debug")
UPDATES = 200
"""Of each phase at most."""
OF_TIME = ("seconds", "per_second", "time", "step_seconds")
"""Parts of the names of metrics that say how long something took."""


def shortened(config: ExperimentConfig) -> ExperimentConfig:
    """The same experiment with at most `UPDATES` updates a phase, and two batches of reinforcement learning."""

    def short(phase: Any) -> Any:
        steps = min(UPDATES, phase.optimizer.steps)
        return replace(phase, optimizer=replace(phase.optimizer, steps=steps, decay_steps=0))

    if config.pretrain.optimizer.steps > UPDATES:
        config = replace(config, pretrain=short(config.pretrain), discover=short(config.discover))
    learning = {name: getattr(config, name) for name in ("internal_rl", "raw_action_rl")}
    return replace(config, **{k: replace(v, episodes=min(v.episodes, 2 * v.batch_size)) for k, v in learning.items()})


def digests(name: str, folder: Path) -> dict[str, str]:
    """Trains a preset in a folder: the SHA-256 of each phase's metrics and of each file of weights."""
    for phase in PHASES:
        run_phase(phase, shortened(preset(name)), folder, quiet=True, device="cpu")
    found: dict[str, Any] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        row = {key: value for key, value in row.items() if not any(part in key for part in OF_TIME)}
        found.setdefault(f"{name}: losses of {row.get('phase')}", hashlib.sha256()).update(json.dumps(row).encode())
    for path in sorted(folder.glob("*.safetensors")):
        weights = found.setdefault(f"{name}: {path.name}", hashlib.sha256())
        for key, tensor in sorted(load_file(path).items()):
            weights.update(key.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return {key: value.hexdigest() for key, value in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="*", default=PRESETS, help="which to train")
    parser.add_argument("--write", type=Path, help="note the digests in this file")
    parser.add_argument("--against", type=Path, help="compare with the digests in this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    noted = {} if options.against is None else json.loads(options.against.read_text(encoding="utf-8"))
    written: dict[str, str] = {}
    for name in options.presets:
        with tempfile.TemporaryDirectory(prefix="neutral-") as folder:
            os.chdir(folder)  # where worlds keep their demonstrations
            found = digests(name, Path(folder) / "run")
        for key, value in found.items():
            same = not noted or noted.get(key) == value
            print(f"{'as before' if noted and same else 'noted' if same else 'DIFFERS'}  {key}", flush=True)
        written |= found
    if options.write is not None:
        options.write.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return int(bool(noted) and any(noted.get(key) != value for key, value in written.items()))


if __name__ == "__main__":
    sys.exit(main())
