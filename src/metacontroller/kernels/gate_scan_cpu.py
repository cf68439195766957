"""The switching gate as an in-place loop with its own backward pass.

It uses torch operations only, so it needs no compiler and runs on any device; it is meant for the CPU. Everything that
does not depend on the previous step is computed outside both loops, which leaves three operations per step forward and
five backward.

Axis letters: B batch, T time, K hidden units of the switching unit, Z code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metacontroller.kernels.gate_scan_reference import GateOptions, gate_from_beta


class InPlaceScan(torch.autograd.Function):
    """z (B, T, Z) and beta (B, T) for logit_t = w_out @ hidden_t + offset_t, where offset has shape (B, T).

    The temperature is already in `w_out` and `offset`; an infinite offset makes beta exactly 1 with no gradient.
    """

    @staticmethod
    def forward(ctx, drive, z_tilde, w_code, w_out, offset, z_initial, options) -> tuple[Tensor, Tensor]:
        batch, time, code_width = z_tilde.shape
        hidden = drive.clone(memory_format=torch.contiguous_format)
        beta = offset.T.clone(memory_format=torch.contiguous_format)  # (T, B)
        z = z_tilde.new_empty(time + 1, batch, code_width)  # z[t] is the code before step t
        z[0] = z_initial
        w_code_transposed = w_code.T.contiguous()
        for t in range(time):
            hidden_t = hidden[:, t].addmm_(z[t], w_code_transposed).relu_()
            beta_t = beta[t].addmv_(hidden_t, w_out).sigmoid_()
            torch.lerp(z[t], z_tilde[:, t], gate_from_beta(beta_t, options)[:, None], out=z[t + 1])
        ctx.save_for_backward(z_tilde, w_code, w_out, hidden, beta, z)
        ctx.options = options
        return z[1:].transpose(0, 1).contiguous(), beta.T.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_z: Tensor, grad_beta: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_z.device.type, enabled=False):
            return *_backward(ctx.saved_tensors, ctx.options, grad_z, grad_beta), None


def _backward(saved: tuple[Tensor, ...], options: GateOptions, grad_z: Tensor, grad_beta: Tensor) -> tuple[Tensor, ...]:
    """Gradients of drive, z_tilde, w_code, w_out, offset and z_initial.

    With G_t the whole gradient of z_t and p_t = d logit_t / d z_{t-1}, going back one step is
    grad_logit_t = beta'_t (grad_beta_t + G_t · (z_tilde_t - z_{t-1})) and
    G_{t-1} = grad_z_{t-1} + (1 - gate_t) G_t + grad_logit_t p_t.
    """
    z_tilde, w_code, w_out, hidden, beta, z = saved
    batch, time, width = hidden.shape
    z_before = z[:-1]
    gate = gate_from_beta(beta, options)[..., None]  # (T, B, 1)
    hold = 1 - gate
    slope = beta * (1 - beta)  # beta', (T, B)
    active_w_out = hidden.sign().mul_(w_out)  # d logit / d hidden before the relu, (B, T, K)
    logit_slope = active_w_out @ w_code  # p, (B, T, Z)
    grad_logit = slope * grad_beta.T  # (T, B)
    gate_learns = options.threshold is None or options.straight_through
    pull = (z_tilde.transpose(0, 1) - z_before).mul_(slope[..., None])  # d z_t / d logit_t, (T, B, Z)
    total = grad_z.transpose(0, 1).clone(memory_format=torch.contiguous_format)  # G, filled from the last step
    carry = torch.zeros_like(z[0])
    for t in range(time - 1, -1, -1):
        total_t = total[t].add_(carry)
        if gate_learns:
            grad_logit[t].add_((total_t * pull[t]).sum(-1))
        torch.mul(total_t, hold[t], out=carry).addcmul_(grad_logit[t][:, None], logit_slope[:, t])
    grad_offset = grad_logit.T.contiguous()
    grad_drive = active_w_out.mul_(grad_offset[..., None])
    grad_w_code = grad_drive.view(-1, width).T @ z_before.transpose(0, 1).reshape(batch * time, -1)
    grad_w_out = grad_offset.view(-1) @ hidden.view(-1, width)
    return grad_drive, (total * gate).transpose(0, 1), grad_w_code, grad_w_out, grad_offset, carry
