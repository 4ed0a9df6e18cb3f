"""scripts/judge.py: what it prints, and how it ends."""

import json
import subprocess
import sys

import pytest

from dpojax.data import reviews

from .conftest import ROOT, environment

RECORDS = reviews.preferences("eval", 12, 3)


def judge(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "judge.py"), *arguments],
        env=environment(),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def folder(tmp_path):
    """Pairs, responses, and human choices, in files."""
    rows = {
        "pairs": RECORDS,
        "bad": [{"prompt": x["prompt"], "response": x["rejected"]} for x in RECORDS],
        "humans": [
            {"prompt": x["prompt"], "a": x["chosen"], "b": x["rejected"], "choice": "a"}
            for x in RECORDS
        ],
    }
    for name, records in rows.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


@pytest.mark.slow
def test_it_prints_a_table_that_fits_a_terminal_and_names_its_files(folder):
    done = judge(
        "--a=a policy with quite a long name=bad.jsonl",
        "--prompts=pairs.jsonl",
        "--judge=exact",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "Win rates against references, judged by exact" in done.stdout
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("a policy")]
    assert row.split()[7:11] == ["0.0", "0.0", "to", row.split()[10]]
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "judged: report.md, win_rates.csv" in done.stdout
    assert (folder / "judged" / "report.md").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--a, --prompts, --judge: missing"),
        (["--a=x", "--prompts=reviews", "--judge=exact"], "limit = 0: the prompts of reviews"),
        (["--a=x", "--prompts=p", "--judge=exact", "--temperatures=0,b"], "--temperatures=0,b:"),
        (["--frontier=nowhere"], "--frontier=nowhere: no such folder"),
        (["--a=x", "--prompts=p", "--judge=exact", "--at_kl=3"], "choose runs of a --frontier"),
        (["--a=x", "--prompts=p", "--judge=exact", "--prompted=y=f.txt"], "no side has this name"),
        (["--humans=humans.jsonl"], "--humans: needs --judge"),
        (["--humans=humans.jsonl", "--judge=exact", "--limit=3"], "reads no --limit"),
        (["--a=x", "--prompts=p", "--judge=exact", "--judge=length"], "name one"),
        (["--a=x", "--prompts=p", "--judge=exact", "--dry_run", "--import_batch=f"], "batch files"),
        (["--a=x", "--prompts=p", "--judge=exact", "--best_of=4"], "name the reward"),
    ],
)
def test_a_wrong_value_is_one_line_and_status_2(folder, arguments, says):
    done = judge(*arguments, cwd=folder)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (folder / "judged").exists()


@pytest.mark.slow
def test_judges_are_held_against_human_choices(folder):
    done = judge("--humans=humans.jsonl", "--judge=exact", "--judge=length", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}
    assert float(rows["exact"][1].rstrip("%")) in (1.0, 100.0)  # the humans are the oracle
    assert rows["length"] != rows["exact"]
    assert "agreement.csv" in done.stdout


@pytest.mark.long
def test_a_dry_run_beside_human_choices_counts_the_calls_and_asks_nobody(folder):
    nobody = "openai:model@http://localhost:9/v1"
    done = judge("--humans=humans.jsonl", f"--judge={nobody}", "--dry_run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{nobody}: {2 * len(RECORDS)} calls with ")
    assert not (folder / "judged").exists()
