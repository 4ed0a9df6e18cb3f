"""What a value of config.json may be, by its key."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

LARGEST = 2**31 - 1


class Whole(NamedTuple):
    """A whole number within limits."""

    low: int
    high: int = LARGEST

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def allows(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high


class Real(NamedTuple):
    """A finite number within limits; `positive` forbids zero."""

    positive: bool
    high: float = 1e12

    def __str__(self) -> str:
        return f"a number from 0 to {self.high:g}" + (", and not 0" if self.positive else "")

    def allows(self, value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return 0 <= value <= self.high and not (self.positive and value == 0)


class Instance(NamedTuple):
    """A value of a JSON type; a list holds strings."""

    kind: type
    name: str

    def __str__(self) -> str:
        return self.name

    def allows(self, value: Any) -> bool:
        if self.kind is list:
            return isinstance(value, list) and all(isinstance(item, str) for item in value)
        return isinstance(value, self.kind)


SWITCH, NAME = Instance(bool, "true or false"), Instance(str, "a string")
NAMES, OBJECT = Instance(list, "a list of strings"), Instance(dict, "an object")
_ABOVE_ZERO, _FROM_ZERO = Real(positive=True), Real(positive=False)


def _all(kind: Any, keys: str) -> dict[str, Any]:
    return dict.fromkeys(keys.split(), kind)


KINDS = {
    **_all(
        Whole(1),
        "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim "
        "max_position_embeddings type_vocab_size n_positions n_embd n_head n_inner rotary_dim "
        "sliding_window sliding_window_pattern _sliding_window_pattern "
        "original_max_position_embeddings",
    ),
    # Tuples with an entry for each are made of these.
    **_all(Whole(1, 10_000), "num_hidden_layers n_layer num_labels _num_labels"),
    **_all(Whole(0), "max_window_layers"),
    **_all(
        _ABOVE_ZERO,
        "rope_theta rope_local_base_freq rotary_emb_base query_pre_attn_scalar "
        "attn_logit_softcapping final_logit_softcapping factor low_freq_factor high_freq_factor "
        "attention_factor beta_fast beta_slow",
    ),
    **_all(
        _FROM_ZERO,
        "rms_norm_eps layer_norm_eps layer_norm_epsilon initializer_range mscale mscale_all_dim",
    ),
    **_all(Real(positive=True, high=1.0), "rotary_pct partial_rotary_factor"),
    **_all(
        SWITCH,
        "tie_word_embeddings attention_bias mlp_bias use_sliding_window use_parallel_residual "
        "scale_attn_weights scale_attn_by_inverse_layer_idx rotary truncate",
    ),
    **_all(NAME, "model_type hidden_act hidden_activation activation_function type rope_type"),
    **_all(NAMES, "architectures layer_types"),
    **_all(OBJECT, "id2label rope_scaling rope_parameters"),
}


def check_values(settings: dict, prefix: str = "") -> None:
    """Raise a ValueError for the first value that no model can have.

    Args:
      settings: config.json, or an object inside it. Keys that `KINDS` lacks, and nulls, pass.
      prefix: of the keys in the message.
    """
    for key, value in settings.items():
        kind = KINDS.get(key)
        if value is not None and kind is not None and not kind.allows(value):
            raise ValueError(f"{prefix}{key}: must be {kind}, not {shown(value)}")


def shown(value: Any) -> str:
    """The value as a message shows it: at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
