"""Every python block of the pages compiles, and those that need no data run, in their order."""

import pathlib
import re

import jax.numpy as jnp
import pytest
from safetensors.flax import save_file

from dpojax import losses
from dpojax.methods.preference import LOSSES

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = ("index.md", "own_loop.md", "faq.md", "losses_and_trl.md", "recipes.md", "config.md")


def python_blocks(page: pathlib.Path) -> list[tuple[int, str]]:
    """The first line and the code of each block."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: block.start()].count("\n") + 2, block[2])
        for block in FENCE.finditer(text)
        if block[1] == "python"
    ]


def compiled(page: pathlib.Path, line: int, code: str):
    """With the lines of the page, so that an error names them."""
    return compile("\n" * (line - 1) + code, f"{page.name}", "exec")


def name(page: pathlib.Path) -> str:
    return page.relative_to(ROOT / "docs").as_posix()


def test_every_python_block_compiles():
    blocks = [
        (page, *block) for page in [*PAGES, ROOT / "README.md"] for block in python_blocks(page)
    ]
    for block in blocks:
        compiled(*block)
    assert len(blocks) > 10


def test_every_page_with_python_is_run():
    assert {name(page) for page in PAGES if python_blocks(page)} == set(RUN)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_the_blocks_of_a_page_run_in_their_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page}
    for block in python_blocks(ROOT / "docs" / page):
        exec(compiled(ROOT / "docs" / page, *block), namespace)
    assert not list(tmp_path.iterdir())
    if page == "own_loop.md":
        check_heads_of_files(namespace["head_of"], tmp_path / "model.safetensors")


def check_heads_of_files(head_of, file):
    """The page's function takes the head where there is one, and else the embedding."""
    embedding, head = jnp.ones((8, 4)), jnp.full((8, 4), 2, jnp.bfloat16)
    for weights, want in {
        "tied": ({"model.embed_tokens.weight": embedding}, embedding),
        "untied": ({"model.embed_tokens.weight": embedding, "lm_head.weight": head}, head),
    }.values():
        save_file(weights, file)
        weight = head_of(file).weight
        assert weight.dtype == want.dtype
        assert jnp.array_equal(weight, want)
    save_file({"norm.weight": embedding}, file)
    with pytest.raises(KeyError, match="neither a head nor an embedding"):
        head_of(file)


def test_shell_blocks_name_scripts_and_configs_that_exist():
    for page in PAGES:
        for block in FENCE.finditer(page.read_text(encoding="utf-8")):
            named = re.findall(r"\b(?:scripts|configs|benchmarks)/\w+\.py", block[2])
            for path in named if block[1] == "sh" else []:
                assert (ROOT / path).is_file(), f"{name(page)}: {path}"


def test_the_navigation_has_every_page():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nplugins:")[0]
    in_nav = set(re.findall(r": ([\w/]+\.md)$", nav, re.MULTILINE))
    outside = {page for page in in_nav if page.startswith("repository/")}
    assert in_nav - outside == {name(page) for page in PAGES}
    assert all((ROOT / page.removeprefix("repository/")).is_file() for page in outside)


def test_the_reference_has_every_file_of_losses():
    """A module of losses that is not in docs/api/losses.md has losses that no reader finds."""
    modules = {getattr(losses, each).__module__ for each in losses.__all__ if each.islower()}
    page = (ROOT / "docs/api/losses.md").read_text(encoding="utf-8")
    assert modules <= set(re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE))


def test_the_number_of_objectives_is_that_of_the_losses_that_can_be_trained():
    for page in ("README.md", "docs/index.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert re.findall(r"^(\w+) objectives", text, re.MULTILINE) == [str(len(LOSSES))], page


def test_the_page_on_trl_names_every_loss():
    """As equal to one of TRL's, as different from it, or as missing there."""
    page = (ROOT / "docs/losses_and_trl.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b\w+\b", page))
    # These are not losses of log-probs.
    parts = {"implicit_rewards", "kto_baseline", "log_ratios", "per_token", "shared_length"}
    parts |= {"epsilon_steps", "gap_statistics", "optimal_values", "plackett_luce_scores"}
    assert {each for each in losses.__all__ if each.islower()} - parts <= named
