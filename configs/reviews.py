"""The embedded task: short film reviews, towards positive ones. No download, no accelerator.

    python scripts/frontier.py --config=configs/reviews.py --workdir=runs/frontier
    python scripts/train.py --config=configs/reviews.py --workdir=runs/reviews

The first makes the reward-KL frontier, 23 runs; the second SFT and then DPO on pairs of the
grammar's own, in 2 minutes on two cores. A Llama-shaped model of 0.15M parameters, made here, which
knows the grammar as well as one of 0.9M (1.599 against 1.595 nats per held-out token).
"""

from dpojax.config.defaults import default_config


def get_config():
    config = default_config()
    config.model.update(width=64, layers=2, heads=2, kv_heads=2, mlp_width=192)
    config.tokens.max_length = 96
    config.max_buckets = 1  # another would take longer to compile than it saves this model
    config.sft.data.limit = 16_000
    config.sft.learning_rate = 5e-3
    config.sft.schedule = "cosine"
    config.preference.data.limit = 8_000
    config.preference.epochs = 2
    config.preference.learning_rate = 1e-3
    config.preference.schedule = "cosine"
    config.evaluate_every = 25
    config.reward.schedule = "cosine"
    config.reward.data.limit = 8_000
    config.ppo.update(steps=48, learning_rate=1e-3)
    config.samples.update(count=128, per_prompt=6)
    config.frontier.update(count=6_500, online_beta=1.0)
    return config


def frontier(config):
    """The 22 runs of the paper's figure 2, on all pairs of four completions of every prompt; and
    beta = 2, since 1 and 5 end far apart here.

    All learn from the same prompts: preferred-FT goes over them once, DPO and unlikelihood twice.
    """
    from dpojax.frontier.runs import paper_runs

    common = {
        "preference.batch_size": 32,
        "preference.warmup_steps": 80,
        "preference.data.limit": 0,
        "preference.data.eval_share": 0.03,
        "preference.data.eval_limit": 200,
        "log_every": 10,
        "checkpoint_every": 0,
        "evaluate_every": 100,
    }
    # The learned reward is in logits, which spread several times as wide as the true one.
    of_method = {
        "ppo": {"evaluate_every": 12, "ppo.kl_coefficient": 0.3},
        "ppo_gt": {"evaluate_every": 12, "ppo.kl_coefficient": 0.1},
        "preferred_ft": {"preference.epochs": 1},
    }
    # Found by single runs: benchmarks/RESULTS.md.
    rates = {0.05: 2e-4, 0.1: 2e-4, 1.0: 1e-3, 2.0: 8e-4, 5.0: 6e-4}
    runs = []
    for run in paper_runs(beta=(0.05, 0.1, 1.0, 2.0, 5.0), common=common):
        rate = rates.get(run.changes.get("preference.beta"), 5e-4)
        changes = run.changes | of_method.get(run.method, {})
        runs.append(run._replace(changes=changes | {"preference.learning_rate": rate}))
    return runs


def sweep():
    """The paper's values of beta (Rafailov et al. 2023, section 6.1)."""
    return [{"preference.beta": beta} for beta in (0.05, 0.1, 1.0, 5.0)]
