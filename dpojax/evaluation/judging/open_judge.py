"""Judges by the name that a command line gives them: KIND or KIND:ARGUMENT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from dpojax.data.pairing import NEUTRAL_WORDS, ROUNDING
from dpojax.evaluation import rewards
from dpojax.evaluation.judging.judge import Judge, JudgeError
from dpojax.evaluation.judging.local_judge import open_local
from dpojax.evaluation.judging.sbert import sbert_judge
from dpojax.evaluation.judging.score_judge import length_reward, reward_judge
from dpojax.evaluation.judging.templates import open_template

TEXTS, QUESTIONS = 64, 16  # in a batch


class Options(NamedTuple):
    """What a judge may be told besides its name.

    Attributes:
      template: name of the prompt for judges that read one; see `templates`.
      template_file: a file that holds the prompt, in place of `template`.
      tie: largest difference of two tied scores, for judges that score; None is the kind's own.
      batch_size: texts or questions in a batch of a model; None is the kind's own.
      mesh: where models are placed; None is one device.
      endpoint: further options of an `openai:` judge, fields of `EndpointOptions`.
    """

    template: str = "summary"
    template_file: str | None = None
    tie: float | None = None
    batch_size: int | None = None
    mesh: Mesh | None = None
    endpoint: Mapping[str, Any] = {}


class JudgeKind(NamedTuple):
    """A kind of judge.

    Attributes:
      usage: how it is named, for a person.
      open: (what follows the colon, options) -> the judge. It sets the judge's name.
      folder: what follows the colon -> the folder of the judge's model, or its name on the hub; ""
        where there is none.
      needs_argument: whether something has to follow the colon.
    """

    usage: str
    open: Callable[[str, Options], Judge]
    folder: Callable[[str], str] = lambda argument: ""
    needs_argument: bool = True


def open_judge(
    spec: str,
    *,
    template: str = "summary",
    template_file: str | None = None,
    tie: float | None = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    **endpoint: Any,
) -> Judge:
    """Open the judge that a command line names; its `name` is `spec`.

    Args:
      spec: as a kind's `usage` in `KINDS` says; a folder may also be a name on the hub.
      template, template_file, tie, batch_size, mesh, endpoint: see `Options`.

    Raises:
      JudgeError: an unknown kind; its folder cannot be read; an option that it does not have.
    """
    name, argument = _kind_and_argument(spec)
    options = Options(template, template_file, tie, batch_size, mesh, endpoint)
    if endpoint and name != "openai":
        names = ", ".join(sorted(endpoint))
        raise JudgeError(f"judge {spec!r}: {names}: only openai:MODEL@URL has such options")
    try:
        return KINDS[name].open(argument, options)
    except JudgeError:
        raise
    except (OSError, ValueError) as error:  # of files, configurations, weights and tokenizers
        raise JudgeError(f"judge {spec!r}: {error}") from error


def folder_of(spec: str) -> str:
    """The folder of the model that a judge reads, or its name on the hub; "" without one.

    Raises:
      JudgeError: an unknown kind.
    """
    name, argument = _kind_and_argument(spec)
    return KINDS[name].folder(argument)


def _kind_and_argument(spec: str) -> tuple[str, str]:
    name, _, argument = spec.partition(":")
    kind = KINDS.get(name)
    if kind is None or (kind.needs_argument and not argument):
        usages = ", ".join(kind.usage for kind in KINDS.values())
        raise JudgeError(f"judge {spec!r}: is not one of {usages}")
    return name, argument


def _tie(options: Options, default: float) -> float:
    return default if options.tie is None else options.tie


def _open_exact(argument: str, options: Options) -> Judge:
    if argument:
        raise JudgeError(f"judge 'exact:{argument}': takes nothing after the colon")
    # Reviews that differ only in neutral words differ by the leak of the grammar.
    return reward_judge(
        rewards.exact_reviews("log_odds"),
        name="exact",
        tie=_tie(options, NEUTRAL_WORDS),
        bradley_terry=True,
    )


def _open_length(argument: str, options: Options) -> Judge:
    if argument not in ("", "shorter"):
        raise JudgeError(f"judge 'length:{argument}': is not one of {KINDS['length'].usage}")
    reward = length_reward(longer=not argument)
    return reward_judge(reward, name=reward.name, tie=_tie(options, 0.0))


def _open_reward_model(argument: str, options: Options) -> Judge:
    return _open_reward("reward_model", argument, options, bradley_terry=True)


def _open_classifier(argument: str, options: Options) -> Judge:
    # A difference of two P(label) is no log-odds of a preference.
    return _open_reward("classifier", argument, options, bradley_terry=False)


def _open_reward(kind: str, argument: str, options: Options, *, bradley_terry: bool) -> Judge:
    spec = f"{kind}:{argument}"
    reward = rewards.open_reward(spec, mesh=options.mesh, batch_size=options.batch_size or TEXTS)
    tie = _tie(options, ROUNDING)
    return reward_judge(reward, name=spec, tie=tie, bradley_terry=bradley_terry)


def _open_openai(argument: str, options: Options) -> Judge:
    from dpojax.evaluation.judging import openai_judge  # others do without HTTP

    return openai_judge.open_endpoint(
        argument,
        template=options.template,
        template_file=options.template_file,
        **options.endpoint,
    )


def _open_local(argument: str, options: Options) -> Judge:
    return open_local(
        argument,
        open_template(options.template, options.template_file),
        tie=_tie(options, 0.0),
        mesh=options.mesh,
        batch_size=options.batch_size or QUESTIONS,
    )


def _open_sbert(argument: str, options: Options) -> Judge:
    return _sbert("sbert", argument, options, to_prompt=False)


def _open_sbert_prompt(argument: str, options: Options) -> Judge:
    return _sbert("sbert_prompt", argument, options, to_prompt=True)


def _sbert(kind: str, argument: str, options: Options, *, to_prompt: bool) -> Judge:
    return sbert_judge(
        argument,
        name=f"{kind}:{argument}",
        to_prompt=to_prompt,
        tie=_tie(options, ROUNDING),
        mesh=options.mesh,
        batch_size=options.batch_size or TEXTS,
    )


def _reward_folder(kind: str) -> Callable[[str], str]:
    return lambda argument: rewards.folder_of(f"{kind}:{argument}")


KINDS: dict[str, JudgeKind] = {
    "exact": JudgeKind("exact", _open_exact, needs_argument=False),
    "length": JudgeKind("length, length:shorter", _open_length, needs_argument=False),
    "reward_model": JudgeKind(
        "reward_model:FOLDER", _open_reward_model, _reward_folder("reward_model")
    ),
    "classifier": JudgeKind(
        "classifier:FOLDER, classifier:FOLDER:LABEL", _open_classifier, _reward_folder("classifier")
    ),
    "sbert": JudgeKind("sbert:FOLDER", _open_sbert, str),
    "sbert_prompt": JudgeKind("sbert_prompt:FOLDER", _open_sbert_prompt, str),
    "local": JudgeKind("local:FOLDER", _open_local, str),
    "openai": JudgeKind("openai:MODEL@URL", _open_openai),
}
