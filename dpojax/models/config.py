"""The configuration of a decoder-only language model."""

from __future__ import annotations

import dataclasses

NORMS = ("layernorm", "rmsnorm")
POSITIONS = ("learned", "rope")
RESIDUALS = ("sequential", "parallel", "parallel_one_norm")
ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def _positive(field: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{field}: must be positive, got {value}")


def _one_of(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{field}: {value!r} is not one of {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embeddings: pair i is rotated by the angle position * frequency_i.

    Attributes:
      kind: `default`: frequency_i = theta^(-2i / dim). `linear`: all frequencies are divided by
        `factor`. `llama3`: low frequencies are divided by `factor`, high ones are not, and a ramp
        over the frequencies lies between. `yarn`: the same with a ramp over pairs; cosine and sine
        are also multiplied by `attention_factor`.
      theta: the base of the frequencies.
      factor: by how much the context is longer than the original one.
      original_max_positions: the context length before scaling (llama3, yarn).
      low_freq_factor, high_freq_factor: the ends of the ramp of llama3, in turns over the original
        context.
      attention_factor: see yarn.
      beta_fast, beta_slow: the ends of the ramp of yarn, in turns over the original context.
      truncate: whether the ramp of yarn starts and ends at whole pairs.
      dim: how many dimensions of a head, from its first, are rotated; all if None. If it is odd (a
        quarter of 6 dimensions is 1), the number of pairs is rounded up; the exponents are divided
        by the odd number.
      interleaved: pairs are (0, 1), (2, 3), ...; otherwise i is paired with i + dim / 2.
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    dim: int | None = None
    interleaved: bool = False

    def __post_init__(self):
        _one_of("rope.kind", self.kind, ROPE_KINDS)
        if self.kind in ("llama3", "yarn") and not self.original_max_positions:
            raise ValueError(f"rope.original_max_positions: {self.kind} scaling needs it")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError("rope.low_freq_factor: must be below high_freq_factor")
        if self.kind == "yarn" and not self.beta_slow < self.beta_fast:
            raise ValueError("rope.beta_slow: must be below beta_fast")
        if self.dim is not None:
            _positive("rope.dim", self.dim)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer with norms before its attention and its MLP (GPT-2, Llama, ...).

    Start from a family: `DecoderConfig(**LLAMA, vocab_size=512, width=64, layers=5, heads=8,
    mlp_width=172, max_positions=512)`.

    Attributes:
      kv_heads: heads of keys and values; heads / kv_heads queries share each. None: heads.
      head_dim: size of a head. None: width / heads.
      norm: `layernorm` or `rmsnorm`.
      norm_offset: norms multiply by norm_offset + scale (1 in Gemma, else 0).
      post_norms: further norms after attention and MLP, before the residual addition.
      qk_norm: RMSNorm over each head of queries and keys, before they are rotated.
      residual: `sequential`: attention, then the MLP on the sum. `parallel`: both read the same x,
        each through its own norm. `parallel_one_norm`: both read it through one norm.
      embedding_scale: a factor of token embeddings, rounded to the compute dtype.
      positions: `learned` embeddings or `rope`.
      rope: for positions = 'rope'. `max_positions` then does not limit the model.
      local_rope: the rope of layers with a window, if they have another.
      activation: a name in `layers.ACTIVATIONS`.
      gated_mlp: the MLP is down(activation(gate(x)) * up(x)) and not down(activation(up(x))).
      tied_head: the weight of the head is the token embedding.
      head_bias: whether logits have a bias.
      head_softcap, attention_softcap: c maps a logit, or a scaled query . key, to c tanh(z / c).
      scalar_head: the model has one score per token and no language-model head. With `labels`, it
        has one logit per token and label.
      labels: two or more names of classes.
      attention_scale: the factor of query . key. None: 1 / sqrt(head_dim).
      attention_scale_by_layer: in layer l = 0, 1, ... the scale is divided by l + 1.
      windows: (), or one entry per layer: None, or how many positions a token sees, itself and the
        ones before it.
      initializer_range: the standard deviation of initial weights.
      scaled_residual_init: that of the two projections into the residual stream is divided by
        sqrt(2 * layers).

    Raises:
      ValueError: a size that is not positive, an unknown name, or sizes that do not fit together.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    max_positions: int
    kv_heads: int | None = None
    head_dim: int | None = None
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    post_norms: bool = False
    qk_norm: bool = False
    residual: str = "sequential"
    embedding_scale: float | None = None
    positions: str = "learned"
    rope: Rope | None = None
    local_rope: Rope | None = None
    activation: str = "gelu_new"
    gated_mlp: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    tied_head: bool = True
    head_bias: bool = False
    head_softcap: float | None = None
    scalar_head: bool = False
    labels: tuple[str, ...] = ()
    attention_softcap: float | None = None
    attention_scale: float | None = None
    attention_scale_by_layer: bool = False
    windows: tuple[int | None, ...] = ()
    initializer_range: float = 0.02
    scaled_residual_init: bool = False

    def __post_init__(self):
        for field in ("vocab_size", "width", "layers", "heads", "mlp_width", "max_positions"):
            _positive(field, getattr(self, field))
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.head_dim is None:
            if self.width % self.heads:
                raise ValueError(f"heads: {self.heads} does not divide width {self.width}")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        _positive("kv_heads", self.kv_heads)
        _positive("head_dim", self.head_dim)
        _one_of("norm", self.norm, NORMS)
        _one_of("positions", self.positions, POSITIONS)
        _one_of("residual", self.residual, RESIDUALS)
        if self.post_norms and self.residual != "sequential":
            raise ValueError(f"post_norms: residual is {self.residual!r}, only sequential has them")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: {self.kv_heads} does not divide heads {self.heads}")
        self._check_rope()
        if self.labels and (not self.scalar_head or len(set(self.labels)) < 2):
            raise ValueError(
                f"labels: {self.labels}; a classifier has scalar_head and two or more labels"
            )
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"windows: {len(self.windows)} entries for {self.layers} layers")
        for window in self.windows:
            if window is not None:
                _positive("windows", window)

    def _check_rope(self):
        if (self.positions == "rope") != (self.rope is not None):
            raise ValueError("rope: give Rope(...) with positions='rope', and only then")
        if self.rope is None:
            if self.local_rope is not None:
                raise ValueError("local_rope: give it beside rope, and only then")
            return
        if self.head_dim % 2:
            raise ValueError(f"head_dim: rope rotates pairs, but head_dim is {self.head_dim}")
        if (self.rope.dim or 0) > self.head_dim:
            raise ValueError(f"rope.dim: {self.rope.dim} is more than head_dim {self.head_dim}")
        local = self.local_rope or self.rope
        if (local.dim, local.interleaved) != (self.rope.dim, self.rope.interleaved):
            raise ValueError("local_rope: it must rotate the same pairs as rope")


GPT2 = {"scaled_residual_init": True}
LLAMA = {
    "norm": "rmsnorm",
    "positions": "rope",
    "rope": Rope(),
    "activation": "silu",
    "gated_mlp": True,
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "tied_head": False,
}
