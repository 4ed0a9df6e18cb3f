"""The rotary settings of a config.json: its old and its new spelling are read, the new written."""

from __future__ import annotations

import numpy as np

from dpojax.models.config import Rope
from dpojax.models.config_values import check_values

# For each kind of scaling: their key -> our field of Rope.
_CONTEXT = {"factor": "factor", "original_max_position_embeddings": "original_max_positions"}
ROPE_SETTINGS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": _CONTEXT | {key: key for key in ("low_freq_factor", "high_freq_factor")},
    "yarn": _CONTEXT
    | {key: key for key in ("attention_factor", "beta_fast", "beta_slow", "truncate")},
}
REQUIRED_ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


def read_rope(
    raw: dict,
    *,
    theta: float = 10_000.0,
    kinds: tuple[str, ...] = tuple(ROPE_SETTINGS),
    head_dim: int | None = None,
    partial: float = 1.0,
) -> Rope:
    """Read the rotary settings of a config.json, new (`rope_parameters`) or old (`rope_scaling`).

    Args:
      raw: config.json.
      theta: the family's default.
      kinds: the scalings that the family has.
      head_dim: size of a head, for families that can rotate a part of it.
      partial: which part they rotate by default.

    Raises:
      ValueError: a scaling or a setting of it that is not supported.
    """
    settings = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    check_values({"rope_parameters": settings})
    settings = {key: value for key, value in settings.items() if value is not None}
    check_values(settings, "rope_parameters.")
    old_name = settings.pop("type", "default")
    kind = settings.pop("rope_type", old_name)
    theta = float(settings.pop("rope_theta", None) or raw.get("rope_theta") or theta)
    if kind not in kinds:
        why = "; it makes a token's angles depend on the longest sequence of its batch"
        raise ValueError(
            f"rope scaling {kind!r} is not supported (only {', '.join(kinds)})"
            + (why if kind in ("dynamic", "longrope", "su") else "")
        )
    part = settings.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor")
    dim = _rotated_dim(part or partial, head_dim)
    if kind in ("llama3", "yarn"):
        # A key at the top of the file wins over one among the settings.
        key = "original_max_position_embeddings"
        settings[key] = raw.get(key) or settings.get(key) or raw.get("max_position_embeddings")
        if settings[key] is None:
            raise ValueError(f"rope_parameters.{key}: {kind!r} scaling needs it")
    if kind == "yarn":
        settings["attention_factor"] = _yarn_attention_factor(settings)
    fields = ROPE_SETTINGS[kind]
    if unknown := sorted(set(settings) - set(fields)):
        raise ValueError(f"rope_parameters.{unknown[0]}: not a setting of {kind!r} scaling")
    if missing := [key for key in REQUIRED_ROPE[kind] if key not in settings]:
        raise ValueError(f"rope_parameters.{missing[0]}: {kind!r} scaling needs it")
    return Rope(kind, theta, dim=dim, **{fields[key]: value for key, value in settings.items()})


def write_rope(rope: Rope, head_dim: int | None = None) -> dict:
    """Make `rope_parameters` for config.json; `head_dim` as for `read_rope`."""
    settings = {key: getattr(rope, field) for key, field in ROPE_SETTINGS[rope.kind].items()}
    written = {"rope_type": rope.kind, "rope_theta": rope.theta, **settings}
    if head_dim is not None:
        written["partial_rotary_factor"] = (rope.dim or head_dim) / head_dim
    return written


def _rotated_dim(partial: float, head_dim: int | None) -> int | None:
    """How many dimensions of a head are rotated, None for all."""
    if partial == 1.0:
        return None
    if head_dim is None:
        raise ValueError("rope_parameters.partial_rotary_factor: only 1.0 is supported")
    return int(head_dim * partial)


def _yarn_attention_factor(settings: dict) -> float:
    """The factor of cosine and sine: 0.1 ln(factor) + 1 (arXiv:2309.00071, eq. 22).

    A file may give it, or two `mscale` settings of which it is a ratio; these are removed.
    """
    mscale, mscale_all = settings.pop("mscale", None), settings.pop("mscale_all_dim", None)
    if "attention_factor" in settings:
        return float(settings["attention_factor"])

    def magnitude(weight: float) -> float:
        factor = settings.get("factor", 1.0)
        return 1.0 if factor <= 1 else 0.1 * weight * float(np.log(factor)) + 1.0

    if mscale and mscale_all:
        return magnitude(mscale) / magnitude(mscale_all)
    return magnitude(1.0)
