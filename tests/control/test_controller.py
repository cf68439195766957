"""The controller: what is applied against the matrix that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metacontroller.control.controller import ROWS_AT_ONCE, Controller

CODE, WIDTH = 3, 7


def make_controller(rank: int | None, hidden: int = 5) -> Controller:
    """Float64, with factors of order one that differ between reading and writing."""
    controller = Controller(CODE, WIDTH, hidden=hidden, rank=rank).double()
    for parameter in controller.parameters():
        nn.init.normal_(parameter)
    return controller


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("rank", [1, 2, WIDTH, None])
def test_what_is_applied_equals_the_matrix_product(rank: int | None, hidden: int) -> None:
    controller = make_controller(rank, hidden)
    z = torch.randn(2, 4, CODE, dtype=torch.float64, requires_grad=True)
    e = torch.randn(2, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    matrix = controller.matrix(z)
    assert (matrix - matrix.transpose(-1, -2)).abs().min(dim=0).values.max() > 0.1  # input and output axes differ
    dense = torch.einsum("btoi,bti->bto", matrix, e)
    applied = controller(z, e)
    torch.testing.assert_close(applied, dense)
    weight = torch.randn_like(dense)
    inputs = [z, e, *controller.parameters()]
    fast, slow = (torch.autograd.grad((out * weight).sum(), inputs) for out in (applied, dense))
    torch.testing.assert_close(fast, slow)
    assert all(bool((gradient != 0).any()) for gradient in fast)


def test_without_hidden_units_each_word_has_a_matrix_of_its_own() -> None:
    controller = make_controller(None, hidden=0)
    words = torch.eye(CODE, dtype=torch.float64)
    torch.testing.assert_close(controller.matrix(words), controller.full[:CODE] + controller.full[CODE])
    with pytest.raises(ValueError, match="depth is 2, but hidden is 0; expected depth 1, or hidden units"):
        Controller(CODE, WIDTH, hidden=0, depth=2)


@pytest.mark.parametrize("rank", [1, 3])
def test_rank_bounds_the_matrix(rank: int) -> None:
    matrix = make_controller(rank).matrix(torch.randn(6, CODE, dtype=torch.float64))
    assert torch.linalg.matrix_rank(matrix).tolist() == [rank] * 6


def test_one_code_and_one_residual_need_no_batch() -> None:
    controller = make_controller(2)
    z, e = torch.randn(CODE, dtype=torch.float64), torch.randn(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(controller(z, e), controller.matrix(z) @ e)


class _LargestTensor(TorchDispatchMode):
    """Notes the number of entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.entries = max(self.entries, out.numel())
        return out


def test_the_low_rank_matrix_is_never_formed() -> None:
    width, steps, hidden, rank = 64, 50, 3, 2
    controller = Controller(CODE, width, hidden=hidden, rank=rank)
    z, e = torch.randn(steps, CODE), torch.randn(steps, width)
    with _LargestTensor() as applied, torch.no_grad():
        controller(z, e)
    with _LargestTensor() as formed, torch.no_grad():
        controller.matrix(z)
    assert formed.entries == steps * width * width
    assert applied.entries == steps * max(width, (hidden + 1) * rank)


@torch.no_grad()
def test_without_a_gradient_a_full_matrix_is_applied_to_some_steps_at_a_time() -> None:
    width, steps, hidden = 8, 2 * ROWS_AT_ONCE + 3, 2
    controller = Controller(CODE, width, hidden=hidden, rank=None).double()
    z, e = torch.randn(1, steps, CODE, dtype=torch.float64), torch.randn(1, steps, width, dtype=torch.float64)
    with _LargestTensor() as largest:
        applied = controller(z, e)
    assert largest.entries == max(ROWS_AT_ONCE * (hidden + 1) * width, steps * width)
    torch.testing.assert_close(applied, torch.einsum("btoi,bti->bto", controller.matrix(z), e))
    assert controller(z[:, :0], e[:, :0]).shape == (1, 0, width)


@pytest.mark.parametrize("rank", [2, None])
def test_steering_starts_near_the_identity(rank: int | None) -> None:
    controller = Controller(8, 64, rank=rank)
    change = controller(torch.randn(100, 8), torch.randn(100, 64))
    assert 0 < change.norm() < 0.5 * 100**0.5 * 8


def test_apply_is_that_of_any_module() -> None:
    controller = make_controller(2)
    assert type(controller).apply is nn.Module.apply
    visited: list[nn.Module] = []
    assert controller.apply(visited.append) is controller
    assert visited == [controller.code_to_hidden, controller]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": WIDTH + 1}, f"1..{WIDTH}"),
        ({"hidden": -1}, "hidden of the controller is -1"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Controller(CODE, WIDTH, **sizes)
