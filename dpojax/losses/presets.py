"""The variant of each loss that other systems compute, as keyword arguments of our functions."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

_TRL = {
    "dpo": {"beta": 0.1, "label_smoothing": 0.0},
    "dpo_norm": {"beta": 0.1, "label_smoothing": 0.0},
    "ipo": {"beta": 0.1, "length_norm": "mean"},
    "hinge": {"beta": 0.1},
    "robust": {"beta": 0.1, "label_smoothing": 0.0},
    "exo": {"beta": 0.1, "label_smoothing": 1e-3},
    "nca": {"beta": 0.1},
    "bco": {"beta": 0.1, "delta": 0.0},
    "sppo": {"beta": 0.1},
    "aot": {"beta": 0.1, "label_smoothing": 0.0},
    "aot_unpaired": {"beta": 0.1, "label_smoothing": 0.0},
    "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1},
    "discopop": {"beta": 0.1, "tau": 0.05},
    "divergence_scores": {"kind": "reverse_kl"},
    "wpo_weights": {"clamp": None},  # with log_collision, which the caller has to compute
    "ld_logprobs": {"weight_reference": True},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "apo_zero_unpaired": {"beta": 0.1},
    "cpo": {"beta": 0.1, "alpha": 1.0, "label_smoothing": 0.0},
    "simpo": {"beta": 0.1, "gamma": 0.5, "label_smoothing": 0.0},
    "orpo": {"beta": 0.1},
    "bradley_terry": {"margin": 0.0, "centring": 0.0},
}

# Where `bco` has no delta, the delta is a running mean. That is state: see `update_baseline`.
PRESETS = MappingProxyType(
    {
        "paper": {
            "dpo": {"beta": 0.1, "label_smoothing": 0.0},
            "ipo": {"length_norm": "sum"},
            "discopop": {"tau": 0.05},
            "tdpo": {"alpha": 0.5, "stop_chosen": True},  # TDPO2
        },
        "emdpo": {
            "dpo": {"label_smoothing": 0.0},
            "ipo": {"length_norm": "sum"},
        },
        "trl-1.16": _TRL,
        "trl-0.24": _TRL
        | {
            "bco": {"beta": 0.1},
            "wpo_weights": {"clamp": 1.0},
            "ld_logprobs": {"weight_reference": False},
        },
        "halos": {
            "dpo": {"beta": 0.1, "label_smoothing": 0.0},
            "ipo": {"beta": 0.1, "length_norm": "mean"},
            "simpo": {"beta": 10.0, "gamma": 3.0, "label_smoothing": 0.0},
            "slic": {"margin": 1.0, "alpha": 0.1},
            "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        },
        "open-instruct": {
            "dpo": {"label_smoothing": 0.0},
            "dpo_norm": {"beta": 5.0, "label_smoothing": 0.0},
            "simpo": {"beta": 5.0, "gamma": 1.5, "label_smoothing": 0.0},
            "wpo_weights": {"log_collision": None, "clamp": 1.0},
        },
        "llama-factory": {
            "ipo": {"length_norm": "mean"},
            "bco": {},
            "ld_logprobs": {"weight_reference": False},
        },
        "openrlhf": {"ipo": {"length_norm": "sum"}},
        "nemo-aligner": {
            "ipo": {"length_norm": "sum"},
            "rpo": {"beta": 0.2, "scale": 1.0},
        },
        "nemo-rl": {"dpo": {"beta": 0.05, "label_smoothing": 0.0}},
    }
)


def preset(source: str, loss: str) -> dict[str, Any]:
    """Look up the keyword arguments that make one of our losses equal to another system's.

    They choose the variant, and set the hyper-parameters for which the system has a default. The
    caller gives the others, and the arguments that come from data (lengths, baselines, scores).
    `docs/losses.md` has the table of differences.

    Args:
      source: a paper's or system's name, a key of `PRESETS`.
      loss: a function's name in `dpojax.losses`.

    Returns:
      A new dict of keyword arguments.

    Raises:
      KeyError: an unknown source, or a loss for which it has no preset; the error lists the known
        ones.

    >>> preset("trl-1.16", "ipo")
    {'beta': 0.1, 'length_norm': 'mean'}
    >>> preset("emdpo", "ipo")
    {'length_norm': 'sum'}
    """
    if source not in PRESETS:
        raise KeyError(f"no preset {source!r}; there are: {', '.join(sorted(PRESETS))}")
    if loss not in PRESETS[source]:
        known = ", ".join(sorted(PRESETS[source]))
        raise KeyError(f"preset {source!r} has no loss {loss!r}; it has: {known}")
    return dict(PRESETS[source][loss])
