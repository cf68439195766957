"""Configurations of action models, by name. A config builds its model from a world's `DomainSpec`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, Literal

from metacontroller.errors import UserError
from metacontroller.models.precision import Precision
from metacontroller.models.readouts import MOST_MODES, MinStd
from metacontroller.models.transformer import Transformer
from metacontroller.ranges import Depth, DepthOr0, Whole, Width, check_fields

GROUP = "metacontroller.models"

MOST_WEIGHTS = 2**34


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A `Transformer`: a causal sequence model split at the controlled layer. UserError for values out of range."""

    name: ClassVar[str] = "transformer"
    Model: ClassVar[type[Transformer]] = Transformer

    dim: Width
    """n_e: width of the residual stream."""
    lower_depth: DepthOr0
    """Blocks below the controlled layer; with 0 that is the input embedding, l = 0."""
    upper_depth: Depth
    """Blocks above the controlled layer."""
    heads: Width
    """Heads of attention, or of Hawk's gates."""
    mlp_dim: Width
    """Hidden units of each block's MLP."""
    body: Literal["attention", "hawk"] = "attention"
    """Kind of blocks: attention, or Hawk as wide as the residual (the paper's SSM)."""
    action_modes: Annotated[int, Whole(1, MOST_MODES)] = 1
    """Gaussians in the mixture over continuous actions; 1, the paper's, cannot say 'to the left or to the right'."""
    min_action_std: MinStd | None = None
    """Lower limit of the deviation of continuous actions; none: that of `GaussianReadout`."""
    precision: Precision = "auto"
    """Of its matrix products; auto: bfloat16 where the device is faster in it."""

    def __post_init__(self) -> None:
        check_fields(self)
        blocks = self.lower_depth + self.upper_depth
        weights = blocks * self.dim * (4 * self.dim + 2 * self.mlp_dim)
        if weights > MOST_WEIGHTS:
            raise UserError(
                f"dim {self.dim}, mlp_dim {self.mlp_dim} and {blocks} blocks make about {weights:.1e} weights; "
                f"expected at most {MOST_WEIGHTS:.1e}, which take 64 GiB; lower one of them."
            )
        if self.dim % self.heads:
            raise UserError(f"dim {self.dim} is not a multiple of heads {self.heads}; change one of them.")

    def build(self, encoder: dict[str, Any], action: dict[str, Any]) -> Transformer:
        """A model with new weights. encoder, action: of a world's `DomainSpec`. UserError for a mixture of discrete
        actions."""
        options = {"modes": self.action_modes if self.action_modes > 1 else None, "min_std": self.min_action_std}
        more = {name: value for name, value in options.items() if value is not None}
        if more and "num_continuous" not in action:
            raise UserError(
                f"action_modes is {self.action_modes} and min_action_std {self.min_action_std}, but the world's "
                "actions are discrete; leave out both."
            )
        body = {"kind": self.body, "heads": self.heads, "mlp_dim": self.mlp_dim}
        return Transformer(
            self.dim,
            action_embed_readout={**action, **more},
            state_embed_readout=encoder,
            lower_body={"depth": self.lower_depth, **body},
            upper_body={"depth": self.upper_depth, **body},
            condition_on_actions=False,
            precision=self.precision,
        )


def model_config_class(name: str) -> type[Any]:
    """The config class of a model: ours, or that of an entry point of `GROUP`. UserError for an unknown name."""
    if name == ModelConfig.name:
        return ModelConfig
    for point in entry_points(group=GROUP, name=name):
        return point.load()
    known = [ModelConfig.name, *(point.name for point in entry_points(group=GROUP))]
    raise UserError(f"model {name!r} is unknown; known are {', '.join(known)}.")
