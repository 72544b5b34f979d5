"""Writes walkthrough.ipynb: the cells of walkthrough.py, with what they print and draw.

    pip install -r examples/requirements-walkthrough.txt
    python examples/notebook.py
"""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRIPT, NOTEBOOK = ROOT / "walkthrough.py", ROOT / "walkthrough.ipynb"


def read_cells(script: str) -> list[tuple[str, str]]:
    """(markdown or code, its text) of each cell of a script in percent format.

    A cell begins with `# %%`, and one of Markdown with `# %% [markdown]`. `# %matplotlib inline` is
    a comment in the script and a command in the notebook.
    """
    cells = []
    for part in re.split(r"^# %%", script, flags=re.M)[1:]:
        mark, _, text = part.partition("\n")
        markdown = mark.strip() == "[markdown]"
        text = re.sub(r"^# ?" if markdown else r"^# (?=%)", "", text.strip(), flags=re.M)
        cells.append(("markdown" if markdown else "code", text))
    return cells


def execute(cells: list[tuple[str, str]]) -> Any:
    """The notebook of these cells after a run of all of them. Raises CellExecutionError."""
    import nbformat
    from nbclient import NotebookClient
    notebook = nbformat.v4.new_notebook()
    for number, (kind, text) in enumerate(cells):
        make = getattr(nbformat.v4, f"new_{kind}_cell")
        notebook.cells.append(make(text, id=f"cell-{number}"))   # by default ids are random
    NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False,
                   coalesce_streams=True, resources={"metadata": {"path": ROOT}}).execute(
        # The embedded model gains nothing from threads, and tqdm warns of missing widgets.
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"})
    notebook.metadata = {   # without the versions of this machine
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"}}
    return notebook


if __name__ == "__main__":
    import nbformat
    nbformat.write(execute(read_cells(SCRIPT.read_text(encoding="utf-8"))), NOTEBOOK)
