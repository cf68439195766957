"""What a metacontroller is made of (paper D.2), and the checks of what it reads.

Axes: b batch, t steps, n_e residual.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from metacontroller.control.codes import CodeKind, make_codes
from metacontroller.control.config import MetaControllerConfig
from metacontroller.control.controller import Controller
from metacontroller.control.policy import AbstractActionPolicy, PolicyKind
from metacontroller.control.sequence_embedder import EmbedderKind, SequenceEmbedder
from metacontroller.control.switching import GateConfig, SwitchingUnit
from metacontroller.errors import UserError
from metacontroller.models.other_keywords import explains_other_keywords
from metacontroller.models.precision import Precision
from metacontroller.ranges import NotNegative, Number, Positive, Width, check, check_options
from metacontroller.storage.module_file import Saveable
from metacontroller.tensors import check_tensor

RANGES = {
    "dim_model": Width,
    "dim_meta_controller": Width,
    "ratio_loss_weight": NotNegative,
    "target_segment_length": Number(1, above=True),
    "eps_clip": Positive,
}
"""Of the arguments that `MetaControllerConfig` does not have."""
OPTIONAL = {"code": "gaussian", "free_bits": 0.0, "decoder_depth": 1, "policy_std": 1.0, "action_temperature": 1.0}
"""Arguments that a file holds only where they are not these."""


class SteeringModules(Saveable, nn.Module):
    """The modules and settings of a `MetaController`, which explains the arguments; what computes with them are the
    functions of this package. UserError for values out of range.

    code_bound: codes are kept within it, see `codes.bounded`. switch_temperature: divides the gate's logit in every
    mode. hard_switch, straight_through, ratio_chunk, loss_weights: of module calls (`variants`, `compat`).
    """

    switch_temperature: float | None = None
    hard_switch: bool | None = None
    straight_through: bool = False
    code_bound: float | None = None
    ratio_chunk: int | None = None
    policy: Any
    sequence_embedder: Any
    encoder: Any

    @explains_other_keywords
    def __init__(
        self,
        dim_model: int,
        *,
        dim_meta_controller: int = 256,
        dim_latent: int = 128,
        code: CodeKind = "gaussian",
        free_bits: float = 0.0,
        dim_history: int | None = None,
        dim_sequence: int | None = None,
        encoder_hidden: int | None = None,
        decoder_hidden: int = 32,
        decoder_depth: int = 1,
        switch_hidden: int = 32,
        policy_hidden: int | None = None,
        policy_std: float = 1.0,
        action_temperature: float = 1.0,
        embedder_dim: int | None = None,
        embedder_depth: int = 1,
        embedder_kind: EmbedderKind = "attention",
        policy_kind: PolicyKind = "gru",
        rank: int | None = 16,
        gate: GateConfig | dict[str, Any] | None = None,
        ratio_loss_weight: float = 0.0,
        target_segment_length: float = 4.0,
        eps_clip: float = 0.2,
        precision: Precision = "float32",
    ) -> None:
        given = dict(locals())
        super().__init__()
        self.remember_arguments(given, OPTIONAL)
        config = _checked(given)
        codes = make_codes(code, dim_latent, free_bits)
        n_h, n_s, n_z, hidden = config.dim_history, config.dim_sequence, codes.dim, config.encoder_hidden
        self.codes, self.gate_config = codes, config.gate
        self.precision: Precision = precision
        self.dim_model, self.dim_latent, self.dim_history = dim_model, n_z, n_h
        self.ratio_loss_weight, self.target_segment_length = ratio_loss_weight, target_segment_length
        self.eps_clip, self.action_temperature = eps_clip, action_temperature
        self.loss_weights: Any = None

        self.norm = nn.LayerNorm(dim_model)
        self.history = nn.GRU(dim_model, n_h, batch_first=True)
        embedder: dict[str, Any] = {"dim": config.embedder_dim, "depth": embedder_depth, "kind": embedder_kind}
        self.sequence_embedder = SequenceEmbedder(dim_model, n_s, **embedder)
        self.encoder = nn.Sequential(
            nn.Linear(dim_model + n_h + n_s, hidden), nn.ReLU(), nn.Linear(hidden, codes.params)
        )
        self.switching = SwitchingUnit(dim_model, n_h, n_z, hidden=switch_hidden, config=config.gate)
        self.controller = Controller(n_z, dim_model, hidden=decoder_hidden, rank=rank, depth=decoder_depth)
        policy: dict[str, Any] = {"hidden": config.policy_hidden, "kind": policy_kind, "params": codes.params}
        self.policy = AbstractActionPolicy(dim_model, n_z, **policy)
        with torch.no_grad():
            self.policy.readout.bias.copy_(codes.start(policy_std))

    def in_weight_dtype(self, residual: Tensor) -> Tensor:
        """A residual in the type of the metacontroller's weights, whatever that of the model is."""
        return residual.to(self.norm.weight.dtype)

    def check_residual(self, residual: Tensor) -> None:
        """UserError unless a residual is (b, t, n_e), floating point and not empty."""
        check_tensor("the residual stream", residual)
        if not residual.is_floating_point():
            raise UserError(f"the residual stream has dtype {residual.dtype}; expected a floating-point one.")
        if residual.dim() != 3 or residual.shape[-1] != self.dim_model or 0 in residual.shape:
            raise UserError(
                f"the residual stream has shape {tuple(residual.shape)}; expected (batch, time, {self.dim_model}) "
                "with at least one episode and one step."
            )


def _checked(given: dict[str, Any]) -> MetaControllerConfig:
    """The constructor's arguments as a config, widths that are None as wide as dim_meta_controller."""
    for name, allowed in RANGES.items():
        check(name, given[name], allowed)
    gate = given["gate"] or {}
    if not isinstance(gate, GateConfig):
        check_options("gate", gate, GateConfig)
        gate = GateConfig(**gate)
    chosen: dict[str, Any] = {field.name: given[field.name] for field in fields(MetaControllerConfig)} | {"gate": gate}
    wide = {name: given["dim_meta_controller"] for name, value in chosen.items() if value is None and name != "rank"}
    return MetaControllerConfig(**(chosen | wide))
