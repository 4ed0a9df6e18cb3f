"""Pages link to files outside of docs/ as a reader of the repository does; the site has copies.

`[...](../benchmarks/figures/losses.png)` of docs/losses.md works where the repository is shown. In
the site it leads to `repository/benchmarks/figures/losses.png`, which is copied there. A link to a
file that does not exist stays as it is, and `mkdocs build --strict` refuses it.
"""

from __future__ import annotations

import os
import pathlib
import posixpath
import re
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

COPIES = "repository"
LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside of docs/ that pages link to."""
    root = pathlib.Path(config.docs_dir).parent
    for page in list(files.documentation_pages()):
        for name in outside(page.content_string, page.src_uri):
            target, path = f"{COPIES}/{name}", root / name
            if path.is_file() and files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=os.fspath(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead these links to the copies."""
    folder = posixpath.dirname(page.file.src_uri)

    def to_copy(link: re.Match) -> str:
        name = name_in_repository(link[1], page.file.src_uri)
        if name is None or files.get_file_from_path(f"{COPIES}/{name}") is None:
            return link[1]
        return posixpath.relpath(f"{COPIES}/{name}", folder or ".")

    return LINK.sub(to_copy, markdown)


def outside(markdown: str, page: str) -> Iterator[str]:
    """Files of the repository, outside of docs/, that a page links to."""
    for link in LINK.findall(markdown):
        name = name_in_repository(link, page)
        if name is not None:
            yield name


def name_in_repository(link: str, page: str) -> str | None:
    """The path from the repository's top; None for a link that stays in docs/ or leaves both."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.split("/")[0] in ("docs", "..") else path
