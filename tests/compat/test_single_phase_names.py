"""The single-phase model under the other library's names: losses, acting from a cache, internal RL."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from metacontroller.errors import UserError

simple = import_module("metacontroller.simple_metacontroller")
BODY = {"depth": 1, "heads": 2, "attn_dim_head": 4}


def make(width: int = 8, continuous: bool = False, **options: Any) -> Any:
    settings = {
        "state_embed_readout": {"num_continuous": 3} if continuous else {"num_discrete": 5},
        "action_embed_readout": {"num_continuous": 2} if continuous else {"num_discrete": 4},
        **dict.fromkeys(("lower_body", "upper_body", "emitter_decoder"), BODY),
        **{"dim_code_bits": 3, "dim_queries_keys": 8, "target_avg_token_length": 4.0, **options},
    }
    return simple.TransformerWithMetacontroller(width, **settings)


def batch(continuous: bool, steps: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    if continuous:
        return torch.randn(2, steps, 3), torch.randn(2, steps, 2)
    return torch.randint(5, (2, steps)), torch.randint(4, (2, steps))


@pytest.mark.parametrize(("width", "continuous"), [(8, False), (16, True)])
@pytest.mark.parametrize("lengths", [None, torch.tensor([6, 3])])
def test_losses_acting_and_internal_rl(
    width: int, continuous: bool, lengths: torch.Tensor | None, tmp_path: Path
) -> None:
    model, (state, actions) = make(width, continuous), batch(continuous)
    losses, output = model(state, actions, episode_lens=lengths)
    torch.testing.assert_close(losses.latent_loss, losses.latent_ar_loss + 0.05 * losses.sigreg_loss)
    assert output.kl_loss is losses.kl_loss
    parts = losses.bc_state_loss, losses.bc_action_loss, losses.ratio_loss, losses.latent_loss
    (sum(parts) + losses.kl_loss + losses.control_penalty_loss).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

    model.eval()
    model.binary_mapper.deterministic_on_eval = True
    with torch.no_grad():
        whole, output = model(state, actions, return_loss=False)
        cache, parts = None, []
        for t in range(6):
            step, _, cache = model(
                state[:, t : t + 1], actions[:, t : t + 1], return_loss=False, cache=cache, return_cache=True
            )
            parts.append(step)
    torch.testing.assert_close(torch.cat(parts, 1), whole)

    stored = simple.extract_grpo_data(model, output)
    assert model.replay_buffer_field_dict["action"] == ("float", stored.action.shape[-1])
    model.zero_grad()
    options = {"switch_betas": stored.switch_beta, "mask": stored.switch_beta[..., None] > 0.5, "episode_lens": lengths}
    again = model.get_action_dist_for_internal_rl(stored.state, stored.switch_beta)
    torch.testing.assert_close(model.log_prob(again, stored.action), stored.log_prob)
    advantages = torch.tensor([1.0, -1.0])
    loss = model.policy_loss(stored.state, stored.log_prob, stored.action, advantages, **options)
    decided = (stored.switch_beta > 0.5) & (
        torch.arange(6) < (torch.tensor([6, 6]) if lengths is None else lengths)[:, None]
    )
    torch.testing.assert_close(loss, -(advantages[:, None] * decided).sum() / decided.sum())  # ratios are 1
    loss.backward()
    trained = {id(parameter) for parameter in model.internal_metacontroller_parameters()}
    assert {id(value) for value in model.parameters() if value.grad is not None} <= trained
    assert model.to_logits.weight.grad.abs().sum() > 0

    model.save(tmp_path / "model.safetensors")
    loaded = type(model).init_and_load(tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def test_what_is_not_here_is_named() -> None:
    with pytest.raises(UserError, match="switch_entropy_quantiles is no option here"):
        make(switch_entropy_quantiles=(0.5,))
    with pytest.raises(UserError, match="actions are missing"):
        make()(batch(False)[0])
