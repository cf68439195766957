"""Settings of discovery: of eq. 3 (`objectives.steering`), and of what may come before it or with it."""

from __future__ import annotations

from dataclasses import dataclass

from metacontroller.ranges import Count, CountOr0, NotNegative, Positive, RowsOr0, Seed, Warmup, check_fields, require
from metacontroller.training.optimizer import OptimizerConfig, linear_warmup


@dataclass(frozen=True, kw_only=True)
class DiscoverConfig:
    """Phase 2 (eq. 3). UserError for values out of range."""

    optimizer: OptimizerConfig
    """How long and how fast."""
    alpha: NotNegative = 0.3
    """Weight of the codes' KL after the linear warm-up; a large weight from the start collapses them to the prior."""
    alpha_start: NotNegative = 0.015
    """Weight of the KL before the linear warm-up."""
    alpha_warmup: Warmup = (0, 0)
    """Updates (from, to) between which the weight goes linearly from alpha_start to alpha."""
    state_loss_weight: NotNegative = 0.0
    """lambda, weight of the loss of the next observation."""
    choice_weight: Positive = 1.0
    """Weight, in the gradient, of the choice between the modes of a mixture over continuous actions (our choice)."""
    muon_lr: NotNegative = 0.0
    """Learning rate of Muon for the metacontroller's matrices (our choice); 0: AdamW for all, as in the paper."""
    guided_updates: CountOr0 = 0
    """Updates at the start in which codes are those that `objectives.guided` names; the gate, and the norm and history
    that it reads, then stay as they are. 0: none, as in the paper."""
    clips: RowsOr0 = 0
    """Clips beside each episode of a batch in guided updates, from where experts decide, see `objectives.clips`."""
    clip_steps: Count = 3
    """Steps of a clip."""
    train_model: bool = False
    """Train the action model too: co-training, a baseline (Fig. 7, 8)."""
    symmetry_augmentation: bool = False
    """Apply a random symmetry of the world to the episodes that the sequence embedder reads (our choice)."""
    seed: Seed = 0
    """Seed of the episodes and, in a separate stream, of the noise in codes and gate; derived from the run's seed."""

    def __post_init__(self) -> None:
        check_fields(self)
        steps = self.optimizer.steps
        require(self.guided_updates <= steps, "guided_updates", self.guided_updates, f"at most {steps}")

    def alpha_at(self, step: int) -> float:
        """Weight of the codes' KL at update number ``step``, counted from 0."""
        return self.alpha_start + (self.alpha - self.alpha_start) * linear_warmup(step, self.alpha_warmup)
