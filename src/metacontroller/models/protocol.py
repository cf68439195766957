"""The interface of a steerable model: lower body -> residual at the controlled layer -> upper body -> readouts.

Axes: b batch, t steps, n_e residual. States may hold T or T + 1 entries for T actions; the last, if there, is only a
target of the state loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from metacontroller.data.trajectories import full_lengths, length_mask, masked_mean
from metacontroller.errors import UserError
from metacontroller.models.chunked_losses import chunked_losses
from metacontroller.models.readouts import Readout
from metacontroller.models.state_encoder import StateEncoder
from metacontroller.storage.module_file import Saveable
from metacontroller.tensors import check_lengths, check_tensor


class BehaviorCloningLosses(NamedTuple):
    """Mean negative log-likelihood per real step of the next state and of the action; scalars.

    Where a model is called, the state loss is also a mean over the entries of the state, see `mean_over_entries`.
    """

    state: Tensor
    action: Tensor


class DiscoveryLosses(NamedTuple):
    """Means per real step: next-state loss, action loss under steering, KL; and the weighted ratio loss. Scalars."""

    state_pred: Tensor
    action_recon: Tensor
    kl: Tensor
    ratio: Tensor


Losses = TypeVar("Losses", BehaviorCloningLosses, DiscoveryLosses)


class SteerableModel(Saveable, nn.Module):
    """A causal sequence model of expert actions, split at the controlled layer; what phases and analyses use.

    A subclass sets ``dim`` (n_e), ``encoder``, ``action_readout`` and ``state_readout``, and defines ``depth``,
    ``embed``, ``lower``, ``upper``, ``empty_cache`` and ``residuals``; ``resplit``, ``cache_store`` and
    ``limit_context`` are optional. The losses are the same for all models.
    """

    dim: int
    encoder: StateEncoder
    action_readout: Readout
    state_readout: Readout

    @property
    def depth(self) -> int:
        """Number of layers beyond the input embedding at which the residual can be read."""
        raise NotImplementedError

    def embed(self, states: Tensor, past_actions: Tensor | None = None) -> Tensor:
        """states (b, t, ...) -> first residual (b, t, n_e).

        past_actions (b, t - 1, ...) or (b, t, ...) precede the states one by one, aligned at the end.
        """
        raise NotImplementedError

    def lower(self, x: Tensor, cache: Any = None) -> Tensor:
        """First residual -> residual at the controlled layer, (b, t, n_e) each; with a cache, x follows its steps."""
        raise NotImplementedError

    def upper(self, residual: Tensor, cache: Any = None) -> Tensor:
        """Residual at the controlled layer -> input of the readouts, (b, t, n_e) each; cache: as for ``lower``."""
        raise NotImplementedError

    def empty_cache(self, batch: int, capacity: int = 32) -> Any:
        """A cache with attributes ``lower`` and ``upper`` for ``batch`` episodes that step together, as `ModelCache`.

        capacity: steps before it has to grow.
        """
        raise NotImplementedError

    def residuals(self, states: Tensor, actions: Tensor) -> list[Tensor]:
        """The residual at every layer, input embedding first: ``depth`` + 1 of (b, T, n_e); see `residual`."""
        raise NotImplementedError

    def resplit(self, lower_depth: int) -> None:
        """Moves the controlled layer, in place, to after layer ``lower_depth``; 0 is the input embedding. The outputs
        without steering do not change; earlier caches become invalid. UserError if the model cannot."""
        raise UserError(f"a {type(self).__name__} is controlled at one layer only; it cannot be split elsewhere.")

    def limit_context(self, steps: int) -> None:
        """From now on, whatever reads the past directly reads the last ``steps`` alone, the current one included, as in
        training; saved with the weights. By default nothing: a recurrent model has its state."""

    def cache_store(self, batch: int) -> Any:
        """Caches of ``batch`` episodes that do not step together, before their first steps, as `ModelStore`; UserError
        if the model has none."""
        name = type(self).__name__
        raise UserError(f"a {name} has no cache for episodes that do not step together; define cache_store() of it.")

    # the same for all models

    def residual(self, states: Tensor, actions: Tensor) -> Tensor:
        """e_t at the controlled layer: states (b, T or T + 1, ...), actions (b, T, ...) -> (b, T, n_e)."""
        return self.lower(self.embed(states[:, : actions.shape[1]], actions[:, :-1]))

    def behavior_cloning_loss(
        self,
        states: Tensor,
        actions: Tensor,
        episode_lens: Tensor | None = None,
        *,
        with_state_loss: bool = True,
        checked: bool = False,
    ) -> BehaviorCloningLosses:
        """-log p(a_t | o_1:t) and -log p(o_{t+1} | o_1:t), means over real steps (paper §1).

        UserError for a batch that does not fit; ``checked`` skips that check, which synchronizes with the device.
        """
        if not checked:
            self.check_batch(states, actions, episode_lens)
        hidden = self.upper(self.residual(states, actions))
        return self.readout_losses(hidden, states, actions, episode_lens, with_state_loss)

    def readout_losses(
        self, hidden: Tensor, states: Tensor, actions: Tensor, episode_lens: Tensor | None, with_state_loss: bool = True
    ) -> BehaviorCloningLosses:
        """Losses from the readouts' input hidden (b, T, n_e); the state loss is 0 unless ``with_state_loss``."""
        steps, lengths = actions.shape[1], full_lengths(episode_lens, actions)
        mask = length_mask(lengths, steps)
        action_loss = -masked_mean(self.action_readout.log_prob(self.action_readout(hidden), actions), mask)
        if not with_state_loss:
            return BehaviorCloningLosses(action_loss.new_zeros(()), action_loss)
        targets = self.encoder.targets(states[:, 1 : steps + 1])
        known = targets.shape[1]
        log_prob = self.state_readout.log_prob(self.state_readout(hidden[:, :known]), targets)
        inside = length_mask(_target_lengths(states, lengths, steps), known)
        return BehaviorCloningLosses(-masked_mean(log_prob, inside), action_loss)

    def losses_under(
        self,
        steered: Tensor,
        states: Tensor,
        actions: Tensor,
        episode_lens: Tensor | None = None,
        *,
        with_state_loss: bool = True,
    ) -> BehaviorCloningLosses:
        """State and action loss when the upper body reads ``steered`` (b, T, n_e), which alone gets a gradient."""
        lengths = full_lengths(episode_lens, actions)
        targets = _target_lengths(states, lengths, actions.shape[1])

        def chunk_losses(steered: Tensor, rows: slice) -> Tensor:
            hidden = self.upper(steered)
            losses = self.readout_losses(hidden, states[rows], actions[rows], lengths[rows], with_state_loss)
            action = losses.action * (lengths[rows].sum() / lengths.sum())
            if not with_state_loss:
                return action[None]
            return torch.stack([action, losses.state * (targets[rows].sum() / targets.sum().clamp_min(1))])

        with frozen(self):
            losses = chunked_losses(steered, chunk_losses)
        return BehaviorCloningLosses(losses[1] if with_state_loss else losses.new_zeros(()), losses[0])

    def state_entries(self, states: Tensor) -> int:
        """Numbers and choices of one state that the state loss predicts; states (b, t, ...)."""
        return self.encoder.targets(states[:1, :1])[0, 0].numel()

    def mean_over_entries(self, losses: Losses, states: Tensor) -> Losses:
        """The same losses, that of the state, which comes first, a mean over the state's entries.

        -log p(o) is a sum over entries: beside that of an action, a state of hundreds of entries leaves nothing to
        learn for actions. The phases weigh the sum with lambda (paper §1); who adds the losses of a call has no lambda.
        """
        return type(losses)(losses[0] / self.state_entries(states), *losses[1:])

    def matrices(self) -> list[nn.Parameter]:
        """The weights of all linear layers between encoder and readouts: those that Muon may train."""
        ends = (self.encoder, self.action_readout, self.state_readout)
        outside = {id(value) for part in ends for value in part.parameters()}
        return [value for value in linear_weights(self) if id(value) not in outside]

    def check_batch(self, states: Tensor, actions: Tensor, episode_lens: Tensor | None) -> None:
        """UserError for wrong shapes, dtypes or lengths, NaN states, or actions out of range."""
        check_tensor("state", states, ("batch", "time", "entries", ...))
        check_tensor("actions", actions)
        batch, steps = states.shape[:2]
        if actions.dim() < 2 or actions.shape[0] != batch or actions.shape[1] not in (steps, steps - 1):
            raise UserError(
                f"actions have shape {tuple(actions.shape)} beside a state of shape {tuple(states.shape)}; expected "
                f"({batch}, {steps}) or ({batch}, {steps - 1}) steps: as many as states, or one less."
            )
        self.action_readout.check(actions, (batch, actions.shape[1]))
        check_lengths(episode_lens, batch, actions.shape[1])
        self.encoder.check(states)


def _target_lengths(states: Tensor, lengths: Tensor, steps: int) -> Tensor:
    """(b,) int64: of how many real steps the next state is there."""
    return lengths if states.shape[1] > steps else lengths - 1


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Context in which a module's parameters require no gradient, so that none is computed for them."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def linear_weights(module: nn.Module) -> list[nn.Parameter]:
    """The weights of all linear layers of a module, in the order of its parameters."""
    linear = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
    return [value for value in module.parameters() if id(value) in linear]
