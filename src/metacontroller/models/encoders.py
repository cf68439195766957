"""State encoders: they map an observation to the first residual, and define the target of the state loss.

Axes: b batch, t steps, n model width. A grid's observation is given as tokens: the cell of each object, then the
agent's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.errors import UserError
from metacontroller.models.readouts import (
    CategoricalReadout,
    GaussianReadout,
    MultiCategoricalReadout,
    register_statistics,
)

NORMALIZED_LIMIT = 10.0
"""Of normalized entries of a vector: rare values of entries that hardly vary would drown all others."""


OBSERVATION_LIMIT = 1e9
"""Of entries of a vector that is not normalized: the squares of larger ones would overflow in the layers behind."""


class VectorEncoder(nn.Module):
    """A linear map of a vector observation, which is cast to the weights' floating-point type, within ±1e9.

    mean, std (dim_state,): statistics of the data, by which the vector is normalized first, within ±10 (our choice).
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self, dim_state: int, dim: int, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if dim_state < 1:
            raise UserError(f"num_continuous is {dim_state}; expected at least 1.")
        self.dim_state = dim_state
        self.statistics = {"mean": mean, "std": std}
        register_statistics(self, dim_state, mean, std)
        self.linear = nn.Linear(dim_state, dim)

    def forward(self, states: Tensor) -> Tensor:
        """states (b, t, dim_state) float -> (b, t, n)."""
        self._check_shape(states)
        states = states.to(self.linear.weight.dtype)
        if self.mean is not None and self.std is not None:
            return self.linear(((states - self.mean) / self.std).clamp(-NORMALIZED_LIMIT, NORMALIZED_LIMIT))
        return self.linear(states.clamp(-OBSERVATION_LIMIT, OBSERVATION_LIMIT))

    def state_readout(self, dim: int) -> GaussianReadout:
        """The readout that predicts the next observation from a residual of width ``dim``."""
        return GaussianReadout(dim, self.dim_state, mean=self.statistics["mean"], std=self.statistics["std"])

    def targets(self, states: Tensor) -> Tensor:
        """The targets of ``state_readout`` in states (b, t, dim_state): the states themselves, within ±1e9."""
        return states.clamp(-OBSERVATION_LIMIT, OBSERVATION_LIMIT)

    def from_observation(self, observation: Any) -> Tensor:
        """Converts one observation of an environment to one state, without batch and time axes."""
        return torch.as_tensor(observation, dtype=torch.float32)

    def check(self, states: Tensor) -> None:
        """UserError unless the states are finite floats of the right width; synchronizes with the device."""
        self._check_shape(states)
        if not bool(torch.isfinite(states).all()):
            raise UserError("state holds NaN or infinite values; clean the data before training.")

    def _check_shape(self, states: Tensor) -> None:
        if states.shape[-1] != self.dim_state or not states.is_floating_point():
            raise UserError(
                f"state has shape {tuple(states.shape)} and dtype {states.dtype}; "
                f"expected floating-point (..., {self.dim_state})."
            )


class GridEncoder(nn.Module):
    """A linear map of a one-hot grid observation, computed as a sum of embedding lookups.

    view "absolute": the paper's one-hot, which object is in which cell, and the agent's cell (§4).
    view "egocentric": only each object's displacement from the agent, one-hot (one table per color, one for all walls),
    like the relative positions that the paper's ant observes (§4); our choice for small models, which need not learn
    to subtract cells. Displacements saturate at ``reach`` cells along each axis (None: never), so that distant objects
    show only their direction; discovery then learns codes for colors sooner (docs/log.md, 24).

    UserError for values out of range.
    """

    offsets: Tensor
    displacements: Tensor

    def __init__(
        self,
        dim: int,
        *,
        size: int,
        num_colors: int,
        num_walls: int,
        view: Literal["absolute", "egocentric"] = "absolute",
        reach: int | None = None,
    ) -> None:
        super().__init__()
        if size < 2 or num_colors < 1 or num_walls < 0:
            raise UserError(
                f"the grid has size {size}, {num_colors} colors and {num_walls} walls; expected at least 2, 1 and 0."
            )
        if reach is not None and (view == "absolute" or reach < 1):
            raise UserError(
                f"reach is {reach} in the {view} view; expected None, or at least 1 in the egocentric view."
            )
        self.size, self.num_objects, self.view = size, num_colors + num_walls, view
        self.reach = size - 1 if reach is None else reach
        if view == "absolute":
            entries, tables = size * size, list(range(self.num_objects))
        elif view == "egocentric":
            entries = (2 * self.reach + 1) ** 2
            tables = [min(index, num_colors) for index in range(self.num_objects)]
        else:
            raise UserError(f"view is {view!r}; expected 'absolute' or 'egocentric'.")
        if view == "absolute":
            tables.append(self.num_objects)  # one more table, for the agent
        self.register_buffer("offsets", torch.tensor(tables) * entries, persistent=False)
        if view == "egocentric":
            self.register_buffer("displacements", self._displacements(), persistent=False)
        self.table = nn.Parameter(torch.randn((max(tables) + 1) * entries, dim) * dim**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (b, t, num_colors + num_walls + 1) int64: cells of colors, walls, agent -> (b, t, n)."""
        return F.embedding_bag(self.indices(tokens).flatten(0, -2), self.table, mode="sum").unflatten(
            0, tokens.shape[:-1]
        )

    def state_readout(self, dim: int) -> CategoricalReadout:
        """The readout that predicts the agent's next cell from a residual of width ``dim``; objects do not move."""
        return CategoricalReadout(dim, self.size**2)

    def targets(self, tokens: Tensor) -> Tensor:
        """The targets of ``state_readout`` in tokens (b, t, objects + 1): the agent's cell, (b, t)."""
        return tokens[..., -1]

    def from_observation(self, observation: Any) -> Tensor:
        """Converts the one-hot vector of one grid to tokens, without batch and time axes."""
        return onehot_to_tokens(self.size**2, torch.as_tensor(observation))

    def check(self, tokens: Tensor) -> None:
        """UserError unless the tokens are cells of the grid; synchronizes with the device."""
        self._check_shape(tokens)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.size**2:
            raise UserError(f"grid state names cells {low}..{high}; each must lie in 0..{self.size**2 - 1}.")

    def _check_shape(self, tokens: Tensor) -> None:
        if tokens.shape[-1] != self.num_objects + 1 or tokens.dtype != torch.int64:
            raise UserError(
                f"grid state has shape {tuple(tokens.shape)} and dtype {tokens.dtype}; expected int64 "
                f"(..., {self.num_objects + 1}): the cell of each object, then the agent's."
            )

    def indices(self, tokens: Tensor) -> Tensor:
        """Rows of the table whose sum encodes each observation: tokens (b, t, objects + 1) -> (b, t, lookups)."""
        self._check_shape(tokens)
        if self.view == "absolute":
            return tokens + self.offsets
        objects, agent = tokens[..., :-1], tokens[..., -1:]
        return self.displacements[objects * self.size**2 + agent] + self.offsets

    def _displacements(self) -> Tensor:
        """Index of the displacement between every two cells, (cells * cells,), row by row from the upper left."""
        cells, size, reach = torch.arange(self.size**2), self.size, self.reach
        objects, agent = cells[:, None], cells[None]
        down = (objects // size - agent // size).clamp(-reach, reach) + reach
        right = (objects % size - agent % size).clamp(-reach, reach) + reach
        return (down * (2 * reach + 1) + right).flatten()


def onehot_to_tokens(num_cells: int, vector: Tensor) -> Tensor:
    """Converts the paper's observation vector, (..., num_cells (o + 1)), to tokens, int64 (..., o + 1), for o objects.

    UserError unless the vector consists of blocks of ``num_cells`` entries with a single 1 each.
    """
    if vector.shape[-1] % num_cells:
        raise UserError(f"the observation has {vector.shape[-1]} entries: expected a multiple of {num_cells} cells.")
    blocks = vector.unflatten(-1, (-1, num_cells))
    tokens = blocks.argmax(-1)
    if not torch.equal(blocks, F.one_hot(tokens, num_cells).to(blocks.dtype)):
        raise UserError(f"the observation is not one-hot: expected a single 1 in every {num_cells} entries.")
    return tokens


class TokenEncoder(nn.Module):
    """A learned embedding of each entry of an observation of categories, and of the condition behind them; their sum.

    sizes: number of categories of each entry; an observation may be a number if there is one. condition: the same of
    the entries behind them that do not change within an episode, such as the words of an instruction; zeros if it is
    hidden. The condition is part of each observation, so that acting needs no further argument: it enters the first
    residual at every step, which carries it through both bodies. The state loss predicts the entries, not the
    condition. UserError for sizes below 1.
    """

    offsets: Tensor
    limits: Tensor

    def __init__(self, dim: int, *, sizes: Sequence[int], condition: Sequence[int] | None = None) -> None:
        super().__init__()
        self.sizes, self.condition_sizes = list(sizes), list(condition or [])
        every = torch.tensor([*self.sizes, *self.condition_sizes])
        if not self.sizes or int(every.min()) < 1:
            raise UserError(f"sizes are {sizes} and condition {condition}; expected numbers of categories, at least 1.")
        self.register_buffer("limits", every, persistent=False)
        self.register_buffer("offsets", every.cumsum(0) - every, persistent=False)
        self.table = nn.Parameter(torch.randn(int(every.sum()), dim) * dim**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (b, t, entries + condition) int64 -> (b, t, n)."""
        self._check_shape(tokens)
        rows = (tokens + self.offsets).flatten(0, -2)
        return F.embedding_bag(rows, self.table, mode="sum").unflatten(0, tokens.shape[:-1])

    def state_readout(self, dim: int) -> MultiCategoricalReadout:
        """The readout that predicts all entries of the next observation from a residual of width ``dim``."""
        return MultiCategoricalReadout(dim, self.sizes)

    def targets(self, tokens: Tensor) -> Tensor:
        """The targets of ``state_readout`` in tokens (b, t, entries + condition): the entries, (b, t, entries)."""
        return tokens[..., : len(self.sizes)]

    def from_observation(self, observation: Any) -> Tensor:
        """Converts one observation of an environment to one state, without batch and time axes."""
        return torch.as_tensor(observation, dtype=torch.int64).reshape(-1)

    def check(self, tokens: Tensor) -> None:
        """UserError unless the tokens are categories; synchronizes with the device."""
        self._check_shape(tokens)
        wrong = ((tokens < 0) | (tokens >= self.limits)).flatten(0, -2).any(0).nonzero()
        if len(wrong):
            entry = int(wrong[0])
            raise UserError(f"entry {entry} of a state is out of range; expected 0..{int(self.limits[entry]) - 1}.")

    def _check_shape(self, tokens: Tensor) -> None:
        if tokens.shape[-1] != len(self.offsets) or tokens.dtype != torch.int64:
            raise UserError(
                f"state has shape {tuple(tokens.shape)} and dtype {tokens.dtype}; expected int64 "
                f"(..., {len(self.offsets)}): {len(self.sizes)} entries, then {len(self.condition_sizes)} of the "
                "condition."
            )


MAX_CHANNELS = 64
MAX_SIDE = 8
"""Side to which an image is halved before a linear map reads it, and of the picture that the state loss predicts."""


class ImageEncoder(nn.Module):
    """A small convolutional network over uint8 images: convolutions of stride 2 until no side is longer than 8.

    shape: of one image, (height, width), (height, width, channels) or (channels, height, width); of its first and last
    axis the shorter one are the channels. UserError for other shapes.
    """

    def __init__(self, dim: int, shape: Sequence[int]) -> None:
        super().__init__()
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise UserError(f"image is {list(shape)}; expected (height, width), with channels first or last.")
        self.shape = tuple(shape)
        self.channels_first = len(shape) == 3 and shape[0] < shape[2]
        channels, *sides = self._channels_first(torch.zeros(self.shape)).shape
        self.pooled = [min(side, MAX_SIDE) for side in sides]
        self.pooled_size = channels * self.pooled[0] * self.pooled[1]
        layers: list[nn.Module] = []
        width, stride = 16, 1 if max(sides) <= MAX_SIDE else 2
        while not layers or max(sides) > MAX_SIDE:
            layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.ReLU()]
            sides = [-(-side // stride) for side in sides]
            channels, width = width, min(2 * width, MAX_CHANNELS)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * sides[0] * sides[1], dim))

    def forward(self, states: Tensor) -> Tensor:
        """states (b, t, *shape) uint8 -> (b, t, n)."""
        self._check_shape(states)
        return self.body(self._scaled(states.flatten(0, 1))).unflatten(0, states.shape[:2])

    def state_readout(self, dim: int) -> GaussianReadout:
        """The readout that predicts the next image, averaged over a grid of at most 8 x 8 fields."""
        return GaussianReadout(dim, self.pooled_size)

    def targets(self, states: Tensor) -> Tensor:
        """The targets of ``state_readout`` in states (b, t, *shape): means of fields, from 0 to 1, side by side."""
        pooled = F.adaptive_avg_pool2d(self._scaled(states.flatten(0, 1)), (self.pooled[0], self.pooled[1]))
        return pooled.flatten(1).unflatten(0, states.shape[:2])

    def from_observation(self, observation: Any) -> Tensor:
        """Converts one image to one state, without batch and time axes."""
        return torch.as_tensor(observation, dtype=torch.uint8)

    def check(self, states: Tensor) -> None:
        """UserError unless the states are images of the right shape."""
        self._check_shape(states)

    def _scaled(self, images: Tensor) -> Tensor:
        """(m, *shape) uint8 -> (m, channels, height, width), from 0 to 1."""
        dtype = next(self.body.parameters()).dtype
        return self._channels_first(images).to(dtype) / 255

    def _channels_first(self, images: Tensor) -> Tensor:
        if len(self.shape) == 2:
            return images.unsqueeze(-3)
        return images if self.channels_first else images.movedim(-1, -3)

    def _check_shape(self, states: Tensor) -> None:
        if states.shape[2:] != self.shape or states.dtype != torch.uint8:
            raise UserError(
                f"state has shape {tuple(states.shape)} and dtype {states.dtype}; expected uint8 (b, t, "
                f"{', '.join(map(str, self.shape))}): images."
            )


Encoder = VectorEncoder | TokenEncoder | ImageEncoder | GridEncoder


def make_encoder(dim: int, options: dict[str, Any]) -> Encoder:
    """The encoder for ``dict(num_continuous = ...)`` with ``mean`` and ``std`` if need be, ``dict(num_discrete =
    [...])``, ``dict(tokens = dict(...))``, ``dict(image = [...])`` or ``dict(grid = dict(...))``.

    UserError for other options.
    """
    if set(options) == {"grid"}:
        return GridEncoder(dim, **options["grid"])
    if set(options) in ({"num_continuous"}, {"num_continuous", "mean", "std"}):
        statistics = {name: options[name] for name in ("mean", "std") if name in options}
        return VectorEncoder(options["num_continuous"], dim, **statistics)
    if set(options) == {"num_discrete"} and not isinstance(options["num_discrete"], int):
        return TokenEncoder(dim, sizes=options["num_discrete"])
    if set(options) == {"tokens"}:
        return TokenEncoder(dim, **options["tokens"])
    if set(options) == {"image"}:
        return ImageEncoder(dim, options["image"])
    raise UserError(
        f"state_embed_readout is {options!r}; expected dict(num_continuous = ...) for vectors, dict(num_discrete = "
        "[...]) for choices, dict(tokens = dict(...)) for categories with a condition, dict(image = [...]) for images "
        "or dict(grid = dict(...)) for grid tokens."
    )
