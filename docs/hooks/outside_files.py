"""Pages link to files outside of docs/ as a reader of the repository does; the site has copies.

`[...](../benchmarks/figures/losses.png)` of docs/losses.md works where the repository is shown. In
the site it leads to `repository/benchmarks/figures/losses.png`, which is copied there. A page of
Markdown, such as benchmarks/RESULTS.md, becomes a page of the site, with what it links to. A link
to a file that does not exist stays as it is, and `mkdocs build --strict` refuses it.
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

DOCS, COPIES = "docs", "repository"
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")  # without a scheme


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside of docs/ that pages link to, and what these link to in turn."""
    root = pathlib.Path(config.docs_dir).parent
    pages = list(files.documentation_pages())
    while pages:
        page = pages.pop()
        for name in outside(page.content_string, page.src_uri):
            target, path = f"{COPIES}/{name}", root / name
            if path.is_file() and files.get_file_from_path(target) is None:
                file = File.generated(config, target, abs_src_path=os.fspath(path))
                files.append(file)
                pages += [file] if file.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead these links to the copies, and those of the copies to the pages."""
    folder = posixpath.dirname(page.file.src_uri)

    def in_site(link: re.Match) -> str:
        target = site_path(name_in_repository(link[1], page.file.src_uri))
        if files.get_file_from_path(target) is None:
            return link[1]
        return posixpath.relpath(target, folder or ".")

    return LINK.sub(in_site, markdown)


def outside(markdown: str, page: str) -> Iterator[str]:
    """Files of the repository, outside of docs/, that a page links to."""
    for link in LINK.findall(markdown):
        name = name_in_repository(link, page)
        if name.split("/")[0] not in (DOCS, ".."):
            yield name


def name_in_repository(link: str, page: str) -> str:
    """The path of a link's target from the repository's top."""
    copied = page.removeprefix(f"{COPIES}/")
    place = copied if copied != page else posixpath.join(DOCS, page)
    return posixpath.normpath(posixpath.join(posixpath.dirname(place), link))


def site_path(name: str) -> str:
    """Where the site has a file of the repository."""
    inside = name.removeprefix(f"{DOCS}/")
    return inside if inside != name else f"{COPIES}/{name}"
