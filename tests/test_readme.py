"""The README and the commands of all pages: what they name exists, and what they set is a key."""

import importlib.util
import pathlib
import re
import shlex
import xml.etree.ElementTree as ET

import pytest
from ml_collections import ConfigDict

from dpojax.commands.entry import COMMANDS
from dpojax.config.command_line import UsageError, parse_config_words
from dpojax.config.defaults import default_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
}
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SVG = "{http://www.w3.org/2000/svg}"


def shell_commands(text: str) -> list[list[str]]:
    """The words of each command of the shell blocks, without comments."""
    lines = "\n".join(SHELL.findall(text)).replace("\\\n", " ").splitlines()
    commands = [re.split(r"&&|;", line) for line in lines]
    return [shlex.split(one, comments=True) for line in commands for one in line]


def of_dpojax(text: str) -> list[list[str]]:
    """Commands that dpojax carries out: `dpojax NAME ...` or `python scripts/NAME.py ...`."""
    commands = []
    for words in shell_commands(text):
        while words and "=" in words[0]:  # JAX_PLATFORMS=cpu python ...
            words = words[1:]
        if words[:1] == ["dpojax"]:
            commands.append(words[1:])
        elif words[:1] == ["python"] and words[1].startswith("scripts/"):
            commands.append([pathlib.Path(words[1]).stem.replace("_", "-"), *words[2:]])
    return commands


def test_the_readme_opens_with_the_figure_and_two_commands_and_is_short():
    opening = README.partition("\n## ")[0]
    assert opening.startswith("# dpojax\n\nDirect Preference Optimization")
    assert opening.index("![") < opening.index("```sh")
    blocks = SHELL.findall(opening)
    assert len(blocks) == 2
    assert "scripts/frontier.py --config=configs/reviews.py" in blocks[0]
    assert blocks[1] == "pip install -e '.[test]' && pytest\n"
    assert len(README.splitlines()) <= 150


def test_every_link_of_the_readme_leads_to_a_file():
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", README)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert len(links) > 10
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_exist_and_set_keys_that_there_are(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in of_dpojax(PAGES[page]):
        assert words[0] in (*COMMANDS, "--help", "--version"), f"{page}: dpojax {words[0]}"
        if "..." not in words:
            parse_config_words(words[1:])


def test_a_page_with_a_wrong_key_or_config_is_refused():
    for line in ("dpojax train --config=pairs --config.beta_of=1", "dpojax train --config=pears"):
        with pytest.raises((UsageError, ValueError)):
            parse_config_words(of_dpojax(f"```sh\n{line}\n```")[0][1:])


def load_hook(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def all_keys(config: ConfigDict, prefix: str = ""):
    for name in config:
        inner = config.get(name)
        if isinstance(inner, ConfigDict):
            yield from all_keys(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_the_page_of_config_keys_has_every_key_with_a_meaning():
    listed, group = set(), ""
    for line in "\n".join(load_hook("config_keys").tables()).splitlines():
        if heading := re.match(r"## (?:`([\w.]+)`)?", line):
            group = f"{heading[1]}." if heading[1] else ""
        elif row := re.match(r"\| `(\w+)` \| .+ \| (.+) \|$", line):
            listed.add(group + row[1])
            assert row[2].strip(), f"{group}{row[1]} has no meaning"
    assert listed == set(all_keys(default_config()))


@pytest.mark.parametrize("path", sorted((DOCS / "drawings").glob("*.svg")), ids=lambda p: p.stem)
def test_a_drawing_has_a_background_of_its_own_and_no_text_that_leaves_it(path):
    """So that it can be read in dark mode, too. Letters are about 6.7 units wide."""
    root = ET.parse(path).getroot()
    width, height = (float(root.get(name)) for name in ("width", "height"))
    background = root.find(f"{SVG}rect")
    assert (float(background.get("width")), background.get("fill")) == (width, "#f6f8fa")
    for text in root.iter(f"{SVG}text"):
        left, length = float(text.get("x")), 6.7 * len(text.text)
        if "mid" in (text.get("class") or ""):
            left -= length / 2
        assert left >= 0, text.text
        assert left + length <= width, text.text
        assert float(text.get("y")) < height, text.text
