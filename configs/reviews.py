"""The embedded task: SFT on short film reviews, then DPO towards positive ones. No download.

    python scripts/train.py --config=configs/reviews.py --workdir=runs/reviews

A Llama-shaped model of the default size.
"""

from dpojax.launch.defaults import default_config


def get_config():
    config = default_config()
    config.tokens.max_length = 96
    return config


def sweep():
    """The paper's values of beta (Rafailov et al. 2023, section 6.1)."""
    return [{"dpo.beta": beta} for beta in (0.05, 0.1, 1.0, 5.0)]
