"""Attributes and small modules under the other library's names: they are the house's, read and set."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from metacontroller import Transformer
from metacontroller.control.codes import BinaryCodes
from metacontroller.errors import UserError

theirs = import_module("metacontroller.metacontroller")
Binary = import_module("metacontroller.metacontroller_with_binary_mapper").MetaControllerWithBinaryMapper
sequential = import_module("metacontroller.sequential_action_selection")
resnet = import_module("metacontroller.transformer_with_resnet")
grid = import_module("metacontroller.transformer_for_symbolic_grid")
BODY = {"depth": 1, "attn_dim_head": 4, "heads": 2}


def steering(**options: Any) -> Any:
    small = {"internal_sequence_embedder": BODY, "action_proposer": BODY, "hypernetwork_low_rank": 2}
    return theirs.MetaController(8, **{"dim_meta_controller": 8, "dim_latent": 4, **small, **options})


def model(**options: Any) -> Any:
    settings = {"state_embed_readout": {"num_continuous": 3}, "lower_body": BODY, "upper_body": BODY, **options}
    return theirs.Transformer(8, action_embed_readout={"num_discrete": 4}, **settings)


def test_options_of_a_metacontroller_are_read_and_set_under_their_names() -> None:
    made = steering(kl_loss_weight=0.5, kl_loss_warmup_steps=4, ratio_loss_weight=2.0, latent_action_barrier_scale=3.0)
    assert (made.kl_loss_weight, made.kl_loss_warmup_steps, made.apply_kl_loss_weight) == (0.5, 4, True)
    assert (made.latent_action_barrier_scale, made.has_ratio_loss, made.compact_sequence_embedding) == (
        3.0,
        True,
        False,
    )
    made.maybe_increment_kl_loss_step()
    assert (int(made.kl_loss_step_count), made.current_kl_loss_weight) == (1, 0.125)
    values = {
        "kl_loss_weight": 1.0,
        "kl_loss_warmup_steps": 2,
        "ratio_loss_weight": 0.25,
        "target_temporal_segment_len": 3,
        "ratio_loss_chunk_size": 2,
        "hard_switch_straight_through": True,
        "latent_action_barrier_scale": None,
        "apply_kl_loss_weight": False,
    }
    for name, value in values.items():
        setattr(made, name, value)
        assert getattr(made, name) == value
    assert (made.current_kl_loss_weight, made.current_ratio_loss_weight, made.target_segment_length) == (0.5, 0.25, 3)
    made.ratio_loss_weight = 0.0
    residual = torch.randn(2, 6, 8)
    assert made(residual, discovery_phase=True)[1].ratio_loss == 0
    assert made.decoder is made.controller
    assert made.summary_gru is made.history
    assert made.action_proposer_mean_log_var is made.policy.readout
    other = copy.deepcopy(made)
    torch.testing.assert_close(other.state_dict(), made.state_dict())
    proposer = nn.GRU(8, 8, batch_first=True)
    made.action_proposer = proposer
    torch.testing.assert_close(
        made.get_action_dist_for_internal_rl(residual), made.policy.readout(proposer(made.policy.norm(residual))[0])
    )


def test_parts_of_a_transformer_have_their_names() -> None:
    made = model(normalize_state_action_losses=True)
    states, actions = torch.randn(2, 5, 3), torch.randint(4, (2, 5))
    whole = made.state_embed(states)
    whole[:, 1:] += made.action_embed(actions[:, :-1])
    torch.testing.assert_close(made(states, actions, return_embed=True), whole)
    assert model(embed_past_actions=False).action_embed is None
    assert made.has_next_latent_loss
    assert not model(next_latent_loss_weight=0.0).has_next_latent_loss
    assert made.dynamics_model is made.next_latent
    assert made.bc_state_loss_normalizer.scale is not None
    assert model().discovery_action_loss_normalizer is None
    torch.manual_seed(0)
    logits = torch.randn(1, 4000, 4)
    assert torch.equal(made.action_readout.sample(logits, temperature=0.0), logits.argmax(-1))


@pytest.mark.parametrize("kind", [theirs.MetaController, Binary])
def test_a_policy_that_reads_every_step_steers_our_own_model_too(kind: Any) -> None:
    house = Transformer(
        8,
        state_embed_readout={"num_continuous": 3},
        action_embed_readout={"num_discrete": 4},
        lower_body={"depth": 1},
        upper_body={"depth": 1},
    )
    made = kind(8, dim_meta_controller=8, internal_sequence_embedder=BODY, action_proposer=BODY)
    nn.init.normal_(made.policy.readout.weight, std=0.5)
    states, cache, outputs, logits, past = torch.randn(2, 5, 3), None, [], [], None
    for t in range(5):
        step, cache = house.step(states[:, t : t + 1], past, made, cache, torch.Generator().manual_seed(t))
        past = house.action_readout.sample(step, temperature=0.0)
        outputs.append(cache.prev_hiddens.meta_controller)
        logits.append(step)
    stored = torch.cat([output.input_residual_stream for output in outputs], 1)
    dist = torch.cat([output.action_dist for output in outputs], 1)
    torch.testing.assert_close(made.get_action_dist_for_internal_rl(stored), dist)
    again, _ = house.step(states[:, :1], None, made, None, torch.Generator().manual_seed(0))
    torch.testing.assert_close(again, logits[0])
    other, _ = house.step(states[:, :1], None, made, None, torch.Generator().manual_seed(1))
    assert not torch.equal(other, logits[0])


def test_small_modules_are_the_houses() -> None:
    scale = theirs.LossNormalizer(2, beta=0.5)
    losses = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(scale(losses), losses)
    torch.testing.assert_close(scale.loss_scale, torch.tensor([1.0, 5.0**0.5]))
    torch.testing.assert_close(scale(losses, update_ema=False), losses / scale.loss_scale)
    with pytest.raises(UserError, match="expected 2 of them"):
        scale(losses[:1])
    dynamics = theirs.ResidualDynamics(8, cond_dim=3, hidden_dim=5, num_layers=2)
    nn.init.normal_(dynamics.net.last.weight)
    latent, tokens = torch.randn(2, 4, 8), torch.randn(2, 4, 3)
    torch.testing.assert_close(dynamics(tokens, latent), dynamics.net(latent, tokens))
    x, mask = torch.randn(2, 5, 8), torch.arange(5) < torch.tensor([[5], [3]])
    pooled = theirs.BidirectionalSequenceEmbedder(8, **BODY)
    found = pooled(x, mask=mask)
    pooled.pooled = False
    torch.testing.assert_close(found[1], pooled(x, mask=mask)[1, :3].mean(0).expand(5, 8))
    torch.testing.assert_close(pooled(x[1:, :3]), pooled(x, mask=mask)[1:, :3])
    causal = theirs.CausalSequenceEmbedder(8, **BODY)
    torch.testing.assert_close(causal(x[:, :3]), causal(x, mask=mask)[:, :3])
    compact = import_module("metacontroller.compact_sequence_embedder").CompactSequenceEmbedder(8, num_layers=2)
    torch.testing.assert_close(compact(x)[0], compact.gru(x)[1][-1, 0].expand(5, 8))
    with torch.device("meta"):
        networks = [make(7, use_layernorm=True) for make in (resnet.resnet18, resnet.resnet34, resnet.resnet50)]
        assert networks[0](torch.randn(1, 3, 32, 32)).shape == (1, 7)
    assert [(len(network.blocks), network.map_channels) for network in networks] == [(8, 512), (16, 512), (16, 2048)]


def test_saving_asks_before_it_overwrites(tmp_path: Path) -> None:
    for made in (steering(), model(), theirs.CausalSequenceEmbedder(8, **BODY)):
        path = tmp_path / f"{type(made).__name__}.safetensors"
        made.save(path, overwrite=False)
        with pytest.raises(UserError, match="overwrite is False"):
            made.save(path, overwrite=False)
        made.save(path)
        torch.testing.assert_close(type(made).init_and_load(path).state_dict(), made.state_dict())


def test_binary_codes_are_sampled_by_their_mapper() -> None:
    made = Binary(8, dim_code_bits=3, dim_meta_controller=8, internal_sequence_embedder=BODY, action_proposer=BODY)
    original = made.binary_mapper.forward
    made.binary_mapper.forward = lambda logits, *others, **options: original(0 * logits - 50.0, *others, **options)
    _, output = made(torch.randn(2, 5, 8))
    assert (output.actions.argmax(-1) == 0).all()
    noise = torch.randn(2, 5, 3)
    logits = torch.randn(2, 5, 3)
    torch.testing.assert_close(made.codes.sample(logits, noise=noise), BinaryCodes(3).sample(logits, noise=noise))
    made.binary_mapper.forward = original
    made.binary_mapper.deterministic_on_eval = True
    made.eval()
    sure = made.codes.sample(logits)
    assert torch.equal(made.codes.codes[sure.argmax(-1)], logits > 0)
    assert (made.binary_mapper.bits, made.binary_mapper.num_codes) == (3, 8)


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(UserError, match="needs JAX"):
        sequential.torch_jax_sequential_selection()
    with pytest.raises(UserError, match="leave it out"):
        grid.TransformerForSymbolicGrid(8, state_embed_readout={"num_continuous": 3})
    with pytest.raises(UserError, match="internal_sequence_embedder has an unknown option 'width'"):
        steering(internal_sequence_embedder={"depth": 1, "width": 4})


def test_bodies_without_heads_fit_any_width() -> None:
    made = theirs.Transformer(
        6,
        state_embed_readout={"num_continuous": 3},
        action_embed_readout={"num_discrete": 4},
        lower_body={"depth": 1},
        upper_body={"depth": 1},
    )
    assert made.lower_body.dim_head == 64
    assert model(lower_body={"depth": 1}, upper_body={"depth": 1}).lower_body.dim_head == 2
