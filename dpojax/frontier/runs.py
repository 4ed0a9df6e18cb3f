"""The runs of a frontier: which methods, with which settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dpojax.config.errors import ConfigError
from dpojax.config.files import failing_at_its_line, load_config_file, split_variant

PREFERENCE, PPO, ONLINE = "preference", "ppo", "online"  # values of `Run.stage`
PREFERRED_FT, UNLIKELIHOOD, ONLINE_DPO = "preferred_ft", "unlikelihood", "online_dpo"  # methods


class Run(NamedTuple):
    """One run of a method.

    Attributes:
      method: a name of `evaluation.frontier_points.NAMES`, or of a loss.
      setting: what differs from the method's other runs, for the figure: "beta=0.1".
      changes: config keys, with values that differ from the config.
      stage: "preference", "ppo", or "online": rounds of the preference stage, see
        `frontier.online`.
    """

    method: str
    setting: str
    changes: Mapping[str, Any]
    stage: str = PREFERENCE

    @property
    def name(self) -> str:
        return f"{self.method}-{self.setting}".replace("=", "-").replace("/", "_")


def paper_runs(
    *,
    beta: Sequence[float] = (0.05, 0.1, 1.0, 5.0),
    common: Mapping[str, Any] | None = None,
) -> list[Run]:
    """The 22 runs of the paper's sweep (Rafailov et al. 2023, section 6.1).

    DPO over beta, PPO with the learned and with the true reward over the target KL, unlikelihood
    over alpha, preferred-FT over seeds.

    Args:
      common: config keys that all of them change.
    """
    common = dict(common or {})
    runs = [Run("dpo", f"beta={b:g}", common | {"preference.beta": b}) for b in beta]
    for method in ("ppo", "ppo_gt"):
        for kl in (3.0, 6.0, 9.0, 12.0):
            runs.append(Run(method, f"kl={kl:g}", common | {"ppo.kl_target": kl}, PPO))
    for a in (0.05, 0.1, 0.5, 1.0):
        changes = {"preference.loss": "unlikelihood", "preference.alpha": a}
        runs.append(Run(UNLIKELIHOOD, f"alpha={a:g}", common | changes))
    for seed in range(6):
        changes = {"preference.loss": "sft", "seed": seed}
        runs.append(Run(PREFERRED_FT, f"seed={seed}", common | changes))
    return runs


def online_runs(
    *, beta: Sequence[float] = (0.1,), common: Mapping[str, Any] | None = None
) -> list[Run]:
    """Online DPO over beta, in `config.frontier.online_rounds` rounds.

    Args:
      common: config keys that all of them change.
    """
    common = dict(common or {})
    return [Run(ONLINE_DPO, f"beta={b:g}", common | {"preference.beta": b}, ONLINE) for b in beta]


def run_of_loss(
    loss: str, common: Mapping[str, Any] | None = None, *, online_beta: float = 0.1
) -> Run:
    """A run of any loss of the library with its default options, or of "online_dpo"."""
    if loss == ONLINE_DPO:
        return online_runs(beta=(online_beta,), common=common)[0]
    return Run(loss, "default", dict(common or {}) | {"preference.loss": loss})


def read_runs(path: str, config: ConfigDict) -> list[Run]:
    """What the function `frontier(config)` of a config file returns.

    Raises:
      ConfigError: the file has no such function.
    """
    module = load_config_file(path)
    if not hasattr(module, "frontier"):
        raise ConfigError(f"{path}: has no function frontier(config) that returns the runs")
    with failing_at_its_line(split_variant(path)[0]):
        return module.frontier(config)
