"""The linear recurrence: fast paths against the loop, values and gradients, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metacontroller.kernels.linear_scan import linear_scan

BATCH, CHANNELS = 3, 5


def make_inputs(time: int) -> list[Tensor]:
    decay, drive = torch.rand(BATCH, time, CHANNELS), torch.randn(BATCH, time, CHANNELS)
    return [value.double().requires_grad_() for value in (decay, drive, torch.randn(BATCH, CHANNELS))]


def test_the_loop_by_hand() -> None:
    decay = torch.tensor([[[0.5], [2.0], [0.0]]])
    drive = torch.tensor([[[1.0], [3.0], [-1.0]]])
    states = linear_scan(decay, drive, torch.tensor([[4.0]]), backend="reference")
    assert states.flatten().tolist() == [3.0, 9.0, -1.0]


@pytest.mark.parametrize("backend", ["auto", "loop", "parallel"])
@pytest.mark.parametrize("time", [1, 2, 3, 7, 8, 33])
@pytest.mark.parametrize("with_initial", [True, False])
def test_fast_paths_equal_the_loop(backend: str, time: int, with_initial: bool) -> None:
    inputs = make_inputs(time)[: 3 if with_initial else 2]
    weight = torch.randn(BATCH, time, CHANNELS, dtype=torch.float64)
    expected, actual = linear_scan(*inputs, backend="reference"), linear_scan(*inputs, backend=backend)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs)
    )


@pytest.mark.parametrize("backend", ["loop", "parallel"])
def test_the_inputs_stay_as_they_are(backend: str) -> None:
    inputs = make_inputs(6)
    before = [value.detach().clone() for value in inputs]
    linear_scan(*inputs, backend=backend).sum().backward()
    for value, old in zip(inputs, before, strict=True):
        assert torch.equal(value, old)


@pytest.mark.parametrize(
    ("shapes", "backend", "message"),
    [
        (((2, 3, 4), (2, 3, 5)), "auto", r"decay has shape \(2, 3, 4\)"),
        (((2, 0, 4), (2, 0, 4)), "auto", "at least one step and channel"),
        (((2, 3, 4), (2, 3, 4), (4,)), "auto", r"initial has shape \(4,\)"),
        (((2, 3, 4), (2, 3, 4)), "quick", "backend='quick' is unknown"),
    ],
)
def test_bad_input_is_named(shapes: tuple[tuple[int, ...], ...], backend: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_scan(*(torch.zeros(shape) for shape in shapes), backend=backend)


@pytest.mark.parametrize("backend", ["reference", "loop", "parallel"])
def test_no_rows_give_no_rows(backend: str) -> None:
    """As at a step where no row of a batch takes a new code."""
    decay, drive = (torch.zeros(0, 3, 4, requires_grad=True) for _ in range(2))
    hidden = linear_scan(decay, drive, backend=backend)
    hidden.sum().backward()
    assert hidden.shape == decay.grad.shape == (0, 3, 4)  # type: ignore[union-attr]
