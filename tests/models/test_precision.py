"""Products in bfloat16: near those of float32, with everything that needs float32 in it; float32 unless asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metacontroller import MetaController, Transformer
from metacontroller.control.discovery_losses import kl_loss, steered_losses
from metacontroller.models.config import ModelConfig
from metacontroller.models.precision import check_precision, prefers_bfloat16, products, weights_cast_once


def make(kind: str, chosen: str) -> tuple[Transformer, MetaController]:
    """The same model and metacontroller for every precision."""
    torch.manual_seed(0)
    body: dict[str, Any] = {"kind": kind, "depth": 2, "heads": 4}
    model = Transformer(
        32,
        action_embed_readout={"num_discrete": 4},
        state_embed_readout={"num_continuous": 5},
        lower_body=body,
        upper_body=body,
        precision=chosen,  # type: ignore[arg-type]
    )
    sizes: dict[str, Any] = {"dim_meta_controller": 16, "dim_latent": 3, "rank": 4}
    return model, MetaController(32, **sizes, precision=chosen)  # type: ignore[arg-type]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """states, actions, lengths."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(6, 9, 5, generator=generator)
    return states, torch.randint(4, (6, 8), generator=generator), torch.tensor([8, 1, 3, 8, 5, 4])


@pytest.mark.parametrize("kind", ["attention", "hawk"])
def test_losses_and_gradients_are_near_those_of_float32_and_of_its_type(kind: str) -> None:
    states, actions, lengths = batch()
    results: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for chosen in ("float32", "bfloat16"):
        model, steering = make(kind, chosen)
        noise = steering.sample_noise(6, 8, torch.Generator().manual_seed(2))
        plain = model.behavior_cloning_loss(states, actions, lengths)
        sum(plain).backward()  # type: ignore[union-attr]
        losses, output = steered_losses(steering, model, states, actions, lengths, noise=noise)
        kl = kl_loss(output)
        (losses.action + kl).backward()
        assert all(value.dtype == torch.float32 for value in (output.beta, output.z, output.kl, output.steered))
        gradients = [p.grad for p in (*model.parameters(), *steering.discovery_parameters()) if p.grad is not None]
        results[chosen] = [*plain, *losses, kl], gradients
    for value, reference in zip(results["bfloat16"][0], results["float32"][0], strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, reference, rtol=0.02, atol=0.02)
    flat, reference = (torch.cat([g.flatten() for g in results[name][1]]) for name in ("bfloat16", "float32"))
    assert flat.dtype == torch.float32
    assert float((flat - reference).norm() / reference.norm()) < 0.05
    assert not torch.equal(flat, reference)


@pytest.mark.parametrize("kind", ["attention", "hawk"])
def test_steps_agree_with_the_sequence(kind: str) -> None:
    model, _ = make(kind, "bfloat16")
    states, actions, _ = batch()
    with torch.no_grad():
        whole = model.action_readout(model.upper(model.residual(states, actions)))
        cache, logits = None, []
        for t in range(8):
            step, cache = model.step(states[:, t : t + 1], actions[:, t - 1 : t] if t else None, cache=cache)
            logits.append(step)
    assert cache is not None
    if kind == "attention":
        assert cache.prev_hiddens.lower_body.keys[0].dtype == torch.float32  # type: ignore[union-attr]
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=0.05, atol=0.02)


def test_a_controller_of_zeros_changes_no_bit() -> None:
    model, steering = make("attention", "bfloat16")
    with torch.no_grad():
        for weight in steering.controller.parameters():
            weight.zero_()
        states, actions, _ = batch()
        residual = model.residual(states, actions)
        assert torch.equal(model.upper(steering.steer(residual, torch.randn(6, 8, 3))), model.upper(residual))


def test_acting_draws_codes_and_their_densities_in_float32() -> None:
    model, steering = make("attention", "bfloat16")
    _, output = steering.act(model.lower(model.embed(batch()[0][:, :1])))
    assert output.action_dist.dtype == output.actions.dtype == output.switch_beta.dtype == torch.float32


def test_float32_leaves_the_callers_autocast_alone() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16), products("float32", x):
        assert (x @ x).dtype == torch.bfloat16
    with products("float32", x):
        assert (x @ x).dtype == torch.float32
    with products("bfloat16", x):
        assert (x @ x).dtype == torch.bfloat16
        assert (x.double() @ x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "maker", "quicker"),
    [
        ("avx512_bf16", "AMD EPYC", True),
        ("amx_bf16", "Intel Xeon", True),
        ("avx512_bf16", "Intel Xeon", False),
        ("avx2", "AMD EPYC", False),
    ],
)
def test_auto_asks_the_processor(name: str, maker: str, quicker: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: True, "cpu_name": maker}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    prefers_bfloat16.cache_clear()
    try:
        dtypes = []
        for rows in (1, 10_000):
            x = torch.ones(rows, 8)
            with products("auto", x):
                dtypes.append((x @ torch.ones(8, 8)).dtype)
    finally:
        prefers_bfloat16.cache_clear()
    assert dtypes == [torch.bfloat16 if quicker else torch.float32] * 2


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_a_row_comes_out_alike_in_any_batch(precision: str) -> None:
    """Log-probabilities that RL compares may be of batches of different sizes."""
    model = Transformer(
        128,
        action_embed_readout={"num_discrete": 4},
        state_embed_readout={"num_continuous": 6},
        lower_body={"depth": 1},
        upper_body={"depth": 1},
        precision=precision,  # type: ignore[arg-type]
    )
    states, actions = torch.randn(1024, 20, 6), torch.randint(0, 4, (1024, 20))

    def log_prob(rows: int) -> torch.Tensor:
        logits = model.action_readout(model.upper(model.residual(states[:rows], actions[:rows])))
        return model.action_readout.log_prob(logits, actions[:rows])

    with torch.no_grad():
        torch.testing.assert_close(log_prob(16), log_prob(1024)[:16], rtol=0, atol=1e-5)


def test_weights_are_cast_once_while_acting(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = torch.nn.Linear(8, 8)
    with torch.no_grad(), weights_cast_once():
        for factor in (1.0, 2.0):
            with products("bfloat16", linear.weight):
                once = linear(torch.ones(1, 8))
            linear.weight.mul_(factor)
    with torch.no_grad(), products("bfloat16", linear.weight):
        again = linear(torch.ones(1, 8))
    assert not torch.equal(once, again)  # within, the weight of the first product served the second; after, no longer


def test_auto_is_float32_where_nothing_is_known_of_the_device() -> None:
    assert not prefers_bfloat16("mps")


def test_the_precision_is_saved_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # as for users, who get our own messages
    model, steering = make("attention", "auto")
    for module in (model, steering):
        module.save(tmp_path / "module")
        assert type(module).init_and_load(tmp_path / "module").precision == "auto"
    sizes: dict[str, Any] = {"dim": 8, "lower_depth": 1, "upper_depth": 1, "heads": 2, "mlp_dim": 8}
    for refuse in (lambda: ModelConfig(**sizes, precision="half"), lambda: check_precision("half")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="precision is 'half'; expected one of 'float32', 'bfloat16', 'auto'"):
            refuse()
