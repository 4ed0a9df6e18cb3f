"""Rewards of many samples of the reference: for best-of-n and the optimum.

python -m dpojax.frontier.reference_samples --config=CONFIG.json --policy=FOLDER --out=FILE.npz
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.command_line import ArgumentParser
from dpojax.config.saved import config_from_json
from dpojax.data.prompts import read_prompts
from dpojax.evaluation.policies import encode_prompts, response_texts
from dpojax.evaluation.rewards import open_reward
from dpojax.runs.command import run_command
from dpojax.runs.policy import load_policy
from dpojax.sampling import build_sampler, generate
from dpojax.stages.samples import SEED
from dpojax.watchdog import watching

SAMPLES_AT_ONCE = 32  # of a prompt


def sample_reference(config: ConfigDict, policy_name: str, out: storage.Path) -> None:
    """Write rewards and lengths [P, m] of samples of a policy to each held-out prompt.

    Args:
      config: its `samples` say how to draw and score; `frontier.reference_samples` is m.
    """
    with watching(config.hang_minutes):
        _sample_reference(config, policy_name, out)


def _sample_reference(config: ConfigDict, policy_name: str, out: storage.Path) -> None:
    samples_config = config.samples
    policy = load_policy(policy_name)
    reward = open_reward(samples_config.reward, mesh=policy.mesh)
    prompts = read_prompts(
        samples_config.prompts,
        split="eval",
        limit=samples_config.count,
        seed=SEED,
        tokenizer=policy.tokenizer,
    )
    sampler = build_sampler(
        policy.model, max_new_tokens=samples_config.max_new_tokens, stop=policy.stop
    )
    repeats = -(-config.frontier.reference_samples // SAMPLES_AT_ONCE)
    # Each prompt stands `repeats` times, one after another.
    token_ids = [ids for ids in encode_prompts(policy.tokenizer, prompts) for _ in range(repeats)]
    texts_of_prompts = [prompt for prompt in prompts for _ in range(repeats)]
    with jax.set_mesh(policy.mesh):
        drawn = generate(
            sampler,
            policy.params,
            token_ids,
            batch_size=32,
            seed=SEED + 1,
            samples=SAMPLES_AT_ONCE,
            temperature=samples_config.temperature,
        )
    responses, lengths, asked_prompts = [], [], []
    for prompt, ids, samples in zip(texts_of_prompts, token_ids, drawn):
        responses += response_texts(policy.tokenizer, ids, samples)
        lengths += [len(sample.tokens) - sample.stopped for sample in samples]
        asked_prompts += [prompt] * len(samples)
    rewards = np.asarray(reward(asked_prompts, responses)).reshape(len(prompts), -1)
    with storage.replacing(out) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, rewards=rewards, lengths=np.reshape(lengths, rewards.shape))


def read_reference_samples(path: storage.Path) -> tuple[np.ndarray, np.ndarray]:
    """Read what `sample_reference` wrote: rewards and lengths, both [prompts, samples].

    Raises:
      StorageError: the file is damaged.
    """
    hint = "delete it: the command that began the frontier makes it again"
    try:
        with storage.damage_named(path, hint), np.load(storage.local_copy(path)) as samples:
            return samples["rewards"], samples["lengths"]
    except (zipfile.BadZipFile, zlib.error) as error:
        raise storage.StorageError(f"{path}: {error}; {hint}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of a job: see above."""
    parser = ArgumentParser(
        prog="python -m dpojax.frontier.reference_samples",
        description="Rewards of many samples of a policy to held-out prompts.",
    )
    parser.add_argument("--config", required=True, help="a config as JSON")
    parser.add_argument("--policy", required=True, help="see dpojax.runs.policy.load_policy")
    parser.add_argument("--out", required=True, help="the .npz file to write")
    options = parser.parse_args(arguments)
    values = storage.read_json(storage.as_path(options.config, "--config"), fields={})
    config = config_from_json(values, where=options.config)
    sample_reference(config, options.policy, storage.as_path(options.out, "--out"))


if __name__ == "__main__":
    run_command(main)
