"""The committed notebook has the cells of walkthrough.py and is legible; CI runs it again."""

import json
import re

import pytest

from examples.notebook import NOTEBOOK, SCRIPT, execute, read_cells

CELLS = read_cells(SCRIPT.read_text(encoding="utf-8"))


def check(cells):
    """These cells of a notebook are those of the script, and a reader sees no noise."""
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == CELLS
    outputs = [each for cell in cells for each in cell.get("outputs", [])]
    assert {each["output_type"] for each in outputs} == {"stream", "display_data"}
    assert all(each.get("name") != "stderr" for each in outputs)
    assert sum("image/png" in each.get("data", {}) for each in outputs) == 3
    texts = ["".join(each["text"]) for each in outputs if "text" in each]
    assert max(len(line) for text in texts for line in text.splitlines()) <= 110
    for each in ("accepted: R = 1 ≥ δ = 1", "rejected: R = 0 < δ = 1"):
        assert any(each in text for text in texts)


def first_printed(cells):
    """What the first cell that prints says, without its numbers, which depend on the processor."""
    texts = [each["text"] for cell in cells for each in cell.get("outputs", [])
             if each.get("name") == "stdout"]
    return re.sub(r"[\d.]+", "N", "".join(texts[0]))


def test_the_committed_notebook_is_that_of_the_script():
    text = NOTEBOOK.read_text(encoding="utf-8")
    check(json.loads(text)["cells"])
    assert len(text) < 400_000


def test_cells_are_read():
    assert read_cells("# before\n# %% [markdown]\n# # A\n#\n# b\n\n# %%\n# %matplotlib inline\n"
                      "x = 1   # %\n\n\n# %%\n# y\n") == [
        ("markdown", "# A\n\nb"), ("code", "%matplotlib inline\nx = 1   # %"), ("code", "# y")]


def test_the_notebook_runs():
    """Its cells fail where the project's functions and arithmetic by hand differ."""
    for package in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(package, reason="pip install -r examples/requirements-walkthrough.txt")
    cells = execute(CELLS).cells
    check(cells)
    assert first_printed(cells) == first_printed(json.loads(
        NOTEBOOK.read_text(encoding="utf-8"))["cells"])
