"""Rotary settings in a config.json: read in both of its spellings, and written."""

from __future__ import annotations

import numpy as np

from dpojax.models.config import Rope

# Of each scaling: their key -> our field of Rope.
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
    """The rotary settings of a config.json, new (`rope_parameters`) or old (`rope_scaling`).

    Args:
      theta: the family's default. kinds: the scalings that it has.
      head_dim: given where the family can rotate a part of a head; `partial`: which by default.

    Raises:
      ValueError: a scaling or a setting of it that is not supported.
    """
    found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    given = {key: value for key, value in found.items() if value is not None}
    old_name = given.pop("type", "default")
    kind = given.pop("rope_type", old_name)
    theta = float(given.pop("rope_theta", None) or raw.get("rope_theta") or theta)
    if kind not in kinds:
        why = "; it makes a token's angles depend on the longest sequence of its batch"
        raise ValueError(
            f"rope scaling {kind!r} is not supported (only {', '.join(kinds)})"
            + (why if kind in ("dynamic", "longrope", "su") else "")
        )
    dim = _rotated(given.pop("partial_rotary_factor", partial), head_dim)
    if kind in ("llama3", "yarn"):
        outside = raw.get("original_max_position_embeddings")
        given.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
        given |= {"original_max_position_embeddings": outside} if outside else {}
    if kind == "yarn":
        given["attention_factor"] = _yarn_attention_factor(given)
    wanted = ROPE_SETTINGS[kind]
    if unknown := sorted(set(given) - set(wanted)):
        raise ValueError(f"rope_parameters.{unknown[0]}: not a setting of {kind!r} scaling")
    if missing := [key for key in REQUIRED_ROPE[kind] if key not in given]:
        raise ValueError(f"rope_parameters.{missing[0]}: {kind!r} scaling needs it")
    return Rope(kind, theta, dim=dim, **{wanted[key]: value for key, value in given.items()})


def write_rope(rope: Rope, head_dim: int | None = None) -> dict:
    """`rope_parameters` for config.json; head_dim as for `read_rope`."""
    settings = {key: getattr(rope, field) for key, field in ROPE_SETTINGS[rope.kind].items()}
    written = {"rope_type": rope.kind, "rope_theta": rope.theta, **settings}
    if head_dim is not None:
        written["partial_rotary_factor"] = (rope.dim or head_dim) / head_dim
    return written


def _rotated(partial: float, head_dim: int | None) -> int | None:
    """Rotated dimensions of a head, None for all."""
    if partial == 1.0:
        return None
    if head_dim is None:
        raise ValueError("rope_parameters.partial_rotary_factor: only 1.0 is supported")
    return int(head_dim * partial)


def _yarn_attention_factor(given: dict) -> float:
    """0.1 ln(factor) + 1 (arXiv:2309.00071, eq. 22), or the ratio that mscale settings ask for."""
    mscale, mscale_all = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    if "attention_factor" in given:
        return float(given["attention_factor"])

    def magnitude(weight: float) -> float:
        factor = given.get("factor", 1.0)
        return 1.0 if factor <= 1 else 0.1 * weight * float(np.log(factor)) + 1.0

    if mscale and mscale_all:
        return magnitude(mscale) / magnitude(mscale_all)
    return magnitude(1.0)
