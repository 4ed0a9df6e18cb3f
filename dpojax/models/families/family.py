"""The description of a Hugging Face model family, and the keys that all families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from dpojax.models.config import DecoderConfig
from dpojax.models.weights import Weight

REQUIRED = object()


class Family(NamedTuple):
    """One model_type of transformers.

    Attributes:
      architecture: the transformers class of the language model.
      classifier: the transformers class of the sequence classifier.
      prefix: the start of tensor names that checkpoints of base models leave out.
      base: fields of our config that are the same for all members.
      keys: their key -> (our field, its default or REQUIRED).
      fixed: their key -> the only value that is supported.
      harmless: keys that do not change the maths.
      weights: which array of ours each tensor is.
      harmless_tensors: a pattern of names of tensors that are not read.
      special: keys for which a new name is not enough; `read` and `write` translate them.
      read: config.json -> fields of our config, for the special keys.
      write: our config -> the special keys.
      config: the class of our config.
      renamed: pairs (start of a tensor's name, what it is in `weights`).
    """

    architecture: str
    classifier: str
    prefix: str
    base: dict
    keys: dict[str, tuple[str, object]]
    fixed: dict[str, object]
    harmless: frozenset[str]
    weights: tuple[Weight, ...]
    harmless_tensors: str
    special: frozenset[str]
    read: Callable[[dict], dict]
    write: Callable[..., dict]
    config: type = DecoderConfig
    renamed: tuple[tuple[str, str], ...] = ()


# Bookkeeping, defaults of generation, dropout (never applied here) and switches of outputs.
_HARMLESS = """
architectures model_type _name_or_path name_or_path transformers_version torch_dtype dtype
use_cache bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id
mask_token_id _commit_hash decoder_start_token_id tokenizer_class task_specific_params prefix
finetuning_task id2label label2id num_labels _num_labels problem_type output_attentions
output_hidden_states output_scores return_dict return_dict_in_generate use_return_dict
gradient_checkpointing attn_implementation _attn_implementation
_attn_implementation_autoset is_decoder torchscript use_bfloat16 tf_legacy_loss pruned_heads
chunk_size_feed_forward max_length min_length do_sample early_stopping num_beams
num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
exponential_decay_length_penalty suppress_tokens begin_suppress_tokens pretraining_tp
attention_dropout resid_pdrop embd_pdrop attn_pdrop unsloth_version unsloth_fixed
classifier_dropout cache_implementation auto_map
"""
HARMLESS = frozenset(_HARMLESS.split())
COMMON_FIXED = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "is_causal": True,
}
ROPE = frozenset(("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"))
ROPE |= {"original_max_position_embeddings"}


def windows_of(kinds: list[str], window: int | None) -> tuple[int | None, ...]:
    """Compute the window of each layer from `layer_types`; () if no layer has one.

    Raises:
      ValueError: an unknown kind of layer.
    """
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"layer_types: {sorted(unknown)[0]!r} is not supported")
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def layer_types(config: DecoderConfig) -> list[str]:
    """Make `layer_types` for config.json: the inverse of `windows_of`."""
    kinds = ["sliding_attention" if window else "full_attention" for window in config.windows]
    return kinds or ["full_attention"] * config.layers


def widest(config: DecoderConfig) -> int | None:
    """Make `sliding_window` for config.json, where all layers with a window share its size."""
    return max((window or 0 for window in config.windows), default=None)
