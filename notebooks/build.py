"""Make the notebooks from the sources beside this file: ``python notebooks/build.py [--run FOLDER]``.

A source is Python in jupytext's percent format, so that it can be read, checked and compared. Each becomes an
``.ipynb`` without outputs, which Colab, Jupyter and editors open. ``--run FOLDER`` also runs them all and writes them
there with what they showed.
"""

import argparse
import re
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SOURCES = sorted(path for path in HERE.glob("*.py") if path.name != Path(__file__).name)
INSTALL = """import importlib.util

if importlib.util.find_spec("surgery") is None:  # on Colab, for example
    %pip install --quiet {archive}"""
UPLOAD = (
    "On Colab: open this file by *File*, *Upload notebook*, put `surgery.zip`, the archive of the repository "
    "(`git archive --output surgery.zip HEAD`), into its folder of files, and run the next cell. Where `surgery` is "
    "installed already, the cell does nothing."
)
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/"
    "github/{place}/blob/main/notebooks/{name}.ipynb) The next cell installs `surgery` where it is not there yet."
)


def published() -> str | None:
    """Where the repository is published: ``owner/name`` on GitHub, if ``CITATION.cff`` says so."""
    text = (HERE.parent / "CITATION.cff").read_text()
    address = re.search(r"^repository-code:\s*[\"']?https://github\.com/([\w.-]+/[\w.-]+)", text, flags=re.MULTILINE)
    return address and address[1].removesuffix(".git")


def header(name: str, place: str | None) -> list[nbformat.NotebookNode]:
    """The first cells of a notebook: how to open it in Colab, and a cell that installs the package there."""
    archive = f"https://github.com/{place}/archive/refs/heads/main.zip" if place else "surgery.zip"
    text = BADGE.format(place=place, name=name) if place else UPLOAD
    return [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell(INSTALL.format(archive=archive))]


def notebook(source: Path, place: str | None = None) -> nbformat.NotebookNode:
    """The notebook of a source, the same for the same source."""
    read = jupytext.read(source)
    cells = [*header(source.stem, place), *read.cells]
    for number, cell in enumerate(cells):
        cell.id, cell.metadata = f"{source.stem}-{number}", nbformat.NotebookNode()
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def text(source: Path) -> str:
    """What the ``.ipynb`` of a source holds."""
    return str(nbformat.writes(notebook(source, published()))) + "\n"


def run(source: Path, folder: Path, timeout: int = 300) -> nbformat.NotebookNode:
    """Run the notebook of a source in ``folder``, in a kernel of its own; return it with its outputs.

    Raises ``nbclient.exceptions.CellExecutionError`` at the first cell that fails.
    """
    client = NotebookClient(
        notebook(source), timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--run", type=Path, metavar="FOLDER", help="also run them, and write the results there")
    folder = arguments.parse_args().run
    for path in SOURCES:
        path.with_suffix(".ipynb").write_text(text(path))
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            nbformat.write(run(path, folder), folder / f"{path.stem}.ipynb")
            print(folder / f"{path.stem}.ipynb")
