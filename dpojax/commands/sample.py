"""Sample: dpojax sample --model=exported --model=runs/reviews:sft --prompt="i think"

Draws from every model with the same randomness and prints the texts side by side. A model is a
Hugging Face folder (or a name of the hub), or WORKDIR[:STAGE] of a run of `dpojax train`.
"""

from __future__ import annotations

import math
import shutil
import textwrap
from typing import NoReturn

from absl import flags

from dpojax.runs.command import run_script
from dpojax.tables import side_by_side
from dpojax.watchdog import watching

MODEL = flags.DEFINE_multi_string("model", None, "One column each.", required=True)
PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt.")
PROMPTS = flags.DEFINE_string("prompts", None, "A text file with a prompt per line.")
SAMPLES = flags.DEFINE_integer("samples", 1, "Per prompt and model.", lower_bound=1)
NEW = flags.DEFINE_integer("max_new_tokens", 64, "The longest response.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 is greedy.", lower_bound=0)
TOP_K = flags.DEFINE_integer("top_k", 0, "Only the k likeliest tokens; 0: all.", lower_bound=0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "Only the likeliest tokens of this probability.")
SEED = flags.DEFINE_integer("seed", 0, "Of all draws.", lower_bound=0)
CHAT = flags.DEFINE_bool("chat", False, "Prompts are users' messages, for the chat template.")
BATCH = flags.DEFINE_integer("batch_size", 8, "Prompts at a time.", lower_bound=1)
HANG = flags.DEFINE_float(
    "hang_minutes", 30.0, "Without progress, after which the command ends; 0: never.", lower_bound=0
)


def main() -> None:
    require_ranges()
    prompts = read_prompts()
    with watching(HANG.value):
        columns = [respond(name, prompts) for name in MODEL.value]
    width = shutil.get_terminal_size().columns
    print(side_by_side(MODEL.value, width))
    for prompt, *responses in zip(prompts, *columns):
        print("\n" + textwrap.fill(f"> {prompt}", width))
        for number, texts in enumerate(zip(*responses), 1):
            print(f"sample {number}\n{side_by_side(texts, width)}")


def require_ranges() -> None:
    """Refuse, before a model is read, numbers that nothing can be drawn with."""
    from dpojax.config.command_line import UsageError

    if not 0 < TOP_P.value <= 1:
        raise UsageError(f"--top_p={TOP_P.value}: above 0 and at most 1 is expected")
    if not TEMPERATURE.value < math.inf:  # nan, too
        raise UsageError(f"--temperature={TEMPERATURE.value}: a finite number is expected")
    for flag in (SEED, TOP_K, SAMPLES, NEW, BATCH):
        if flag.value >= 2**31:
            raise UsageError(f"--{flag.name}={flag.value}: the number is too large")


def read_prompts() -> list[str]:
    """Those of --prompt, then the lines of --prompts that are not empty."""
    from dpojax import storage
    from dpojax.config.command_line import UsageError

    lines = []
    if PROMPTS.value:
        path = storage.as_path(PROMPTS.value, "--prompts")
        lines = path.read_text(encoding="utf-8").splitlines()
    prompts = [*PROMPT.value, *(line for line in lines if line.strip())]
    if not prompts:
        raise UsageError("no prompt: give --prompt=TEXT or --prompts=FILE")
    return prompts


def respond(name: str, prompts: list[str]) -> list[list[str]]:
    """--samples texts of one model to each prompt."""
    import jax

    from dpojax.config.command_line import UsageError
    from dpojax.runs.policy import load_policy
    from dpojax.sampling import build_sampler, generate

    loaded = load_policy(name)
    tokenizer = loaded.tokenizer
    if CHAT.value and not tokenizer.chat_template:
        raise UsageError(f"--chat: {name} has no chat template; leave it out")
    sampler = build_sampler(loaded.model, max_new_tokens=NEW.value, stop=loaded.stop)
    with jax.set_mesh(loaded.mesh):
        drawn = generate(
            sampler,
            loaded.params,
            [encode(tokenizer, prompt) for prompt in prompts],
            batch_size=BATCH.value,
            seed=SEED.value,
            temperature=TEMPERATURE.value,
            top_k=TOP_K.value,
            top_p=TOP_P.value,
            samples=SAMPLES.value,
        )
    return [[_text(tokenizer, sample) for sample in samples] for samples in drawn]


def _text(tokenizer, sample) -> str:
    """The text of a response; it ends in [..] where it ran out of tokens."""
    text = tokenizer.decode(sample.tokens, skip_special_tokens=True).strip()
    return text if sample.stopped else f"{text} [..]"


def encode(tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt, or with --chat of the user's message."""
    if CHAT.value:
        from dpojax.data.templates import prompt_text

        text = prompt_text(tokenizer, [{"role": "user", "content": prompt}])
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and len(ids) > 1 else ids


def start() -> NoReturn:
    """Run the command that `sys.argv` holds, and end the process."""
    run_script(main)
