"""`TransformerWithResnet`: the action model over images, which a residual network turns into vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from metacontroller.data.trajectories import full_lengths, length_mask, masked_mean
from metacontroller.errors import UserError
from metacontroller.models.attention import AttentionBody
from metacontroller.variants.resnet import ResNet, ResNetDecoder, pixel_losses

from .compat_names import body_options
from .compat_transformer import BehavioralCloningLosses, Transformer


class TransformerWithResnet(Transformer):
    """States (b, t, y, x, c), or (b, t, c, y, x) without ``is_channel_last``: floats, or uint8 that are divided by 255.

    resnet_type: "resnet18", "resnet34" or "resnet50". The number of features is that of
    ``state_embed_readout=dict(num_continuous=...)``; they are what the state loss predicts, without a gradient there.
    use_layernorm: instead of batch norm. norm_final_encoding: a layer norm over the features. encoder_kwargs: of a
    two-sided attention body over the cells of the feature map, before they are pooled.
    """

    def __init__(
        self,
        dim: int,
        resnet_type: str = "resnet18",
        is_channel_last: bool = True,
        use_layernorm: bool = False,
        norm_final_encoding: bool = False,
        encoder_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        given = dict(locals())
        super().__init__(dim, **options)
        self.remember_arguments(given)
        readout, depth = options["state_embed_readout"], resnet_type.removeprefix("resnet")
        features = readout.get("num_continuous")
        if not depth.isdecimal() or features is None:
            raise UserError(
                f"resnet_type is {resnet_type!r} and state_embed_readout {readout!r}; expected 'resnet18', 'resnet34' "
                "or 'resnet50', and dict(num_continuous=...)."
            )
        self.is_channel_last = is_channel_last
        self.visual_encoder = ResNet(int(depth), features, layer_norm=use_layernorm)
        channels = self.visual_encoder.map_channels
        self.visual_decoder = ResNetDecoder(channels, layer_norm=use_layernorm)
        self.final_norm = nn.LayerNorm(features) if norm_final_encoding else nn.Identity()
        attention = None if encoder_kwargs is None else body_options(encoder_kwargs, channels)
        self.attn = None if attention is None else AttentionBody(channels, causal=False, **attention)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        state: Tensor,
        actions: Tensor | None = None,
        return_visual_autoencoder_loss: bool = False,
        **options: Any,
    ) -> Any:
        """As of `Transformer`, and with ``return_visual_autoencoder_loss`` the pixel loss beside it.

        Where a metacontroller steers, the model is frozen, and so is what sees: batch norms keep their statistics.
        """
        steering = self.meta_controller if options.get("meta_controller") is None else options["meta_controller"]
        steered = steering is not None and not options.get("force_behavior_cloning")
        with self._still() if steered else nullcontext():
            encoded, feature_map, images = self.visual_encode(state, return_feature_map=True)
            pixels = None
            if return_visual_autoencoder_loss:
                pixels = self.visual_reconstruction_loss(feature_map, images, options.get("episode_lens"))
        result = super().forward(encoded, actions, **options)
        return result if pixels is None else (result, pixels)

    @contextmanager
    def _still(self) -> Iterator[None]:
        """Context in which what sees gets no gradient and keeps its statistics."""
        parts = [part for part in (self.visual_encoder, self.visual_decoder) if part.training]
        for part in parts:
            part.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for part in parts:
                part.train()

    def visual_encode(self, x: Tensor, return_feature_map: bool = False) -> tuple[Tensor, Any, Any]:
        """Features (b, t, n) of images, and if asked the maps (b, t, c, y, x) they are means of, and the pixels."""
        images = self._images(x)
        maps = self.visual_encoder.feature_map(images.flatten(0, 1))
        cells = maps.flatten(2).mT
        cells = cells if self.attn is None else self.attn(cells)
        encoded = self.final_norm(self.visual_encoder.readout(cells.mean(1)))
        encoded, maps = (part.unflatten(0, images.shape[:2]) for part in (encoded, maps))
        return (encoded, maps, images) if return_feature_map else (encoded, None, None)

    def _images(self, state: Tensor) -> Tensor:
        """(b, t, c, y, x) floats; UserError for another shape."""
        images = state.movedim(-1, 2) if self.is_channel_last and state.dim() == 5 else state
        if images.dim() != 5 or images.shape[2] != 3:
            order = "(batch, time, height, width, 3)" if self.is_channel_last else "(batch, time, 3, height, width)"
            raise UserError(f"state has shape {tuple(state.shape)}; expected images {order}.")
        weight = self.visual_encoder.readout.weight
        return images.to(weight.dtype) / 255 if images.dtype == torch.uint8 else images

    def visual_reconstruction_loss(
        self, feature_map: Tensor, normalized_pixels: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """The mean over real states of -log p of their pixels, from what `visual_encode` gives; a scalar."""
        images = normalized_pixels
        batch, steps = images.shape[:2]
        mean, log_variance = self.visual_decoder(feature_map.flatten(0, 1), images.shape[-2:])
        losses = pixel_losses(mean, log_variance, images.flatten(0, 1)).view(batch, steps)
        return masked_mean(losses, length_mask(full_lengths(lengths, losses), steps))

    def _losses(self, phase: str, hidden: Tensor, state: Tensor, *others: Any) -> BehavioralCloningLosses:
        """The next state is a target alone: features that came to meet their prediction could all become one."""
        return super()._losses(phase, hidden, state.detach(), *others)


def _maker(depth: int) -> Callable[..., ResNet]:
    """Makes our network of so many layers: images (b, 3, y, x) -> (b, num_classes)."""
    return lambda num_classes=1000, use_layernorm=False: ResNet(depth, num_classes, layer_norm=use_layernorm)


resnet18, resnet34, resnet50 = _maker(18), _maker(34), _maker(50)
