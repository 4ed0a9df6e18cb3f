"""Two rounds of online DPO in a tiny frontier whose reward is a classifier that it trains: who
draws, what is learnt from it, and resuming."""

import itertools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpojax.data.records import DataError
from dpojax.evaluation.frontier_points import read_points
from dpojax.evaluation.policies import encode_prompts, response_texts
from dpojax.evaluation.rewards import open_reward
from dpojax.frontier import online
from dpojax.frontier import results as frontier_results
from dpojax.frontier.configs import CLASSIFIER, POLICY
from dpojax.frontier.frontier import make_frontier
from dpojax.frontier.plan import SAMPLES
from dpojax.frontier.runs import run_of_loss
from dpojax.jobs.progress import read_seconds
from dpojax.models import huggingface
from dpojax.runs.policy import load_policy
from dpojax.runs.preferences import Settings, generate_preferences
from dpojax.sampling import build_sampler, generate
from dpojax.training.metrics import read_metrics

from .test_classifier_run import texts, write_parquet
from .test_frontier import config
from .test_preferences import save_model

STEPS = 4
CHANGES = {
    "frontier.online_rounds": 2,
    "frontier.reward": "classifier",
    "tokens.max_length": 32,
    "classifier.max_tokens": 24,
    "classifier.batch_size": 16,
    "classifier.steps": 3,
}
RUNS = [run_of_loss("online_dpo", {"preference.learning_rate": 1e-2, "preference.warmup_steps": 0})]


def rounds_of(folder):
    workdir = folder / "runs" / "online_dpo-beta-0.1"
    return [online.round_folder(workdir, number) for number in range(2)]


def make(folder):
    source = {"classifier.data.source": str(folder / "labelled.parquet")}
    make_frontier(config(**CHANGES | source), RUNS, str(folder))


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A frontier whose other jobs are done: of its policy, preferences and samples; its figure."""
    folder = tmp_path_factory.mktemp("online")
    save_model(folder / POLICY)
    write_parquet(folder / "labelled.parquet", texts(200))
    for done in ("sft/finished.json", "preferences/.done-1of1"):
        (folder / done).parent.mkdir()
        (folder / done).touch()
    rewards = np.random.default_rng(0).uniform(size=(8, 32))
    np.savez(folder / SAMPLES, rewards=rewards, lengths=np.full((8, 32), 9))
    make(folder)
    frontier_results.write(folder)
    return folder


def drawn_by(policy_folder, prompts, first):
    """All texts that a policy says to prompts whose ids start at `first`, by prompt."""
    policy = load_policy(str(policy_folder))
    ids = encode_prompts(policy.tokenizer, prompts)
    sampler = build_sampler(policy.model, max_new_tokens=16, stop=policy.stop)
    drawn = generate(
        sampler,
        policy.params,
        ids,
        batch_size=64,
        ids=range(first, first + len(ids)),
        seed=0,
        samples=3,
    )
    return [set(response_texts(policy.tokenizer, *pair)) for pair in zip(ids, drawn)]


def preferences(folder):
    (path,) = (folder / online.PREFERENCES).glob("part-*.parquet")
    return pq.read_table(path).to_pylist()


def test_a_round_learns_from_what_the_policy_before_it_says_to_prompts_of_its_own(made):
    first, second = rounds_of(made)
    prompts = [json.loads((f / "preferences/provenance.json").read_text()) for f in (first, second)]
    assert [provenance["prompts"] for provenance in prompts] == [12, 12]  # of 24 in two rounds
    rows = preferences(second)
    prompts_drawn = [row["prompt"] for row in rows]
    from_first = drawn_by(first / online.EXPORTED, prompts_drawn[:4], 12)
    from_sft = drawn_by(made / POLICY, prompts_drawn[:4], 12)
    assert [row["prompt_index"] for row in rows[:4]] == [0, 1, 2, 3]
    assert all(set(row["responses"]) <= drawn for row, drawn in zip(rows, from_first))
    assert not all(set(row["responses"]) <= drawn for row, drawn in zip(rows, from_sft))
    assert prompts_drawn != [row["prompt"] for row in preferences(first)]


def test_the_classifier_that_the_plan_trained_is_the_reward(made):
    reward = open_reward(f"classifier:{made / CLASSIFIER}")
    rows = preferences(rounds_of(made)[1])
    for row in rows[:4]:
        prompts = [row["prompt"]] * len(row["responses"])
        np.testing.assert_allclose(row["scores"], reward(prompts, row["responses"]), atol=1e-5)
    points = [p for p in read_points(made / "frontier.csv") if p.method == "online_dpo"]
    assert all(0 < point.reward < 1 for point in points)


def weights(folder):
    params = huggingface.load(str(folder))[1]
    return np.asarray(params["blocks"]["mlp"]["up"]["kernel"])


def test_every_round_starts_from_the_one_before_and_its_reference_is_the_sft_policy(made):
    first, second = rounds_of(made)
    for folder, start in ((first, made / POLICY), (second, first / online.EXPORTED)):
        config_of_round = json.loads((folder / online.TRAINED / "config.json").read_text())
        assert config_of_round["model"]["path"] == str(start)
        assert config_of_round["preference"]["reference"]["path"] == str(made / POLICY)
    at_start = [
        next(
            x
            for x in read_metrics(f / "run" / "preference")
            if x["split"] == "eval" and not x["step"]
        )
        for f in (first, second)
    ]
    # The KL is from the SFT policy: none before the first round, some before the second.
    assert abs(at_start[0]["samples/kl"]) < 1e-4 < 0.01 < abs(at_start[1]["samples/kl"])
    policies = [made / POLICY, first / online.EXPORTED, second / online.EXPORTED]
    same = [np.array_equal(weights(a), weights(b)) for a, b in itertools.pairwise(policies)]
    assert same == [False, False]


def test_the_rounds_are_one_run_of_the_figure(made):
    points = read_points(made / "frontier.csv")
    steps = [point.step for point in points if point.method == "online_dpo"]
    assert steps == [2, 4, STEPS + 2, STEPS + 4]
    lines = [json.loads(line) for line in (made / "samples.jsonl").read_text().splitlines()]
    assert [(line["method"], line["setting"]) for line in lines] == 8 * [("online_dpo", "beta=0.1")]
    assert "Online DPO" in (made / "report.md").read_text()


def test_the_parts_of_every_round_are_jobs_with_logs_and_seconds_of_their_own(made):
    jobs = json.loads((made / "plan.json").read_text())["jobs"]
    names = [job["name"] for job in jobs if "round" in job["name"]]
    parts = [
        f"online_dpo-beta-0.1-round-{number}{part}"
        for number in range(2)
        for part in ("-preferences", "", "-policy")
    ]
    assert names == parts
    needs = {job["name"]: job["needs"] for job in jobs}
    assert [needs[name] for name in names] == [[CLASSIFIER], *([name] for name in names[:-1])]
    assert read_seconds(made).jobs.keys() >= {*names}
    assert {f"{name}.txt" for name in names} <= {path.name for path in (made / "logs").iterdir()}


def test_what_is_done_of_the_rounds_is_not_done_again(made):
    first, second = rounds_of(made)
    made_files = [
        *first.rglob("*.parquet"),
        *first.rglob("*.safetensors"),
        *second.rglob("*.parquet"),
    ]
    before = {path: path.stat().st_mtime_ns for path in made_files}
    (second / online.EXPORTED).rename(made / "lost")
    make(made)
    assert {path: path.stat().st_mtime_ns for path in made_files} == before
    np.testing.assert_array_equal(weights(second / online.EXPORTED), weights(made / "lost"))


def test_prompts_that_do_not_suffice_for_a_round_are_refused(made, tmp_path):
    (tmp_path / "prompts.txt").write_text("this film\na film\n")
    settings = Settings(
        policy=str(made / POLICY),
        prompts=str(tmp_path / "prompts.txt"),
        reward="reviews",
        out=str(tmp_path / "out"),
        skip=2,
        limit=2,
    )
    with pytest.raises(DataError, match=r"prompts\.txt: holds 2 prompts, and skip = 2 leaves none"):
        generate_preferences(settings)
    assert not (tmp_path / "out").exists()


def test_online_dpo_is_added_with_the_beta_that_the_config_gives_it():
    run = run_of_loss("online_dpo", {"preference.steps": 2}, online_beta=0.5)
    assert run.changes == {"preference.steps": 2, "preference.beta": 0.5}
    assert run.name == "online_dpo-beta-0.5"
