"""A measurement of float32 that learns, made by hand."""

import math

import numpy as np

from dpojax.certifying.measure import Measurement

LN2 = math.log(2)


def exact_measurement(**changes) -> Measurement:
    """Float32 that learns: two parameters of 500 entries, 40 tokens, 20 examples, 6 steps."""
    rng = np.random.default_rng(0)
    before = rng.normal(-3, 1, 40)
    gradient = np.concatenate([rng.normal(0, 1, 500), rng.normal(0, 1e-3, 500)])
    return Measurement(
        losses=np.linspace(LN2, 0.6, 6),
        first_batch=np.array([LN2, 0.55]),
        before=before,
        after=before + rng.normal(0.1, 0.1, 40),
        margins=rng.normal(0.5, 0.3, 20),
        gradient=gradient,
        sizes=np.array([500, 500]),
        gradient_norm=np.array(np.linalg.norm(gradient)),
    )._replace(**changes)


EXACT = exact_measurement()
