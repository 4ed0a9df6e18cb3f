"""No code of a folder or a hub repository ever runs: every loader is told so."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("dpojax", "benchmarks", "scripts", "configs")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
LOADERS = ("from_pretrained", "from_config", "load_dataset", "pipeline")
JSON_ALONE = {"GenerationConfig"}  # its `from_pretrained` knows no code and no such argument


def unguarded(source: str) -> list[int]:
    """The lines that call a loader without trust_remote_code=False."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or _name(node.func) not in LOADERS:
            continue
        if _name(getattr(node.func, "value", None)) in JSON_ALONE:
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        trust = given.get("trust_remote_code")
        if not (isinstance(trust, ast.Constant) and trust.value is False):
            lines.append(node.lineno)
    return lines


def _name(node: ast.expr | None) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_loader_is_told_to_run_no_code(path):
    assert unguarded(path.read_text(encoding="utf-8")) == []


def test_a_loader_that_is_not_told_is_found():
    code = """
AutoTokenizer.from_pretrained(name)
transformers.AutoModel.from_pretrained(name, trust_remote_code=True)
datasets.load_dataset(name, **options)
load_dataset(name, trust_remote_code=trust)
AutoConfig.from_pretrained(name, trust_remote_code=False)
GenerationConfig.from_pretrained(name)
"""
    assert unguarded(code) == [2, 3, 4, 5]
    found = [path for path in FILES if "trust_remote_code=False" in path.read_text()]
    assert len(found) >= 3  # fewer would mean that the search has gone blind


SCRIPT = """
import datasets
open({mark!r}, "w").close()
class Mine(datasets.GeneratorBasedBuilder):
    def _info(self):
        return datasets.DatasetInfo()
    def _split_generators(self, manager):
        return [datasets.SplitGenerator("train")]
    def _generate_examples(self):
        yield 0, {{"prompt": "a", "chosen": "b", "rejected": "c"}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("with_data", [False, True])
def test_a_data_set_with_a_script_is_refused(tmp_path, with_data):
    """A user, or `yes |`, answers every question with y."""
    folder = tmp_path / "data_set"
    folder.mkdir()
    (folder / "data_set.py").write_text(SCRIPT.format(mark=str(tmp_path / "ran")))
    if with_data:
        rows = ['{"prompt": "a", "chosen": "b", "rejected": "c"}'] * 3
        (folder / "train.jsonl").write_text("\n".join(rows))
    read = f"print(len(load_records({str(folder)!r})[0]))"
    code = f"from dpojax.data.sources import load_records; {read}"
    done = subprocess.run(
        [sys.executable, "-c", code], input="y\n" * 9, capture_output=True, text=True, cwd=ROOT
    )
    assert not (tmp_path / "ran").exists()
    assert done.returncode == 1
    assert f"DataError: {folder}: " in done.stderr
    assert "no code of a data set is run" in done.stderr
