"""State encoders: they map an observation to the first residual, and define the target of the state loss.

Axes: b batch, t steps, n model width. A grid's observation is given as tokens: the cell of each object, then the
agent's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.errors import UserError
from metacontroller.models.float_states import FloatStates, limited
from metacontroller.models.grid_encoder import SymbolicGridEncoder
from metacontroller.models.image_encoder import ImageEncoder
from metacontroller.models.mixed_encoder import MixedEncoder
from metacontroller.models.readouts import (
    CategoricalReadout,
    GaussianReadout,
    MultiCategoricalReadout,
    register_statistics,
)
from metacontroller.ranges import MOST_SIDE, ROWS, Whole, check_number, check_options, shown

NORMALIZED_LIMIT = 10.0
"""Of normalized entries of a vector: rare values of entries that hardly vary would drown all others."""


class VectorEncoder(FloatStates, nn.Module):
    """A linear map of a vector observation, which is cast to the weights' floating-point type, within ±1e9.

    mean, std (dim_state,): statistics of the data, by which the vector is normalized first, within ±10 (our choice).
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self, dim_state: int, dim: int, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        check_number("num_continuous", dim_state, ROWS)
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
        return self.linear(limited(states))

    def state_readout(self, dim: int) -> GaussianReadout:
        """The readout that predicts the next observation from a residual of width ``dim``."""
        return GaussianReadout(dim, self.dim_state, mean=self.statistics["mean"], std=self.statistics["std"])

    def _check_shape(self, states: Tensor) -> None:
        if states.shape[-1] != self.dim_state or not states.is_floating_point():
            raise UserError(
                f"state has shape {tuple(states.shape)} and dtype {states.dtype}; "
                f"expected floating-point (..., {self.dim_state})."
            )


class PlaneEncoder(VectorEncoder):
    """`VectorEncoder` of an observation, and one vector for the walker's cell and for each object's, seen from there.

    A way is a matter of cells. Numbers say in which cell a thing lies too, but a network has to learn their steps, for
    which it takes ten times as many examples (docs/log.md, 94); this encoder reads them off (our choice). Each object
    has a part of the width of its own, n / (o + 1) numbers, so that a linear map can hide one without another
    (docs/log.md, 106).
    Axes: o objects.
    dim_state: d. size: cells along each side. objects: o. The last 2 + 2 o + 2 numbers of an observation are the
    walker's x and y, with the plane as -1..1; from it to the middle of each object's cell, in the same unit; and its
    place in its cell, with the cell as -1..1. UserError for sizes that do not fit.
    """

    def __init__(self, dim: int, *, dim_state: int, size: int, objects: int) -> None:
        super().__init__(dim_state, dim)
        check_number("size", size, Whole(1, MOST_SIDE))
        check_number("objects", objects, ROWS)
        check_number("dim_state", dim_state, Whole(4 + 2 * objects))
        part = dim // (objects + 1)
        if not part:
            raise UserError(f"dim is {dim}; expected at least {objects + 1}, one more than objects.")
        self.size, self.objects = size, objects
        self.span = 2 * size - 1  # offsets of cells along one axis
        self.own = nn.Embedding(size**2, dim)
        self.others = nn.Embedding(objects * self.span**2, part)
        nn.init.normal_(self.own.weight, std=0.5 * dim**-0.5)
        nn.init.normal_(self.others.weight, std=0.4)

    def forward(self, states: Tensor) -> Tensor:
        """states (b, t, d) float -> (b, t, n)."""
        x = super().forward(states)
        own, others = self.cells(states)
        parts = self.others(others).flatten(-2)
        return x + self.own(own) + F.pad(parts, (0, x.shape[-1] - parts.shape[-1]))

    def cells(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the tables: the walker's cell, int64 (b, t), and each object's as seen from there (b, t, o)."""
        place, relative, local = states[..., -4 - 2 * self.objects :].split([2, 2 * self.objects, 2], -1)
        cell = self._whole((place + 1) * self.size / 2 - 0.5, self.size - 1)
        offset = (relative.unflatten(-1, (self.objects, 2)) + local[..., None, :] / self.size) * self.size / 2
        seen = self._whole(offset + self.size - 1, self.span - 1)
        each = torch.arange(self.objects, device=states.device) * self.span**2
        return cell[..., 0] * self.size + cell[..., 1], each + seen[..., 0] * self.span + seen[..., 1]

    @staticmethod
    def _whole(values: Tensor, most: int) -> Tensor:
        """The nearest whole numbers within 0..most, int64; 0 for NaN."""
        return values.nan_to_num().round().clamp(0, most).long()


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


class PictureEncoder(nn.Module):
    """An image with an observation of categories and a condition beside it: the sum of their embeddings.

    A state is one vector of uint8: the image, flattened, then what a `TokenEncoder` reads. image: its shape, as of
    `ImageEncoder`. sizes, condition: as of `TokenEncoder`. The state loss predicts the image alone. UserError for more
    categories than uint8 counts.
    """

    def __init__(
        self, dim: int, *, image: Sequence[int], sizes: Sequence[int], condition: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.image, self.tokens = ImageEncoder(dim, image), TokenEncoder(dim, sizes=sizes, condition=condition)
        most = int(self.tokens.limits.max())
        if most > 256:
            raise UserError(f"an entry beside the image has {most} categories; expected at most 256, as of uint8.")
        self.pixels = math.prod(self.image.shape)

    def forward(self, states: Tensor) -> Tensor:
        """states (b, t, pixels + entries + condition) uint8 -> (b, t, n)."""
        images, tokens = self._parts(states)
        return self.image(images) + self.tokens(tokens)

    def state_readout(self, dim: int) -> GaussianReadout:
        """The readout that predicts the next image, as of `ImageEncoder`."""
        return self.image.state_readout(dim)

    def targets(self, states: Tensor) -> Tensor:
        """The targets of ``state_readout`` in states (b, t, pixels + entries + condition)."""
        return self.image.targets(self._parts(states)[0])

    def from_observation(self, observation: Any) -> Tensor:
        """Converts one vector of uint8 to one state, without batch and time axes."""
        return torch.as_tensor(observation, dtype=torch.uint8)

    def check(self, states: Tensor) -> None:
        """UserError unless the states have the right size and their categories are known; synchronizes."""
        self.tokens.check(self._parts(states)[1])

    def _parts(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, t, *image) uint8, and the rest (b, t, entries + condition) int64."""
        size = self.pixels + len(self.tokens.limits)
        if states.shape[-1] != size or states.dtype != torch.uint8:
            raise UserError(
                f"state has shape {tuple(states.shape)} and dtype {states.dtype}; expected uint8 (b, t, {size}): an "
                f"image of {' x '.join(map(str, self.image.shape))}, flattened, and {size - self.pixels} entries."
            )
        return states[..., : self.pixels].unflatten(-1, self.image.shape), states[..., self.pixels :].long()


Encoder = (
    VectorEncoder
    | PlaneEncoder
    | TokenEncoder
    | ImageEncoder
    | PictureEncoder
    | GridEncoder
    | SymbolicGridEncoder
    | MixedEncoder
)


def make_encoder(dim: int, options: dict[str, Any]) -> Encoder:
    """The encoder for ``dict(num_continuous = ...)`` with ``mean`` and ``std`` if need be, ``dict(num_discrete =
    [...])``, both of them without statistics, ``dict(tokens = dict(...))``, ``dict(image = [...])`` with ``mean`` and
    ``std`` if need be, ``dict(picture = dict(...))``, ``dict(grid = dict(...))``, ``dict(plane = dict(dim_state =,
    size =, objects =))`` or ``dict(symbolic_grid = dict(sizes =, side =, depth =, kernel =))``.

    UserError for other options.
    """
    kinds: dict[str, Any] = {
        "grid": GridEncoder,
        "plane": PlaneEncoder,
        "tokens": TokenEncoder,
        "picture": PictureEncoder,
        "symbolic_grid": SymbolicGridEncoder,
    }
    given = shown(options)
    if not isinstance(options, dict):
        options = {}
    name = next(iter(options), "")
    if len(options) == 1 and name in kinds:
        check_options(f"state_embed_readout[{name!r}]", options[name], kinds[name], given=("dim",))
        return kinds[name](dim, **options[name])
    if set(options) in ({"num_continuous"}, {"num_continuous", "mean", "std"}):
        statistics = {name: options[name] for name in ("mean", "std") if name in options}
        return VectorEncoder(options["num_continuous"], dim, **statistics)
    if set(options) == {"num_discrete"} and not isinstance(options["num_discrete"], int):
        return TokenEncoder(dim, sizes=options["num_discrete"])
    if set(options) == {"num_discrete", "num_continuous"} and not isinstance(options["num_discrete"], int):
        return MixedEncoder(dim, sizes=options["num_discrete"], num_continuous=options["num_continuous"])
    if set(options) in ({"image"}, {"image", "mean", "std"}):
        return ImageEncoder(dim, options["image"], mean=options.get("mean"), std=options.get("std"))
    raise UserError(
        f"state_embed_readout is {given}; expected dict(num_continuous = ...) for vectors, dict(num_discrete = "
        "[...]) for choices, both for choices and numbers, dict(tokens = dict(...)) for categories with a condition, "
        "dict(image = [...]) for images, "
        "dict(picture = dict(...)) for images with categories beside them, dict(grid = dict(...)) for grid tokens or "
        "dict(plane = dict(...)) for a walker on a plane of cells."
    )
