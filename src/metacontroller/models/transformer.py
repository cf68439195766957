"""The autoregressive action model: encoder -> lower body -> [steer here] -> upper body -> readouts (paper §1, D.1).

Axes: b batch, t steps, n_e residual. States may hold T or T + 1 entries for T actions; the last, if there, is only a
target of the state loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metacontroller.errors import UserError
from metacontroller.models.attention import AttentionBody
from metacontroller.models.blocks import Body
from metacontroller.models.caches import ModelCache, ModelStore, check_unused
from metacontroller.models.encoders import make_encoder
from metacontroller.models.hawk import HawkBody
from metacontroller.models.other_keywords import explains_other_keywords, refuse_keyword
from metacontroller.models.precision import Precision, check_precision, products
from metacontroller.models.protocol import BehaviorCloningLosses, DiscoveryLosses, SteerableModel
from metacontroller.models.readouts import make_readout
from metacontroller.ranges import Count, Whole, Width, check, check_options, require
from metacontroller.tensors import check_tensor

BODIES: dict[str, type[Body]] = {"attention": AttentionBody, "hawk": HawkBody}
"""Kinds of bodies. A new one is a class and a line here."""

OTHER_OPTIONS = {"attn_dim_head", "ff_mult", "polar_pos_emb", "rotary_pos_emb", "use_rmsnorm"}
"""Options of bodies in metacontroller-pytorch."""


class PreviousHiddens(NamedTuple):
    """State after a step: the caches of the two bodies and the metacontroller's output, if one acted."""

    lower_body: Any
    upper_body: Any
    meta_controller: Any


class TransformerOutput(NamedTuple):
    """Cache after a step: residual (b, 1, n_e) before steering, ``prev_hiddens``, and the number of steps so far."""

    residual: Tensor
    prev_hiddens: PreviousHiddens
    steps: int


class Transformer(SteerableModel):
    """A causal sequence model of expert actions, split at the controlled layer.

    dim: n_e. action_embed_readout: dict(num_discrete=...), a list for several choices at once, or
    dict(num_continuous=...). state_embed_readout: dict(num_continuous=...) for vectors, dict(num_discrete=[...]) for
    choices, dict(tokens=dict(sizes=, condition=)) for categories with a condition, dict(image=[...]) for uint8 images,
    or dict(grid=dict(size=, num_colors=, num_walls=, view=)) for grid tokens. With dict(num_continuous=..., mean=[...],
    std=[...]) vectors and actions are normalized.
    lower_body, upper_body: dict(depth=, heads=, dim_head=, mlp_dim=) of attention, or
    dict(kind="hawk", depth=, width=, heads=, mlp_dim=), or a body made before; the residual between them is steered.
    condition_on_actions: whether the model also reads past actions; the paper's does not (D.1). dim_condition: width of
    a condition on which the norms of both bodies depend; ``lower`` and ``upper`` then need it.
    precision: of the matrix products in both bodies; the residual stream and all else stay in float32.
    context: steps that attention looks back over, the current one included, None for all; a model that learns from no
    more than so many steps at once acts by no more in longer episodes. Hawk carries its state over all steps.
    meta_controller: steers when a call gives no other; it is not saved with the model.

    The methods of the three phases are ``behavior_cloning_loss``, the metacontroller's ``discovery_loss`` and ``step``;
    ``forward`` dispatches to them. UserError for options that do not fit.
    """

    unsaved = ("meta_controller",)

    @explains_other_keywords
    def __init__(
        self,
        dim: int,
        *,
        action_embed_readout: dict[str, Any],
        state_embed_readout: dict[str, Any],
        lower_body: dict[str, Any] | nn.Module,
        upper_body: dict[str, Any] | nn.Module,
        condition_on_actions: bool = True,
        dim_condition: int | None = None,
        precision: Precision = "float32",
        context: int | None = None,
        meta_controller: Any = None,
    ) -> None:
        super().__init__()
        check_precision(precision)
        check("dim", dim, Width)
        check("dim_condition", dim_condition, Width | None)
        given = {name: value for name, value in locals().items() if name != "meta_controller"}
        self.remember_arguments(given, {"dim_condition": None, "context": None})
        self.dim, self.condition_on_actions = dim, condition_on_actions
        self.precision: Precision = precision
        self.action_readout = make_readout(dim, "action_embed_readout", action_embed_readout, embeds=True)
        self.encoder = make_encoder(dim, state_embed_readout)
        self.state_readout = self.encoder.state_readout(dim)
        self.lower_body = make_body(dim, "lower_body", lower_body, dim_condition)
        self.upper_body = make_body(dim, "upper_body", upper_body, dim_condition)
        self.norm = nn.LayerNorm(dim)
        self.meta_controller = meta_controller
        if context is not None:
            self.limit_context(context)

    @property
    def blocks(self) -> list[nn.Module]:
        """Those of both bodies, lowest first."""
        return [*self.lower_body.blocks, *self.upper_body.blocks]

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def embed(self, states: Tensor, past_actions: Tensor | None = None) -> Tensor:
        """As of `SteerableModel`; past_actions are ignored if the model does not condition on actions."""
        x = self.encoder(states)
        if not self.condition_on_actions or past_actions is None or past_actions.shape[1] == 0:
            return x
        before = self.action_readout.embed(past_actions)
        return x + nn.functional.pad(before, (0, 0, x.shape[1] - before.shape[1], 0))

    def lower(self, x: Tensor, cache: Any = None, condition: Tensor | None = None) -> Tensor:
        """As of `SteerableModel`; condition (b, dim_condition)."""
        with products(self.precision, x):
            return self.lower_body(x, cache, condition=condition)

    def upper(self, residual: Tensor, cache: Any = None, condition: Tensor | None = None) -> Tensor:
        """As of `SteerableModel`; condition (b, dim_condition)."""
        with products(self.precision, residual):
            return self.norm(self.upper_body(residual, cache, condition=condition))

    def empty_cache(self, batch: int, capacity: int = 32) -> ModelCache:
        return ModelCache(self.lower_body.empty_cache(batch, capacity), self.upper_body.empty_cache(batch, capacity))

    def cache_store(self, batch: int) -> ModelStore:
        device = self.norm.weight.device
        return ModelStore(self.lower_body.cache_store(batch, device), self.upper_body.cache_store(batch, device))

    def limit_context(self, steps: int) -> None:
        check("context", steps, Count)
        self.arguments["context"] = steps
        for body in (self.lower_body, self.upper_body):
            if isinstance(body, Body):
                body.limit_context(steps)

    def resplit(self, lower_depth: int) -> None:
        blocks = self.blocks
        fits = not Whole(0, len(blocks)).expected(lower_depth)
        require(fits, "lower_depth", lower_depth, f"0..{len(blocks)}, the model's number of blocks")
        lower, upper = ((type(body).__name__, body.sizes) for body in (self.lower_body, self.upper_body))
        if lower != upper:
            raise UserError(
                f"lower_body is {lower} and upper_body {upper}; only bodies of one kind and the same sizes can "
                "exchange blocks."
            )
        for name, part in (("lower_body", blocks[:lower_depth]), ("upper_body", blocks[lower_depth:])):
            getattr(self, name).blocks = nn.ModuleList(part)
            self.arguments[name] = {**self.arguments[name], "depth": len(part)}

    def residuals(self, states: Tensor, actions: Tensor) -> list[Tensor]:
        x = self.embed(states[:, : actions.shape[1]], actions[:, :-1])
        layers = [x]
        for block in self.blocks:
            with products(self.precision, x):
                x = block(x)
            x = x[0] if isinstance(x, tuple) else x  # a recurrent block also returns its state
            layers.append(x)
        return layers

    def step(
        self,
        states: Tensor,
        past_actions: Tensor | None = None,
        meta_controller: Any = None,
        cache: TransformerOutput | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, TransformerOutput]:
        """One step: states (b, 1, ...) -> parameters of the action distribution (b, 1, ...), cache for the next step.

        past_actions (b, 1, ...): the last ones. A cache can be used only once, because a step writes into its buffers.
        UserError for arguments that do not fit.
        """
        self.check_step(states, past_actions, cache)
        if cache is None:
            empty = self.empty_cache(len(states))
            lower, upper, before, steps = empty.lower, empty.upper, None, 0
        else:
            (lower, upper, before), steps = cache.prev_hiddens, cache.steps
        residual = self.lower(self.embed(states, past_actions), lower)
        steered, output = residual, None
        if meta_controller is not None:
            require(hasattr(meta_controller, "act"), "meta_controller", meta_controller, "a MetaController")
            steered, output = meta_controller.act(residual, None if before is None else before.state, generator)
        logits = self.action_readout(self.upper(steered, upper))
        return logits, TransformerOutput(residual, PreviousHiddens(lower, upper, output), steps + 1)

    def evolve(self, num_generations: int, environment: Callable[[Transformer], float], **options: Any) -> Any:
        """Trains the policy of ``self.meta_controller`` by evolution strategies, see its ``evolve_policy``."""
        if self.meta_controller is None:
            raise UserError("model.meta_controller is None; set it to the metacontroller whose policy is to evolve.")
        return self.meta_controller.evolve_policy(self, num_generations, environment, **options)

    @explains_other_keywords
    def forward(
        self,
        state: Tensor,
        actions: Tensor | None = None,
        *,
        meta_controller: Any = None,
        discovery_phase: bool = False,
        cache: TransformerOutput | None = None,
        return_cache: bool = False,
        episode_lens: Tensor | None = None,
    ) -> BehaviorCloningLosses | DiscoveryLosses | tuple[Tensor, TransformerOutput]:
        """Calls ``step`` if ``return_cache``, the metacontroller's ``discovery_loss`` if ``discovery_phase``, else
        ``behavior_cloning_loss``; the state loss of the latter two is here a mean over the state's entries, so that it
        can be added to the action's. UserError for arguments that are missing or do not go together."""
        meta_controller = self.meta_controller if meta_controller is None else meta_controller
        if return_cache:
            return self.step(state, actions, meta_controller, cache)
        if cache is not None:
            raise UserError("cache is given but return_cache is False; acting needs return_cache = True.")
        if actions is None:
            raise UserError("actions are missing; training needs them, and acting needs return_cache = True.")
        if discovery_phase:
            known = hasattr(meta_controller, "discovery_loss")
            require(known, "meta_controller", meta_controller, "a MetaController where discovery_phase = True")
            losses = meta_controller.discovery_loss(self, state, actions, episode_lens)
            return self.mean_over_entries(losses, state)
        return self.mean_over_entries(self.behavior_cloning_loss(state, actions, episode_lens), state)

    def check_step(self, states: Tensor, past_actions: Tensor | None, cache: TransformerOutput | None) -> None:
        """UserError for arguments that do not fit ``step``."""
        check_tensor("state", states, ("batch", 1, "entries", ...), what="one step at a time")
        check_tensor("actions", past_actions, none=True)
        self.encoder.check(states)
        if past_actions is not None:
            self.action_readout.check(past_actions, (len(states), 1))
        if cache is None:
            return
        require(isinstance(cache, TransformerOutput), "cache", cache, "what a step returned beside its logits")
        for name in ("lower_body", "upper_body"):
            actual, expected = (getattr(getattr(of, name), "layout", None) for of in (cache.prev_hiddens, self))
            if expected is not None and actual != expected:  # a body that somebody else has made may say nothing
                raise UserError(f"cache is of another model: its {name} is {actual}; expected {expected}.")
        check_unused(cache.prev_hiddens.lower_body, cache.steps)
        if len(cache.residual) != len(states):
            raise UserError(f"state has {len(states)} rows but the cache {len(cache.residual)}; expected as many.")
        if self.condition_on_actions and past_actions is None:
            raise UserError("actions are missing; this model is conditioned on them: give the last one of each row.")


def make_body(dim: int, name: str, arguments: dict[str, Any] | nn.Module, dim_condition: int | None = None) -> Body:
    """The stack of blocks for ``arguments``, dict(kind="attention" or "hawk", ...); attention by default.

    name: of the argument, for errors. A body that was made before is taken as it is. UserError for an unknown kind.
    """
    if isinstance(arguments, nn.Module):
        return arguments  # pyright: ignore[reportReturnType] - whatever has a body's methods
    require(isinstance(arguments, dict), name, arguments, "a dict, such as dict(depth = 2), or a body")
    options = {"kind": "attention", **arguments}
    kind = options.pop("kind")
    if kind not in BODIES:
        raise UserError(f"{name} has kind {kind!r}; expected one of {', '.join(map(repr, BODIES))}.")
    for option in sorted(options.keys() & OTHER_OPTIONS):
        refuse_keyword(name, option)
    check_options(name, options, BODIES[kind], given=("dim", "dim_condition"))
    return BODIES[kind](dim, **options, dim_condition=dim_condition)
