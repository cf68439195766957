"""State encoders: lookups against the linear maps of one-hot vectors that they stand for."""

from __future__ import annotations

from typing import Any, Literal

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from metacontroller.domains.gridworld_pinpad.layouts import PinpadConfig, tokens_to_onehot
from metacontroller.domains.pinpad.layouts import sample_layouts
from metacontroller.models import encoders
from metacontroller.models.encoders import GridEncoder, TokenEncoder, VectorEncoder
from metacontroller.models.transformer import Transformer

GRID = PinpadConfig(size=4, num_colors=3, num_walls=2)
DIM = 6


def grid_tokens() -> Tensor:
    """(3, 5, 6) tokens of random layouts."""
    layouts = sample_layouts(GRID, 15, torch.Generator().manual_seed(1))
    return torch.cat([layouts.objects, layouts.agent[:, None]], 1).view(3, 5, -1)


def make_encoder(view: Literal["absolute", "egocentric"], reach: int | None = None) -> GridEncoder:
    grid = {"size": GRID.size, "num_colors": GRID.num_colors, "num_walls": GRID.num_walls}
    return GridEncoder(DIM, **grid, view=view, reach=reach).double()


def displacement_onehot(tokens: Tensor, reach: int) -> Tensor:
    """One grid's displacements, slowly: a block per color, and one that the walls add up in."""
    size, span = GRID.size, 2 * reach + 1
    blocks = torch.zeros(GRID.num_colors + 1, span, span, dtype=torch.float64)
    agent = int(tokens[-1])
    for number, cell in enumerate(tokens[:-1].tolist()):
        down, right = (
            max(-reach, min(reach, far)) for far in (cell // size - agent // size, cell % size - agent % size)
        )
        blocks[min(number, GRID.num_colors), down + reach, right + reach] += 1
    return blocks.flatten()


@pytest.mark.parametrize(
    ("view", "reach"), [("absolute", None), ("egocentric", None), ("egocentric", 1), ("egocentric", 9)]
)
def test_grid_lookup_is_a_linear_map_of_the_onehot(view: Any, reach: int | None) -> None:
    encoder, tokens = make_encoder(view, reach), grid_tokens()
    if view == "absolute":
        onehot = tokens_to_onehot(GRID, tokens).double()
    else:
        rows = [displacement_onehot(row, reach or GRID.size - 1) for row in tokens.flatten(0, 1)]
        onehot = torch.stack(rows).unflatten(0, (3, 5))
    weight = torch.randn(3, 5, DIM, dtype=torch.float64)
    linear = torch.nn.functional.linear(onehot, encoder.table.T)
    torch.testing.assert_close(encoder(tokens), linear)
    (fast,) = torch.autograd.grad((encoder(tokens) * weight).sum(), encoder.table)
    (slow,) = torch.autograd.grad((linear * weight).sum(), encoder.table)
    torch.testing.assert_close(fast, slow)


def test_the_egocentric_view_does_not_say_where_on_the_grid() -> None:
    # two objects and the agent in the upper left, then the same one row down and one column right
    encoder = GridEncoder(DIM, size=4, num_colors=1, num_walls=1, view="egocentric")
    tokens = torch.tensor([[[0, 1, 5]]])
    assert torch.equal(encoder(tokens), encoder(tokens + 5))
    assert not torch.equal(encoder(tokens), encoder(tokens + torch.tensor([0, 0, 1])))


def test_beyond_its_reach_the_view_tells_the_direction_alone() -> None:
    encoder = GridEncoder(DIM, size=5, num_colors=1, num_walls=0, view="egocentric", reach=2)
    near, far, farther = (encoder(torch.tensor([[[cell, 0]]])) for cell in (11, 13, 14))  # the agent in the corner
    assert torch.equal(far, farther)
    assert not torch.equal(near, far)


def test_vector_encoder_is_linear_and_casts_to_its_weights() -> None:
    encoder, states = VectorEncoder(5, DIM), torch.randn(2, 3, 5, dtype=torch.float64)
    expected = states.float() @ encoder.linear.weight.T + encoder.linear.bias
    torch.testing.assert_close(encoder(states), expected)


def test_looking_only_at_shapes_is_enough_to_encode_but_not_to_check() -> None:
    nan = torch.full((1, 1, 5), torch.nan)
    encoder = VectorEncoder(5, DIM)
    assert bool(encoder(nan).isnan().all())
    with pytest.raises(ValueError, match="NaN"):
        encoder.check(nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 1}, "size is 1"),
        ({"num_colors": 0}, "num_colors is 0"),
        ({"num_walls": -1}, "num_walls is -1"),
        ({"view": "sideways"}, "'sideways'"),
        ({"reach": 2}, "reach is 2; expected none in the absolute view"),
        ({"reach": 0, "view": "egocentric"}, "reach is 0; expected at least 1"),
    ],
)
def test_impossible_grids_are_refused(change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users, who get our own messages
    options: dict[str, Any] = {"size": 4, "num_colors": 3, "num_walls": 2, "view": "absolute"} | change
    with pytest.raises(ValueError, match=message):
        GridEncoder(DIM, **options)


# -- categories with a condition --------------------------------------------------------------------------------------

SIZES, CONDITION = [3, 2, 4], [5, 5]


def category_tokens(batch: int = 3, steps: int = 4) -> Tensor:
    """(batch, steps, 5) random categories, the condition included."""
    return torch.stack([torch.randint(size, (batch, steps)) for size in [*SIZES, *CONDITION]], -1)


def token_encoder() -> TokenEncoder:
    return TokenEncoder(DIM, sizes=SIZES, condition=CONDITION).double()


def test_categories_are_the_linear_map_of_their_one_hots() -> None:
    encoder, tokens = token_encoder(), category_tokens()
    parts = [one_hot(part, size) for part, size in zip(tokens.unbind(-1), [*SIZES, *CONDITION], strict=True)]
    expected = torch.cat(parts, -1).double() @ encoder.table
    torch.testing.assert_close(encoder(tokens), expected)
    (fast,) = torch.autograd.grad(encoder(tokens).square().sum(), encoder.table)
    (slow,) = torch.autograd.grad((torch.cat(parts, -1).double() @ encoder.table).square().sum(), encoder.table)
    torch.testing.assert_close(fast, slow)


def test_the_condition_reaches_both_bodies_but_is_no_target() -> None:
    sizes = {"sizes": SIZES, "condition": CONDITION}
    model = Transformer(
        8,
        action_embed_readout={"num_discrete": 3},
        state_embed_readout={"tokens": sizes},
        lower_body={"depth": 1, "heads": 2},
        upper_body={"depth": 1, "heads": 2},
    )
    told = category_tokens()
    hidden = told.clone()
    hidden[..., len(SIZES) :] = 0
    told[..., len(SIZES) :] = 1
    below, above = (model.lower(model.embed(states)) for states in (told, hidden))
    assert not torch.allclose(below, above)
    assert not torch.allclose(model.upper(below), model.upper(above))
    assert torch.equal(model.encoder.targets(told), model.encoder.targets(hidden))
    losses = model.behavior_cloning_loss(told, torch.zeros(3, 4, dtype=torch.long))
    assert losses.state.isfinite()
    assert losses.state > 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tokens: tokens.float(), r"dtype torch.float32; expected int64 \(3, 4, 5\): 3 entries, then 2"),
        (lambda tokens: tokens[..., :4], r"shape \(3, 4, 4\)"),
        (
            lambda tokens: tokens + torch.tensor([0, 2, 0, 0, 0]),
            r", 1\] ranges over 2\.\.3; each must lie in 0\.\.1",
        ),
        (
            lambda tokens: tokens - torch.tensor([0, 0, 0, 0, 5]),
            r", 4\] ranges over -5\.\.-1; each must lie in 0\.\.4",
        ),
    ],
)
def test_what_is_no_category_is_refused(change: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        token_encoder().check(change(category_tokens()))


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sizes\[1\] is 0; expected at least 1"):
        TokenEncoder(DIM, sizes=[3, 0])


# -- your own data ----------------------------------------------------------------------------------------------------


def test_vectors_are_normalized_within_limits() -> None:
    encoder = encoders.make_encoder(DIM, {"num_continuous": 2, "mean": [5.0, 0.0], "std": [2.0, 1e-3]})
    assert isinstance(encoder, VectorEncoder)
    plain = VectorEncoder(2, DIM)
    plain.linear.load_state_dict(encoder.linear.state_dict())
    torch.testing.assert_close(encoder(torch.tensor([[[9.0, 1.0]]])), plain(torch.tensor([[[2.0, 10.0]]])))
    assert encoder.state_readout(DIM).std is not None


def test_choices_are_a_sum_of_embeddings() -> None:
    encoder = encoders.make_encoder(DIM, {"num_discrete": [5, 3]})
    assert isinstance(encoder, TokenEncoder)
    states = torch.tensor([[[4, 0], [1, 2]]])
    expected = torch.stack([encoder.table[4] + encoder.table[5], encoder.table[1] + encoder.table[7]])
    torch.testing.assert_close(encoder(states)[0], expected)
    assert encoder.state_readout(DIM)(torch.randn(1, 2, DIM)).shape == (1, 2, 8)
    assert encoder.from_observation(np.int64(3)).tolist() == [3]
    with pytest.raises(ValueError, match=r"ranges over 3\.\.3; each must lie in 0\.\.2"):
        encoder.check(torch.tensor([[[4, 3]]]))


@pytest.mark.parametrize("shape", [[7, 7, 3], [40, 33, 3], [4, 84, 84], [20, 30]])
def test_images_of_any_layout_are_read(shape: list[int]) -> None:
    encoder = encoders.make_encoder(DIM, {"image": shape})
    states = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
    assert encoder(states).shape == (2, 3, DIM)
    targets, readout = encoder.targets(states), encoder.state_readout(DIM)
    assert targets.shape == (2, 3, readout.num_continuous)
    assert float(targets.min()) >= 0
    assert float(targets.max()) <= 1
    torch.testing.assert_close(encoder(states)[1, 2:], encoder(states[1:, 2:])[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="expected uint8"):
        encoder.check(states.float())


def test_a_color_moved_to_another_axis_is_the_same_image() -> None:
    last, first = (encoders.make_encoder(DIM, {"image": shape}) for shape in ([20, 16, 3], [3, 20, 16]))
    first.load_state_dict(last.state_dict())
    states = torch.randint(0, 256, (1, 2, 20, 16, 3), dtype=torch.uint8)
    torch.testing.assert_close(last(states), first(states.movedim(-1, 2)))


def test_a_picture_and_what_stands_beside_it_are_added_up() -> None:
    encoder = encoders.make_encoder(5, {"picture": {"image": [9, 8, 3], "sizes": [4], "condition": [3, 3]}})
    assert isinstance(encoder, encoders.PictureEncoder)
    states = torch.randint(3, (2, 4, 9 * 8 * 3 + 3)).to(torch.uint8)
    encoder.check(states)
    images, rest = states[..., :216].view(2, 4, 9, 8, 3), states[..., 216:].long()
    torch.testing.assert_close(encoder(states), encoder.image(images) + encoder.tokens(rest))
    assert torch.equal(encoder.targets(states), encoder.image.targets(images))
    assert encoder.state_readout(5).num_continuous == encoder.targets(states).shape[-1]
    assert torch.equal(encoder.from_observation(states[0, 0].numpy()), states[0, 0])
    states[0, 0, 217] = 3
    with pytest.raises(ValueError, match=r"state\[\.\.\., 1\] ranges over"):
        encoder.check(states)
    with pytest.raises(ValueError, match=r"expected uint8 \(2, 4, 219\): an image of 9 x 8 x 3"):
        encoder(states[..., 1:])
    with pytest.raises(ValueError, match="beside the image is 300; expected at most 256"):
        encoders.make_encoder(5, {"picture": {"image": [9, 8, 3], "sizes": [300]}})


def test_many_images_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoders.make_encoder(5, {"image": [16, 12]})
    states = torch.randint(256, (3, 5, 16, 12), dtype=torch.uint8)
    whole, targets = encoder(states), encoder.targets(states)
    monkeypatch.setattr("metacontroller.models.image_encoder.MAX_IMAGES", 4)
    torch.testing.assert_close(encoder(states), whole)
    torch.testing.assert_close(encoder.targets(states), targets)


@pytest.mark.parametrize("size", [1e19, 3e38, 1e300])
def test_extreme_observations_are_clamped_and_losses_stay_finite(size: float) -> None:
    model = Transformer(
        8,
        action_embed_readout={"num_discrete": 3},
        state_embed_readout={"num_continuous": 2},
        lower_body={"depth": 1},
        upper_body={"depth": 1},
    )
    state = torch.full((2, 4, 2), size, dtype=torch.float64)
    losses = model(state, torch.zeros(2, 4, dtype=torch.int64))
    torch.stack(list(losses)).sum().backward()
    assert all(bool(loss.isfinite()) for loss in losses)
    assert all(bool(value.grad.isfinite().all()) for value in model.parameters() if value.grad is not None)
    limit = model.encoder(torch.full((1, 1, 2), 1e9))
    torch.testing.assert_close(model.encoder(state[:1, :1]), limit)
