"""A sweep over beta against as many separate runs, each from start to finish.

    python benchmarks/sweep.py --shape tiny --json sweep.json
    python benchmarks/sweep.py --shape gpt2-small --steps 10 --separate 2

Everything that a user waits for is timed: starting Python, reading data, compiling, the
reference's log-probs, training, evaluations and checkpoints, in new processes without anything
compiled before. Separate runs and the sweep take turns, so that both see the same machine;
`--separate` says how many of the members' runs are timed (their mean stands for the others).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpojax.models import decoder, huggingface
from dpojax.models.config import GPT2, DecoderConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
BETAS = (0.01, 0.03, 0.05, 0.1, 0.3, 0.5, 1.0, 5.0)


class Shape(NamedTuple):
    layers: int
    width: int
    heads: int
    vocabulary: int
    pairs: int
    tokens: int  # of the prompt, and of each response


SHAPES = {
    "tiny": Shape(4, 256, 4, 8192, pairs=16, tokens=64),
    "gpt2-small": Shape(12, 768, 12, 50257, pairs=4, tokens=128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--members", type=int, default=8, choices=range(2, len(BETAS) + 1))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--separate", type=int, default=4, help="separate runs to time")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_inputs(folder, SHAPES[args.shape], args.steps)
        config = write_config(folder, SHAPES[args.shape], args.steps, BETAS[: args.members])
        result = _timed(folder, config, args)
    result |= {"shape": args.shape, "members": args.members, "steps": args.steps}
    separate, sweep = statistics.mean(result["separate"]), result["sweep"]
    result["ratio"] = sweep / (args.members * separate)
    print(
        f"{args.shape}, {args.steps} steps: a run {separate:.1f} s "
        f"({', '.join(f'{x:.1f}' for x in result['separate'])}), the sweep of {args.members} "
        f"{sweep:.1f} s, {result['ratio']:.2f} of {args.members} runs"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def _timed(folder: pathlib.Path, config: pathlib.Path, args) -> dict:
    """Seconds of the sweep, and of separate runs: half of them before the sweep, half after."""
    seconds: dict = {"separate": []}
    before = -(-args.separate // 2)
    for index in range(args.separate + 1):
        if index == before:
            seconds["sweep"] = _run("sweep.py", config, folder / "sweep")
            continue
        beta = BETAS[len(seconds["separate"]) * (args.members - 1) // max(1, args.separate - 1)]
        name = folder / f"run-{beta}"
        changed = f"--config.preference.beta={beta}"
        seconds["separate"].append(_run("train.py", config, name, changed))
    return seconds


def _run(script: str, config: pathlib.Path, workdir: pathlib.Path, *more: str) -> float:
    command = [sys.executable, str(ROOT / "scripts" / script), f"--config={config}"]
    began = time.perf_counter()
    subprocess.run(
        [*command, f"--workdir={workdir}", *more],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    return time.perf_counter() - began


def make_inputs(folder: pathlib.Path, shape: Shape, steps: int) -> None:
    """A model of random weights, a tokenizer of as many words, and pairs of random words."""
    words = ["<pad>", "</s>", "<unk>", *(f"t{i}" for i in range(3, shape.vocabulary))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    sizes = {"width": shape.width, "mlp_width": 4 * shape.width, "heads": shape.heads}
    sizes |= {"layers": shape.layers, "max_positions": 1024, "vocab_size": shape.vocabulary}
    config = DecoderConfig(**GPT2, **sizes)
    params = jax.jit(decoder.build(config).init)(jax.random.key(0))
    huggingface.save(folder / "policy", config, params, tokenizer=tokenizer)
    rng = np.random.default_rng(0)

    def text(count: int) -> str:
        return " ".join(f"t{i}" for i in rng.integers(3, shape.vocabulary, count))

    for split, pairs in (("train", steps * shape.pairs), ("eval", 4 * shape.pairs)):
        lines = [
            {
                "prompt": text(shape.tokens),
                "chosen": f" {text(shape.tokens - 1)}",  # and EOS
                "rejected": f" {text(shape.tokens - 1)}",
            }
            for _ in range(pairs)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))


def write_config(folder: pathlib.Path, shape: Shape, steps: int, betas: tuple) -> pathlib.Path:
    """Half of the steps lie between two evaluations."""
    path = folder / "config.py"
    path.write_text(f"""
from dpojax.config.defaults import default_config


def get_config():
    config = default_config()
    config.stages = ("preference",)
    config.model.path = {str(folder / "policy")!r}
    config.preference.data.source = {str(folder / "train.jsonl")!r}
    config.preference.data.eval_source = {str(folder / "eval.jsonl")!r}
    config.preference.data.limit = 0
    config.preference.data.eval_limit = 0
    config.preference.batch_size = {shape.pairs}
    config.preference.steps = {steps}
    config.preference.learning_rate = 1e-5
    config.evaluate_every = {steps // 2}
    config.checkpoint_every = 0
    config.trackers = ()
    return config


def sweep():
    return [{{"preference.beta": beta}} for beta in {betas}]
""")
    return path


if __name__ == "__main__":
    main()
