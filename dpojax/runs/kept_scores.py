"""Scores of responses by a reward: computed once, and kept beside the responses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence

from dpojax import storage
from dpojax.evaluation.rewards import Reward

AT_ONCE = 1024  # texts that are scored, then written; a kill loses as many


def keep_scores(reward: Reward, folder: storage.Path, log: Callable[[str], None]) -> Reward:
    """The same reward, which scores no text twice; its scores are in a file of the folder.

    Args:
      reward: one without a fingerprint is returned as it is: nothing tells it from another one.
      log: gets a line if another process scores there, which is waited for.
    """
    if not reward.fingerprint:
        return reward
    path = folder / f"scores-{_hash(reward.fingerprint)}.jsonl"

    def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        texts = {_hash(*pair): pair for pair in zip(prompts, responses)}
        scores = _read(path)
        if not scores.keys() >= texts.keys():
            with storage.lock_in_turn(folder, log):
                scores = _read(path)  # another process may have been here
                missing = {name: pair for name, pair in texts.items() if name not in scores}
                scores |= _score_missing(reward, missing, path)
        return [scores[_hash(*pair)] for pair in zip(prompts, responses)]

    return dataclasses.replace(reward, function=score)


def _score_missing(
    reward: Reward, missing: dict[str, tuple[str, str]], path: storage.Path
) -> dict[str, float]:
    """Score texts, and append their scores to the file."""
    names, scores = list(missing), {}
    with storage.LineWriter(path) as lines:
        for start in range(0, len(names), AT_ONCE):
            some = names[start : start + AT_ONCE]
            values = reward([missing[x][0] for x in some], [missing[x][1] for x in some])
            for name, value in zip(some, values.tolist()):
                scores[name] = value
                lines.write(json.dumps({"text": name, "score": value}))
    return scores


def _read(path: storage.Path) -> dict[str, float]:
    """Scores by the name of the text; lines that are damaged are left out."""
    records = storage.read_records(path)
    return {x["text"]: x["score"] for x in records if isinstance(x.get("score"), float)}


def _hash(*texts: str) -> str:
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=8).hexdigest()
