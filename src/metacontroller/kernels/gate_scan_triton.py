"""The switching gate as two Triton kernels: each program runs a few rows of the batch through all time steps.

Importing this module needs Triton; `gate_scan` imports it on first use.

Axis letters: B batch, T time, K hidden units of the switching unit, Z code, R rows of one program.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.autograd.function import once_differentiable

from metacontroller.kernels.gate_scan_reference import GateOptions

ROWS = 4  # rows of the batch in one program


class TritonScan(torch.autograd.Function):
    """z (B, T, Z) and beta (B, T), as of `gate_scan_cpu.InPlaceScan`."""

    @staticmethod
    def forward(ctx, *inputs) -> tuple[Tensor, Tensor]:
        drive, z_tilde, w_code, w_out, offset, z_initial = (tensor.contiguous() for tensor in inputs[:-1])
        options: GateOptions = inputs[-1]
        z, beta = torch.empty_like(z_tilde), torch.empty_like(offset)
        programs, settings = _launch_settings(drive, z_tilde, options)
        with torch.cuda.device_of(drive):  # Triton launches on the current device, which may be another
            forward = _forward_kernel[(programs,)]  # pyright: ignore[reportIndexIssue]
            forward(drive, z_tilde, w_code, w_out, offset, z_initial, z, beta, **settings)
        ctx.save_for_backward(drive, z_tilde, w_code, w_out, z_initial, z, beta)
        ctx.options = options
        return z, beta

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_z: Tensor, grad_beta: Tensor) -> tuple[Tensor | None, ...]:
        drive, z_tilde, w_code, w_out, z_initial, z, beta = ctx.saved_tensors
        options: GateOptions = ctx.options
        programs, settings = _launch_settings(drive, z_tilde, options)
        grad_drive, grad_z_tilde = torch.empty_like(drive), torch.empty_like(z_tilde)
        grad_offset, grad_z_initial = torch.empty_like(beta), torch.empty_like(z_initial)
        # each program writes its own term of the weights' gradients, without atomics: so the sum is deterministic
        grad_w_code, grad_w_out = w_code.new_empty(programs, *w_code.shape), w_out.new_empty(programs, *w_out.shape)
        backward = _backward_kernel[(programs,)]  # pyright: ignore[reportIndexIssue]
        backward(
            *(drive, z_tilde, w_code, w_out, z_initial, z, beta, grad_z.contiguous(), grad_beta.contiguous()),
            *(grad_drive, grad_z_tilde, grad_w_code, grad_w_out, grad_offset, grad_z_initial),
            GATE_LEARNS=options.threshold is None or options.straight_through,
            **settings,
        )
        return grad_drive, grad_z_tilde, grad_w_code.sum(0), grad_w_out.sum(0), grad_offset, grad_z_initial, None


def _launch_settings(drive: Tensor, z_tilde: Tensor, options: GateOptions) -> tuple[int, dict[str, object]]:
    """Number of programs, and the settings that both kernels share."""
    batch, time, hidden = drive.shape
    code = z_tilde.shape[2]
    settings = {
        "batch": batch,
        "time": time,
        "HIDDEN": hidden,
        "CODE": code,
        "HIDDEN_BLOCK": triton.next_power_of_2(hidden),
        "CODE_BLOCK": triton.next_power_of_2(code),
        "THRESHOLD": options.threshold,
        "R": ROWS,
    }
    return triton.cdiv(batch, ROWS), settings


@triton.jit
def _places(
    batch,
    HIDDEN: tl.constexpr,
    CODE: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
    CODE_BLOCK: tl.constexpr,
    R: tl.constexpr,
):
    """Of this program: its rows, the hidden units, the axes of the code, and masks of rows, of rows and units, of rows
    and axes, and of units and axes."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    unit = tl.arange(0, HIDDEN_BLOCK)
    axis = tl.arange(0, CODE_BLOCK)
    has_row = row < batch
    has_unit = has_row[:, None] & (unit < HIDDEN)[None, :]
    has_axis = has_row[:, None] & (axis < CODE)[None, :]
    has_weight = (unit < HIDDEN)[:, None] & (axis < CODE)[None, :]
    return row, unit, axis, has_row, has_unit, has_axis, has_weight


@triton.jit
def _gate(beta, THRESHOLD: tl.constexpr):
    gate = beta
    if THRESHOLD is not None:
        gate = (beta >= THRESHOLD).to(beta.dtype)
    return gate


@triton.jit
def _forward_kernel(
    drive_ptr,
    z_tilde_ptr,
    w_code_ptr,
    w_out_ptr,
    offset_ptr,
    z_initial_ptr,
    z_ptr,
    beta_ptr,
    batch,
    time,
    HIDDEN: tl.constexpr,
    CODE: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
    CODE_BLOCK: tl.constexpr,
    THRESHOLD: tl.constexpr,
    R: tl.constexpr,
):
    row, unit, axis, has_row, has_unit, has_axis, has_weight = _places(batch, HIDDEN, CODE, HIDDEN_BLOCK, CODE_BLOCK, R)
    w_code = tl.load(w_code_ptr + unit[:, None] * CODE + axis[None, :], mask=has_weight, other=0.0)
    w_out = tl.load(w_out_ptr + unit, mask=unit < HIDDEN, other=0.0)
    z = tl.load(z_initial_ptr + row[:, None] * CODE + axis[None, :], mask=has_axis, other=0.0)
    for t in range(time):
        step = row * time + t
        drive = tl.load(drive_ptr + step[:, None] * HIDDEN + unit[None, :], mask=has_unit, other=0.0)
        z_tilde = tl.load(z_tilde_ptr + step[:, None] * CODE + axis[None, :], mask=has_axis, other=0.0)
        offset = tl.load(offset_ptr + step, mask=has_row, other=0.0)
        hidden = drive + tl.sum(w_code[None, :, :] * z[:, None, :], axis=2)
        hidden = tl.where(hidden < 0, 0.0, hidden)
        beta = 1 / (1 + tl.exp(-(tl.sum(hidden * w_out[None, :], axis=1) + offset)))
        gate = _gate(beta, THRESHOLD)
        z = gate[:, None] * z_tilde + (1 - gate[:, None]) * z
        tl.store(z_ptr + step[:, None] * CODE + axis[None, :], z, mask=has_axis)
        tl.store(beta_ptr + step, beta, mask=has_row)


@triton.jit
def _backward_kernel(
    drive_ptr,
    z_tilde_ptr,
    w_code_ptr,
    w_out_ptr,
    z_initial_ptr,
    z_ptr,
    beta_ptr,
    grad_z_ptr,
    grad_beta_ptr,
    grad_drive_ptr,
    grad_z_tilde_ptr,
    grad_w_code_ptr,
    grad_w_out_ptr,
    grad_offset_ptr,
    grad_z_initial_ptr,
    batch,
    time,
    HIDDEN: tl.constexpr,
    CODE: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
    CODE_BLOCK: tl.constexpr,
    THRESHOLD: tl.constexpr,
    R: tl.constexpr,
    GATE_LEARNS: tl.constexpr,
):
    row, unit, axis, has_row, has_unit, has_axis, has_weight = _places(batch, HIDDEN, CODE, HIDDEN_BLOCK, CODE_BLOCK, R)
    w_code = tl.load(w_code_ptr + unit[:, None] * CODE + axis[None, :], mask=has_weight, other=0.0)
    w_out = tl.load(w_out_ptr + unit, mask=unit < HIDDEN, other=0.0)
    z_initial = tl.load(z_initial_ptr + row[:, None] * CODE + axis[None, :], mask=has_axis, other=0.0)
    carry, grad_w_code, grad_w_out = tl.zeros_like(z_initial), tl.zeros_like(w_code), tl.zeros_like(w_out)
    for back in range(time):
        step = row * time + time - 1 - back
        drive = tl.load(drive_ptr + step[:, None] * HIDDEN + unit[None, :], mask=has_unit, other=0.0)
        z_tilde = tl.load(z_tilde_ptr + step[:, None] * CODE + axis[None, :], mask=has_axis, other=0.0)
        later = (step > row * time)[:, None]  # not the first step, so the code before it is in z
        before = tl.load(z_ptr + (step - 1)[:, None] * CODE + axis[None, :], mask=has_axis & later, other=0.0)
        z = tl.where(later, before, z_initial)
        beta = tl.load(beta_ptr + step, mask=has_row, other=0.0)
        grad_logit = tl.load(grad_beta_ptr + step, mask=has_row, other=0.0)
        total = carry + tl.load(grad_z_ptr + step[:, None] * CODE + axis[None, :], mask=has_axis, other=0.0)
        gate = _gate(beta, THRESHOLD)
        if GATE_LEARNS:
            grad_logit += tl.sum(total * (z_tilde - z), axis=1)
        grad_logit *= beta * (1 - beta)
        hidden = drive + tl.sum(w_code[None, :, :] * z[:, None, :], axis=2)  # recomputed: cheaper than storing it
        grad_hidden = tl.where(hidden > 0, grad_logit[:, None] * w_out[None, :], 0.0)
        grad_w_out += tl.sum(tl.where(hidden > 0, hidden, 0.0) * grad_logit[:, None], axis=0)
        grad_w_code += tl.sum(grad_hidden[:, :, None] * z[:, None, :], axis=0)
        carry = total * (1 - gate[:, None]) + tl.sum(grad_hidden[:, :, None] * w_code[None, :, :], axis=1)
        tl.store(grad_drive_ptr + step[:, None] * HIDDEN + unit[None, :], grad_hidden, mask=has_unit)
        tl.store(grad_z_tilde_ptr + step[:, None] * CODE + axis[None, :], total * gate[:, None], mask=has_axis)
        tl.store(grad_offset_ptr + step, grad_logit, mask=has_row)
    tl.store(grad_z_initial_ptr + row[:, None] * CODE + axis[None, :], carry, mask=has_axis)
    program = tl.program_id(0).to(tl.int64)
    tl.store(grad_w_out_ptr + program * HIDDEN + unit, grad_w_out, mask=unit < HIDDEN)
    weight = program * HIDDEN * CODE + unit[:, None] * CODE + axis[None, :]
    tl.store(grad_w_code_ptr + weight, grad_w_code, mask=has_weight)
