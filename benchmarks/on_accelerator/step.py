"""The DPO step of a model in bfloat16: python -m benchmarks.on_accelerator.step gpt2-large

Tokens per second, MFU, and memory against what a run predicts: one case of
`benchmarks/train_step.py`, in this process, whose peak memory is the step's.
"""

from __future__ import annotations

from benchmarks.on_accelerator.entries import Section, tell
from benchmarks.train_step import Case, decoder_config, measure

# Rows of 1,024 and 2,048 tokens, half of them or more scored, and 8 of them.
GPT2_LARGE = {"model": "openai-community/gpt2-large", "pairs": 8, "prompt": 256, "response": 384}
LLAMA_1B = {"model": "meta-llama/Llama-3.2-1B", "pairs": 8, "prompt": 512, "response": 768}
CASES = {
    "gpt2-large": Case(**GPT2_LARGE, dtype="bfloat16"),
    "llama-1b": Case(**LLAMA_1B, dtype="bfloat16"),
}
TINY = {"small": True, "pairs": 2, "prompt": 16, "response": 24, "dtype": "float32"}
STEPS = 7


def main() -> None:
    section = Section(__doc__, "case")
    case = CASES[section.args.case]
    if section.small:
        case = case._replace(**TINY)
    result = measure(case, 2 if section.small else STEPS)
    tell("step", f"{decoder_config(case).layers} layers, rows {result['rows']}", **result)


if __name__ == "__main__":
    main()
