"""One phase instead of two: an action model that learns its own abstract actions while it learns to act.

    e_t = lower(o_1:t, a_<t)
    p_t, b_t   from how much e_t resembles e_{t-1}                  (`control.similarity`)
    y_t ~ binary code of emitter(e_1:t + embedding of b_1:t)        (Free Transformer, arXiv 2510.17558)
    z_t = b_t y_t + (1 - b_t) z_{t-1}                               (paper eq. 17)
    u_t = c_t V z_t,  c_t = 1 with the gradient of the gate's confidence
    action, next state ~ readouts of upper(norm(e_t + u_t))

Nothing is frozen and nothing reads the future: the emitter that learns with the model is the policy that internal RL
trains. The codes are additive (V z), not a map of e as in the paper. After `metacontroller-pytorch`'s single-phase
model; it is no part of the paper. Axes: b batch, t steps, n_e residual, h bits, n_z = 2^h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.control.codes import BinaryCodes
from metacontroller.control.losses import ratio_loss
from metacontroller.control.similarity import THRESHOLD, SimilaritySwitch, confidence, hard_switch
from metacontroller.control.switching import mix_given
from metacontroller.data.trajectories import length_mask, masked_mean
from metacontroller.errors import UserError
from metacontroller.models.latent_prediction import LatentPrediction, sigreg
from metacontroller.models.transformer import ModelCache, Transformer, make_body
from metacontroller.storage.module_file import Saveable


@dataclass
class SinglePhaseCache:
    """What a call hands to the next: caches of the model's bodies and of the emitter, the last key (b, w) of the
    switch, the code z (b, n_z), and the steps so far."""

    model: ModelCache
    emitter: Any
    key: Tensor
    z: Tensor
    steps: int


class Steering(NamedTuple):
    """Of one call. residual, control (b, t, n_e): e and u. action_dist (b, t, h): logits of the bits. actions
    (b, t, n_z): the code proposed at every step. switch_beta, probability (b, t): b with the gradient of p, and p."""

    residual: Tensor
    control: Tensor
    action_dist: Tensor
    actions: Tensor
    switch_beta: Tensor
    probability: Tensor


class SinglePhaseLosses(NamedTuple):
    """Scalars. state, action: mean negative log-likelihoods of a step. kl: of codes against their prior, beyond the
    free bits. ratio: towards the target length of a segment. latent: of the next residuals. sigreg: of residuals that
    collapse. control: where a switch moves the residual too little to matter."""

    state: Tensor
    action: Tensor
    kl: Tensor
    ratio: Tensor
    latent: Tensor
    sigreg: Tensor
    control: Tensor


class SinglePhase(Saveable, nn.Module):
    """The model of this module's docstring.

    dim, state_embed_readout, action_embed_readout, lower_body, upper_body, condition_on_actions: of `Transformer`;
    emitter: a body like them. bits: h. free_bits: of a step that cost no KL. switch_width: of the switch's queries and
    keys. target_length: of a segment. ahead: residuals that are predicted. directions: of SIGReg, drawn anew at each
    call. control_floor: the share of |e| / |u| at switches that costs nothing. dropout: of the residual before the code
    is added, in training. UserError for values out of range.
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
    ) -> None:
        super().__init__()
        self.remember_arguments(locals())
        if target_length <= 1:
            raise UserError(f"target_length is {target_length}; expected more than 1 step.")
        if directions < 1:
            raise UserError(f"directions is {directions}; expected at least 1.")
        self.dim, self.target_length, self.directions = dim, target_length, directions
        self.control_floor, self.dropout = control_floor, dropout
        self.model = Transformer(
            dim,
            action_embed_readout=action_embed_readout,
            state_embed_readout=state_embed_readout,
            lower_body=lower_body,
            upper_body=upper_body,
            condition_on_actions=condition_on_actions,
        )
        self.emitter = make_body(dim, "emitter", emitter)
        self.emitter_norm = nn.LayerNorm(dim)
        self.switch = SimilaritySwitch(dim, width=switch_width)
        self.switch_embedding = nn.Embedding(2, dim)
        self.codes = BinaryCodes(bits, free_bits=free_bits)
        self.to_logits = nn.Linear(dim, bits, bias=False)
        self.to_control = nn.Linear(self.codes.dim, dim, bias=False)
        self.steered_norm = nn.LayerNorm(dim)
        self.latents = LatentPrediction(dim, ahead=ahead)

    def steer(
        self, residual: Tensor, cache: SinglePhaseCache | None = None, *, temperature: float = 1.0
    ) -> tuple[Tensor, Steering]:
        """The residual that the upper body reads, (b, t, n_e), from residual (b, t, n_e), and what led to it.

        A cache is brought up to the last of these steps. temperature: of the codes, 0 for the likeliest.
        """
        fresh = cache is None or cache.steps == 0
        probability, key = self.switch(residual, None if fresh or cache is None else cache.key)
        gate = hard_switch(probability)
        logits = self.action_dist(residual, gate, None if cache is None else cache.emitter)
        proposed = self.codes.sample(logits, temperature=temperature)
        z = mix_given(proposed, gate, None if cache is None else cache.z).z
        control = self.to_control(z) * confidence(probability)[..., None]
        if cache is not None:
            cache.key, cache.z, cache.steps = key.detach(), z[:, -1].detach(), cache.steps + residual.shape[1]
        kept = F.dropout(residual, self.dropout, self.training)
        return self.steered_norm(kept + control), Steering(residual, control, logits, proposed, gate, probability)

    def action_dist(self, residual: Tensor, switch_beta: Tensor, cache: Any = None) -> Tensor:
        """Logits of the bits (b, t, h), of the emitter along residuals (b, t, n_e) with switches (b, t)."""
        switched = (switch_beta >= THRESHOLD).long()
        return self.to_logits(self.emitter_norm(self.emitter(residual + self.switch_embedding(switched), cache)))

    def act(
        self,
        states: Tensor,
        past_actions: Tensor | None = None,
        cache: SinglePhaseCache | None = None,
        *,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Steering]:
        """Parameters of the action's distribution (b, t, ...) for states (b, t, ...), which follow a cache's steps.

        past_actions: as of `Transformer.embed`. A cache, from `empty_cache`, is brought up to date in place.
        """
        bodies = (None, None) if cache is None else (cache.model.lower, cache.model.upper)
        residual = self.model.lower(self.model.embed(states, past_actions), bodies[0])
        steered, output = self.steer(residual, cache, temperature=temperature)
        return self.model.action_readout(self.model.upper(steered, bodies[1])), output

    def empty_cache(self, batch: int, capacity: int = 32) -> SinglePhaseCache:
        """The cache of ``batch`` episodes before their first step; capacity: steps before it has to grow."""
        weight = self.to_control.weight
        key = weight.new_zeros(batch, self.switch.to_queries_and_keys.out_features // 2)
        z = weight.new_zeros(batch, self.codes.dim)
        return SinglePhaseCache(
            self.model.empty_cache(batch, capacity), self.emitter.empty_cache(batch, capacity), key, z, 0
        )

    def losses(
        self, states: Tensor, actions: Tensor, episode_lens: Tensor | None = None
    ) -> tuple[SinglePhaseLosses, Steering]:
        """All losses of whole episodes, unweighted.

        states (b, T or T + 1, ...), actions (b, T, ...), episode_lens (b,): real steps. UserError for a batch that does
        not fit.
        """
        self.model.check_batch(states, actions, episode_lens)
        batch, steps = actions.shape[:2]
        lengths = actions.new_full((batch,), steps, dtype=torch.long) if episode_lens is None else episode_lens
        mask = length_mask(lengths, steps)
        residual = self.model.residual(states, actions)
        steered, output = self.steer(residual)
        cloned = self.model.readout_losses(self.model.upper(steered), states, actions, lengths)
        switched = (output.switch_beta >= THRESHOLD) & mask
        strength = residual.norm(dim=-1) / output.control.norm(dim=-1).clamp_min(1e-5)
        directions = torch.randn(self.directions, self.dim, device=residual.device, dtype=residual.dtype)
        return SinglePhaseLosses(
            state=cloned.state,
            action=cloned.action,
            kl=masked_mean(self.codes.kl(output.action_dist), mask),
            ratio=ratio_loss(output.probability, mask, self.target_length, THRESHOLD),
            latent=self.latents.loss(residual, mask),
            sigreg=sigreg(residual[mask], directions),
            control=masked_mean(F.relu(strength - self.control_floor), switched),
        ), output
