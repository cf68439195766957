"""The elementwise linear recurrence h_t = a_t h_{t-1} + x_t of recurrent blocks with linear state.

Axis letters: B batch, T time, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metacontroller.errors import UserError

BACKENDS = ("auto", "reference", "loop", "parallel")


def linear_scan(decay: Tensor, drive: Tensor, initial: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """h_t = decay_t * h_{t-1} + drive_t for t = 1..T, with h_0 = ``initial`` (zeros if None).

    decay, drive (B, T, D), initial (B, D), all of one floating dtype; returns h (B, T, D). B may be 0, as where
    no row of a batch takes a new code.
    backend: "reference" (plain loop), "loop" (one in-place operation per step, best where launches are cheap),
    "parallel" (pairs of steps are merged recursively: about 2 log2 T operations, O(T) work) or "auto" ("loop" on a CPU,
    else "parallel"). "loop" and "parallel" have their own backward pass, the same recurrence backwards in time.

    UserError for shapes or a backend that do not fit.
    """
    if decay.ndim != 3 or decay.shape != drive.shape or 0 in decay.shape[1:]:
        raise UserError(
            f"decay has shape {tuple(decay.shape)} and drive {tuple(drive.shape)}: expected the same "
            "(batch, time, channels) for both, with at least one step and channel."
        )
    if initial is None:
        initial = torch.zeros_like(drive[:, 0])
    if initial.shape != drive[:, 0].shape:
        raise UserError(f"initial has shape {tuple(initial.shape)}: expected {tuple(drive[:, 0].shape)}.")
    if backend == "auto":
        backend = "loop" if drive.device.type == "cpu" else "parallel"
    if backend == "reference":
        return linear_scan_reference(decay, drive, initial)
    if backend not in _SCANS:
        raise UserError(f"backend={backend!r} is unknown: use one of {', '.join(BACKENDS)}.")
    return _LinearScan.apply(decay, drive, initial, backend)  # pyright: ignore[reportReturnType]


def linear_scan_reference(decay: Tensor, drive: Tensor, initial: Tensor) -> Tensor:
    """The recurrence step by step: slow and simple; the fast backends are tested on it."""
    state, states = initial, []
    for t in range(drive.shape[1]):
        state = decay[:, t] * state + drive[:, t]
        states.append(state)
    return torch.stack(states, dim=1)


def _loop(decay: Tensor, drive: Tensor) -> Tensor:
    states = drive.clone(memory_format=torch.contiguous_format)
    for t in range(1, drive.shape[1]):
        states[:, t].addcmul_(decay[:, t], states[:, t - 1])
    return states


def _parallel(decay: Tensor, drive: Tensor) -> Tensor:
    """Solves a recurrence half as long, h_2k = (a_2k a_2k-1) h_2k-2 + (a_2k x_2k-1 + x_2k), then adds the odd steps."""
    steps = drive.shape[1]
    if steps == 1:
        return drive
    first, second, third = slice(0, steps - 1, 2), slice(1, steps, 2), slice(2, steps, 2)
    merged = _parallel(
        decay[:, second] * decay[:, first], torch.addcmul(drive[:, second], decay[:, second], drive[:, first])
    )
    states = torch.empty_like(drive, memory_format=torch.contiguous_format)
    states[:, 0] = drive[:, 0]
    states[:, second] = merged
    states[:, third] = torch.addcmul(drive[:, third], decay[:, third], merged[:, : (steps - 1) // 2])
    return states


_SCANS = {"loop": _loop, "parallel": _parallel}


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, decay: Tensor, drive: Tensor, initial: Tensor, backend: str) -> Tensor:
        drive = drive.clone(memory_format=torch.contiguous_format)
        drive[:, 0].addcmul_(decay[:, 0], initial)
        states = _SCANS[backend](decay, drive)
        ctx.save_for_backward(decay, initial, states)
        ctx.backend = backend
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_states: Tensor) -> tuple[Tensor | None, ...]:
        """G_t = grad_t + a_{t+1} G_{t+1} is the whole gradient of h_t, and so of x_t; a_t gets G_t h_{t-1}."""
        decay, initial, states = ctx.saved_tensors
        following = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], 1)
        total = _SCANS[ctx.backend](following.flip(1), grad_states.flip(1)).flip(1)
        before = torch.cat([initial[:, None], states[:, :-1]], 1)
        return total * before, total, decay[:, 0] * total[:, 0], None
