"""Supervised fine-tuning, and preferred-FT: maximum likelihood of the best response."""

from __future__ import annotations

import jax.numpy as jnp

from dpojax import losses
from dpojax.data.rows import Rows
from dpojax.logprobs import TokenStatistics
from dpojax.training.objective import Hyper, Objective, Terms, masked_metric
from dpojax.training.responses import response_sums


def objective() -> Objective:
    """The token mean of -log policy over all scored tokens of the optimiser batch, nats.

    Ouyang et al. 2022. With the preferred responses as data it is the "Preferred-FT" baseline of
    Rafailov et al. 2023, section 6. The rows decide whether the prompt's tokens count. A text of
    weight w counts as w equal texts.
    """

    def terms(tokens: TokenStatistics, rows: Rows, hyper: Hyper) -> Terms:
        del hyper
        scored = rows.response >= 0
        loss = losses.sft(response_sums(tokens.logprob, rows).sum(-1))  # [..., R, E]
        count = response_sums(scored.astype(jnp.float32), rows).sum(-1)
        logps = masked_metric(-loss, jnp.any(rows.present, axis=-1) * rows.weight)
        return Terms(loss * rows.weight, count * rows.weight, {"logps/chosen": logps})

    return Objective(terms, needs_reference=False)
