"""The sampler of GPT-2 large in bfloat16: python -m benchmarks.on_accelerator.draws

Tokens per second, and those of `transformers.generate` where torch is installed: the two take
turns, as in `benchmarks/sampler.py`. Weights are random.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import tempfile

from benchmarks.on_accelerator.entries import Section, first_line, leave_out, tell

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch needs memory, too

from benchmarks.sampler import measure, random_model

LAYERS, WIDTH, PROMPT_TOKENS = 36, 1280, 64
CASES = ((16, 1, 64), (64, 4, 128))  # prompts, samples of each, new tokens
TINY = ((2, 2, 4),)


def main() -> None:
    section = Section(__doc__)
    device = "cpu" if section.small else "cuda"
    if importlib.util.find_spec("torch") is None:
        leave_out("sampler", "torch", "torch is not installed")
        device = None
    layers, width = (1, 64) if section.small else (LAYERS, WIDTH)
    dtype = "float32" if section.small else "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(pathlib.Path(folder) / "model", layers, width)
        for prompts, samples, tokens in TINY if section.small else CASES:
            what = f"{prompts} x {samples} x {tokens}"
            if section.left < 0.2 * section.args.seconds:
                leave_out("sampler", what, "no time was left")
                continue
            sizes = (prompts, samples, tokens, PROMPT_TOKENS if not section.small else 4)
            rounds = 1 if section.small else 3
            try:
                result = measure(model, *sizes, rounds, dtype, device)
            except Exception as error:  # torch without this GPU, for example
                if device is None:
                    raise
                leave_out("sampler", f"torch, {what}", first_line(error))
                device = None
                result = measure(model, *sizes, rounds, dtype, device)
            tell("sampler", what, dtype=dtype, **result)


if __name__ == "__main__":
    main()
