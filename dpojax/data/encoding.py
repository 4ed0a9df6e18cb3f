"""Token ids of many texts at once, by the quickest way that gives the same ids.

A prompt is encoded once, and not again in front of each of its responses, where the tokenizer is
known to cut a text at a certain place whatever stands around it: at a token that splits every text,
such as those that a chat template writes, or, with the usual byte-level tokenizers, in front of a
space that follows no white space. Only the prompt's end from there on is encoded with a response.

Such a byte-level tokenizer is also asked only once about a word: its ids are remembered.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

Ids = list[int]

# The expressions by which byte-level tokenizers cut a text before they merge bytes. None of them
# lets a space into a piece behind anything but white space, nor looks behind itself. So a text may
# be cut in front of such a space, and both halves encoded alone.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN = {GPT2, _WORDS + r"\p{N}{1,3}" + _REST, _WORDS + r"\p{N}" + _REST}  # Llama 3, Qwen 2
WORD_END = re.compile(r"(?<=\S)(?= )")
LAST_WORD_END = re.compile(r"(?s:.*)" + WORD_END.pattern)
SEARCHED = 400  # characters at a prompt's end that are searched for a place to cut
WORDS = 2**17  # that are remembered, with their ids; about 30 MB
LONGEST = 40  # characters of a word that is remembered
BATCH = 256  # words in a row that the tokenizer is asked about


class TextEncoder:
    """Encodes texts with one tokenizer, without special tokens around them and without limits.

    Attributes:
      tokenizer: a `transformers` tokenizer.
      invents_space: whether it puts a space in front of a text that has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.backend = getattr(tokenizer, "backend_tokenizer", None)
        self._ids: dict[str, Ids] = {}  # of each word that is remembered
        self._markers, self._cuts_at_words = self._find_cuts()
        self.invents_space = self.encode(["a"])[0] != self.encode(["\na"])[0][-1:]

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text."""
        if not texts:
            return []
        if self._cuts_at_words:
            return self._encode_words(texts)
        if self.backend is None:
            # verbose=False: no warning about the model's length, which TokenizeConfig limits.
            return self.tokenizer(
                list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
            )["input_ids"]
        return [encoding.ids for encoding in self._call_backend(list(texts))]

    def _call_backend(self, texts: list, *, are_words: bool = False) -> list[Any]:
        # What each call of the tokenizer itself sets: a tokenizer.json may hold limits of its own.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = self.tokenizer.split_special_tokens
        if are_words:  # the fast call does not tell which token is of which word
            return self.backend.encode_batch(texts, is_pretokenized=True, add_special_tokens=False)
        return self.backend.encode_batch_fast(texts, add_special_tokens=False)

    def _encode_words(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, word by word."""
        words_of = [WORD_END.split(text) for text in texts]
        if len(self._ids) > WORDS:
            self._ids.clear()
        new = [*{word for words in words_of for word in words if word not in self._ids}]
        rows = [new[start : start + BATCH] for start in range(0, len(new), BATCH)]
        for row, encoding in zip(rows, self._call_backend(rows, are_words=True)):
            self._ids.update((word, []) for word in row)
            for place, token in zip(encoding.word_ids, encoding.ids):
                self._ids[row[place]].append(token)
        ids_of = self._ids.__getitem__
        ids = [[*itertools.chain.from_iterable(map(ids_of, words))] for words in words_of]
        for word in new:
            if len(word) > LONGEST:
                del self._ids[word]
        return ids

    def alone(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of texts that continue others: without an invented space in front."""
        if not self.invents_space:
            return self.encode(texts)
        newline, *behind = self.encode(["\n", *("\n" + text for text in texts)])
        begun = [ids[: len(newline)] == newline for ids in behind]
        apart = iter(self.encode([text for text, good in zip(texts, begun) if not good]))
        return [ids[len(newline) :] if good else next(apart) for ids, good in zip(behind, begun)]

    def continued(self, texts: Sequence[tuple[str, Sequence[str]]]) -> list[tuple[Ids, list]]:
        """The ids of each prompt, and of what its continuations add to it.

        Args:
          texts: (prompt, continuations).

        Returns:
          For each prompt its ids and, for each continuation, the ids that follow the prompt's in
          the whole text; None where a token would span the boundary.
        """
        cuts = [self.cut(prompt) for prompt, _ in texts]
        tails = [prompt[cut:] for (prompt, _), cut in zip(texts, cuts)]
        prompts = self.encode([prompt for prompt, _ in texts])
        tail_ids = iter(self.encode([tail for tail, cut in zip(tails, cuts) if cut]))
        wholes = iter(
            self.encode([tail + text for tail, (_, many) in zip(tails, texts) for text in many])
        )
        result = []
        for ids, cut, (_, many) in zip(prompts, cuts, texts):
            shared = next(tail_ids) if cut else ids
            added = []
            for _ in many:
                whole = next(wholes)
                fits = whole[: len(shared)] == shared
                added.append(whole[len(shared) :] if fits else None)
            result.append((ids, added))
        return result

    def cut(self, prompt: str) -> int:
        """A place where the tokenizer cuts the prompt and every text that begins with it, or 0."""
        begin = max(0, len(prompt) - SEARCHED)
        end, at = prompt[begin:], 0
        if self._markers is not None:
            for match in self._markers.finditer(end):
                at = match.start()
        if not at and self._cuts_at_words:
            last = LAST_WORD_END.match(end)
            at = last.end() if last else 0
        return begin + at if at else 0

    def _find_cuts(self) -> tuple[re.Pattern | None, bool]:
        """Tokens at which every text is cut, and whether it is cut in front of spaces."""
        if self.backend is None or self.tokenizer.split_special_tokens:
            return None, False
        core = json.loads(self.backend.to_str())
        added = core.get("added_tokens") or []
        # A token that also swallows white space, or wants the end of a word, looks around itself.
        if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
            return None, False
        raw = core.get("normalizer") is None
        texts = [token["content"] for token in added]
        # No other token may begin before a marker and end inside it.
        markers = [
            token["content"]
            for token in added
            if (raw or not token["normalized"])
            and not any(character.isspace() for character in token["content"])
            and not any(token["content"][0] in text[1:] for text in texts)
        ]
        markers.sort(key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, markers))) if markers else None
        return pattern, _cuts_at_words(core) and not any(map(WORD_END.search, texts))


def _cuts_at_words(core: dict) -> bool:
    """Whether a tokenizer.json cuts a text in front of a space, wherever it stands."""
    normalizer, model = core.get("normalizer"), core.get("model") or {}
    if model.get("type") != "BPE" or model.get("dropout"):
        return False
    if normalizer is not None and normalizer.get("type") != "NFC":  # NFC leaves ASCII alone
        return False
    first = core.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", []) if first.get("type") == "Sequence" else [first]
    return _is_known(steps)


def _is_known(steps: Iterable[dict]) -> bool:
    match [*steps]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return True
        case [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return regex in KNOWN
    return False
