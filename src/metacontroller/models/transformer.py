"""The autoregressive action model: encoder -> lower body -> [steer here] -> upper body -> readouts (paper §1, D.1).

Axes: b batch, t steps, n_e residual. States may hold T or T + 1 entries for T actions; the last, if there, is only a
target of the state loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metacontroller.data.trajectories import check_tensor
from metacontroller.errors import UserError
from metacontroller.models.attention import AttentionBody, AttentionCache
from metacontroller.models.cache_store import ModelStore, check_unused, make_body_store
from metacontroller.models.encoders import make_encoder
from metacontroller.models.hawk import HawkBody, HawkCache
from metacontroller.models.other_keywords import own_keywords, refuse_keyword
from metacontroller.models.precision import Precision, check_precision, products
from metacontroller.models.protocol import BehaviorCloningLosses, DiscoveryLosses, SteerableModel
from metacontroller.models.readouts import make_readout
from metacontroller.ranges import COUNT, MOST_WIDTH, WIDTH, Whole, check_number, check_options, shown

OTHER_OPTIONS = {"attn_dim_head", "ff_mult", "polar_pos_emb", "rotary_pos_emb", "use_rmsnorm"}
"""Options of bodies in metacontroller-pytorch."""

Body = AttentionBody | HawkBody
BodyCache = AttentionCache | HawkCache


class PreviousHiddens(NamedTuple):
    """State after a step: the caches of the two bodies and the metacontroller's output, if one acted."""

    lower_body: BodyCache
    upper_body: BodyCache
    meta_controller: Any


class TransformerOutput(NamedTuple):
    """Cache after a step: residual (b, 1, n_e) before steering, ``prev_hiddens``, and the number of steps so far."""

    residual: Tensor
    prev_hiddens: PreviousHiddens
    steps: int


@dataclass
class ModelCache:
    """The caches of both bodies, as the phases use them."""

    lower: BodyCache
    upper: BodyCache

    def keep(self, rows: Tensor) -> None:
        """Keeps only the rows with indices ``rows``, int64 (m,), in place."""
        self.lower.keep(rows)
        self.upper.keep(rows)


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
    ``forward`` dispatches to them. They are built from ``embed``, ``lower``, ``upper`` and ``action_readout``.
    ``resplit`` moves the controlled layer. UserError for options that do not fit.
    """

    unsaved = ("meta_controller",)

    @own_keywords
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
        check_number("dim", dim, WIDTH)
        check_number("dim_condition", dim_condition, Whole(most=MOST_WIDTH, none=True))
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

    # building blocks

    def embed(self, states: Tensor, past_actions: Tensor | None = None) -> Tensor:
        """states (b, t, ...) -> first residual (b, t, n_e).

        past_actions (b, t - 1, ...) or (b, t, ...) precede the states one by one, aligned at the end; they are ignored
        if the model does not condition on actions.
        """
        x = self.encoder(states)
        if not self.condition_on_actions or past_actions is None or past_actions.shape[1] == 0:
            return x
        before = self.action_readout.embed(past_actions)
        return x + nn.functional.pad(before, (0, 0, x.shape[1] - before.shape[1], 0))

    def lower(self, x: Tensor, cache: BodyCache | None = None, condition: Tensor | None = None) -> Tensor:
        """First residual -> residual at the controlled layer, (b, t, n_e) each; condition (b, dim_condition)."""
        with products(self.precision, x):
            return self.lower_body(x, cache, condition=condition)

    def upper(self, residual: Tensor, cache: BodyCache | None = None, condition: Tensor | None = None) -> Tensor:
        """Residual at the controlled layer -> input of the readouts, (b, t, n_e) each; condition: as for ``lower``."""
        with products(self.precision, residual):
            return self.norm(self.upper_body(residual, cache, condition=condition))

    def empty_cache(self, batch: int, capacity: int = 32) -> ModelCache:
        """Empty caches for ``batch`` episodes that step together; capacity: steps before they have to grow."""
        return ModelCache(self.lower_body.empty_cache(batch, capacity), self.upper_body.empty_cache(batch, capacity))

    def cache_store(self, batch: int) -> ModelStore:
        """Caches of ``batch`` episodes that do not step together, before their first steps."""
        device = self.norm.weight.device
        lower, upper = (make_body_store(body, batch, device) for body in (self.lower_body, self.upper_body))
        return ModelStore(lower, upper)

    def limit_context(self, steps: int) -> None:
        check_number("context", steps, COUNT)
        self.arguments["context"] = steps
        for body in (self.lower_body, self.upper_body):
            if isinstance(body, AttentionBody):
                body.limit_context(steps)

    def resplit(self, lower_depth: int) -> None:
        """Moves the controlled layer, in place, to after block ``lower_depth`` of all; 0 is the input embedding.

        The outputs without steering do not change; earlier caches become invalid. UserError if the bodies differ.
        """
        blocks = [*self.lower_body.blocks, *self.upper_body.blocks]
        if Whole(0).expected(lower_depth) or lower_depth > len(blocks):
            raise UserError(f"lower_depth is {lower_depth}; expected 0..{len(blocks)}, the model's number of blocks.")
        sizes = [(type(body).__name__, body.sizes) for body in (self.lower_body, self.upper_body)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"lower_body is {sizes[0]} and upper_body {sizes[1]}; only bodies of one kind and the same sizes can "
                "exchange blocks."
            )
        self.lower_body.blocks = nn.ModuleList(blocks[:lower_depth])
        self.upper_body.blocks = nn.ModuleList(blocks[lower_depth:])
        for name, depth in (("lower_body", lower_depth), ("upper_body", len(blocks) - lower_depth)):
            self.arguments[name] = {**self.arguments[name], "depth": depth}

    @property
    def depth(self) -> int:
        """Number of blocks of both bodies."""
        return len(self.lower_body.blocks) + len(self.upper_body.blocks)

    def residuals(self, states: Tensor, actions: Tensor) -> list[Tensor]:
        """The residual at every layer, input embedding first: ``depth`` + 1 of (b, T, n_e); see `residual`."""
        x = self.embed(states[:, : actions.shape[1]], actions[:, :-1])
        layers = [x]
        for block in [*self.lower_body.blocks, *self.upper_body.blocks]:
            with products(self.precision, x):
                x = block(x)
            x = x[0] if isinstance(x, tuple) else x  # a recurrent block also returns its state
            layers.append(x)
        return layers

    # phase 3: acting

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
            hiddens = PreviousHiddens(empty.lower, empty.upper, None)
        else:
            hiddens = cache.prev_hiddens
        residual = self.lower(self.embed(states, past_actions), hiddens.lower_body)
        steered, output = residual, None
        if meta_controller is not None:
            if not hasattr(meta_controller, "act"):
                raise UserError(f"meta_controller is {shown(meta_controller)}; expected a MetaController.")
            state = None if hiddens.meta_controller is None else hiddens.meta_controller.state
            steered, output = meta_controller.act(residual, state, generator)
        logits = self.action_readout(self.upper(steered, hiddens.upper_body))
        after = PreviousHiddens(hiddens.lower_body, hiddens.upper_body, output)
        return logits, TransformerOutput(residual, after, 1 if cache is None else cache.steps + 1)

    def evolve(self, num_generations: int, environment: Callable[[Transformer], float], **options: Any) -> Any:
        """Trains the policy of ``self.meta_controller`` by evolution strategies, see its ``evolve_policy``."""
        if self.meta_controller is None:
            raise UserError("model.meta_controller is None; set it to the metacontroller whose policy is to evolve.")
        return self.meta_controller.evolve_policy(self, num_generations, environment, **options)

    # dispatch to the phases

    @own_keywords
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
            if meta_controller is None:
                raise UserError("meta_controller is missing; discovery_phase = True needs one.")
            if not hasattr(meta_controller, "discovery_loss"):
                raise UserError(f"meta_controller is {shown(meta_controller)}; expected a MetaController.")
            losses = meta_controller.discovery_loss(self, state, actions, episode_lens)
            return self.mean_over_entries(losses, state)
        return self.mean_over_entries(self.behavior_cloning_loss(state, actions, episode_lens), state)

    def check_step(self, states: Tensor, past_actions: Tensor | None, cache: TransformerOutput | None) -> None:
        """UserError for arguments that do not fit ``step``."""
        check_tensor("state", states)
        check_tensor("actions", past_actions, none=True)
        if states.dim() < 3 or states.shape[1] != 1 or 0 in states.shape:
            raise UserError(f"state has shape {tuple(states.shape)}; expected (batch, 1, ...): one step at a time.")
        self.encoder.check(states)
        if past_actions is not None:
            self.action_readout.check(past_actions, (len(states), 1))
        if cache is None:
            return
        if not isinstance(cache, TransformerOutput):
            raise UserError(f"cache is {shown(cache)}; expected what a step returned beside its logits.")
        for name in ("lower_body", "upper_body"):
            found, own = (getattr(getattr(of, name), "layout", None) for of in (cache.prev_hiddens, self))
            if own is not None and found != own:  # a body that somebody else has made may say nothing
                raise UserError(f"cache is of another model: its {name} is {found}; expected {own}.")
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
    kinds: dict[str, Callable[..., Body]] = {"attention": AttentionBody, "hawk": HawkBody}
    if not isinstance(arguments, dict):
        raise UserError(f"{name} is {shown(arguments)}; expected a dict, such as dict(depth = 2), or a body.")
    options = {key: value for key, value in arguments.items() if key != "kind"}
    kind = arguments.get("kind", "attention")
    if kind not in kinds:
        raise UserError(f"{name} has kind {kind!r}; expected one of {', '.join(map(repr, kinds))}.")
    for option in sorted(options.keys() & OTHER_OPTIONS):
        refuse_keyword(name, option)
    check_options(name, options, kinds[kind], given=("dim", "dim_condition"))
    if dim_condition is not None:
        options["dim_condition"] = dim_condition
    return kinds[kind](dim, **options)
