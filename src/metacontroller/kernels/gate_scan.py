"""The switching gate, the only computation of the metacontroller that must run step by step.

Axis letters: B batch, T time, K hidden units of the switching unit, Z code.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metacontroller.errors import UserError
from metacontroller.kernels.gate_scan_cpu import InPlaceScan
from metacontroller.kernels.gate_scan_reference import GateOptions, GateOutput, gate_from_beta, gate_scan_reference

__all__ = ["BACKENDS", "GateOutput", "gate_scan"]

BACKENDS = ("auto", "reference", "cpu", "triton")


def gate_scan(
    drive: Float[Tensor, "batch time hidden"],
    z_tilde: Float[Tensor, "batch time code"],
    w_code: Float[Tensor, "hidden code"],
    w_out: Float[Tensor, " hidden"],
    b_out: Float[Tensor, ""],
    *,
    fresh: Bool[Tensor, "batch time"],
    z_initial: Float[Tensor, "batch code"] | None = None,
    noise: Float[Tensor, "batch time"] | None = None,
    temperature: float = 1.0,
    threshold: float | None = None,
    straight_through: bool = False,
    backend: str = "auto",
) -> GateOutput:
    """Run the switching unit and the temporal integration over time (paper eq. 16, 17).

    For t = 1..T, with z_0 = `z_initial`::

        hidden_t = relu(drive_t + w_code @ z_{t-1})
        beta_t   = sigmoid((w_out @ hidden_t + b_out + noise_t) / temperature), or 1 where fresh_t
        gate_t   = beta_t, or 1 if beta_t >= threshold else 0
        z_t      = gate_t * z_tilde_t + (1 - gate_t) * z_{t-1}

    drive: the part of the switching unit's hidden layer that does not depend on z, with its bias.
    z_tilde: proposed codes.
    w_code, w_out, b_out: the switching unit's weights from z to hidden, and from hidden to the logit.
    fresh: True at the first step of an episode, which takes the proposal whatever the logit.
    z_initial: code held before the first step; zeros if None.
    noise: added to the logit; logistic noise gives the Gumbel-sigmoid relaxation. It receives no gradient.
    temperature: divides the logit, > 0.
    threshold: None for a soft gate; in [0, 1] for a hard one.
    straight_through: the hard gate passes its gradient on to beta; otherwise it has none.
    backend: "reference" (plain loop), "cpu" (in-place loop with its own backward, for any device), "triton"
        (CUDA) or "auto" (the fastest at hand).

    Returns `GateOutput(z, gate, beta)`, each of T entries; gradients may arrive through all three. Works in float32 or
    float64; half precision is cast to float32, also under autocast. UserError for shapes, dtypes, devices or settings
    that do not fit.
    """
    z_initial = z_tilde.new_zeros(z_tilde.shape[0], z_tilde.shape[-1]) if z_initial is None else z_initial
    inputs = map(_full_precision, (drive, z_tilde, w_code, w_out, b_out, z_initial))
    drive, z_tilde, w_code, w_out, b_out, z_initial = inputs
    noise = None if noise is None else _full_precision(noise.detach())
    options = GateOptions(temperature, threshold, straight_through)
    given = {"z_tilde": z_tilde, "w_code": w_code, "w_out": w_out, "b_out": b_out, "z_initial": z_initial}
    _check_tensors(drive, z_tilde, {**given, "fresh": fresh, **({} if noise is None else {"noise": noise})})
    _check_options(options)
    backend = _choose_backend(backend, drive.device)
    with torch.autocast(drive.device.type, enabled=False):
        if backend == "reference":
            return gate_scan_reference(drive, z_tilde, w_code, w_out, b_out, fresh, z_initial, noise, options)
        # bias, noise, temperature and forced switches are combined into one offset per step, outside the scan
        logit_offset = b_out.expand(fresh.shape) if noise is None else b_out + noise
        offset = (logit_offset / temperature).masked_fill(fresh, float("inf"))
        scan: Any = _triton_scan() if backend == "triton" else InPlaceScan
        z, beta = scan.apply(drive, z_tilde, w_code, w_out / temperature, offset, z_initial, options)
        return GateOutput(z, gate_from_beta(beta, options), beta)


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _triton_scan() -> Any:
    from metacontroller.kernels.gate_scan_triton import TritonScan  # Triton is only needed on a GPU

    return TritonScan


def _choose_backend(backend: str, device: torch.device) -> str:
    """Resolve "auto"; UserError for unknown names, and for Triton where it cannot run."""
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r} is unknown: use one of {', '.join(BACKENDS)}.")
    has_triton = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        return "triton" if device.type == "cuda" and has_triton else "cpu"
    if backend == "triton" and not has_triton:
        raise UserError("backend='triton' needs the package triton, which is not installed: use backend='auto'.")
    if backend == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"backend='triton' needs CUDA tensors but drive is on {device}: use backend='auto'.")
    return backend


def _check_tensors(drive: Tensor, z_tilde: Tensor, others: dict[str, Tensor]) -> None:
    """UserError naming the first tensor whose shape, dtype or device does not fit drive (B, T, K)."""
    for name, tensor, last in (("drive", drive, "hidden"), ("z_tilde", z_tilde, "code")):
        if tensor.ndim != 3 or 0 in tensor.shape:
            raise UserError(f"{name} has shape {tuple(tensor.shape)}: expected a non-empty (batch, time, {last}).")
    if drive.dtype not in (torch.float32, torch.float64):
        raise UserError(f"drive has dtype {drive.dtype}: expected a floating dtype, so cast it with .float().")
    (batch, time, hidden), code = drive.shape, z_tilde.shape[2]
    shapes = {"z_tilde": (batch, time, code), "w_code": (hidden, code), "w_out": (hidden,), "b_out": ()}
    shapes |= {"z_initial": (batch, code)}
    for name, tensor in others.items():
        shape, dtype = shapes.get(name, (batch, time)), torch.bool if name == "fresh" else drive.dtype
        if tensor.shape != shape:
            raise UserError(f"{name} has shape {tuple(tensor.shape)}: expected {shape} to fit drive and z_tilde.")
        if tensor.dtype != dtype:
            raise UserError(f"{name} has dtype {tensor.dtype}: expected {dtype}, so cast it with .to({dtype}).")
        if tensor.device != drive.device:
            raise UserError(f"{name} is on {tensor.device}: expected {drive.device} as for drive, so move it there.")


def _check_options(options: GateOptions) -> None:
    if not options.temperature > 0:
        raise UserError(f"temperature={options.temperature} is not allowed: it must be above 0.")
    if options.threshold is None and options.straight_through:
        raise UserError("straight_through=True with threshold=None is not allowed: set a threshold such as 0.5.")
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UserError(f"threshold={options.threshold} is not allowed: it must be in [0, 1], or None for a soft gate.")
