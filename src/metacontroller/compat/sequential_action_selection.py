"""The other library's switching recurrence, a GRU unit, step by step; ours is `kernels.gate_scan`. JAX is not used."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metacontroller.errors import UserError
from metacontroller.variants.switches import gru_gate

HAS_JAX = False


class SequentialActionSelectionOutput(NamedTuple):
    """switch_beta (b, t), gated_action (b, t, n_z), next_switching_unit_gru_hidden (1, b, h)."""

    switch_beta: Tensor
    gated_action: Tensor
    next_switching_unit_gru_hidden: Tensor


def perform_sequential_action_selection(
    gru: nn.GRU,
    to_beta: nn.Linear,
    residual_stream: Tensor,
    meta_embeddings: Tensor,
    sampled_latent_actions: Tensor,
    hidden_init: Tensor | None,
    latent_init: Tensor,
    switch_temperature: float,
    hard_switch: bool,
    hard_switch_straight_through: bool = False,
    is_first_step: bool = True,
) -> SequentialActionSelectionOutput:
    """See `variants.switches`; hidden_init (1, b, h), latent_init (b, 1, n_z)."""
    inputs = torch.cat([residual_stream, meta_embeddings], -1)
    hidden = None if hidden_init is None else hidden_init[0]
    options = switch_temperature, hard_switch, hard_switch_straight_through, is_first_step
    beta, z, hidden = gru_gate(gru, to_beta, inputs, sampled_latent_actions, hidden, latent_init[:, 0], *options)
    return SequentialActionSelectionOutput(beta, z, hidden[None])


pytorch_sequential_action_selection = perform_sequential_action_selection


def torch_jax_sequential_selection(*arguments: Any, **options: Any) -> SequentialActionSelectionOutput:
    """UserError: there is no JAX here."""
    raise UserError("torch_jax_sequential_selection needs JAX, which is not used here; HAS_JAX is False.")
