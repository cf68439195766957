"""The switching gate: the loop against values computed by hand, the fast paths against the loop."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor

from metacontroller.kernels.gate_scan import GateOutput, _choose_backend, gate_scan

BATCH, TIME, HIDDEN, CODE = 5, 7, 6, 3
LEARNED = ("drive", "z_tilde", "w_code", "w_out", "b_out", "z_initial")

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed (it comes with CUDA builds of torch)")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CPU_BACKENDS = ("reference", "cpu")

MODES: dict[str, dict[str, Any]] = {
    "soft": {},
    "sharp": {"temperature": 0.3},
    "hard": {"threshold": 0.5},
    "straight-through": {"threshold": 0.6, "straight_through": True, "temperature": 0.5},
}


def make_inputs(seed: int = 0, noise: bool = False, **sizes: int) -> dict[str, Any]:
    """Random float64 arguments of `gate_scan`, with forced switches first and, in two rows, in the middle."""
    batch, time = sizes.get("batch", BATCH), sizes.get("time", TIME)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs: dict[str, Any] = {
        "drive": random(batch, time, HIDDEN),
        "z_tilde": random(batch, time, CODE),
        "w_code": random(HIDDEN, CODE),
        "w_out": random(HIDDEN),
        "b_out": random(),
        "z_initial": random(batch, CODE),
        "fresh": torch.zeros(batch, time, dtype=torch.bool),
    }
    inputs["fresh"][1:, 0] = True  # row 0 continues from z_initial
    inputs["fresh"][2, time // 2] = inputs["fresh"][3, time - 1] = True
    if noise:
        inputs["noise"] = random(batch, time)
    return inputs


def scan(inputs: dict[str, Any], changes: dict[str, Any] | None = None, **settings: Any) -> GateOutput:
    return gate_scan(**inputs | (changes or {}) | settings)


def values_and_gradients(inputs: dict[str, Any], through: str, **kwargs: Any) -> tuple[GateOutput, list[Tensor]]:
    """Outputs, and the gradients of the learned inputs of a random function of the outputs named in `through`."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in LEARNED}
    output = scan(inputs, leaves, **kwargs)
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for name in through.split("+"):
        value = getattr(output, name).cpu()
        loss = loss + (value * torch.randn(value.shape, generator=generator, dtype=value.dtype)).sum()
    return output, list(torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True))


def assert_same_as_reference(backend: str, mode: str, noise: bool, through: str, device: str = "cpu") -> None:
    inputs = {name: tensor.to(device) for name, tensor in make_inputs(noise=noise).items()}
    expected, expected_gradients = values_and_gradients(inputs, through, backend="reference", **MODES[mode])
    output, gradients = values_and_gradients(inputs, through, backend=backend, **MODES[mode])
    for got, want in zip(output, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for name, got, want in zip(LEARNED, gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    logit_learns = mode != "hard" or "beta" in through
    assert (expected_gradients[0].abs().sum() > 0) == logit_learns  # so that agreement is not agreement on zeros


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_hand_worked_numbers(backend: str) -> None:
    """One row, one hidden unit: logits ln 3 (beta 3/4) and then 0 from the code 3 held since step 1 (beta 1/2)."""
    output = gate_scan(
        torch.tensor([[[math.log(3.0)], [-6.0], [-2.0]]]),
        torch.tensor([[[4.0], [7.0], [1.0]]]),
        torch.tensor([[2.0]]),
        torch.tensor([1.0]),
        torch.tensor(0.0),
        fresh=torch.tensor([[False, False, True]]),
        backend=backend,
    )
    # z: 3/4 * 4 = 3; hidden relu(-6 + 2 * 3) = 0, so 1/2 * 7 + 1/2 * 3 = 5; then the forced 1
    torch.testing.assert_close(output.beta, torch.tensor([[0.75, 0.5, 1.0]]))
    torch.testing.assert_close(output.z, torch.tensor([[[3.0], [5.0], [1.0]]]))
    assert torch.equal(output.gate, output.beta)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_hand_worked_temperature_noise_and_threshold(backend: str) -> None:
    """Logit 1 + 0.5, noise -0.5 or -2.5, temperature 2: beta = sigmoid(0.5) and sigmoid(-0.5)."""
    output = gate_scan(
        torch.ones(1, 2, 1),
        torch.tensor([[[4.0], [9.0]]]),
        torch.zeros(1, 1),
        torch.ones(1),
        torch.tensor(0.5),
        fresh=torch.zeros(1, 2, dtype=torch.bool),
        noise=torch.tensor([[-0.5, -2.5]]),
        temperature=2.0,
        threshold=0.5,
        backend=backend,
    )
    torch.testing.assert_close(output.beta, torch.tensor([[0.6224593, 0.3775407]]))
    assert output.gate.tolist() == [[1.0, 0.0]]
    assert output.z.flatten().tolist() == [4.0, 4.0]


@pytest.mark.parametrize("through", ["z", "gate+beta", "z+gate+beta"])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_cpu_path_equals_reference(mode: str, noise: bool, through: str) -> None:
    assert_same_as_reference("cpu", mode, noise, through)


@needs_cuda
@needs_triton
@pytest.mark.parametrize("through", ["gate+beta", "z+gate+beta"])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_triton_path_equals_reference(mode: str, noise: bool, through: str) -> None:
    assert_same_as_reference("triton", mode, noise, through, device="cuda")


@pytest.fixture
def triton_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the Triton kernels on the CPU; the choice is made when their module is imported."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sys.modules.pop("metacontroller.kernels.gate_scan_triton", None)
    yield
    sys.modules.pop("metacontroller.kernels.gate_scan_triton", None)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_probability_at_the_threshold_switches(backend: str) -> None:
    inputs = {name: torch.zeros_like(value) for name, value in make_inputs().items()}  # beta is exactly 1/2
    for threshold, gate in ((0.5, 1.0), (0.6, 0.0)):
        assert bool((scan(inputs, backend=backend, threshold=threshold).gate == gate).all())


@needs_triton
@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) >= "2.5.0", reason="Triton 3.6's interpreter needs NumPy < 2.5")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("triton_interpreter")
def test_interpreted_triton_path_equals_reference(mode: str) -> None:
    assert_same_as_reference("triton", mode, noise=True, through="z+gate+beta")


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("mode", ["soft", "sharp"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradcheck(backend: str, mode: str, noise: bool) -> None:
    inputs = make_inputs(batch=4, time=3, noise=noise)

    def outputs(*leaves: Tensor) -> GateOutput:
        return scan(inputs, dict(zip(LEARNED, leaves, strict=True)), backend=backend, **MODES[mode])

    assert torch.autograd.gradcheck(outputs, [inputs[name].clone().requires_grad_() for name in LEARNED])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_future_does_not_change_the_past(backend: str, mode: str) -> None:
    inputs, seen = make_inputs(noise=True), 4
    before = scan(inputs, backend=backend, **MODES[mode])
    for name in ("drive", "z_tilde", "noise"):
        inputs[name][:, seen:] += 1
    inputs["fresh"][:, seen:] ^= True
    after = scan(inputs, backend=backend, **MODES[mode])
    assert all(torch.equal(x[:, :seen], y[:, :seen]) for x, y in zip(before, after, strict=True))
    assert not torch.equal(before.z[:, seen:], after.z[:, seen:])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_sequence_equals_steps(backend: str, mode: str) -> None:
    inputs = make_inputs(noise=True)
    sequence = scan(inputs, backend=backend, **MODES[mode])
    z = inputs["z_initial"]
    for t in range(TIME):
        step = {name: inputs[name][:, t : t + 1] for name in ("drive", "z_tilde", "noise", "fresh")}
        output = scan(inputs, step | {"z_initial": z}, backend=backend, **MODES[mode])
        z = output.z[:, 0]
        for got, want in zip(output, sequence, strict=True):
            torch.testing.assert_close(got[:, 0], want[:, t], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_open_gate_copies_the_proposal(backend: str) -> None:
    inputs = make_inputs()
    by_force = scan(inputs, {"fresh": torch.ones(BATCH, TIME, dtype=torch.bool)}, backend=backend)
    by_logit = scan(inputs, {"b_out": torch.tensor(1e4, dtype=torch.float64)}, backend=backend)
    for output in (by_force, by_logit):
        assert torch.equal(output.z, inputs["z_tilde"])
        assert torch.equal(output.beta, torch.ones_like(output.beta))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_shut_gate_holds_the_code_until_a_fresh_one(backend: str) -> None:
    inputs = make_inputs() | {"b_out": torch.tensor(-1e4, dtype=torch.float64)}
    z = scan(inputs, backend=backend).z
    assert torch.equal(z[0], inputs["z_initial"][0].expand(TIME, CODE))
    middle = TIME // 2
    assert torch.equal(z[2, :middle], inputs["z_tilde"][2, 0].expand(middle, CODE))
    assert torch.equal(z[2, middle:], inputs["z_tilde"][2, middle].expand(TIME - middle, CODE))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_hard_gate_is_binary_and_stops_the_gradient(backend: str) -> None:
    inputs = make_inputs()
    output, gradients = values_and_gradients(inputs, "z", backend=backend, threshold=0.5)
    gradient = dict(zip(LEARNED, gradients, strict=True))
    assert set(output.gate.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(output.gate, (output.beta >= 0.5).double())
    assert all(gradient[name].abs().sum() == 0 for name in ("drive", "w_code", "w_out", "b_out"))
    assert all(gradient[name].abs().sum() > 0 for name in ("z_tilde", "z_initial"))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_straight_through_has_hard_values_and_soft_slopes(backend: str) -> None:
    """One step: z = gate * z_tilde with gate 1, and dz/db_out = beta (1 - beta) z_tilde."""
    b_out = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    output = gate_scan(
        one,
        3 * one,
        one[0],
        0 * one[0, 0],
        b_out,
        fresh=torch.zeros(1, 1, dtype=torch.bool),
        threshold=0.5,
        straight_through=True,
        backend=backend,
    )
    assert output.gate.item() == 1.0
    assert output.z.item() == 3.0
    (slope,) = torch.autograd.grad(output.z.sum(), b_out)
    beta = 1 / (1 + math.exp(-0.4))
    assert slope.item() == pytest.approx(3 * beta * (1 - beta))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_fresh_steps_send_nothing_to_the_logit_or_the_code_before(backend: str) -> None:
    inputs = make_inputs()
    _, gradients = values_and_gradients(inputs, "z+gate+beta", backend=backend)
    gradient = dict(zip(LEARNED, gradients, strict=True))
    fresh = inputs["fresh"]
    assert gradient["drive"][fresh].abs().sum() == 0
    assert gradient["drive"][~fresh].abs().sum() > 0
    assert gradient["z_initial"][1:].abs().sum() == 0
    assert gradient["z_initial"][0].abs().sum() > 0


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_z_initial_defaults_to_zeros(backend: str) -> None:
    inputs = make_inputs()
    zeros = scan(inputs, {"z_initial": torch.zeros(BATCH, CODE, dtype=torch.float64)}, backend=backend)
    default = scan(inputs, {"z_initial": None}, backend=backend)
    assert torch.equal(zeros.z, default.z)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_half_precision_is_computed_in_float32(backend: str) -> None:
    inputs = {name: value if name == "fresh" else value.float() for name, value in make_inputs(noise=True).items()}
    rounded = inputs | {"drive": inputs["drive"].bfloat16()}
    expected = scan(inputs, {"drive": rounded["drive"].float()}, backend=backend)
    rounded["drive"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = scan(rounded, backend=backend)
        output.z.sum().backward()
    assert output.z.dtype == torch.float32
    assert torch.equal(output.z, expected.z)
    assert rounded["drive"].grad.dtype == torch.bfloat16


def test_inputs_are_left_alone_and_may_be_strided() -> None:
    inputs = make_inputs(noise=True)
    kept = {name: tensor.clone() for name, tensor in inputs.items()}
    strided = {name: tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor for name, tensor in inputs.items()}
    expected, expected_gradients = values_and_gradients(inputs, "z+beta", backend="cpu")
    output, gradients = values_and_gradients(strided, "z+beta", backend="cpu")
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(inputs[name], kept[name]) for name in inputs)


def test_auto_takes_the_fast_path_and_falls_back_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert _choose_backend("auto", cpu) == "cpu"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert _choose_backend("auto", cuda) == "triton"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _choose_backend("auto", cuda) == "cpu"
    with pytest.raises(ValueError, match="the package triton, which is not installed"):
        scan(make_inputs(), backend="triton")


def test_triton_refuses_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="needs CUDA tensors but drive is on cpu"):
        scan(make_inputs(), backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"drive": torch.zeros(BATCH, HIDDEN)},
            r"drive has shape \(5, 6\): expected a non-empty \(batch, time, hidden",
        ),
        ({"drive": torch.zeros(0, TIME, HIDDEN)}, r"drive has shape \(0, 7, 6\): expected a non-empty"),
        (
            {"drive": torch.zeros(BATCH, TIME, HIDDEN, dtype=torch.int64)},
            r"drive has dtype torch.int64: expected a float",
        ),
        ({"drive": torch.zeros(BATCH, TIME, HIDDEN)}, "z_tilde has dtype torch.float64: expected torch.float32"),
        (
            {"z_tilde": torch.zeros(BATCH, CODE)},
            r"z_tilde has shape \(5, 3\): expected a non-empty \(batch, time, code",
        ),
        ({"z_tilde": torch.zeros(BATCH, 2, CODE)}, r"z_tilde has shape \(5, 2, 3\): expected \(5, 7, 3\)"),
        ({"w_code": torch.zeros(CODE, HIDDEN)}, r"w_code has shape \(3, 6\): expected \(6, 3\)"),
        ({"w_out": torch.zeros(1, HIDDEN)}, r"w_out has shape \(1, 6\): expected \(6,\)"),
        ({"b_out": torch.zeros(1)}, r"b_out has shape \(1,\): expected \(\)"),
        ({"z_initial": torch.zeros(CODE)}, r"z_initial has shape \(3,\): expected \(5, 3\)"),
        ({"noise": torch.zeros(TIME)}, r"noise has shape \(7,\): expected \(5, 7\)"),
        ({"fresh": torch.zeros(BATCH, TIME)}, "fresh has dtype torch.float32: expected torch.bool"),
        ({"w_out": torch.zeros(HIDDEN, dtype=torch.float64, device="meta")}, "w_out is on meta: expected cpu"),
        ({"temperature": 0.0}, "temperature=0.0 is not allowed: it must be above 0"),
        ({"temperature": float("nan")}, "temperature=nan is not allowed"),
        ({"threshold": 1.5}, r"threshold=1.5 is not allowed: it must be in \[0, 1\]"),
        ({"straight_through": True}, "straight_through=True with threshold=None is not allowed: set a threshold"),
        ({"backend": "numba"}, "backend='numba' is unknown: use one of auto, reference, cpu, triton"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users, who get our own messages
    with pytest.raises(ValueError, match=message):
        scan(make_inputs(), change)
