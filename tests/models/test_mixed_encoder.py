"""States of categories and numbers at once: encoder and readout against their parts, entry by entry, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metacontroller.errors import UserError
from metacontroller.models.encoders import MixedEncoder
from metacontroller.models.readouts import MixedReadout, gaussian_log_prob
from metacontroller.models.transformer import Transformer

DIM, SIZES, NUMBERS = 6, [3, 2], 2


def states() -> Tensor:
    chosen = [torch.randint(size, (2, 4)) for size in SIZES]
    return torch.cat([torch.stack(chosen, -1).double(), torch.randn(2, 4, NUMBERS).double()], -1)


def test_the_encoder_is_a_sum_of_rows_and_a_linear_map() -> None:
    encoder = MixedEncoder(DIM, sizes=SIZES, num_continuous=NUMBERS).double()
    seen = states()
    found = encoder(seen)
    for row in range(2):
        for t in range(4):
            first, second = (int(value) for value in seen[row, t, :2])
            slow = encoder.table.weight[first] + encoder.table.weight[3 + second]
            slow = slow + encoder.linear.weight @ seen[row, t, 2:] + encoder.linear.bias
            torch.testing.assert_close(found[row, t], slow)


def test_the_readout_is_the_product_of_its_parts() -> None:
    readout = MixedReadout(DIM, SIZES, NUMBERS).double()
    hidden, seen = torch.randn(2, 4, DIM, dtype=torch.float64), states()
    params = readout(hidden)
    for row in range(2):
        for t in range(4):
            logits, p = readout.categories.linear(hidden[row, t]), params[row, t]
            slow = logits[:3].log_softmax(-1)[int(seen[row, t, 0])] + logits[3:].log_softmax(-1)[int(seen[row, t, 1])]
            slow = slow + gaussian_log_prob(p[5:], seen[row, t, 2:]).sum()
            torch.testing.assert_close(readout.log_prob(params, seen)[row, t], slow)
    parts = readout.categories.entropy(params[..., :5]) + readout.numbers.entropy(params[..., 5:])
    torch.testing.assert_close(readout.entropy(params), parts)
    sure = params.clone()
    sure[..., [2, 3]] = 1000.0
    sure[..., 7:] = -20.0
    drawn = readout.sample(sure)
    torch.testing.assert_close(drawn[..., :2], torch.tensor([2.0, 0.0]).double().expand(2, 4, 2))
    torch.testing.assert_close(drawn[..., 2:], sure[..., 5:7], atol=1e-6, rtol=0)


def test_a_model_of_mixed_states_learns_and_names_wrong_ones() -> None:
    body = {"depth": 1, "heads": 2}
    options = {"num_discrete": SIZES, "num_continuous": NUMBERS}
    model = Transformer(
        DIM,
        state_embed_readout=options,
        action_embed_readout={"num_discrete": 3},
        lower_body=body,
        upper_body=body,
    ).double()
    seen, actions = states(), torch.zeros(2, 4, dtype=torch.long)
    model.behavior_cloning_loss(seen, actions).state.backward()
    encoder = model.encoder
    assert isinstance(encoder, MixedEncoder)
    assert encoder.table.weight.grad is not None
    assert encoder.table.weight.grad.abs().sum() > 0
    for value, message in (
        (3.0, r", 0\] ranges over .*3\.0; each must lie in 0\.\.2"),
        (0.5, "whole number"),
    ):
        wrong = seen.clone()
        wrong[1, 2, 0] = value
        with pytest.raises(UserError, match=message):
            model.behavior_cloning_loss(wrong, actions)
    with pytest.raises(UserError, match="2 categories, then 2 numbers"):
        model.behavior_cloning_loss(seen[..., :3], actions)
    seen[0, 0, 3] = torch.inf
    with pytest.raises(UserError, match="NaN or infinite"):
        model.behavior_cloning_loss(seen, actions)
