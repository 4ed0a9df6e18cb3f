"""A frontier on the embedded task that two cores make in a minute, strong enough to conclude from.

scripts/frontier.py makes it for `test_frontier_conclusions.py`.
"""

from dpojax.launch.defaults import default_config
from dpojax.launch.frontier import Run


def get_config():
    config = default_config()
    config.model.update(width=64, layers=2, heads=2, kv_heads=2, mlp_width=192, max_positions=128)
    config.tokens.max_length = 96
    config.sft.data.limit = 12_000
    config.sft.data.eval_limit = 50
    config.sft.schedule = "cosine"
    config.dpo.data.limit = 0
    config.dpo.data.eval_limit = 50
    config.dpo.batch_size = 16
    config.dpo.steps = 100
    config.dpo.learning_rate = 1e-3
    config.ppo.steps = 24
    config.ppo.limit = 1_000
    config.evaluate_every = 25
    config.checkpoint_every = 0
    config.samples.count = 64
    config.samples.per_prompt = 8
    config.samples.max_new_tokens = 48
    config.frontier.count = 1_000
    config.frontier.reference_samples = 512
    config.frontier.best_of_n = (2, 4, 16, 64)
    return config


def frontier():
    return [
        Run("dpo", "beta=0.05", {"dpo.beta": 0.05}),
        Run("dpo", "beta=0.3", {"dpo.beta": 0.3}),
        Run("ppo_gt", "kl=4", {"ppo.kl_target": 4.0, "evaluate_every": 12}, "ppo"),
        Run("unlikelihood", "alpha=0.5", {"dpo.loss": "unlikelihood", "dpo.alpha": 0.5}),
        Run("preferred_ft", "seed=0", {"dpo.loss": "sft"}),
    ]
