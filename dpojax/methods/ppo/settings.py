"""PPO's settings that are compiled into its programs."""

from __future__ import annotations

import dataclasses

from dpojax import rl
from dpojax.training.objective import OptionError


@dataclasses.dataclass(frozen=True)
class PPO:
    """What is compiled into `update`. All other numbers are in `hyper`.

    Attributes:
      epochs: how often an iteration goes through its responses.
      minibatches: optimiser steps of an epoch, each on other rows.
      micro_batches: parts of a minibatch (gradient accumulation), to save memory.
      entropy: weight of the entropy bonus, in reward per nat and token; 0 computes none.
      kl_estimator: of the penalty in the rewards, see `rl.shape_rewards`.

    Raises:
      OptionError: a number that is not positive, or a negative weight.
    """

    epochs: int = 4
    minibatches: int = 4
    micro_batches: int = 1
    entropy: float = 0.0
    kl_estimator: rl.Estimator = "k1"

    def __post_init__(self):
        for name in ("epochs", "minibatches", "micro_batches"):
            if getattr(self, name) < 1:
                raise OptionError(name, f"must be positive, got {getattr(self, name)}")
        if self.entropy < 0:
            raise OptionError("entropy", f"must not be negative, got {self.entropy}")
