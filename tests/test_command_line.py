"""Every word of a command line means something, or is an error that says what was meant."""

import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from dpojax.commands import entry
from dpojax.commands.entry import COMMANDS
from dpojax.config import command_line, files
from dpojax.config.command_line import ArgumentParser, ConfigFlag, UsageError, parse_flags
from dpojax.config.errors import ConfigError
from dpojax.config.help_text import about_text
from tests import further

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = f"--config={ROOT / 'configs' / 'reviews.py'}"
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


@pytest.fixture
def parse(monkeypatch):
    """Parses words as scripts/train.py does, and returns the config."""
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    monkeypatch.setattr(
        flags, "DEFINE_string", lambda *args, **how: _define(flags.FLAGS, *args, **how)
    )
    config = ConfigFlag("A file.")
    flags.DEFINE_string("workdir", None, "A folder.", required=True)
    _define_bool(flags.FLAGS, "dry_run")

    def parse_words(*words):
        parse_flags(words, config)
        return config.value

    return parse_words


_string, _bool = flags.DEFINE_string, flags.DEFINE_bool


def _define(values, *args, **how):
    return _string(*args, flag_values=values, **how)


def _define_bool(values, name):
    return _bool(name, False, "", flag_values=values)


def test_words_of_a_command_line_set_the_keys_that_they_name(parse):
    config = parse(
        CONFIG,
        "--workdir=run",
        "--config.seed=3",
        "--config.preference.beta=0.25",
        "--config.stages=('sft',)",
        "--config.sft.lora.targets=attention/,mlp/",
        "--noconfig.check_memory",
        "--config.profile",
        "--config.sft.steps",
        "7",
        "--config.preference.stop_chosen=false",
        "--config.preference.loss=",
    )
    assert (config.seed, config.preference.beta, config.stages) == (3, 0.25, ("sft",))
    assert config.sft.lora.targets == ("attention/", "mlp/")
    assert (config.check_memory, config.profile, config.sft.steps) == (False, True, 7)
    assert config.preference.stop_chosen is False
    assert config.preference.loss == ""
    assert config.is_locked


REFUSED = {
    ("stray",): "'stray' belongs to no flag",
    ("--config.check_memory", "False"): "write --config.check_memory=False",
    ("--dry_run", "False"): "write --dry_run=False",
    ("\u2013config.seed=3",): "write --config.seed=3",
    ("\u2014dry_run",): "write --dry_run",
    ("-\u2013config.seed=3",): "write --config.seed=3",
    ("config.preference.beta=0.3",): "write --config.preference.beta=0.3",
    ("workdir=elsewhere",): "write --workdir=elsewhere",
    ("--config.preference.betta=1",): "did you mean --config.preference.beta?",
    ("--config.sft.clip_norm=1",): "did you mean --config.sft.optimizer.clip_norm?",
    ("--config.packing=1",): "no such key; --help lists them all$",
    ("--config.beta=1",): "did you mean --config.preference.beta?",
    ("--config.preference.beta.x=1",): "no such key",
    ("--config.preference=1",): "a group of keys",
    ("--config.=1",): "no such key",
    ("--wrkdir=x",): "did you mean --workdir?",
    ("--config.learning_rate=1",): r"sft\.learning_rate",
    ("--config.sft.learning_rate=1e\u20134",): "a dash that is no hyphen",
    ("--config.preference.beta=abc",): "beta=abc: a number is expected",
    ("--config.preference.beta=nan",): "beta=nan: a finite number is expected",
    ("--config.sft.learning_rate=-inf",): "a finite number is expected",
    ("--config.sft.learning_rate=1e999",): "a finite number is expected",
    ("--config.seed=99999999999999999999",): "the number is too large",
    ("--config.seed=" + "9" * 5000,): "seed=9999",
    ("--config.seed=1.5",): "an integer is expected",
    ("--config.seed=",): "an integer is expected",
    ("--config.check_memory=maybe",): "true or false is expected",
    ("--noconfig.seed",): "only a key that is true or false",
    ("--config.sft.steps",): "a value is missing",
    ("--config.stages=(1,)",): "a list of str",
    ("--config.stages=" + "(" * 5000,): "is expected",
    ("--config.seed=1", "--config.seed=2"): "--config.seed is given twice: 1, 2",
    ("--workdir=x",): "--workdir is given twice",
    ("--config=other.py",): "--config is given twice",
    ("--config.sft.steps=3\nx",): r"steps=3\\nx: an integer is expected",
}


@pytest.mark.parametrize("words", REFUSED, ids=lambda words: " ".join(words)[:40])
def test_a_word_that_means_nothing_is_refused_in_one_line_that_says_what_was_meant(parse, words):
    with pytest.raises(UsageError, match=REFUSED[words]) as refused:
        parse(CONFIG, "--workdir=run", *words)
    text = str(refused.value)
    assert "\n" not in text
    assert len(text) < 300


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ((CONFIG,), "--workdir"),
        (("--workdir=run",), "--config"),
        (("--workdir=run", "--config="), "--config is empty"),
        ((CONFIG, "--workdir=run", "--config"), "--config: a value is missing"),
        (("stray",), "^'stray' belongs to no flag.*; --config and --workdir are missing$"),
        ((CONFIG, "workdir=run"), "write --workdir=run; --workdir is missing$"),
        ((), "^--config and --workdir are missing$"),
    ],
)
def test_what_is_missing_is_named(parse, words, missing):
    with pytest.raises(UsageError, match=missing):
        parse(*words)


BROKEN = {
    "def get_config(:": r"config\.py:1: this is not Python",
    "import nothing_of_this_name": r"config\.py:1: ModuleNotFoundError: .*nothing_of_this_name",
    "x = 1\n\ndef get_config():\n    return 1 / 0": r"config\.py:4: ZeroDivisionError",
    "x = 1": r"config\.py: has no function get_config\(\)",
    "get_config = 3": r"config\.py: has no function get_config\(\)",
    "def get_config():\n    pass": r"get_config\(\) returned None, not a ConfigDict",
    "def get_config():\n    return {}": "returned a dict, not a ConfigDict",
    "from dpojax.config.defaults import default_config\n"
    "def get_config():\n    c = default_config()\n    c.preference.betta = 1\n    return c": (
        r"config\.py:4: AttributeError"
    ),
    "from dpojax.config.defaults import default_config\n"
    "def get_config():\n    c = default_config()\n    c.sft.learning_rate = float('nan')\n"
    "    return c": r"config\.sft\.learning_rate = nan: a finite number",
    "raise SystemExit('no')": r"config\.py:1: SystemExit: no",
    "def get_config():\n    return get_config()": r"config\.py:2: RecursionError",
}


@pytest.mark.parametrize("code", BROKEN, ids=lambda code: code.splitlines()[-1][:30])
def test_a_config_file_that_fails_is_told_with_its_line(parse, tmp_path, code):
    file = tmp_path / "config.py"
    file.write_text(code)
    with pytest.raises(ConfigError, match=BROKEN[code]) as refused:
        parse(f"--config={file}", "--workdir=run")
    assert "\n" not in str(refused.value)


def test_a_config_file_that_is_not_there_or_takes_no_variant_is_told(parse, tmp_path):
    for path, message in {
        tmp_path / "missing.py": "there is no such file",
        tmp_path: "a folder, not a file",
        f"{ROOT / 'configs' / 'reviews.py'}:small": "has no variants",
        f"{ROOT / 'configs' / 'imdb.py'}:smal": r"imdb\.py:\d+: ValueError: .*small, paper",
    }.items():
        with pytest.raises(ConfigError, match=message):
            parse(f"--config={path}", "--workdir=run")


def test_a_config_of_json_is_read_and_a_deep_or_foreign_one_is_told(parse, tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"seed": 5}')
    assert parse(f"--config={file}", "--workdir=run").seed == 5
    for text in ("[" * 100_000, '{"seed": 1', '{"sed": 1}', '{"seed": "x"}', "[]", '{"seed": NaN}'):
        file.write_text(text)
        with pytest.raises((ConfigError, ValueError), match=r"config\.json"):
            parse(f"--config={file}", "--workdir=run")


def test_argparse_is_as_strict(capsys):
    parser = ArgumentParser(prog="tool")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--adapters", action="store_true")
    assert parser.parse_args(["--workdir", "x", "--adapters"]).workdir == "x"
    for words, message in {
        ("--workdir=x", "stray"): "'stray' belongs to no flag",
        ("--work=x",): "--work: no such flag; did you mean --workdir?",
        ("--workdir=x", "--adapters", "False"): "write --adapters=False",
        ("\u2013workdir=x",): "write --workdir=x",
        ("--workdir=x", "--workdir=y"): "--workdir is given twice",
        ("workdir=x", "--workdir=y"): "write --workdir=x",
        (): "--workdir is missing",
        ("stray",): "'stray' belongs to no flag; a value with spaces needs quotes; --workdir is",
    }.items():
        with pytest.raises(SystemExit) as refused:
            parser.parse_args(list(words))
        assert refused.value.code == command_line.USAGE
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "file"),
    [("imdb", "imdb.py"), ("imdb:paper", "imdb.py:paper"), ("reviews", "reviews.py")],
)
def test_a_bare_name_is_that_of_a_config_that_comes_with_dpojax(given, file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = command_line.parse_config_words([f"--config={given}", "--config.seed=3"])
    by_path = command_line.parse_config_words([f"--config={ROOT / 'configs' / file}"])
    assert words.path == by_path.path
    assert words.value.seed == 3
    assert words.value.stages == by_path.value.stages
    assert files.shipped_name(words.path) == given


def test_a_name_of_no_config_is_told_with_those_that_there_are(parse):
    with pytest.raises(ConfigError, match=r"imbd: there is no such file; .* hh, imdb, instr"):
        parse("--config=imbd", "--workdir=run")


def test_every_command_has_its_file_and_its_script():
    names = {name.replace("-", "_") for name in COMMANDS}
    folder = ROOT / "dpojax" / "commands"
    assert names == {path.stem for path in folder.glob("*.py")} - {"__init__", "entry"}
    assert names == {path.stem for path in SCRIPTS}


def test_dpojax_alone_lists_its_commands_and_an_unknown_one_is_told_its_neighbours(
    monkeypatch, capsys
):
    for words, status in {(): 0, ("--help",): 0, ("trian",): 2, ("inspect_data",): 2}.items():
        monkeypatch.setattr(sys, "argv", ["dpojax", *words])
        with pytest.raises(SystemExit) as ended:
            entry.main()
        assert ended.value.code == status
        shown = capsys.readouterr()
        if status == 0:
            lines = [line.split()[0] for line in shown.out.splitlines() if line.startswith("  ")]
            assert lines == list(COMMANDS)
            assert max(map(len, shown.out.splitlines())) < 100
        else:
            near = {"trian": "train", "inspect_data": "inspect-data"}[words[0]]
            assert f"did you mean {near}?" in shown.err
            assert shown.err.count("\n") == 1


def test_what_help_says_of_a_command_fits_its_terminal_and_keeps_the_lines_of_examples():
    about = """Makes: dpojax train \\
    --workdir=x

Words of a long sentence
that goes on.

    /quit    the end of what was begun"""
    assert about_text(about, 100) == about
    assert (
        about_text(about, 30)
        == """Makes: dpojax train \\
    --workdir=x

Words of a long sentence that
goes on.

    /quit
        the end of what was
        begun"""
    )


@pytest.mark.slow
def test_flags_of_one_command_are_no_flags_of_another():
    code = "import sys; sys.argv[0] = 'dpojax'; from dpojax.commands.entry import main; main()"
    words = ["train", CONFIG, "--workdir=x", "--members=2"]
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "dpojax train: --members: no such flag\n"


@pytest.mark.slow
@pytest.mark.parametrize("script", [*SCRIPTS[-2:], *further(*SCRIPTS[:-2])], ids=lambda p: p.stem)
def test_every_script_refuses_a_stray_word_with_one_line_and_status_2(script):
    required = {
        "inspect_data": ["--data=x", "--tokenizer=x"],
        "export": ["--workdir=x", "--out=y"],
        "prefer": ["--policy=x", "--prompts=reviews", "--reward=reviews", "--out=y"],
        "sample": ["--model=x"],
        "chat": ["--model=x"],
        "compare": [],
        "launch": ["slurm", CONFIG, "--workdir=x"],
        "judge": ["--a=x", "--prompts=reviews", "--judge=exact"],
        "plan": [CONFIG, "--topology=cpu:1"],
    }.get(script.stem, [CONFIG, "--workdir=x"])
    ended = subprocess.run(
        [sys.executable, script, *required, "stray"],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "stray" in ended.stderr
