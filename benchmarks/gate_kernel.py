"""Time the switching gate, forward and backward: the plain loop against the path that `backend="auto"` takes.

python benchmarks/gate_kernel.py --repeats 30 --json gate_kernel.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from metacontroller.kernels.gate_scan import gate_scan

SIZES = ((1, 1), (128, 14), (128, 32), (512, 14), (512, 32), (512, 100))  # (batch, time)
HIDDEN, CODE = 32, 8  # n_h and n_z of the paper


def milliseconds(batch: int, steps: int, backend: str, repeats: int, device: torch.device) -> float:
    """Median time of one forward and backward in float32, soft gate, after two calls to warm up."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, steps, HIDDEN), (batch, steps, CODE), (HIDDEN, CODE), (HIDDEN,), ())
    inputs = [(0.3 * torch.randn(shape, generator=generator)).to(device).requires_grad_() for shape in shapes]
    fresh = (torch.arange(steps, device=device) == 0).expand(batch, steps)
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        output = gate_scan(*inputs, fresh=fresh, backend=backend)
        torch.autograd.grad(output.z.sum() + output.beta.sum(), inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    print(f"{'batch':>6} {'time':>5} {'reference ms':>13} {'auto ms':>9} {'ratio':>6}")
    for batch, steps in SIZES:
        reference, auto = (
            milliseconds(batch, steps, backend, arguments.repeats, arguments.device)
            for backend in ("reference", "auto")
        )
        rows.append({"batch": batch, "time": steps, "reference_ms": reference, "auto_ms": auto})
        print(f"{batch:>6} {steps:>5} {reference:>13.2f} {auto:>9.2f} {reference / auto:>6.1f}")
    if arguments.json:
        result = {
            "device": str(arguments.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
