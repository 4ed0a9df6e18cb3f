"""--help lists every key with what the comment beside its default says."""

import shlex

import pytest

from dpojax.config import command_line, defaults
from dpojax.config.defaults import default_config
from dpojax.config.key_help import _Source, help_lines, list_keys

SOURCE = '''
def default_config():
    config = ConfigDict()
    config.seed = 0  # where it begins
    # Of several lines,
    # which end here.
    config.name = ""
    config.part = _part()
    config.bare = 1


def _part():
    """What the part is for.

    And more.
    """
    return ConfigDict(dict(a=1, b=2, **_shared() | dict(c=4)))


def _shared():
    return dict(
        c=3,  # from elsewhere
        inner=ConfigDict(dict(x=1)),  # of all
    )
'''


def test_a_comment_belongs_to_the_key_on_its_line_or_to_the_one_below():
    keys = _Source(SOURCE).top_level()
    assert keys["seed"].text == "where it begins"
    assert keys["name"].text == "Of several lines, which end here."
    assert keys["bare"].text == ""
    assert keys["part"].text == "What the part is for."
    assert list(keys["part"].below) == ["a", "b", "c", "inner"]
    assert keys["part"].below["c"].text == "from elsewhere"
    assert list(keys["part"].below["inner"].below) == ["x"]


def leaves(config, prefix=""):
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_key_has_a_meaning():
    keys = list_keys()
    assert [key.name for key in keys if not key.meaning] == []
    assert sorted(key.name for key in keys) == sorted(leaves(default_config()))


def test_the_list_fits_the_width_and_shows_the_values_of_the_config():
    config = defaults.default_config()
    config.preference.beta = 0.25
    lines = help_lines(config, width=90)
    assert max(map(len, lines)) <= 90
    assert any(line.startswith("  preference.beta = 0.25: ") for line in lines)
    assert any(line.startswith("  preference.tau (open: a number): ") for line in lines)


def test_help_of_a_command_lists_the_keys(capsys, monkeypatch):
    from absl import flags

    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    defined = flags.DEFINE_string
    monkeypatch.setattr(
        flags, "DEFINE_string", lambda *a, **k: defined(*a, flag_values=flags.FLAGS, **k)
    )
    config = command_line.ConfigFlag("A file.")
    for word in ("-h", "--help"):
        with pytest.raises(SystemExit) as ended:
            command_line.parse_flags([word], config, about="What it does.")
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert shown.startswith("What it does.")
        assert "\n  sft.batch_size = 64: examples of an optimiser step\n" in shown


def test_the_value_of_a_key_is_what_a_shell_would_set_it_to():
    config = defaults.default_config()
    for key in list_keys(config):
        if key.value is not None:
            (text,) = shlex.split(key.value_text)
            assert command_line.parse_value(config, key.name, text) == key.value, key.name
