"""Log-probabilities of tokens and of sequences: from hidden states, or from logits.

`token_logprobs` takes a model's last hidden states and its head, and needs no logits of a whole
batch in memory. The policy, the reference, evaluation and rewards all use it. `sequence_logprobs`
takes logits, for code that has them. Both give what `dpojax.losses` takes.
"""

from dpojax.head import Head, logits_of, target_logits, vocabulary_chunks
from dpojax.logprobs.chunked import weight_gradient
from dpojax.logprobs.divergence import token_kl
from dpojax.logprobs.perturbed import perturbed_logprobs
from dpojax.logprobs.sequences import (
    SequenceLogprobs,
    of_response,
    sequence_logprobs,
    sequence_logprobs_from_hidden,
    sum_by_response,
)
from dpojax.logprobs.tokens import (
    PerturbedLogprobs,
    TokenStatistics,
    logits_at_once,
    token_logprobs,
    token_logprobs_and_entropy,
    token_logprobs_plain,
    token_statistics,
)

__all__ = [
    "Head",
    "PerturbedLogprobs",
    "SequenceLogprobs",
    "TokenStatistics",
    "logits_at_once",
    "logits_of",
    "of_response",
    "perturbed_logprobs",
    "sequence_logprobs",
    "sequence_logprobs_from_hidden",
    "sum_by_response",
    "target_logits",
    "token_kl",
    "token_logprobs",
    "token_logprobs_and_entropy",
    "token_logprobs_plain",
    "token_statistics",
    "vocabulary_chunks",
    "weight_gradient",
]
