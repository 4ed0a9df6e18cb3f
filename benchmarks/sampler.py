"""This library's sampler against `transformers.generate` in torch: tokens per second.

    python benchmarks/sampler.py --model FOLDER                # a Hugging Face folder of a decoder
    python benchmarks/sampler.py --prompts 8 32 --samples 1 4 --tokens 64 256 --json sampler.json

Without --model: a model of GPT-2 small's shape with random weights. Both sides have the same
weights and prompts, draw at temperature 1 from the whole vocabulary, and do not stop, so that all
responses have the same number of tokens. The two take turns; medians, and the median of the ratios
of neighbours, which drifts less than seconds do where other processes run. `CPU ratio` is that of
the CPU seconds taken, which other processes touch least; `taskset -c 0` gives both sides one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpojax import sharding
from dpojax.models import decoder, huggingface
from dpojax.models.config import GPT2, DecoderConfig
from dpojax.sampling import build_sampler, pad

COLUMNS = (
    "prompts x samples | new tokens | ours tok/s | torch tok/s | ratio | CPU ratio | compile s"
)


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    with tempfile.TemporaryDirectory() as made:
        folder = args.model or random_model(pathlib.Path(made) / "model", args.layers, args.width)
        results = []
        print(f"| {COLUMNS} |\n|{' --- |' * 7}", flush=True)
        cases = itertools.product(args.prompts, args.samples, args.tokens)
        for prompts, samples, tokens in cases:
            result = measure(folder, prompts, samples, tokens, args.prompt_tokens, args.rounds)
            results.append(result)
            numbers = f"{result['ours']:,.0f} | {result['torch']:,.0f} | {result['ratio']:.2f}"
            numbers += f" | {result['cpu_ratio']:.2f}"
            row = f"{prompts} x {samples} | {tokens} | {numbers} | {result['compile']:.1f}"
            print(f"| {row} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=pathlib.Path, help="a Hugging Face folder; default: random weights")
    add("--layers", type=int, default=12, help="of the random model")
    add("--width", type=int, default=768, help="of the random model")
    add("--prompts", type=int, nargs="+", default=[8, 32, 128])
    add("--samples", type=int, nargs="+", default=[1, 4], help="of each prompt")
    add("--tokens", type=int, nargs="+", default=[64, 256], help="new ones of a response")
    add("--prompt-tokens", type=int, default=16, help="length of every prompt")
    add("--rounds", type=int, default=3, help="timed calls of each side")
    add("--json", type=pathlib.Path, metavar="OUT", help="also write the results here")
    return parser.parse_args(argv)


def random_model(folder: pathlib.Path, layers: int, width: int) -> pathlib.Path:
    """A GPT-2 of this shape with random weights."""
    shape = {"vocab_size": 50257, "width": width, "layers": layers, "heads": width // 64}
    shape |= {"mlp_width": 4 * width, "max_positions": 1024}
    config = DecoderConfig(**GPT2 | shape)
    huggingface.save(folder, config, jax.jit(decoder.build(config).init)(jax.random.key(0)))
    return folder


def measure(
    folder: pathlib.Path,
    prompts: int,
    samples: int,
    tokens: int,
    prompt_tokens: int,
    rounds: int,
    dtype: str = "float32",
    torch_device: str | None = "cpu",
) -> dict[str, Any]:
    """Tokens per second of both sides, and `compile`: by how much our first call took longer.

    Args:
      folder: of the model.
      prompts, samples, tokens, prompt_tokens: how many there are of each.
      rounds: timed calls of each side.
      dtype: of weights in products.
      torch_device: where torch draws; None measures our side alone.
    """
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    config, params, _ = huggingface.load(str(folder), mesh=mesh)
    ids = np.random.default_rng(0).integers(3, config.vocab_size, (prompts, prompt_tokens))
    sides = [_ours(config, params, ids, samples, tokens, dtype)]
    if torch_device is not None:
        sides.append(_torch(folder, ids, samples, tokens, dtype, torch_device))
    first, *_ = [_seconds(draw, 0)[0] for draw in sides]
    timed = [[_seconds(draw, seed) for draw in sides] for seed in range(1, rounds + 1)]
    ours, *theirs = [statistics.median(seconds for seconds, _ in side) for side in zip(*timed)]
    count = prompts * samples * tokens
    result = {"prompts": prompts, "samples": samples, "tokens": tokens}
    result |= {"ours": count / ours, "compile": first - ours}
    if not theirs:
        return result
    # Both clocks, wall and CPU: the median over rounds of torch's seconds / ours.
    ratio, cpu_ratio = (
        statistics.median(torch_side[clock] / our_side[clock] for our_side, torch_side in timed)
        for clock in (0, 1)
    )
    return result | {"torch": count / theirs[0], "ratio": ratio, "cpu_ratio": cpu_ratio}


def _seconds(draw: Callable[[int], None], seed: int) -> tuple[float, float]:
    """Of the wall clock, and of CPU time."""
    began, cpu = time.perf_counter(), time.process_time()
    draw(seed)
    return time.perf_counter() - began, time.process_time() - cpu


def _ours(
    config, params, ids: np.ndarray, samples: int, tokens: int, dtype: str
) -> Callable[[int], None]:
    model = decoder.build(config, compute_dtype=jnp.dtype(dtype))
    params = jax.jit(model.cast)(params)
    sampler = build_sampler(model, max_new_tokens=tokens)
    batch = pad(list(ids), range(len(ids)), len(ids))

    def draw(seed: int) -> None:
        drawn = jax.device_get(sampler(params, batch, seed=seed, samples=samples))
        assert (drawn.lengths == tokens).all()

    return draw


def _torch(
    folder, ids: np.ndarray, samples: int, tokens: int, dtype: str, device: str
) -> Callable[[int], None]:
    import torch  # our side can be measured without it
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=False
    )
    model = model.to(device).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    prompts = torch.tensor(ids, device=device)

    def draw(seed: int) -> None:
        torch.manual_seed(seed)
        with torch.inference_mode():
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                num_return_sequences=samples,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
            )
        assert out.cpu().shape == (len(ids) * samples, ids.shape[1] + tokens)  # waits for a GPU

    return draw


if __name__ == "__main__":
    main()
