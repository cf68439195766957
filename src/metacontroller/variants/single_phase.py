"""One phase instead of two: an action model that learns its own abstract actions while it learns to act.

    e_t = lower(o_1:t, a_<t)
    p_t, b_t   from how much e_t resembles e_{t-1}                  (`variants.switches`)
    y_t ~ binary code of emitter(e_1:t + embedding of b_1:t)        (Free Transformer, arXiv 2510.17558)
    z_t = b_t y_t + (1 - b_t) z_{t-1}                               (paper eq. 17)
    u_t = c_t V z_t,  c_t = 1 with the gradient of the gate's confidence
    action, next state ~ readouts of upper(norm(e_t + u_t))

Nothing is frozen and nothing that acts reads the future: the emitter that learns with the model is the policy that
internal RL trains. The codes are additive (V z), not a map of e as in the paper. Options: p_t from how unsure the model
is of the next residuals (`variants.switches`); a summary of the whole episode for the switch while it learns;
prediction of the residual at the next switch. After `metacontroller-pytorch`'s single-phase model; it is no part of the
paper. Axes: b batch, t steps, n_e residual, h bits, n_z = 2^h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.control.codes import BinaryCodes
from metacontroller.control.losses import ratio_loss
from metacontroller.control.sequence_embedder import SequenceEmbedder
from metacontroller.control.switching import mix_given
from metacontroller.data.trajectories import full_lengths, length_mask, masked_mean
from metacontroller.errors import UserError
from metacontroller.models.transformer import ModelCache, Transformer, make_body
from metacontroller.ranges import Count, Number, Share, check
from metacontroller.storage.module_file import Saveable
from metacontroller.variants.latent_prediction import LatentPrediction, NextSwitch, sigreg
from metacontroller.variants.switches import (
    THRESHOLD,
    EntropySwitch,
    SimilaritySwitch,
    confidence,
    hard_switch,
    open_at_first,
)


@dataclass
class SinglePhaseCache:
    """What a call hands to the next: caches of the model's bodies and of the emitter, the last key (b, w) of the
    switch or None, the code z (b, n_z), the steps so far, and the index of an entropy's quantile (b,) or None."""

    model: ModelCache
    emitter: Any
    key: Tensor | None
    z: Tensor
    steps: int
    quantile: Tensor | None = None


class Steering(NamedTuple):
    """Of one call. residual, control (b, t, n_e): e and u. action_dist (b, t, h): logits of the bits. actions
    (b, t, n_z): the code proposed at every step. switch_beta, probability (b, t): b with the gradient of p, and p.
    entropy (b, t): of the predicted residuals. quantile (b,): index of the quantile of it that an episode switches at,
    None where switches go by similarity. emitted (b, t, n_e): what the logits are read from."""

    residual: Tensor
    action_dist: Tensor
    actions: Tensor
    switch_beta: Tensor
    probability: Tensor
    entropy: Tensor
    quantile: Tensor | None
    emitted: Tensor
    control: Tensor


class SinglePhaseLosses(NamedTuple):
    """Scalars. state, action: mean negative log-likelihoods of a step. ratio: towards the target length of a segment.
    latent: of the next residuals. sigreg: of residuals that collapse. kl: of codes against their prior, beyond the free
    bits. next_switch: of the residual at the next switch, 0 unless the model predicts it. control: where a switch moves
    the residual too little to matter."""

    state: Tensor
    action: Tensor
    ratio: Tensor
    latent: Tensor
    sigreg: Tensor
    kl: Tensor
    next_switch: Tensor
    control: Tensor


class SinglePhase(Saveable, nn.Module):
    """The model of this module's docstring.

    dim, state_embed_readout, action_embed_readout, lower_body, upper_body, condition_on_actions: of `Transformer`;
    emitter: a body like them. bits: h. free_bits: of a step that cost no KL. switch_width: of the switch's queries and
    keys. target_length: of a segment. ahead: residuals that are predicted. directions: of SIGReg, drawn anew at each
    call; sigreg_domain, sigreg_points: of its integral. control_floor: the share of |e| / |u| at switches that costs
    nothing. dropout: of the residual before the code is added, in training; drop_episodes: the share of episodes whose
    whole residual is left out there.

    entropy_quantiles: switches by entropy, with options of `EntropySwitch` in ``entropy_options``; ahead_weights: of
    the residuals ahead in the entropy. sequence_embedder: options of `SequenceEmbedder`, whose summary of an episode,
    of width dim_sequence, the switch reads too in ``losses``, in a share ``sequence_share`` of the episodes.
    predict_switches: whether the emitter predicts the residual at the next switch. UserError for values out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        state_embed_readout: dict[str, Any],
        action_embed_readout: dict[str, Any],
        lower_body: dict[str, Any],
        upper_body: dict[str, Any],
        emitter: dict[str, Any],
        condition_on_actions: bool = True,
        bits: int = 4,
        free_bits: float = 0.0,
        switch_width: int = 256,
        target_length: float = 8.0,
        ahead: int = 2,
        directions: int = 256,
        control_floor: float = 0.5,
        dropout: float = 0.0,
        drop_episodes: float = 0.0,
        sigreg_domain: Sequence[float] = (-5.0, 5.0),
        sigreg_points: int = 17,
        entropy_quantiles: Sequence[float] | None = None,
        entropy_options: dict[str, Any] | None = None,
        ahead_weights: Sequence[float] | None = None,
        sequence_embedder: dict[str, Any] | None = None,
        dim_sequence: int = 32,
        sequence_share: float = 1.0,
        predict_switches: bool = False,
    ) -> None:
        super().__init__()
        self.remember_arguments(locals())
        check("target_length", target_length, Number(1, above=True))
        check("directions", directions, Count)
        for name, share in (("dropout", dropout), ("drop_episodes", drop_episodes), ("sequence_share", sequence_share)):
            check(name, share, Share)
        if ahead_weights is not None and len(ahead_weights) != ahead:
            raise UserError(f"ahead_weights are {list(ahead_weights)}; expected {ahead}, one for each residual ahead.")
        self.dim, self.target_length, self.control_floor = dim, target_length, control_floor
        self.directions, self.sigreg_domain, self.sigreg_points = directions, tuple(sigreg_domain), sigreg_points
        self.dropout, self.drop_episodes, self.sequence_share = dropout, drop_episodes, sequence_share
        self.ahead_weights = ahead_weights
        options = {"lower_body": lower_body, "upper_body": upper_body, "condition_on_actions": condition_on_actions}
        self.model = Transformer(
            dim, state_embed_readout=state_embed_readout, action_embed_readout=action_embed_readout, **options
        )
        self.emitter, self.emitter_norm = make_body(dim, "emitter", emitter), nn.LayerNorm(dim)
        self.switch = None if entropy_quantiles else SimilaritySwitch(dim, width=switch_width)
        self.switch_embedding = nn.Embedding(2, dim)
        self.codes = BinaryCodes(bits, free_bits=free_bits)
        self.to_logits = nn.Linear(dim, bits, bias=False)
        self.to_control = nn.Linear(self.codes.dim, dim, bias=False)
        self.steered_norm = nn.LayerNorm(dim)
        self.latents = LatentPrediction(dim, ahead=ahead)
        if entropy_quantiles:
            self.entropy_switch = EntropySwitch(dim, entropy_quantiles, **(entropy_options or {}))
        self.sequence_embedder = None
        if sequence_embedder is not None:
            self.sequence_embedder = SequenceEmbedder(dim, dim_sequence, dim=dim, **sequence_embedder)
            self.from_sequence = nn.Linear(dim_sequence, dim)
        self.next_switch = NextSwitch(dim) if predict_switches else None

    def steer(
        self,
        residual: Tensor,
        cache: SinglePhaseCache | None = None,
        *,
        temperature: float = 1.0,
        mask: Tensor | None = None,
        use_summary: bool = False,
        update: bool | None = None,
    ) -> tuple[Tensor, Steering]:
        """The residual that the upper body reads, (b, t, n_e), from residual (b, t, n_e), and what led to it.

        A cache is brought up to the last of these steps. temperature: of the codes, 0 for the likeliest. mask (b, t)
        bool: real steps, all if None. use_summary: whether these are whole episodes, of which the switch reads a
        summary if the model has one. update: of running quantiles, see `EntropySwitch.follow`.
        """
        before = None if cache is None or cache.steps == 0 else cache
        entropy = self.latents.entropy(residual, self.ahead_weights)
        key = quantile = None
        if self.switch is not None:
            read = residual + self._summary(residual, mask) if use_summary else residual
            probability, key = self.switch(read, None if before is None else before.key)
        else:
            quantile = self.entropy_switch.choose(len(residual)) if before is None else before.quantile
            probability = self.entropy_switch(entropy, quantile)
            probability = open_at_first(probability) if before is None else probability
            self.entropy_switch.follow(entropy, mask, update)
        gate = hard_switch(probability)
        emitted = self.emit(residual, gate, quantile, None if cache is None else cache.emitter)
        logits = self.to_logits(emitted)
        proposed = self.codes.sample(logits, temperature=temperature)
        z = mix_given(proposed, gate, None if cache is None else cache.z).z
        control = self.to_control(z) * confidence(probability)[..., None]
        if cache is not None:
            cache.key = None if key is None else key.detach()
            cache.z, cache.steps, cache.quantile = z[:, -1].detach(), cache.steps + residual.shape[1], quantile
        remaining = F.dropout(residual, self.dropout, self.training)
        if self.training and self.drop_episodes:
            stay = torch.rand(len(remaining), device=remaining.device) >= self.drop_episodes
            remaining = remaining * stay[:, None, None]
        output = Steering(residual, logits, proposed, gate, probability, entropy, quantile, emitted, control)
        return self.steered_norm(remaining + control), output

    def _summary(self, residual: Tensor, mask: Tensor | None) -> Tensor | float:
        """Of whole episodes, for the switch: (b, 1, n_e), in training 0 for a random share of them; 0 without one."""
        if self.sequence_embedder is None:
            return 0.0
        real = torch.ones_like(residual[..., 0], dtype=torch.bool) if mask is None else mask
        summary = self.from_sequence(self.sequence_embedder(residual, real))
        if self.training and self.sequence_share < 1:
            summary = summary * (torch.rand(len(summary), device=summary.device) < self.sequence_share)[:, None]
        return summary[:, None]

    def emit(self, residual: Tensor, switch_beta: Tensor, quantile: Tensor | None = None, cache: Any = None) -> Tensor:
        """What the emitter makes of residuals (b, t, n_e) with switches (b, t): (b, t, n_e). quantile: (b,), (b, t)."""
        read = residual + self.switch_embedding((switch_beta >= THRESHOLD).long())
        if quantile is not None and self.switch is None:
            known = self.entropy_switch.embedding(quantile)
            read = read + (known[:, None] if quantile.dim() == 1 else known)
        return self.emitter_norm(self.emitter(read, cache))

    def action_dist(self, residual: Tensor, switch_beta: Tensor, quantile: Tensor | None = None) -> Tensor:
        """Logits of the bits (b, t, h) along stored residuals, as of `emit`."""
        return self.to_logits(self.emit(residual, switch_beta, quantile))

    def act(
        self,
        states: Tensor,
        past_actions: Tensor | None = None,
        cache: SinglePhaseCache | None = None,
        **options: Any,
    ) -> tuple[Tensor, Steering]:
        """Parameters of the action's distribution (b, t, ...) for states (b, t, ...), which follow a cache's steps.

        past_actions: as of `Transformer.embed`. A cache, from `empty_cache`, is brought up to date in place. options:
        of ``steer``.
        """
        lower, upper = (None, None) if cache is None else (cache.model.lower, cache.model.upper)
        residual = self.model.lower(self.model.embed(states, past_actions), lower)
        steered, output = self.steer(residual, cache, **options)
        return self.model.action_readout(self.model.upper(steered, upper)), output

    def empty_cache(self, batch: int, capacity: int = 32) -> SinglePhaseCache:
        """The cache of ``batch`` episodes before their first step; capacity: steps before it has to grow."""
        z = self.to_control.weight.new_zeros(batch, self.codes.dim)
        return SinglePhaseCache(
            self.model.empty_cache(batch, capacity), self.emitter.empty_cache(batch, capacity), None, z, 0
        )

    def losses(
        self,
        states: Tensor,
        actions: Tensor,
        episode_lens: Tensor | None = None,
        *,
        use_summary: bool = True,
        update: bool | None = None,
    ) -> tuple[SinglePhaseLosses, Steering]:
        """All losses of whole episodes, unweighted.

        states (b, T or T + 1, ...), actions (b, T, ...), episode_lens (b,): real steps. use_summary, update: as of
        ``steer``. UserError for a batch that does not fit.
        """
        self.model.check_batch(states, actions, episode_lens)
        lengths = full_lengths(episode_lens, actions)
        mask = length_mask(lengths, actions.shape[1])
        residual = self.model.residual(states, actions)
        steered, output = self.steer(residual, mask=mask, use_summary=use_summary, update=update)
        cloned = self.model.readout_losses(self.model.upper(steered), states, actions, lengths)
        switched = (output.switch_beta >= THRESHOLD) & mask
        strength = residual.norm(dim=-1) / output.control.norm(dim=-1).clamp_min(1e-5)
        directions = torch.randn(self.directions, self.dim, device=residual.device, dtype=residual.dtype)
        predictor, none = self.next_switch, residual.new_zeros(())
        return SinglePhaseLosses(
            state=cloned.state,
            action=cloned.action,
            ratio=ratio_loss(output.probability, mask, self.target_length, THRESHOLD),
            latent=self.latents.loss(residual, mask),
            sigreg=sigreg(residual[mask], directions, self.sigreg_domain, self.sigreg_points),
            kl=masked_mean(self.codes.kl(output.action_dist), mask),
            next_switch=none if predictor is None else predictor.loss(output.emitted, residual, switched),
            control=masked_mean(F.relu(strength - self.control_floor), switched),
        ), output
