"""Folders with splits and subsets, and names on the hub, whose one boundary is `load_dataset`."""

import json

import datasets
import huggingface_hub
import pytest

from dpojax.data import reviews
from dpojax.data.records import DataError
from dpojax.data.sources import Source, fingerprint, labels, listed, read
from dpojax.stages.data import DataRequirements, load

ROWS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(8)]


def rows(path, **options):
    return [row for row, _ in read(path, **options)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.fixture
def folder(tmp_path):
    """Two subsets, one of which has two splits, as a README.md names them."""
    write(tmp_path / "set" / "helpful" / "a.jsonl", ROWS[:2])
    write(tmp_path / "set" / "helpful" / "b.jsonl", ROWS[2:3])
    write(tmp_path / "set" / "harmless" / "train.jsonl", ROWS[3:6])
    write(tmp_path / "set" / "harmless" / "test.jsonl", ROWS[6:])
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: helpful\n  data_files: helpful/*.jsonl\n"
        "- config_name: harmless\n  data_files:\n  - split: train\n    path: harmless/train.jsonl\n"
        "  - split: test\n    path: harmless/test.jsonl\n---\n"
    )
    return tmp_path / "set"


def test_a_subset_of_a_folder_is_named_by_a_key_or_behind_its_name(folder):
    found = [*read(Source(folder, subset="helpful"))]
    assert [row for row, _ in found] == ROWS[:3]
    assert [id for _, id in found] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]
    assert [*read(f"{folder}:helpful")] == found
    assert rows(f"{folder}:harmless", split="test") == ROWS[6:]
    assert rows(Source(folder, data_dir="helpful")) == ROWS[:3]


def test_what_a_folder_has_is_listed_where_something_else_is_asked_for(folder):
    for subset in ("", "honest"):
        with pytest.raises(DataError, match=r"helpful.*harmless.*data\.subset"):
            rows(Source(folder, subset=subset))
    with pytest.raises(DataError, match="has the splits train, test; choose one"):
        rows(f"{folder}:harmless")
    with pytest.raises(DataError, match="no split 'dev', only train, test"):
        rows(f"{folder}:harmless", split="dev")
    with pytest.raises(DataError, match="is a file and has no subsets"):
        rows(Source(folder / "helpful" / "a.jsonl", subset="helpful"))


def test_the_fingerprint_covers_what_is_meant_of_a_folder(folder):
    both = [fingerprint(f"{folder}:{subset}") for subset in ("helpful", "harmless")]
    assert len({*both, fingerprint(folder)}) == 3
    write(folder / "harmless" / "test.jsonl", ROWS)
    assert fingerprint(f"{folder}:helpful") != both[0]


def test_a_line_of_a_folder_that_cannot_be_read_is_named_with_its_file(folder):
    (folder / "helpful" / "b.jsonl").write_text('{"prompt": "p"}\n{"prompt": \n')
    with pytest.raises(DataError, match=r"helpful/b\.jsonl:2: not valid JSON"):
        rows(f"{folder}:helpful")


def test_a_part_of_a_split_counts_the_rows_of_all_its_files(folder):
    assert rows(f"{folder}:helpful", split="train[1:]") == ROWS[1:3]
    assert rows(f"{folder}:helpful", split="train[:2]") == ROWS[:2]
    assert rows(folder / "helpful" / "a.jsonl", split="[1:2]") == ROWS[1:2]
    with pytest.raises(DataError, match=r"train\[:1000\]"):
        rows(f"{folder}:helpful", split="train[:10%]")


def test_commas_separate_sources_unless_such_a_file_is_there(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "a.jsonl,b.jsonl"):
        write(tmp_path / name, ROWS[:1])
    both = f"{tmp_path}/a.jsonl, {tmp_path}/b.jsonl"
    assert [source.path for source in listed(both)] == both.split(", ")
    assert labels(listed(both)) == ["a", "b"]
    whole = f"{tmp_path}/a.jsonl,b.jsonl"
    assert [source.path for source in listed(whole)] == [whole]
    assert listed("user/a:x,b@v1", split="train") == [
        Source("user/a:x", split="train"),
        Source("b@v1", split="train"),
    ]
    assert labels(listed("x/*.jsonl,y/*.jsonl")) == ["x/*", "y/*"]
    assert labels(listed("*.jsonl,y/")) == ["*.jsonl", "y"]
    with pytest.raises(DataError, match="named twice"):
        listed("a.jsonl,b.jsonl,a.jsonl")
    with pytest.raises(DataError, match="a name is missing"):
        listed("a.jsonl,,b.jsonl")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The calls of `load_dataset`, which answers with two splits, or with the one asked for."""
    calls = []
    monkeypatch.chdir(tmp_path)
    parts = {
        "train": datasets.Dataset.from_list(ROWS),
        "test": datasets.Dataset.from_list(ROWS[:1]),
    }

    def load_dataset(path, *, split=None, streaming=False, **options):
        calls.append((path, split, streaming, options))
        found = datasets.DatasetDict(parts)
        if streaming:
            found = datasets.IterableDatasetDict(
                {key: part.to_iterable_dataset() for key, part in found.items()}
            )
        return found if split is None else found[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("source", "name", "options"),
    [
        ("user/set", "user/set", {}),
        ("hub:set", "set", {}),
        ("user/set:sub", "user/set", {"name": "sub"}),
        ("user/set:sub@v1.0", "user/set", {"name": "sub", "revision": "v1.0"}),
        ("set@refs/pr/1", "set", {"revision": "refs/pr/1"}),
        ("hub:user/set@abc123", "user/set", {"revision": "abc123"}),
        (
            Source("user/set", subset="sub", revision="v2", data_dir="part"),
            "user/set",
            {"name": "sub", "revision": "v2", "data_dir": "part"},
        ),
    ],
)
def test_a_name_on_the_hub_says_subset_and_revision(hub, source, name, options):
    source = source if isinstance(source, Source) else Source(source)
    assert rows(source._replace(split="train")) == ROWS
    (called,) = hub
    assert called == (name, "train", False, options | {"trust_remote_code": False})
    assert rows(source._replace(split="train[2:4]")) == ROWS[2:4]
    with pytest.raises(DataError, match="has the splits train, test; choose one"):
        rows(source)


@pytest.mark.slow  # imports torch
def test_with_a_connection_rows_come_as_they_are_asked_for_and_the_commit_counts(hub, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    commits = {None: "aaa", "v1": "bbb"}

    class Info:
        def __init__(self, sha):
            self.sha = sha

    def dataset_info(self, name, revision=None):
        return Info(commits[revision])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    found = read(Source("user/set", split="train"))
    assert [next(found) for _ in range(2)] == [(ROWS[0], "set:1"), (ROWS[1], "set:2")]
    assert [streaming for _, _, streaming, _ in hub] == [True]
    names = [fingerprint(f"user/set{more}") for more in ("", "@v1", ":sub")]
    assert len({*names}) == 3
    commits[None] = "ccc"
    assert fingerprint("user/set") != names[0]
    assert len(hub) == 1  # nothing is fetched for a fingerprint


def test_a_published_folder_with_subsets_trains_by_a_key(tiny_data, shared):
    folder = shared / "cases" / "data" / "22b_folder_configs"
    sides = {}
    for subset in ("helpful", "harmless"):
        lines = len((folder / subset / "train.jsonl").read_text().splitlines())
        data = tiny_data(source=str(folder), subset=subset, eval_share=0.5)
        sides[subset] = {example.id for example in data.examples}
        assert len(sides[subset]) == lines
    both = tiny_data(source=f"{folder}:helpful,{folder}:harmless", eval_share=0.5)
    assert [part.name.partition(":")[2] for part in both.sources] == ["helpful", "harmless"]
    assert len(both.examples) == sum(map(len, sides.values()))


@pytest.fixture
def tiny_data():
    from dpojax.config.defaults import default_config

    def loaded(**changes):
        config = default_config()
        config.preference.data.update(limit=0, eval_limit=0, **changes)
        return load(
            config.preference.data,
            config.tokens,
            reviews.tokenizer(),
            requirements=DataRequirements(),
            seed=0,
        )

    return loaded
