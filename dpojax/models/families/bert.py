"""BERT and RoBERTa sequence classifiers."""

from __future__ import annotations

import re

from dpojax.models.config_values import Whole, shown
from dpojax.models.encoder import EncoderConfig
from dpojax.models.families.family import COMMON_FIXED, HARMLESS, REQUIRED, Family
from dpojax.models.weights import ATTENTION, Weight, affine, norm, table


def _trunk(prefix: str) -> tuple[Weight, ...]:
    """The weights below the classifier. Both families give them the same names after a prefix."""
    embeddings, layer = f"{prefix}.embeddings", f"{prefix}.encoder.layer.{{layer}}"
    attention = f"{layer}.attention.self"
    return (
        table(f"{embeddings}.word_embeddings.weight", "embed/tokens"),
        table(f"{embeddings}.position_embeddings.weight", "embed/positions"),
        table(f"{embeddings}.token_type_embeddings.weight", "embed/types"),
        *norm(f"{embeddings}.LayerNorm", "embed/norm"),
        *affine(f"{attention}.query", f"{ATTENTION}/query", "dnh -> nh d", "nh -> nh"),
        *affine(f"{attention}.key", f"{ATTENTION}/key", "dnh -> nh d", "nh -> nh"),
        *affine(f"{attention}.value", f"{ATTENTION}/value", "dnh -> nh d", "nh -> nh"),
        *affine(f"{layer}.attention.output.dense", f"{ATTENTION}/out", "nhd -> d nh", "d -> d"),
        *norm(f"{layer}.attention.output.LayerNorm", "blocks/attention_norm"),
        *affine(f"{layer}.intermediate.dense", "blocks/mlp/up", "df -> f d", "f -> f"),
        *affine(f"{layer}.output.dense", "blocks/mlp/down", "fd -> d f", "d -> d"),
        *norm(f"{layer}.output.LayerNorm", "blocks/mlp_norm"),
    )


BERT_WEIGHTS = (
    *_trunk("bert"),
    *affine("bert.pooler.dense", "pooler", "de -> e d", "d -> d"),
    *affine("classifier", "classifier", "dl -> l d", "l -> l"),
)
ROBERTA_WEIGHTS = (
    *_trunk("roberta"),
    *affine("classifier.dense", "pooler", "de -> e d", "d -> d"),
    *affine("classifier.out_proj", "classifier", "dl -> l d", "l -> l"),
)


def labels_of(raw: dict) -> tuple[str, ...]:
    """Read the names of a classifier's labels, in the order of its logits."""
    names = raw.get("id2label")
    if not names:
        count = raw.get("num_labels") or raw.get("_num_labels") or 2
        return tuple(f"LABEL_{i}" for i in range(count))
    for number, name in names.items():
        if not re.fullmatch(r"\d{1,5}", str(number)) or not isinstance(name, str):
            raise ValueError(f"id2label: must map numbers to names, not {shown({number: name})}")
    by_number = {int(number): name for number, name in names.items()}
    if sorted(by_number) != list(range(len(by_number))):
        raise ValueError(f"id2label: its keys are not 0 to {len(by_number) - 1}")
    return tuple(by_number[i] for i in range(len(by_number)))


def _read_bert(raw: dict) -> dict:
    return {"labels": labels_of(raw)}


def _read_roberta(raw: dict) -> dict:
    # Positions are counted from the id of padding, which has an entry of the table for itself.
    padding = raw.get("pad_token_id", 1)
    if not Whole(0).allows(padding):
        raise ValueError(
            f"pad_token_id: must be {Whole(0)}, not {shown(padding)}: roberta counts positions "
            "from it"
        )
    return _read_bert(raw) | {"first_position": padding + 1}


def _write(config: EncoderConfig) -> dict:
    raise NotImplementedError("encoders are imported, not exported")


_POOLER = {f"pooler_{key}" for key in ("fc_size", "num_attention_heads", "num_fc_layers", "type")}

BERT = Family(
    architecture="BertForSequenceClassification",
    classifier="BertForSequenceClassification",
    prefix="bert.",
    base={},
    keys={
        "vocab_size": ("vocab_size", REQUIRED),
        "hidden_size": ("width", REQUIRED),
        "num_hidden_layers": ("layers", REQUIRED),
        "num_attention_heads": ("heads", REQUIRED),
        "intermediate_size": ("mlp_width", REQUIRED),
        "max_position_embeddings": ("max_positions", 512),
        "type_vocab_size": ("types", 2),
        "hidden_act": ("activation", "gelu"),
        "layer_norm_eps": ("norm_eps", 1e-12),
        "initializer_range": ("initializer_range", 0.02),
    },
    fixed=COMMON_FIXED
    | {"is_causal": False, "is_decoder": False}
    | {"position_embedding_type": "absolute"},
    harmless=HARMLESS
    | {"hidden_dropout_prob", "attention_probs_dropout_prob", "tie_word_embeddings"}
    | {"output_past", "directionality", "pooler_size_per_head"}
    | _POOLER,
    weights=BERT_WEIGHTS,
    harmless_tensors=r"\.embeddings\.position_ids$",
    special=frozenset(),
    read=_read_bert,
    write=_write,
    config=EncoderConfig,
)
ROBERTA = BERT._replace(
    architecture="RobertaForSequenceClassification",
    classifier="RobertaForSequenceClassification",
    prefix="roberta.",
    weights=ROBERTA_WEIGHTS,
    # Older files have a pooler that the classifier does not use.
    harmless_tensors=r"\.embeddings\.position_ids$|^roberta\.pooler\.",
    read=_read_roberta,
)
