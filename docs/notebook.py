"""Run the notebook while the manual is built, and make a page of it with what its cells show.

A hook of MkDocs. The notebook is kept without outputs; a cell that fails ends the build.
"""

import os
from functools import cache

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbclient import NotebookClient
from nbformat import NotebookNode

_SUFFIX = ".ipynb"


class _Notebook(File):
    """A notebook that is a page, and not a file to copy."""

    def is_documentation_page(self) -> bool:
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take notebooks for pages."""
    for file in [file for file in files if file.src_uri.endswith(_SUFFIX)]:
        files.remove(file)
        files.append(
            _Notebook(file.src_uri, config.docs_dir, config.site_dir, config.use_directory_urls)
        )
    return files


def on_page_read_source(page: Page, **_: object) -> str | None:
    """Return the Markdown of a notebook; other pages are read as always."""
    return to_markdown(page.file.content_string) if page.file.src_uri.endswith(_SUFFIX) else None


@cache
def to_markdown(text: str) -> str:
    """Run a notebook and return its cells and what they show as Markdown."""
    notebook = nbformat.reads(text, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    # threads that share cores with other jobs wait for each other longer than they compute
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    NotebookClient(notebook, extra_arguments=["--log-level=ERROR"]).execute(env=env)
    return "\n\n".join(part for cell in notebook.cells for part in _draw_cell(cell))


def _draw_cell(cell: NotebookNode) -> list[str]:
    if cell.cell_type == "markdown":
        return [cell.source]
    return [f"```python\n{cell.source}\n```", *map(_draw_output, cell.outputs)]


def _draw_output(output: NotebookNode) -> str:
    """Return an image, a table or a text that a cell shows."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![](data:image/png;base64,{data['image/png'].strip()})"
    if "text/html" in data:
        # without a class, the theme draws a table as those of the other pages
        return str(data["text/html"]).replace(' border="1" class="dataframe"', "")
    return f"```text\n{(output.get('text') or data['text/plain']).rstrip()}\n```"
