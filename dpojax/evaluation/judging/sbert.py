"""Similarity of sentence embeddings (SBERT; Reimers and Gurevych 2019) as a judge.

The response whose embedding is closer to that of the reference response is taken for the better
one. `docs/judging.md` shows how far that can be trusted.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray

from dpojax import storage
from dpojax.data.pairing import ROUNDING
from dpojax.data.tokenizer_files import read_tokenizer
from dpojax.evaluation.judging.judge import JudgeError
from dpojax.evaluation.judging.score_judge import ScoreJudge, Text
from dpojax.evaluation.rewards import batched
from dpojax.models import encoder, huggingface, safetensors_io
from dpojax.training.reference import fingerprint

MODULES, POOLING, SETTINGS = "modules.json", "1_Pooling", "sentence_bert_config.json"
PROMPTS = "config_sentence_transformers.json"
MEAN, CLS = "mean", "cls"
OLD_NAMES = {
    "pooling_mode_cls_token": CLS,
    "pooling_mode_mean_tokens": MEAN,
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class Recipe(NamedTuple):
    """What a folder of sentence-transformers says of its model.

    Attributes:
      transformer: the folder of the encoder and its tokenizer.
      pooling: "mean" of the hidden states of all tokens, or "cls": that of the first one.
      normalize: whether an embedding is divided by its length.
      longest: most tokens of a text, the special ones included; None: what the model can read.
      lower_case: whether a text is put into lower case first.
    """

    transformer: pathlib.Path
    pooling: str = MEAN
    normalize: bool = False
    longest: int | None = None
    lower_case: bool = False


class SentenceEncoder(NamedTuple):
    """A sentence encoder.

    Attributes:
      embed: n texts -> their embeddings, float64 [n, D].
      fingerprint: different for encoders whose embeddings may differ.
    """

    embed: Callable[[Sequence[str]], NDArray[np.float64]]
    fingerprint: str


def read_recipe(path: str | os.PathLike) -> Recipe:
    """Read what a folder of sentence-transformers, or a name of the hub, says of its model.

    A folder without modules.json is a plain encoder: its embeddings are means.

    Raises:
      ValueError: a module, a way of pooling or a default prompt that is not supported here.
      FileNotFoundError: no such folder.
    """
    folder = huggingface.local_folder(path, [*huggingface.FILES, *huggingface.TEXT_FILES])
    if not (folder / MODULES).is_file():
        return _with_settings(Recipe(folder))
    modules = storage.read_json(folder / MODULES)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ValueError(f"{folder / MODULES}: must hold a list of modules")
    names = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"{folder / MODULES}: the modules {', '.join(names)} are not supported, only "
            "Transformer, Pooling and, behind them, Normalize"
        )
    _refuse_default_prompt(folder)
    recipe = Recipe(
        folder / modules[0].get("path", ""),
        _pooling(folder / modules[1].get("path", POOLING) / "config.json"),
        normalize="Normalize" in names,
    )
    return _with_settings(recipe)


def _pooling(file: pathlib.Path) -> str:
    settings = safetensors_io.read_object(file)
    mode = settings.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else list(mode or ())
    modes = modes or [name for key, name in OLD_NAMES.items() if settings.get(key)] or [MEAN]
    if modes not in ([MEAN], [CLS]):
        raise ValueError(
            f"{file}: pooling by {' and '.join(map(str, modes))} is not supported, "
            f"only by {MEAN} or by {CLS}"
        )
    return modes[0]


def _refuse_default_prompt(folder: pathlib.Path) -> None:
    """Refuse a text that sentence-transformers would put in front of every other one."""
    file = folder / PROMPTS
    name = safetensors_io.read_object(file).get("default_prompt_name") if file.is_file() else None
    if name:
        raise ValueError(f"{file}: default_prompt_name: {name!r} is not supported, only null")


def _with_settings(recipe: Recipe) -> Recipe:
    file = recipe.transformer / SETTINGS
    settings: dict[str, Any] = safetensors_io.read_object(file) if file.is_file() else {}
    return recipe._replace(
        longest=settings.get("max_seq_length"), lower_case=bool(settings.get("do_lower_case"))
    )


def open_encoder(
    path: str | os.PathLike, *, mesh: Mesh | None = None, batch_size: int = 64
) -> SentenceEncoder:
    """Open a sentence encoder of the BERT type.

    Args:
      path: a folder of sentence-transformers, or a name of the hub.
      mesh: where the model is placed; None is one device.
      batch_size: texts in a batch.

    Raises:
      OSError, ValueError: see `read_recipe` and `huggingface.load_trunk`.
    """
    recipe = read_recipe(path)
    config, params, _ = huggingface.load_trunk(recipe.transformer, mesh=mesh)
    tokenizer = read_tokenizer(recipe.transformer)
    longest = min(config.max_positions - config.first_position, tokenizer.model_max_length)
    longest = min(longest, recipe.longest or longest)
    trunk, pool = encoder.build_trunk(config), _POOLS[recipe.pooling]

    def apply(params, tokens: Array, lengths: Array) -> Array:
        return pool(trunk.apply(params, tokens, lengths), lengths)

    pooled_of = batched(apply, params, longest, mesh, batch_size)

    def embed(texts: Sequence[str]) -> NDArray[np.float64]:
        texts = [text.lower() if recipe.lower_case else text for text in texts]
        vectors_nxD = pooled_of(tokenizer(texts, truncation=True, max_length=longest)["input_ids"])
        return _normalized(vectors_nxD) if recipe.normalize else vectors_nxD

    says = f"{recipe.pooling} {recipe.normalize} {longest} {recipe.lower_case}"
    return SentenceEncoder(embed, f"{fingerprint(params)} {says}")


def _mean(hidden_BxTxD: Array, lengths_B: Array) -> Array:
    is_real_BxT = jnp.arange(hidden_BxTxD.shape[1])[None] < lengths_B[:, None]
    total_BxD = jnp.sum(jnp.where(is_real_BxT[..., None], hidden_BxTxD, 0), axis=1)
    return total_BxD / lengths_B[:, None]


def _first(hidden_BxTxD: Array, lengths_B: Array) -> Array:
    return hidden_BxTxD[:, 0]


_POOLS = {MEAN: _mean, CLS: _first}


def _normalized(vectors_nxD: NDArray) -> NDArray:
    lengths_nx1 = np.linalg.norm(vectors_nxD, axis=1, keepdims=True)
    return vectors_nxD / np.maximum(lengths_nx1, 1e-12)


def sbert_judge(
    path: str | os.PathLike,
    *,
    name: str,
    to_prompt: bool = False,
    tie: float = ROUNDING,
    mesh: Mesh | None = None,
    batch_size: int = 64,
) -> ScoreJudge:
    """Make a judge whose score is the cosine of a response with the reference response.

    Args:
      path, mesh, batch_size: see `open_encoder`.
      name: see `Judge`.
      to_prompt: compare with the prompt instead, such as a summary with the text that it sums up.
      tie: largest difference of two tied cosines.

    Raises:
      OSError, ValueError: see `open_encoder`. `replies` raises JudgeError where a question has no
        reference.
    """
    sentences = open_encoder(path, mesh=mesh, batch_size=batch_size)

    def cosines(texts: Sequence[Text]) -> NDArray[np.float64]:
        targets = [text.prompt if to_prompt else text.reference for text in texts]
        if "" in targets:
            what = "prompt is empty" if to_prompt else "prompt has no reference response"
            raise JudgeError(
                f"judge {name}: a {what}, with which responses are compared: "
                f"{texts[targets.index('')].prompt[:60]!r}"
            )
        responses = [text.response for text in texts]
        distinct = list(dict.fromkeys(targets + responses))
        place = {text: index for index, text in enumerate(distinct)}
        unit_nxD = _normalized(sentences.embed(distinct))
        responses_nxD = unit_nxD[[place[response] for response in responses]]
        targets_nxD = unit_nxD[[place[target] for target in targets]]
        return np.sum(responses_nxD * targets_nxD, axis=1)

    compared = "prompt" if to_prompt else "reference"
    return ScoreJudge(
        cosines, name=name, fingerprint=f"sbert {compared} {sentences.fingerprint}", tie=tie
    )
