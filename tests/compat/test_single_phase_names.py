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


def test_every_option_has_an_effect_and_its_names() -> None:
    """Both sizes, kinds and lengths: in each pair of options something named by the other library differs."""
    cases: dict[str, Any] = {
        "temporal_sequence_embedder": BODY,
        "switch_entropy_quantiles": 0.5,
        "residual_stream_dropout": 0.5,
        "residual_stream_drop_prob": 0.5,
        "future_entropy_weights": (1.0, 4.0),
        "predict_next_switch_embed": True,
        "sigreg_loss_kwargs": {"num_slices": 8, "domain": (-1, 1), "num_knots": 3},
        "num_latent_pred_steps": 3,
        "control_penalty_floor": 0.0,
        "target_avg_token_length": 6.0,
        "kl_loss_threshold": 0.01,
    }
    for width, continuous, lengths in ((8, False, None), (16, True, torch.tensor([6, 3]))):
        state, actions = batch(continuous)
        found = {}
        for name, options in {"": {}, **{name: {name: value} for name, value in cases.items()}}.items():
            torch.manual_seed(0)
            losses, output = make(width, continuous, **options)(state, actions, episode_lens=lengths)
            assert output.latent_pred_entropy.shape == output.switch_beta.shape == (2, 6)
            assert (output.quantile_indices is None) == (name != "switch_entropy_quantiles")
            found[name] = [float(term.detach()) for term in losses] + output.latent_pred_entropy.flatten().tolist()
        assert [name for name in cases if found[name] == found[""]] == []


def test_switches_by_entropy_follow_only_where_asked() -> None:
    model = make(switch_entropy_quantiles=(0.5, 0.9), eval_switch_entropy_quantile=0.9, switch_entropy_quantile_lr=1.0)
    state, actions = batch(False)
    model.eval()
    model(state, actions)
    assert model.running_entropy_quantiles.tolist() == [10.0, 10.0]
    _, output = model(state, actions, update_entropy_quantile=True, return_loss=False)
    torch.testing.assert_close(
        model.running_entropy_quantiles, torch.quantile(output.latent_pred_entropy, torch.tensor([0.5, 0.9]))
    )
    _, output = model(state, actions, return_loss=False)
    assert output.quantile_indices.tolist() == [1, 1]
    stored = simple.extract_grpo_data(model, output)
    assert stored.quantile_indices is output.quantile_indices
    logits, kl = model.get_action_dist_for_internal_rl(
        stored.state, stored.switch_beta, stored.quantile_indices, return_kl_loss=True
    )
    torch.testing.assert_close(logits, output.action_dist)
    torch.testing.assert_close(kl, model.calculate_kl_loss(output.action_dist))
    assert not hasattr(make(), "running_entropy_quantiles")


def test_a_replaced_mapper_is_what_samples() -> None:
    model = make()
    mapper = model.binary_mapper
    original = mapper.forward
    mapper.forward = lambda logits, *others, **options: original(0 * logits + 50.0, *others, **options)
    _, output = model(*batch(False), return_loss=False)
    assert (output.actions.argmax(-1) == 7).all()
    assert mapper.codes.shape == (8, 3)
    _, kl, index = original(torch.full((2, 3), 50.0), return_indices=True, reduce_aux_kl_loss=False)
    assert index.tolist() == [7, 7]
    assert kl.shape == (2,)
    logits = torch.zeros(2, 3, requires_grad=True)
    assert original(logits, straight_through=False)[0].grad_fn is None
    assert original(logits)[0].grad_fn is not None
    assert float(original(logits + 3.0, calc_aux_loss=False)[1]) == 0


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(UserError, match="actions are missing"):
        make()(batch(False)[0])
    with pytest.raises(UserError, match="reduction is 'none'"):
        make(sigreg_loss_kwargs={"reduction": "none"})
    vectors = torch.randn(2, 6, 8)
    torch.manual_seed(0)
    first = simple.TransformerWithMetacontroller.sigreg_loss(vectors, torch.ones(2, 6).bool(), num_slices=4)
    torch.manual_seed(0)
    torch.testing.assert_close(simple.TransformerWithMetacontroller.sigreg_loss(vectors, num_slices=4), first)
