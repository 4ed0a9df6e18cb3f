"""Prompts for judges that read: our own, and a user's file."""

from __future__ import annotations

import dataclasses
import hashlib
import re

from dpojax.evaluation.judging.judge import JudgeError
from dpojax.evaluation.judging.parsing import parse_verdict
from dpojax.evaluation.judging.template_texts import TEXTS
from dpojax.evaluation.judging.verdicts import Choice, Question
from dpojax.storage import Path
from dpojax.storage.paths import PathLike

_FIELD = re.compile(r"\{(prompt|first|second|reference)\}")
_OFFERS_TIES = re.compile(r"preferred:\W*tie\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt for a judge.

    Attributes:
      name: of one of ours, or of the user's file.
      text: with the fields {prompt}, {first}, {second} and {reference}. Other braces are text.
    """

    name: str
    text: str

    @property
    def version(self) -> str:
        """A short hash of the text. It is part of a judge's fingerprint."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    @property
    def allows_ties(self) -> bool:
        """Whether the text offers the answer `Preferred: tie`."""
        return _OFFERS_TIES.search(self.text) is not None

    def fill(self, question: Question) -> str:
        """Return the prompt for one question. Braces in the question's texts stay as they are.

        Raises:
          JudgeError: the text has the field {reference}, and the question has no reference.
        """
        if "{reference}" in self.text and not question.reference:
            raise JudgeError(
                f"template {self.name}: has the field {{reference}}, and the prompt "
                f"{question.prompt[:60]!r} has no reference response"
            )
        return _FIELD.sub(lambda field: getattr(question, field[1]), self.text)

    def read(self, reply: str) -> Choice:
        """Return what a judge's reply to this prompt says."""
        return parse_verdict(reply, allows_ties=self.allows_ties)


def open_template(name: str = "summary", file: PathLike | None = None) -> Template:
    """Return one of our prompts, or that in a user's file.

    Args:
      name: of a prompt in `TEXTS`.
      file: a text file that is used instead.

    Raises:
      JudgeError: there is no such prompt; the file cannot be read, or lacks a field.
    """
    if file is None:
        if name not in TEXTS:
            raise JudgeError(
                f"template {name!r}: is not one of {', '.join(TEXTS)}; a prompt of your own is "
                "read from a file"
            )
        return Template(name, TEXTS[name])
    try:
        text = Path(file).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise JudgeError(f"template {file}: cannot be read ({error})") from error
    missing = [field for field in ("{first}", "{second}") if field not in text]
    if missing:
        raise JudgeError(
            f"template {file}: lacks {' and '.join(missing)}; a template has the fields {{first}} "
            "and {second}, and may have {prompt} and {reference}"
        )
    return Template(Path(file).name, text)
