"""Keywords of `metacontroller-pytorch`, each at two sizes and kinds of action, with and without lengths: it is taken,
losses are finite, gradients flow, and something is different from the default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compat_models import ACTIONS, BODY, CONDITION, STATE, STEPS, Binary, make_model, make_steering, theirs
from torch import Tensor, nn

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
pytestmark = pytest.mark.slow
CASES = [  # width, continuous, with lengths
    pytest.param(((8, False, False), (16, True, True)), id="two"),
    pytest.param(((8, False, True), (16, True, False)), id="others"),
]

CLONING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options of the model, of the call
    "embed_past_actions": ({"embed_past_actions": False}, {}),
    "attn_dim_head": ({"lower_body": {**BODY, "attn_dim_head": 8}}, {}),
    "dim_condition": ({"dim_condition": CONDITION}, {"condition": torch.ones(2, CONDITION)}),
    "normalize_state_action_losses": ({"normalize_state_action_losses": True}, {"update_loss_ema": True}),
    "loss_normalizer_beta": ({"normalize_state_action_losses": True, "loss_normalizer_beta": 0.5}, {}),
    "next_latent_loss_weight": ({"next_latent_loss_weight": 0.0}, {}),
    "dynamics_hidden_dim": ({"dynamics_hidden_dim": 5}, {}),
    "dynamics_num_layers": ({"dynamics_num_layers": 2}, {}),
    "lower_transformer_post_norm": ({"lower_transformer_post_norm": True}, {}),
    "states of one choice": ({"state_embed_readout": {"num_discrete": 7}}, {}),
    "states of several choices": ({"state_embed_readout": {"num_discrete": [7, 7, 7]}}, {}),
}
DISCOVERY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options of the metacontroller, of the call
    "dim_meta_controller": ({"dim_meta_controller": 12}, {}),
    "dim_latent": ({"dim_latent": 3}, {}),
    "decoder_expansion_factor": ({"decoder_expansion_factor": 3.0}, {}),
    "decoder_depth": ({"decoder_depth": 2}, {}),
    "hypernetwork_low_rank": ({"hypernetwork_low_rank": 3}, {}),
    "internal_sequence_embedder": ({"internal_sequence_embedder": {**BODY, "depth": 2}}, {}),
    "compact_sequence_embedding": ({"compact_sequence_embedding": True}, {}),
    "bidirectional": ({"bidirectional": False}, {}),
    "pool_embedded_sequence": ({"pool_embedded_sequence": False}, {}),
    "dim_sequence_summary_embed": ({"dim_sequence_summary_embed": 6}, {}),
    "switch_temperature": ({"switch_temperature": 0.1}, {}),
    "target_temporal_segment_len": ({"target_temporal_segment_len": 3}, {}),
    "ratio_loss_weight": ({"ratio_loss_weight": 0.5}, {}),
    "ratio_loss_chunk_size": ({"ratio_loss_chunk_size": 2}, {}),
    "hard_switch": ({"hard_switch": True}, {}),
    "hard_switch_straight_through": ({"hard_switch": True, "hard_switch_straight_through": True}, {}),
    "kl_loss_weight": ({"kl_loss_weight": 0.5}, {}),
    "kl_loss_warmup_steps": ({"kl_loss_warmup_steps": 10}, {}),
    "ratio_loss_final_weight": ({"ratio_loss_final_weight": 0.0, "ratio_loss_warmdown_steps": 1}, {}),
    "latent_action_barrier_scale": ({"latent_action_barrier_scale": 0.5}, {}),
    "dim_code_bits": ({"kind": Binary, "dim_code_bits": 2}, {}),
    "kl_loss_threshold": ({"kind": Binary, "kl_loss_threshold": 0.01}, {}),
    "a call's hard_switch": ({}, {"hard_switch": True}),
    "switch_beta_frequency": ({}, {"switch_beta_frequency": 2}),
    "ablate_switch_beta": ({}, {"ablate_switch_beta": torch.ones(2, STEPS)}),
    "meta_controller_temperature": ({}, {"meta_controller_temperature": 0.5}),
    "control_signal_multiplier": ({}, {"control_signal_multiplier": 2.0}),
    "metacontroller_residual_stream_dropout": ({}, {"metacontroller_residual_stream_dropout": 0.5}),
}
POLICY: dict[str, dict[str, Any]] = {
    "mask": {"mask": torch.tensor([[1.0, 0, 0, 1, 0, 0]] * 2)},
    "mask of three axes": {"mask": torch.tensor([[1.0, 0, 0, 1, 0, 0]] * 2)[..., None]},
    "switch_beta_frequency": {"switch_beta_frequency": 3},
    "eps_clip": {"eps_clip": 0.01},
    "eps_clip of two": {"eps_clip": (0.01, 0.5)},
    "use_tpo": {"use_tpo": True},
    "tpo_eta": {"use_tpo": True, "tpo_eta": 0.5},
    "tpo_group_size": {"use_tpo": True, "tpo_group_size": 1},
    "per_entry": {"per_entry": True},
}


def moved(options: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}


def make_switching(width: int, device: str, **options: Any) -> Any:
    steering = make_steering(width, device, **options)
    nn.init.normal_(steering.switching.out.bias, std=1.0)
    return steering


def batch(model: Any, continuous: bool, lengths: bool, device: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    torch.manual_seed(1)
    sizes = model.arguments["state_embed_readout"].get("num_discrete")
    states = torch.randn(2, STEPS, STATE)
    if sizes is not None:
        states = torch.randint(7, (2, STEPS) if isinstance(sizes, int) else (2, STEPS, 3))
    actions = torch.randn(2, STEPS, ACTIONS) if continuous else torch.randint(ACTIONS, (2, STEPS))
    given = {"episode_lens": torch.tensor([STEPS, 3], device=device)} if lengths else {}
    return states.to(device), actions.to(device), given


def learned(loss: Tensor, learner: Any) -> list[float]:
    """The loss, the size of its gradient, and how many numbers learn; all finite, and some learn."""
    learner.zero_grad()
    loss.backward()
    gradients = [value.grad for value in learner.parameters() if value.grad is not None]
    size = float(sum(gradient.double().abs().sum() for gradient in gradients))
    assert torch.isfinite(loss)
    assert 0 < size < float("inf")
    return [float(loss.detach()), size, sum(value.numel() for value in learner.parameters())]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keyword", CLONING)
@pytest.mark.parametrize("cases", CASES)
def test_a_keyword_of_the_transformer(keyword: str, cases: Any, device: str) -> None:
    options, call = CLONING[keyword]
    for width, continuous, lengths in cases:
        found = []
        for chosen, given in ((options, call), ({}, {})):
            model = make_model(width, continuous, device, **chosen)
            states, actions, known = batch(model, continuous, lengths, device)
            known |= moved(given, device)
            model(states, actions, **known)  # a running scale is known from the second call on
            found.append(learned(torch.stack(list(model(states, actions, **known))).sum(), model))
        assert found[0] != found[1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keyword", DISCOVERY)
@pytest.mark.parametrize("cases", CASES)
def test_a_keyword_of_the_metacontroller(keyword: str, cases: Any, device: str) -> None:
    options, call = DISCOVERY[keyword]
    for width, continuous, lengths in cases:
        found = []
        model = make_model(width, continuous, device)
        for chosen, given in ((options, call), ({"kind": options.get("kind", theirs.MetaController)}, {})):
            steering = make_switching(width, device, **chosen)
            steering.maybe_increment_kl_loss_step()
            states, actions, known = batch(model, continuous, lengths, device)
            known |= {"meta_controller": steering, "discovery_phase": True, **moved(given, device)}
            losses = model(states, actions, **known)
            found.append(learned(losses.action_recon + losses.kl + losses.ratio, steering))
        assert all(value.grad is None for value in model.parameters())
        assert found[0] != found[1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keyword", POLICY)
@pytest.mark.parametrize("kind", [theirs.MetaController, Binary], ids=["continuous", "discrete"])
def test_a_keyword_of_the_policy_loss(keyword: str, kind: Any, device: str) -> None:
    for width, lengths in ((8, False), (16, True)):
        steering = make_switching(width, device, kind=kind)
        torch.manual_seed(1)
        residual = torch.randn(2, STEPS, width, device=device)
        codes = steering.codes.sample(steering.get_action_dist_for_internal_rl(residual)).detach()
        old = steering.log_prob(steering.get_action_dist_for_internal_rl(residual), codes).detach()
        old = old + 0.2 * torch.randn_like(old)
        known = {"episode_lens": torch.tensor([STEPS, 4], device=device)} if lengths else {}
        stored = residual, old, codes, torch.tensor([1.0, -0.5], device=device)
        found = [
            learned(steering.policy_loss(*stored, **known, **moved(given, device)), steering)
            if given.get("tpo_group_size") != 1
            else [float(steering.policy_loss(*stored, **known, **given).detach())]
            for given in (POLICY[keyword], {})
        ]
        assert found[0] != found[1]
