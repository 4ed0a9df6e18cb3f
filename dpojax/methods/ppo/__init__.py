"""PPO for language models: the baseline of the reward-KL frontier (Rafailov et al. 2023, fig. 2).

An iteration has three parts. The caller does the second one, where PPO with a learned reward and
PPO with the true reward (PPO-GT) differ:

    samples = draw(sampler, state, prompts)                 # responses of the policy
    scores = ...                                            # any numbers, one for each
    state, report = update(state, reference, pack(prompts, samples), scores, hyper)

`update` (see `build_update`) computes log-probs and values, shapes rewards by the KL to the
reference, estimates advantages and takes several epochs of minibatch steps. Its mathematics is that
of `dpojax.rl`. Its optimiser step is that of every other method. Schulman et al. 2017; Ziegler et
al. 2019.
"""

from dpojax.methods.ppo.experience import build_experience
from dpojax.methods.ppo.objectives import Experience, hyper
from dpojax.methods.ppo.rollouts import (
    PPOState,
    Responses,
    draw,
    new_ppo_state,
    pack,
    row_shape,
    with_value_head,
)
from dpojax.methods.ppo.settings import PPO
from dpojax.methods.ppo.update import build_optimise, build_update

__all__ = [
    "PPO",
    "Experience",
    "PPOState",
    "Responses",
    "build_experience",
    "build_optimise",
    "build_update",
    "draw",
    "hyper",
    "new_ppo_state",
    "pack",
    "row_shape",
    "with_value_head",
]
