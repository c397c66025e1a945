"""A model written out for another runtime: a folder of files, whole or not at all.

In this file: `export`, behind the command `textbook-code export`. The work is done by the modules beside it;
here the folder is made under another name and renamed when everything is in it.

Book: deploy-cli
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from textbook_code.deploy.runtimes import INT8_FILE, Model

KINDS = {
    "onnx": "model.onnx in float32, and model_int8.onnx",
    "tflite": f"model.tflite in float32, and {INT8_FILE}",
    "c": "C99 without a library: int person(const uint8_t rgb[3072])",
    "mcu": "a project for a Cortex-M microcontroller",
    "wasm": "a WebAssembly module",
}
"""What can be written, and what it is."""
_NO_LIMIT = 2**62


class FolderError(ValueError):
    """The folder is in use, or cannot be made.

    Book: deploy-cli
    """


def export(
    kind: str,
    model: Model | str | Path,
    folder: str | Path,
    *,
    kernels: str = "fast",
    board: str = "mps2-an500",
    max_flash: int | None = None,
    max_ram: int | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda step: None,
) -> list[Path]:
    """Write the model for a runtime.

    Args:
        kind: one of `KINDS`.
        model: see `Model`; "onnx" and "tflite" need one that has a float model.
        folder: it must not be there, or be empty.
        kernels: "fast" or "plain", for "c" and "mcu".
        board: of QEMU, for "mcu".
        max_flash: the most bytes that constants may take, for "c" and "mcu".
        max_ram: the most bytes of the arena, for "c" and "mcu".
        force: replace what an earlier export wrote; a folder with anything else in it is left alone.
        say: is told each step before it begins.

    Returns:
        The files, sorted.

    Raises:
        ValueError: an unknown kind, an operation that cannot be generated (named with its layer), or a
            model over the budget (by how much).
        FolderError: the folder is in use.
        ModelError: there is no such model, or it has no float model.
        ImportError, CompilerMissingError: a tool is missing.

    Book: deploy-cli
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    if kernels not in ("fast", "plain"):
        raise ValueError(f"kernels: got {kernels!r}, expected fast or plain")
    from textbook_code.deploy.c_codegen import Budget, generate

    budget = None
    if max_flash is not None or max_ram is not None:
        budget = Budget(*(_NO_LIMIT if most is None else most for most in (max_flash, max_ram)))
    with _whole(Path(folder), force) as new:
        say("reading the model")
        model = model if isinstance(model, Model) else Model(model)
        if kind in ("c", "mcu", "wasm"):
            model.step  # noqa: B018 - a file that is none is named before anything is generated from it
        if kind == "onnx":
            new.mkdir()
            say("exporting to ONNX")
            shutil.copyfile(model.onnx, new / "model.onnx")
            say("quantising")
            shutil.copyfile(model.onnx_int8, new / "model_int8.onnx")
        elif kind == "tflite":
            new.mkdir()
            say("converting to TFLite")
            shutil.copyfile(model.tflite, new / "model.tflite")
            say("quantising")
            shutil.copyfile(model.int8, new / INT8_FILE)
        elif kind == "c":
            say("generating C")
            generate(model.int8, new, kernels=kernels, budget=budget)
        elif kind == "mcu":
            from textbook_code.deploy import mcu

            say("generating the project")
            if budget:  # checked before a project for a chip that is too small is begun
                generate(model.int8, model.work / "budget", kernels=kernels, budget=budget)
            mcu.project(model.int8, new, board=board, kernels=kernels)
        else:
            from textbook_code.deploy import wasm

            new.mkdir()
            wasm.build(model.int8, new / "person.wasm", progress=say)
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


@contextmanager
def _whole(folder: Path, force: bool) -> Iterator[Path]:
    """Give the name of a folder that is not there yet, and put it in place of `folder` at the end."""
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"folder: {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise FolderError(f"folder: {folder} is not empty; name another, or pass --force to replace it")
    parent = folder.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=parent))
    except OSError as error:
        raise FolderError(f"folder: {folder} cannot be made: {error.strerror}") from error
    try:
        new, old = work / "new", work / "old"
        yield new
        if folder.is_dir():
            if others := _files(folder) - _files(new):
                raise FolderError(f"folder: {folder} holds {min(others)}, which this export does not write")
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.is_dir():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
