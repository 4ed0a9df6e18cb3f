"""Sampling of responses from a decoder.

    sampler = build_sampler(model, max_new_tokens=64, stop=(tokenizer.eos_token_id,))
    samples = sampler(params, prompts, seed=0, temperature=0.7, samples=4)     # arrays [B, 4, 64]
    texts = generate(sampler, params, token_ids, batch_size=32, seed=0)        # lists, any lengths

A draw depends on the seed, the id of the prompt, the number of the sample and the position of the
token in its response. It depends on nothing else: not on the batch, its order or its padding, and
not on the devices.
"""

from dpojax.sampling.batches import Sample, generate, pad
from dpojax.sampling.draws import SamplingParams, truncate
from dpojax.sampling.sampler import Prompts, ResponsePrefix, Sampler, Samples, build_sampler

__all__ = [
    "Prompts",
    "ResponsePrefix",
    "Sample",
    "Sampler",
    "Samples",
    "SamplingParams",
    "build_sampler",
    "generate",
    "pad",
    "truncate",
]
