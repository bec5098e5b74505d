"""Run the launch tutorial twice in a row in one kernel, without a browser: real processes, real gloo.

python scripts/launch_headless.py [notebook]"""
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
notebook = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "nbs/tutorials/launch_training.ipynb"

with tempfile.TemporaryDirectory() as cache:
    os.environ |= {"ASTROBIO_CACHE": cache, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    nb = nbformat.read(notebook, 4)
    client = NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(notebook.parent)}})
    said = []
    with client.setup_kernel():
        for n in range(2):
            for i, cell in enumerate(nb.cells):
                if cell.cell_type == "code":
                    client.execute_cell(cell, i)
            said.append(["".join(o.get("text", "") for o in c.outputs) for c in nb.cells if c.cell_type == "code"])
            print(f"pass {n + 1}:", *(t.strip() for t in said[-1] if "undisturbed" in t))
    assert said[0] == said[1], "the two passes said different things"
    assert all(any("undisturbed run: True" in t for t in texts) for texts in said)
print("1 passed, 0 failed")
