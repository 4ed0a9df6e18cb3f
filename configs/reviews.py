"""The embedded task: SFT on short film reviews, then DPO towards positive ones. No download.

    python scripts/train.py --config=configs/reviews.py --workdir=runs/reviews

A Llama-shaped model of 0.9M parameters, made here; 2 to 3 minutes on 2 cores.
"""

from dpojax.launch.defaults import default_config


def get_config():
    config = default_config()
    config.tokens.max_length = 96
    config.sft.data.limit = 16_000
    config.sft.schedule = "cosine"
    config.dpo.data.limit = 8_000
    config.dpo.epochs = 2
    config.dpo.learning_rate = 5e-4
    config.dpo.schedule = "cosine"
    config.evaluate_every = 25
    return config


def frontier():
    """The 22 runs of the paper's figure 2, on rankings of four completions of each prompt."""
    from dpojax.launch.frontier import paper_runs

    common = {
        "dpo.batch_size": 16,
        "dpo.epochs": 1,
        "dpo.data.limit": 0,
        "dpo.data.eval_limit": 100,
        "log_every": 5,
        "evaluate_every": 25,
        "checkpoint_every": 0,
    }
    return paper_runs(common=common)


def sweep():
    """The paper's values of beta (Rafailov et al. 2023, section 6.1)."""
    return [{"dpo.beta": beta} for beta in (0.05, 0.1, 1.0, 5.0)]
