"""`TransformerWithResnet`: images of either order through the three phases, and the pixel loss beside them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from metacontroller.errors import UserError

TransformerWithResnet = import_module("metacontroller.transformer_with_resnet").TransformerWithResnet
MetaController = import_module("metacontroller.metacontroller").MetaController
BODY = {"depth": 1, "heads": 2, "attn_dim_head": 4}


def make(**options: Any) -> Any:
    return TransformerWithResnet(
        8,
        **{
            "state_embed_readout": {"num_continuous": 6},
            "action_embed_readout": {"num_discrete": 4},
            "lower_body": BODY,
            "upper_body": BODY,
            "use_layernorm": True,
            **options,
        },
    )


def test_the_phases_see_images(tmp_path: Path) -> None:
    lengths = torch.tensor([3, 2])
    steering = MetaController(
        8, dim_meta_controller=8, dim_latent=2, internal_sequence_embedder=BODY, action_proposer=BODY
    )
    model = make(norm_final_encoding=True, encoder_kwargs=BODY)
    images, actions = torch.randint(256, (2, 3, 16, 16, 3), dtype=torch.uint8), torch.randint(4, (2, 3))
    losses, pixels = model(images, actions, episode_lens=lengths, return_visual_autoencoder_loss=True)
    (losses.state + losses.action + pixels).backward()
    seeing = [model.visual_encoder, model.visual_decoder, model.final_norm, model.attn]
    assert all(parameter.grad is not None for part in seeing for parameter in part.parameters())
    with torch.no_grad():
        encoded, feature_map, seen = model.visual_encode(images, return_feature_map=True)
        assert model.visual_encode(images)[1:] == (None, None)
        torch.testing.assert_close(model.visual_reconstruction_loss(feature_map, seen, lengths), pixels)
    base = super(TransformerWithResnet, model).forward
    torch.testing.assert_close(
        model(images, actions, episode_lens=lengths), base(encoded, actions, episode_lens=lengths)
    )

    model.zero_grad()
    found = model(images, actions, meta_controller=steering, discovery_phase=True, episode_lens=lengths)
    (found.action_recon + found.kl).backward()
    assert all(parameter.grad is None for parameter in model.parameters())

    with torch.no_grad():
        whole, _ = model(images, actions, return_action_cache=True)
        cache, parts = None, []
        for t in range(3):
            past = actions[:, t - 1 : t] if t else None
            step, cache = model(images[:, t : t + 1], past, cache=cache, return_cache=True)
            parts.append(step)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    model.save(tmp_path / "model.safetensors")
    again = TransformerWithResnet.init_and_load(tmp_path / "model.safetensors")
    torch.testing.assert_close(again.state_dict(), model.state_dict())


def test_features_that_are_predicted_get_no_gradient() -> None:
    images = torch.rand(1, 3, 16, 16, 3, requires_grad=True)
    make()(images, torch.zeros(1, 3, dtype=torch.long)).state.backward()
    assert images.grad is not None
    assert images.grad[:, :-1].abs().sum(dim=(2, 3, 4)).min() > 0
    assert images.grad[:, -1].abs().max() == 0


def test_channels_may_come_first_and_wrong_images_are_named() -> None:
    model = make(is_channel_last=False)
    images = torch.rand(1, 2, 3, 16, 16)
    torch.testing.assert_close(model.visual_encode(images)[0][0], model.visual_encoder(images[0]))
    with pytest.raises(UserError, match=r"expected images \(batch, time, 3, height, width\)"):
        model(images.movedim(2, -1), torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(UserError, match="resnet_type is 'vit'"):
        make(resnet_type="vit")
    with pytest.raises(UserError, match="depth is 101"):
        make(resnet_type="resnet101")


def test_batch_norms_are_frozen_where_a_metacontroller_steers() -> None:
    steering = MetaController(
        8, dim_meta_controller=8, dim_latent=2, internal_sequence_embedder=BODY, action_proposer=BODY
    )
    model = make(use_layernorm=False)
    images, actions = torch.rand(2, 3, 16, 16, 3), torch.randint(4, (2, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(images, actions, meta_controller=steering, discovery_phase=True, return_visual_autoencoder_loss=True)
    logits, _ = model(images[:1, :1], meta_controller=steering, return_cache=True)  # one image has no variance
    assert logits.shape == (1, 1, 4)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.visual_encoder.training
    model(images, actions)
    after = model.state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items() if "running_mean" in name)
