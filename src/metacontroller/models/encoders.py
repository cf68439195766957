"""Encoders of observations: vectors, grids and categories; images are in `image_encoders`.

A new kind of observation is a class, and a line in `KINDS`.
Axes: b batch, t steps, n model width, o objects, s side of a grid, k channels or categories, m numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.arguments import checked_kinds
from metacontroller.errors import UserError
from metacontroller.models.image_encoder import ImageEncoder
from metacontroller.models.readouts import MixedReadout
from metacontroller.models.state_encoder import StateEncoder, limited
from metacontroller.models.values import block_starts, register_statistics
from metacontroller.ranges import (
    MOST_SIDE,
    Count,
    DepthOr0,
    Rows,
    RowsOr0,
    Whole,
    check_options,
    require,
    shown,
)

Side = Annotated[int, Whole(most=MOST_SIDE)]

NORMALIZED_LIMIT = 10.0
"""Of normalized entries of a vector: rare values of entries that hardly vary would drown all others."""


class VectorEncoder(StateEncoder):
    """A linear map of a vector, which is cast to the weights' floating-point type, within ±1e9.

    mean, std (num_continuous,): of the data; by them the vector is normalized first, within ±10 (our choice).
    """

    mean: Tensor | None
    std: Tensor | None

    @checked_kinds
    def __init__(
        self, num_continuous: Rows, dim: int, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.shape = (num_continuous,)
        self.predicted = {"num_continuous": num_continuous, "mean": mean, "std": std}
        register_statistics(self, num_continuous, mean, std)
        self.linear = nn.Linear(num_continuous, dim)

    def forward(self, states: Tensor) -> Tensor:
        self.check_shape(states)
        states = states.to(self.linear.weight.dtype)
        if self.mean is not None and self.std is not None:
            return self.linear(((states - self.mean) / self.std).clamp(-NORMALIZED_LIMIT, NORMALIZED_LIMIT))
        return self.linear(limited(states))

    def targets(self, states: Tensor) -> Tensor:
        return limited(states)


class PlaneEncoder(VectorEncoder):
    """`VectorEncoder` of an observation, and one vector for the walker's cell and for each object's, seen from there.

    A way is a matter of cells. Numbers say in which cell a thing lies too, but a network has to learn their steps, for
    which it takes ten times as many examples (docs/log.md, 94); this encoder reads them off (our choice). Each object
    has a part of the width to itself, n / (o + 1) numbers, so that a linear map can hide one without another
    (docs/log.md, 106).
    dim_state: d. size: cells along each side. objects: o. The last 2 + 2 o + 2 numbers of an observation are the
    walker's x and y, with the plane as -1..1; from it to the middle of each object's cell, in the same unit; and its
    place in its cell, with the cell as -1..1. UserError for sizes that do not fit.
    """

    @checked_kinds
    def __init__(self, dim: int, *, dim_state: Rows, size: Side, objects: Rows) -> None:
        super().__init__(dim_state, dim)
        require(dim_state >= 4 + 2 * objects, "dim_state", dim_state, f"at least {4 + 2 * objects}")
        part = dim // (objects + 1)
        require(part > 0, "dim", dim, f"at least {objects + 1}, one more than objects")
        self.size, self.objects = size, objects
        self.span = 2 * size - 1  # offsets of cells along one axis
        self.own = nn.Embedding(size**2, dim)
        self.others = nn.Embedding(objects * self.span**2, part)
        nn.init.normal_(self.own.weight, std=0.5 * dim**-0.5)
        nn.init.normal_(self.others.weight, std=0.4)

    def forward(self, states: Tensor) -> Tensor:
        x = super().forward(states)
        own, others = self.cells(states)
        parts = self.others(others).flatten(-2)
        return x + self.own(own) + F.pad(parts, (0, x.shape[-1] - parts.shape[-1]))

    def cells(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the tables: the walker's cell, int64 (b, t), and each object's as seen from there (b, t, o)."""
        place, relative, local = states[..., -4 - 2 * self.objects :].split([2, 2 * self.objects, 2], -1)
        cell = _rounded((place + 1) * self.size / 2 - 0.5, self.size - 1)
        offset = (relative.unflatten(-1, (self.objects, 2)) + local[..., None, :] / self.size) * self.size / 2
        seen = _rounded(offset + self.size - 1, self.span - 1)
        each = torch.arange(self.objects, device=states.device) * self.span**2
        return cell[..., 0] * self.size + cell[..., 1], each + seen[..., 0] * self.span + seen[..., 1]


def _rounded(values: Tensor, most: int) -> Tensor:
    """The nearest whole numbers within 0..most, int64; 0 for NaN."""
    return values.nan_to_num().round().clamp(0, most).long()


class GridEncoder(StateEncoder):
    """A linear map of a one-hot grid observation, computed as a sum of embedding lookups.

    A state is given as tokens: the cell of each color, of each wall, then the agent's, (o + 1,) int64. The readout
    predicts the agent's next cell, since objects do not move.
    view "absolute": the paper's one-hot, which object is in which cell, and the agent's cell (§4).
    view "egocentric": only each object's displacement from the agent, one-hot (one table per color, one for all walls),
    like the relative positions that the paper's ant observes (§4); our choice for small models, which need not learn
    to subtract cells. Displacements saturate at ``reach`` cells along each axis (None: never), so that distant objects
    show only their direction; discovery then learns codes for colors sooner (docs/log.md, 24).

    UserError for values out of range.
    """

    dtype = torch.int64
    contents = "the cell of each object, then the agent's"
    offsets: Tensor
    displacements: Tensor

    @checked_kinds
    def __init__(
        self,
        dim: int,
        *,
        size: Annotated[int, Whole(2, MOST_SIDE)],
        num_colors: Rows,
        num_walls: RowsOr0,
        view: Literal["absolute", "egocentric"] = "absolute",
        reach: Count | None = None,
    ) -> None:
        super().__init__()
        require(reach is None or view == "egocentric", "reach", reach, "none in the absolute view")
        self.size, self.view = size, view
        self.reach = size - 1 if reach is None else reach
        objects = num_colors + num_walls
        self.shape, self.sizes = (objects + 1,), (size**2,) * (objects + 1)
        self.predicted = {"num_discrete": size**2}
        if view == "absolute":
            entries, tables = size**2, list(range(objects + 1))  # the last one for the agent
        else:
            entries, tables = (2 * self.reach + 1) ** 2, [min(index, num_colors) for index in range(objects)]
            self.register_buffer("displacements", self._displacements(), persistent=False)
        self.register_buffer("offsets", torch.tensor(tables) * entries, persistent=False)
        self.table = nn.Parameter(torch.randn((max(tables) + 1) * entries, dim) * dim**-0.5)

    def forward(self, states: Tensor) -> Tensor:
        return embedding_sum(self.table, self.indices(states))

    def targets(self, states: Tensor) -> Tensor:
        return states[..., -1]

    def from_observation(self, observation: Any) -> Tensor:
        """Converts the one-hot vector of one grid to tokens, without batch and time axes."""
        return onehot_to_tokens(self.size**2, torch.as_tensor(observation))

    def indices(self, states: Tensor) -> Tensor:
        """Rows of the table whose sum encodes each observation: states (b, t, o + 1) -> (b, t, lookups)."""
        self.check_shape(states)
        if self.view == "absolute":
            return states + self.offsets
        objects, agent = states[..., :-1], states[..., -1:]
        return self.displacements[objects * self.size**2 + agent] + self.offsets

    def _displacements(self) -> Tensor:
        """Index of the displacement between every two cells, (cells * cells,), row by row from the upper left."""
        cells, size, reach = torch.arange(self.size**2), self.size, self.reach
        objects, agent = cells[:, None], cells[None]
        down = (objects // size - agent // size).clamp(-reach, reach) + reach
        right = (objects % size - agent % size).clamp(-reach, reach) + reach
        return (down * (2 * reach + 1) + right).flatten()


def embedding_sum(table: Tensor, rows: Tensor) -> Tensor:
    """The sum of the rows (..., m) int64 of a table (rows, n), (..., n)."""
    return F.embedding_bag(rows.flatten(0, -2), table, mode="sum").unflatten(0, rows.shape[:-1])


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


class SymbolicGridEncoder(StateEncoder):
    """Embeds each cell's channels, mixes cells by convolutions, and takes the mean over cells.

    A state is (s, s, k) int64. sizes: categories of each channel, such as 11 types, 6 colors, 3 states. side: cells
    along a side. The readout predicts every channel of every cell. UserError for sizes below 1, or an even kernel.
    """

    dtype = torch.int64
    contents = "a grid of cells with channels"
    offsets: Tensor

    @checked_kinds
    def __init__(
        self, dim: int, *, sizes: Sequence[Rows] = (11, 6, 3), side: Side = 7, depth: DepthOr0 = 4, kernel: int = 3
    ) -> None:
        super().__init__()
        require(len(sizes) > 0, "sizes", sizes, "at least one channel")
        require(kernel % 2 == 1, "kernel", kernel, "an odd number of cells")
        self.sizes, self.shape = tuple(sizes), (side, side, len(sizes))
        self.predicted = {"num_discrete": self.sizes * side**2}
        self.register_buffer("offsets", block_starts(sizes), persistent=False)
        self.table = nn.Embedding(sum(sizes), dim)
        nn.init.normal_(self.table.weight, std=dim**-0.5)
        self.blocks = nn.ModuleList(GridBlock(dim, kernel=kernel) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, states: Tensor) -> Tensor:
        self.check_shape(states)
        x = self.table(states + self.offsets).sum(-2).flatten(0, 1).permute(0, 3, 1, 2)  # (b t, n, s, s)
        for block in self.blocks:
            x = block(x)
        return self.norm(x.permute(0, 2, 3, 1)).mean((1, 2)).unflatten(0, states.shape[:2])

    def targets(self, states: Tensor) -> Tensor:
        """Cell by cell, (b, t, s² k)."""
        return states.flatten(2)


class GridBlock(nn.Module):
    """A ConvNeXt block (arXiv 2201.03545, section 2): depthwise convolution, norm, MLP over channels, residual."""

    def __init__(self, dim: int, *, kernel: int = 3, expansion: int = 4) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp_in, self.mlp_out = nn.Linear(dim, expansion * dim), nn.Linear(expansion * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (m, n, s, s) -> as x."""
        mixed = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.mlp_out(F.gelu(self.mlp_in(mixed))).permute(0, 3, 1, 2)


class TokenEncoder(StateEncoder):
    """A learned embedding of each entry of an observation of categories, and of the condition behind them; their sum.

    sizes: number of categories of each entry; an observation may be a number if there is one. condition: the same of
    the entries behind them that do not change within an episode, such as the words of an instruction; zeros if it is
    hidden. The condition is part of each observation, so that acting needs no further argument: it enters the first
    residual at every step, which carries it through both bodies. The state loss predicts the entries, not the
    condition. UserError for sizes below 1.
    """

    dtype = torch.int64
    offsets: Tensor

    @checked_kinds
    def __init__(self, dim: int, *, sizes: Sequence[Rows], condition: Sequence[Rows] | None = None) -> None:
        super().__init__()
        require(len(sizes) > 0, "sizes", sizes, "at least one entry")
        self.sizes, self.predicted = (*sizes, *(condition or ())), {"num_discrete": tuple(sizes)}
        self.shape = (len(self.sizes),)
        self.contents = f"{len(sizes)} entries, then {len(self.sizes) - len(sizes)} of the condition"
        self.register_buffer("offsets", block_starts(self.sizes), persistent=False)
        self.table = nn.Parameter(torch.randn(sum(self.sizes), dim) * dim**-0.5)

    def forward(self, states: Tensor) -> Tensor:
        self.check_shape(states)
        return embedding_sum(self.table, states + self.offsets)

    def targets(self, states: Tensor) -> Tensor:
        return states[..., : len(self.predicted["num_discrete"])]

    def from_observation(self, observation: Any) -> Tensor:
        return super().from_observation(observation).reshape(-1)


class MixedEncoder(StateEncoder):
    """A learned embedding of each category and a linear map of the numbers; their sum.

    A state is one vector of floats: k categories, then m numbers. sizes: values of each category. num_continuous: m.
    UserError for values out of range.
    """

    offsets: Tensor

    @checked_kinds
    def __init__(self, dim: int, *, sizes: Sequence[Rows], num_continuous: Rows) -> None:
        super().__init__()
        self.sizes, self.shape = tuple(sizes), (len(sizes) + num_continuous,)
        self.num_continuous = num_continuous
        self.contents = f"{len(sizes)} categories, then {num_continuous} numbers"
        self.register_buffer("offsets", block_starts(sizes), persistent=False)
        self.table = nn.Embedding(sum(sizes), dim)
        nn.init.normal_(self.table.weight, std=dim**-0.5)
        self.linear = nn.Linear(num_continuous, dim)

    def forward(self, states: Tensor) -> Tensor:
        self.check_shape(states)
        entries = len(self.sizes)
        chosen = self.table(states[..., :entries].long() + self.offsets).sum(-2)
        return chosen + self.linear(limited(states[..., entries:].to(self.linear.weight.dtype)))

    def state_readout(self, dim: int) -> MixedReadout:
        return MixedReadout(dim, self.sizes, self.num_continuous)

    def targets(self, states: Tensor) -> Tensor:
        return limited(states)


class PictureEncoder(StateEncoder):
    """An image with an observation of categories and a condition beside it: the sum of their embeddings.

    A state is one vector of uint8: the image, flattened, then what a `TokenEncoder` reads. image: its shape, as of
    `ImageEncoder`. sizes, condition: as of `TokenEncoder`. The state loss predicts the image alone. UserError for more
    categories than uint8 counts.
    """

    dtype = torch.uint8

    def __init__(
        self, dim: int, *, image: Sequence[int], sizes: Sequence[int], condition: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.image, self.tokens = ImageEncoder(dim, image), TokenEncoder(dim, sizes=sizes, condition=condition)
        most = max(self.tokens.sizes)
        require(most <= 256, "the number of categories of an entry beside the image", most, "at most 256, as of uint8")
        self.pixels, entries = math.prod(self.image.shape), len(self.tokens.sizes)
        self.shape = (self.pixels + entries,)
        self.predicted = self.image.predicted
        self.contents = f"an image of {' x '.join(map(str, image))}, flattened, and {entries} entries"

    def forward(self, states: Tensor) -> Tensor:
        images, tokens = self._parts(states)
        return self.image(images) + self.tokens(tokens)

    def targets(self, states: Tensor) -> Tensor:
        return self.image.targets(self._parts(states)[0])

    def check(self, states: Tensor) -> None:
        self.tokens.check(self._parts(states)[1])

    def _parts(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, t, *image) uint8, and the rest (b, t, entries + condition) int64."""
        self.check_shape(states)
        return states[..., : self.pixels].unflatten(-1, self.image.shape), states[..., self.pixels :].long()


KINDS: dict[str, type[StateEncoder]] = {
    "tokens": TokenEncoder,
    "grid": GridEncoder,
    "plane": PlaneEncoder,
    "picture": PictureEncoder,
    "symbolic_grid": SymbolicGridEncoder,
}


def make_encoder(dim: int, options: dict[str, Any]) -> StateEncoder:
    """The encoder for ``dict(num_continuous = ...)`` or ``dict(image = [...])``, both with ``mean`` and ``std`` if need
    be, ``dict(num_discrete = [...])``, numbers and choices together without statistics, or ``dict(KIND = dict(...))``
    with the options of one of `KINDS`. UserError for other options.
    """
    names = set(options) if isinstance(options, dict) else set()
    kind = next(iter(options), "") if len(names) == 1 else ""
    if kind in KINDS:
        check_options(f"state_embed_readout[{kind!r}]", options[kind], KINDS[kind], given=("dim",))
        return KINDS[kind](dim, **options[kind])
    statistics = {name: options[name] for name in ("mean", "std") if name in names}
    if names - {"mean", "std"} == {"num_continuous"}:
        return VectorEncoder(options["num_continuous"], dim, **statistics)
    if names - {"mean", "std"} == {"image"}:
        return ImageEncoder(dim, options["image"], **statistics)
    if "num_discrete" in names and not isinstance(options["num_discrete"], int):
        if names == {"num_discrete"}:
            return TokenEncoder(dim, sizes=options["num_discrete"])
        if names == {"num_discrete", "num_continuous"}:
            return MixedEncoder(dim, sizes=options["num_discrete"], num_continuous=options["num_continuous"])
    raise UserError(
        f"state_embed_readout is {shown(options)}; expected dict(num_continuous = ...) for vectors, "
        "dict(num_discrete = [...]) for choices, both for choices and numbers, dict(image = [...]) for images, or "
        f"dict(KIND = dict(...)) for one of {', '.join(KINDS)}."
    )
