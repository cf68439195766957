"""Conditions, loss scales, next-latent prediction and symbolic grids against slow versions, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metacontroller.errors import UserError
from metacontroller.models.blocks import Norm
from metacontroller.models.encoders import SymbolicGridEncoder
from metacontroller.models.transformer import Transformer, make_body
from metacontroller.variants.latent_prediction import NextLatent
from metacontroller.variants.loss_weights import LossScale

WIDTH, COND = 6, 3


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def randomize(module: Any) -> Any:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.double()


def test_an_adaptive_norm_is_its_formula_row_by_row() -> None:
    norm, x, condition = randomize(Norm(WIDTH, COND)), random(2, 4, WIDTH), random(2, COND).requires_grad_()
    weight, bias = norm.to_scale_and_shift.weight, norm.to_scale_and_shift.bias
    rows = []
    for b in range(2):
        scale, shift = (weight @ condition[b] + bias).chunk(2)
        for t in range(4):
            centred = x[b, t] - x[b, t].mean()
            rows.append(centred / (centred.square().mean() + 1e-5).sqrt() * (1 + scale) + shift)
    slow, fast = torch.stack(rows).view(2, 4, WIDTH), norm(x, condition)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(*(torch.autograd.grad(v.square().sum(), condition)[0] for v in (fast, slow)))
    torch.testing.assert_close(norm(x, condition[:, None].expand(-1, 4, -1)), fast)
    torch.testing.assert_close(norm(x[:, 0], condition[:, None]), fast[:, 0])
    for wrong, message in ((None, "condition is missing"), (random(2, 2), "one a row")):
        with pytest.raises(UserError, match=message):
            norm(x, wrong)


@pytest.mark.parametrize("kind", ["attention", "hawk"])
@pytest.mark.parametrize("final_norm", [False, True])
def test_a_body_with_a_condition_acts_as_over_sequences(kind: str, final_norm: bool) -> None:
    options = {"kind": kind, "depth": 2, "heads": 2, "final_norm": final_norm}
    body: Any = randomize(make_body(WIDTH, "lower_body", options, COND))  # pyright: ignore[reportArgumentType]
    x, condition = random(2, 5, WIDTH), random(2, COND).requires_grad_()
    whole = body(x, condition=condition)
    cache = body.empty_cache(2)
    steps = [body(x[:, t : t + 1], cache, condition=condition) for t in range(5)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    assert float(torch.autograd.grad(whole.square().sum(), condition)[0].abs().min()) > 0
    plain: Any = make_body(WIDTH, "lower_body", {**options, "final_norm": False}).double()
    missing = plain.load_state_dict({k: v for k, v in body.state_dict().items() if "norm" not in k}, strict=False)
    assert all("norm" in name for name in missing.missing_keys)
    untrained: Any = make_body(WIDTH, "lower_body", options, COND).double()
    torch.testing.assert_close(untrained(x, condition=condition), untrained(x, condition=random(2, COND)))


def test_a_transformer_passes_its_condition_to_both_bodies() -> None:
    model = Transformer(
        WIDTH,
        action_embed_readout={"num_discrete": 3},
        state_embed_readout={"num_continuous": 2},
        lower_body={"depth": 1, "heads": 2},
        upper_body={"depth": 1, "heads": 2},
        dim_condition=COND,
    )
    randomize(model)
    x, one, other = random(2, 4, WIDTH), random(2, COND), random(2, COND)
    assert not torch.allclose(model.lower(x, condition=one), model.lower(x, condition=other))
    assert not torch.allclose(model.upper(x, condition=one), model.upper(x, condition=other))


def test_a_loss_is_divided_by_its_running_root_mean_square() -> None:
    scale = LossScale(0.9).double()
    mean, losses = 1.0, [4.0, 2.0, 0.5]
    for value in losses:
        loss = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        out = scale(loss)
        assert out.item() == pytest.approx(value / mean**0.5)
        assert torch.autograd.grad(out, loss)[0].item() == pytest.approx(mean**-0.5)
        mean = 0.9 * mean + 0.1 * value**2
    scale.eval()(torch.tensor(100.0))
    assert scale.scale.item() == pytest.approx(mean**0.5)
    scale(torch.tensor(100.0), update=True)
    assert scale.scale.item() > 2
    with pytest.raises(UserError, match="between 0 and 1"):
        LossScale(1.0)


def test_next_latents_are_predicted_pair_by_pair() -> None:
    unit = NextLatent(WIDTH, hidden=5, layers=2).double()
    latents, actions = random(2, 4, WIDTH).requires_grad_(), random(2, 4, WIDTH).requires_grad_()
    torch.testing.assert_close(unit(latents, actions), latents)  # it starts as the identity
    randomize(unit)
    lengths = [4, 2]
    terms = []
    for b, length in enumerate(lengths):
        for t in range(length - 1):
            x = nn.functional.layer_norm(
                torch.cat([latents[b, t], actions[b, t]]), (2 * WIDTH,), unit.norm.weight, unit.norm.bias
            )
            for layer in unit.hidden:
                x = layer(x)
                x = x * torch.sigmoid(x)
            error = latents[b, t] + unit.last(x) - latents[b, t + 1].detach()
            terms.append(torch.where(error.abs() < 1, 0.5 * error**2, error.abs() - 0.5).mean())
    fast = unit.loss(latents, actions, torch.arange(4) < torch.tensor(lengths)[:, None])
    slow = torch.stack(terms).mean()
    torch.testing.assert_close(fast, slow)
    inputs = [latents, actions, *unit.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(v, inputs) for v in (fast, slow)))
    assert unit.loss(latents[:, :1], actions, torch.ones(2, 1, dtype=torch.bool)).item() == 0


def test_a_symbolic_grid_is_embedded_cell_by_cell() -> None:
    encoder = SymbolicGridEncoder(WIDTH, sizes=(4, 3), side=3, depth=1).double()
    randomize(encoder)
    grids = torch.stack([torch.randint(size, (2, 2, 3, 3)) for size in (4, 3)], -1)
    block: Any = encoder.blocks[0]
    table, kernel = encoder.table.weight, block.depthwise.weight
    for b in range(2):
        cells = torch.zeros(3, 3, WIDTH, dtype=torch.float64)
        for i in range(3):
            for j in range(3):
                kind, color = grids[b, 1, i, j].tolist()
                cells[i, j] = table[kind] + table[4 + color]
        out = []
        for i in range(3):
            for j in range(3):
                near = block.depthwise.bias.clone()
                for di in (-1, 0, 1):
                    for dj in (-1, 0, 1):
                        if 0 <= i + di < 3 and 0 <= j + dj < 3:
                            near = near + kernel[:, 0, di + 1, dj + 1] * cells[i + di, j + dj]
                hidden = nn.functional.gelu(block.mlp_in(block.norm(near)))
                out.append(encoder.norm(cells[i, j] + block.mlp_out(hidden)))
        torch.testing.assert_close(encoder(grids)[b, 1], torch.stack(out).mean(0))
    readout = encoder.state_readout(WIDTH).double()
    targets = encoder.targets(grids)
    logits = readout(random(2, 2, WIDTH))
    first = logits[0, 0].split([4, 3] * 9)
    expected = sum(part.log_softmax(-1)[int(target)] for part, target in zip(first, targets[0, 0], strict=True))
    torch.testing.assert_close(readout.log_prob(logits, targets)[0, 0], expected)
    encoder.check(grids)
    for wrong, message in ((grids + 4, "each must lie in"), (grids[..., :1], "grid of cells")):
        with pytest.raises(UserError, match=message):
            encoder.check(wrong)
    with pytest.raises(UserError, match="odd number"):
        SymbolicGridEncoder(WIDTH, kernel=2)
