"""Execute one notebook in a kernel of its own: the worker behind execute.py, one process a page.

    python run_page.py NOTEBOOK.ipynb FOLDER OUT.json

FOLDER is where the cells run. OUT.json tells what came of it: the executed notebook and the seconds it took,
or the cell that failed, with its traceback.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from traitlets import default

CELL_SECONDS = 600  # a page is written to take a minute; this only ends what hangs


class OneKernel(KernelSpecManager):
    """Knows one kernel, the running interpreter's, whatever kernels the user has installed."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python", name=kernel_name)


class Manager(AsyncKernelManager):
    """Starts that kernel."""

    @default("kernel_spec_manager")
    def _kernels(self) -> KernelSpecManager:
        return OneKernel()


def execute(notebook: nbformat.NotebookNode, folder: Path, *, seconds: int = CELL_SECONDS) -> dict[str, Any]:
    """Run every cell in `folder` and return what came of it."""
    start, before = time.perf_counter(), _children()
    client = NotebookClient(
        notebook,
        kernel_manager_class=Manager,
        timeout=seconds,
        startup_timeout=300,  # on a busy machine a kernel takes its time
        record_timing=False,  # it would change the cells' metadata, which the cache compares
        resources={"metadata": {"path": str(folder)}},
    )
    client.on_cell_execute = lambda cell, cell_index: running.append(cell_index)
    running: list[int] = []
    result: dict[str, Any] = {}
    try:
        client.execute()
        result["notebook"] = notebook
    except CellExecutionError as error:
        result["error"] = {"cell": running[-1], "traceback": error.traceback}
    except (CellTimeoutError, DeadKernelError) as error:
        result["error"] = {"cell": running[-1] if running else 0, "traceback": str(error)}
    result["wall_seconds"] = time.perf_counter() - start
    result["cpu_seconds"] = _children() - before  # the kernel has ended, so its time is counted
    return result


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _end_with_parent() -> None:
    """Leave when the build that asked for this page is gone; the kernel leaves with us."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(notebook: str, folder: str, out: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    result = execute(nbformat.read(notebook, as_version=4), Path(folder))
    part = Path(f"{out}.part")
    part.write_text(json.dumps(result), "utf-8")
    part.replace(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
