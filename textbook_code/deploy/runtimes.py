"""One model in many runtimes, the same pictures through all of them, and one table of what they say.

In this file: `Model`, which is a checkpoint or a .tflite file and makes the other formats of it when they are
asked for; `RUNTIMES`, each with a function that opens the model in it; and `compare`, which runs them and
counts where they differ. Every integer runtime computes the same function, so the right difference is none;
the float ones show what quantisation changed.

A runtime whose tools are missing is a row that says which, and never an error.

Book: deploy-runtimes
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.console import RenderableType

    from textbook_code.models.vision.tiny_vit import TinyViT

INT8_FILE = "model_int8.tflite"
"""The integer model in a checkpoint's folder."""
_WEIGHTS = "model.safetensors"
_BATCH = 32


class ModelError(ValueError):
    """A name that leads to no model, or a model that lacks what a runtime needs.

    Book: deploy-runtimes
    """


# ---------------------------------------------------------------- the model


class Model:
    """A model by its name, its folder, or its integer file; other formats are made when first asked for.

    Args:
        source: a checkpoint of the package ("person-vit"), a folder for `TinyViT.from_pretrained` with or
            without a `model_int8.tflite`, or a .tflite file, which then has no float model beside it.
        calibration: pictures, uint8 (n, 32, 32, 3), for the ranges of what is quantised anew; by default
            those of `tflite.calibration`.

    Raises:
        ModelError: there is no such checkpoint, folder or file, or it is empty.

    Book: deploy-runtimes
    """

    def __init__(self, source: str | Path, *, calibration: np.ndarray | None = None) -> None:
        path = _locate(source)
        self.name = str(source)
        self.folder = path if path.is_dir() else None
        self._int8 = path if path.is_file() else path / INT8_FILE
        self._calibration = calibration
        self._work = tempfile.TemporaryDirectory(prefix="textbook-code-")  # goes with this object

    @property
    def work(self) -> Path:
        """A folder for what is made of the model; it goes when the model goes.

        Book: deploy-runtimes
        """
        return Path(self._work.name)

    @cached_property
    def torch(self) -> TinyViT:
        """The float model, folded: what all the other formats are made of.

        Raises: ModelError when there is only an integer file.

        Book: deploy-runtimes
        """
        from textbook_code.models.vision.tiny_vit import TinyViT, fold

        if self.folder is None or not (self.folder / _WEIGHTS).is_file():
            raise ModelError(f"{self.name}: holds no float model, expected a folder with {_WEIGHTS}")
        model = TinyViT.from_pretrained(str(self.folder)).float().eval()
        return fold(model)

    @cached_property
    def calibration(self) -> np.ndarray:
        """The pictures from which ranges are measured, uint8 (n, 32, 32, 3).

        Book: deploy-runtimes
        """
        if self._calibration is not None:
            return self._calibration
        from textbook_code.deploy import tflite

        return tflite.calibration()

    @cached_property
    def int8(self) -> Path:
        """The integer model: the file that came with it, or one made now.

        Book: deploy-runtimes
        """
        if self._int8.is_file():
            return self._int8
        from textbook_code.deploy import tflite

        path = self.work / INT8_FILE
        tflite.quantize(self.tflite, path, self.calibration)
        return path

    @cached_property
    def tflite(self) -> Path:
        """The float model as a .tflite file.

        Book: deploy-runtimes
        """
        from textbook_code.deploy import tflite

        path = self.work / "model.tflite"
        tflite.convert(self.torch, path)
        return path

    @cached_property
    def onnx(self) -> Path:
        """The float model as an .onnx file.

        Book: deploy-runtimes
        """
        from textbook_code.deploy import onnx

        path = self.work / "model.onnx"
        onnx.export(self.torch, path)
        return path

    @cached_property
    def onnx_int8(self) -> Path:
        """The .onnx file with its matrices in int8; some operations stay in float.

        Book: deploy-runtimes
        """
        from textbook_code.deploy import onnx, tflite

        path = self.work / "model_int8.onnx"
        given = self._calibration is not None
        name = f"{len(self.calibration)} given pictures" if given else tflite.CALIBRATION_NAME
        onnx.quantize(self.onnx, path, self.calibration, name=name)
        return path

    @cached_property
    def step(self) -> tuple[float, int]:
        """Scale and zero point of the output: the logit is scale · (q − zero point).

        Book: deploy-runtimes
        """
        from textbook_code.deploy import graph

        read = graph.read(self.int8)
        output = read.tensors[read.outputs[0]]
        if output.dtype != "int8" or len(output.scale) != 1:
            raise ModelError(f"{self.int8}: expected one int8 output, got {output.dtype}")
        return output.scale[0], output.zero_point[0]


def _locate(source: str | Path) -> Path:
    from textbook_code import checkpoints

    if isinstance(source, str) and source in checkpoints.names():
        return checkpoints.path(source)
    path = Path(source)
    if path.is_file():
        if path.stat().st_size == 0:
            raise ModelError(f"model: {path} is empty, 0 bytes")
        if path.suffix != ".tflite":
            raise ModelError(f"model: expected a .tflite file or a folder, got {path.name}")
        return path
    if path.is_dir():
        if not any((path / name).is_file() for name in (_WEIGHTS, INT8_FILE)):
            raise ModelError(f"model: {path} holds neither {_WEIGHTS} nor {INT8_FILE}")
        return path
    known = ", ".join(name for name in checkpoints.names() if name.startswith("person"))
    raise ModelError(
        f"model: got {str(source)!r}, expected {known or 'a checkpoint'}, a folder or a .tflite file"
    )


# ---------------------------------------------------------------- the runtimes


@dataclass
class Running:
    """A model that is open in a runtime.

    Args:
        logits: uint8 pictures (n, 32, 32, 3) → (n,): int8 steps, or float logits.
        size: bytes of the file or program that holds the model.
        memory: bytes for activations: an arena, or a microcontroller's static RAM.
        instructions: of one picture, once some were run; None where nobody counts them.

    Book: deploy-runtimes
    """

    logits: Callable[[np.ndarray], np.ndarray]
    size: int | None = None
    memory: int | None = None
    instructions: int | None = None


@dataclass(frozen=True)
class Runtime:
    """A way to run the model.

    Args:
        name: as `--runtime` takes it.
        title: what it is.
        numbers: "float32", "int8", or "mixed" where integer matrices stand between float operations.
        open: opens a model in it; raises one of `refusals` where a tool is missing.

    Book: deploy-runtimes
    """

    name: str
    title: str
    numbers: str
    open: Callable[[Model], Running] = field(repr=False)


def _torch(model: Model) -> Running:
    import torch

    network = model.torch

    @torch.no_grad()
    def logits(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        return network((x.float() - 128) / 128).numpy()

    return Running(logits, size=sum(p.numel() * p.element_size() for p in network.parameters()))


def _onnx(model: Model) -> Running:
    from textbook_code.deploy import onnx

    return Running(onnx.OnnxRuntime(model.onnx).logits, size=model.onnx.stat().st_size)


def _onnx_int8(model: Model) -> Running:
    from textbook_code.deploy import onnx

    return Running(onnx.OnnxRuntime(model.onnx_int8).logits, size=model.onnx_int8.stat().st_size)


def _litert_float(model: Model) -> Running:
    from textbook_code.deploy import tflite

    return Running(tflite.LiteRT(model.tflite).logits, size=model.tflite.stat().st_size)


def _litert(model: Model) -> Running:
    from textbook_code.deploy import tflite

    return Running(tflite.LiteRT(model.int8).logits, size=model.int8.stat().st_size)


def _litert_reference(model: Model) -> Running:
    from textbook_code.deploy import tflite

    return Running(tflite.LiteRT(model.int8, reference=True).logits, size=model.int8.stat().st_size)


def _tflm(model: Model) -> Running:
    from textbook_code.deploy import tflite

    micro = tflite.TFLiteMicro(model.int8)
    return Running(micro.logits, size=model.int8.stat().st_size, memory=micro.arena.total)


def _numpy(model: Model) -> Running:
    from textbook_code.deploy import graph, interpreter

    return Running(interpreter.Interpreter(graph.read(model.int8)).logits, size=model.int8.stat().st_size)


def _c(kernels: str) -> Callable[[Model], Running]:
    def open_(model: Model) -> Running:
        from textbook_code.deploy.compilers import CNet

        net = CNet(model.int8, kernels=kernels)
        return Running(net.logits, size=net.generated.flash_bytes, memory=net.generated.arena_bytes)

    return open_


def _firmware(cpu: str, board: str) -> Callable[[Model], Running]:
    def open_(model: Model) -> Running:
        from textbook_code.deploy import mcu

        project = mcu.project(model.int8, model.work / board, board=board, kernels="fast", force=True)

        def logits(images: np.ndarray) -> np.ndarray:
            ran = mcu.run(project, images, cpu=cpu)
            running.size, running.memory = ran.flash_bytes, ran.static_ram_bytes
            running.instructions = ran.instructions
            return ran.logits

        running = Running(logits)
        return running

    return open_


def _aarch64(model: Model) -> Running:
    from textbook_code.deploy import arm

    program = arm.build(model.int8, model.work / "person-aarch64")
    return Running(lambda images: arm.run(program, images), size=program.stat().st_size)


def _wasm(model: Model) -> Running:
    from textbook_code.deploy import wasm

    module = wasm.Module(wasm.build(model.int8, model.work / "person.wasm"))
    return Running(module.logits, size=module.size, memory=module.memory_bytes)


RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime("torch", "PyTorch", "float32", _torch),
        Runtime("onnx", "ONNX Runtime", "float32", _onnx),
        Runtime("onnx-int8", "ONNX Runtime, QDQ", "mixed", _onnx_int8),
        Runtime("litert-float", "LiteRT", "float32", _litert_float),
        Runtime("litert", "LiteRT", "int8", _litert),
        Runtime("litert-ref", "LiteRT, reference kernels", "int8", _litert_reference),
        Runtime("tflm", "TensorFlow Lite Micro", "int8", _tflm),
        Runtime("numpy", "NumPy, op by op", "int8", _numpy),
        Runtime("c", "C99, plain kernels", "int8", _c("plain")),
        Runtime("c-fast", "C99, fast kernels", "int8", _c("fast")),
        Runtime("cortex-m7", "Cortex-M7 in QEMU", "int8", _firmware("cortex-m7", "mps2-an500")),
        Runtime("cortex-m4", "Cortex-M4 in QEMU", "int8", _firmware("cortex-m4", "mps2-an386")),
        Runtime("cortex-m3", "Cortex-M3 in QEMU", "int8", _firmware("cortex-m3", "mps2-an385")),
        Runtime("aarch64", "64-bit Arm program", "int8", _aarch64),
        Runtime("wasm", "WebAssembly", "int8", _wasm),
    )
}
"""By name, in the order of the table."""


def find(name: str) -> Runtime:
    """The runtime called `name`.

    Raises:
        ValueError: there is none; those there are are named.

    Book: deploy-runtimes
    """
    if name not in RUNTIMES:
        raise ValueError(f"runtime: got {name!r}, expected one of {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


@dataclass(frozen=True)
class Decision:
    """What a runtime says of one picture.

    Args:
        person: the verdict.
        logit: above 0 is a person.
        steps: the logit in steps of the integer output, from an integer runtime.

    Book: deploy-runtimes
    """

    person: bool
    logit: float
    steps: int | None


def decide(model: Model | str | Path, images: np.ndarray, runtime: str = "c") -> list[Decision]:
    """Ask one runtime about each picture.

    Args:
        model: see `Model`.
        images: uint8, (n, 32, 32, 3).
        runtime: by name.

    Raises:
        ValueError: an unknown runtime, or another shape.
        TypeError: the images are not bytes.
        ModelError: there is no such model, or it is not in the form that the runtime needs.
        ImportError, CompilerMissingError: a tool is missing.

    Book: deploy-runtimes
    """
    images, _, _ = _checked(images, None, None)
    chosen = find(runtime)
    model = model if isinstance(model, Model) else Model(model)
    logits = np.asarray(chosen.open(model).logits(images))
    if not np.issubdtype(logits.dtype, np.integer):
        return [Decision(z > 0, z, None) for z in logits.astype(float).tolist()]
    scale, zero_point = model.step
    return [Decision(q > zero_point, (q - zero_point) * scale, q - zero_point) for q in logits.tolist()]


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """What one runtime said of the pictures, beside the reference.

    Args:
        runtime: its name.
        title: what it is.
        numbers: "float32", "int8" or "mixed".
        pictures: how many it was given.
        decisions: how many of them it decided as the reference did.
        lsb: the largest difference of a logit from the reference, in steps of the integer output.
        exact: on how many pictures the difference is zero; None where logits are no integers.
        accuracy: balanced accuracy by source, where it saw every picture of both classes.
        size: bytes of the file or program.
        memory: bytes for activations.
        instructions: of one picture.
        missing: why it did not run; then nothing else is known.

    Book: deploy-runtimes
    """

    runtime: str
    title: str
    numbers: str
    pictures: int = 0
    decisions: int | None = None
    lsb: float | None = None
    exact: int | None = None
    accuracy: Mapping[str, float] = field(default_factory=dict)
    size: int | None = None
    memory: int | None = None
    instructions: int | None = None
    missing: str | None = None


@dataclass(frozen=True)
class Table:
    """The rows of `compare`, and what they were measured against.

    Args:
        rows: in the order of the runtimes.
        reference: the runtime that the others are compared with.
        scale: of the integer output.
        zero_point: of the integer output; above it is a person.
        logits: of each runtime that ran, for the pictures that it was given.

    Book: deploy-runtimes
    """

    rows: tuple[Row, ...]
    reference: str
    scale: float
    zero_point: int
    logits: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __getitem__(self, runtime: str) -> Row:
        for row in self.rows:
            if row.runtime == runtime:
                return row
        raise KeyError(f"{runtime!r} is not in the table, only {', '.join(r.runtime for r in self.rows)}")

    @property
    def missing(self) -> dict[str, str]:
        """The runtimes that did not run, and why.

        Book: deploy-runtimes
        """
        return {row.runtime: row.missing for row in self.rows if row.missing}

    def plain(self) -> list[dict[str, str]]:
        """The table as text: a dictionary a row, with one set of keys in the order of the columns.

        `verdicts` and `bits` count the pictures on which the decision, and the logit to the last bit, are
        those of the reference; `LSB` is the largest difference of a logit in steps; then come balanced
        accuracies by source, and what the model costs.

        Book: deploy-runtimes
        """
        sources = list(dict.fromkeys(name for row in self.rows for name in row.accuracy))
        return [_as_text(row, sources) for row in self.rows]

    def __str__(self) -> str:
        return "\n\n".join(self._written(lines, heads) for lines, heads in self._parts())

    def _written(self, lines: list[dict[str, str]], heads: list[str]) -> str:
        widths = [max(len(head), *(len(line[head]) for line in lines)) for head in heads]
        out = []
        for line in ({head: head for head in heads} | {"missing": ""}, *lines):
            name, *cells = (line[head] for head in heads)
            rest = " ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            said = f"not run: {line['missing']}" if line["missing"] else rest
            out.append(f"{name:{widths[0]}} {said}".rstrip())
        return "\n".join(out)

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        parts: list[RenderableType] = []
        for lines, heads in self._parts():
            part = RichTable(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
            ran = [line for line in lines if not line["missing"]]
            for head in heads:  # a head may be broken, a figure is not
                width = max((len(line[head]) for line in ran), default=0)
                side: Any = "left" if head == heads[0] else "right"
                part.add_column(head, justify=side, min_width=width, overflow="fold")
            for line in ran:
                part.add_row(*(line[head] for head in heads))
            parts += [part, Text()]
        parts += [Text(f"{name}: not run: {why}") for name, why in self.missing.items()]
        return Group(*parts)

    def _parts(self) -> list[tuple[list[dict[str, str]], list[str]]]:
        """The table in two, since all columns are more than a page is wide: lines, and their columns."""
        lines = self.plain()
        heads = [h for h in lines[0] if h != "missing" and any(line[h] for line in lines)]
        scores = [head for head in heads if any(head in row.accuracy for row in self.rows)]
        parts = [(lines, [head for head in heads if head not in scores])]
        if scores:
            scored = [line for line, row in zip(lines, self.rows, strict=True) if row.accuracy]
            parts.append((scored, [heads[0], *scores]))
        return parts


def _as_text(row: Row, sources: list[str]) -> dict[str, str]:
    def number(value: int | None) -> str:
        return "" if value is None else f"{value:,}"

    steps = "" if row.lsb is None else f"{row.lsb:.0f}" if row.exact is not None else f"{row.lsb:.2f}"
    cells = {
        "runtime": row.runtime,
        "type": row.numbers,
        "n": number(row.pictures or None),
        "verdicts": number(row.decisions),
        "bits": number(row.exact),
        "LSB": steps,
    }
    for name in sources:
        cells[name] = f"{100 * row.accuracy[name]:.1f} %" if name in row.accuracy else ""
    return cells | {
        "bytes": number(row.size),
        "memory": number(row.memory),
        "instructions": number(row.instructions),
        "missing": row.missing or "",
    }


# ---------------------------------------------------------------- running them


@dataclass(frozen=True)
class Outcome:
    """What a runtime gave.

    Args:
        logits: (m,), int8 or float.
        at: (m,), which pictures they belong to.
        size: see `Running`.
        memory: see `Running`.
        instructions: see `Running`.

    Book: deploy-runtimes
    """

    logits: np.ndarray
    at: np.ndarray
    size: int | None = None
    memory: int | None = None
    instructions: int | None = None

    @property
    def integers(self) -> bool:
        """Whether the logits are steps of the integer output.

        Book: deploy-runtimes
        """
        return bool(np.issubdtype(self.logits.dtype, np.integer))

    def steps(self, scale: float, zero_point: int) -> np.ndarray:
        """The logits in steps from the threshold: whole from an integer runtime.

        Book: deploy-runtimes
        """
        if self.integers:
            return self.logits.astype(np.int64) - zero_point
        return self.logits.astype(np.float64) / scale


def compare(
    model: Model | str | Path,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    sources: Sequence[str] | None = None,
    runtimes: Sequence[str] | None = None,
    reference: str = "c",
    limits: Mapping[str, int] | None = None,
    progress: bool = False,
) -> Table:
    """Run the same pictures through every runtime and count where their logits and decisions differ.

    Args:
        model: see `Model`.
        images: uint8, (n, 32, 32, 3).
        labels: bool, (n,): whether a person is in it; without them there are no accuracies.
        sources: where each picture is from, n names; accuracies are reported for each, never pooled.
        runtimes: by name; all of them by default.
        reference: the integer runtime that the others are compared with. Where it is missing, the next
            integer runtime that is there takes its place; the table names it.
        limits: the most pictures that a slow runtime is given, evenly spread over all of them.
        progress: show bars on standard error.

    Returns:
        One row for each runtime, missing ones included.

    Raises:
        TypeError: the images are not bytes.
        ValueError: shapes that do not fit, an unknown runtime, or a reference that is not of integers.
        ModelError: there is no such model.

    Book: deploy-runtimes
    """
    images, labels, groups = _checked(images, labels, sources)
    names = list(dict.fromkeys(runtimes if runtimes is not None else RUNTIMES))
    wanted = [find(name) for name in names]
    if find(reference).numbers != "int8":
        raise ValueError(f"reference: expected a runtime of int8, got {reference!r}")
    if not wanted:
        raise ValueError("runtimes: expected at least one")
    model = model if isinstance(model, Model) else Model(model)
    scale, zero_point = model.step
    outcomes: dict[str, Outcome | str] = {}
    # the reference runs even where it is not among the wanted
    order = [name for name in RUNTIMES if name in {*names, reference}]
    with _bars(progress) as begin:
        for name in order:
            at = _spread(len(images), (limits or {}).get(name))
            outcomes[name] = _try(find(name), model, images[at], at, begin(find(name).title, len(at)))
    return tabulate(
        outcomes,
        scale=scale,
        zero_point=zero_point,
        labels=labels,
        sources=groups.tolist(),
        reference=reference,
        rows=[runtime.name for runtime in wanted],
    )


def tabulate(
    outcomes: Mapping[str, Outcome | str],
    *,
    scale: float,
    zero_point: int,
    labels: np.ndarray | None = None,
    sources: Sequence[str] | None = None,
    reference: str = "c",
    rows: Sequence[str] | None = None,
) -> Table:
    """The table of what runtimes have said.

    Args:
        outcomes: by the runtime's name; a text in place of an outcome says why there is none.
        scale: of the integer output.
        zero_point: of the integer output.
        labels: as in `compare`, of all pictures.
        sources: as in `compare`.
        reference: as in `compare`.
        rows: which runtimes get a row, in this order; all by default.

    Book: deploy-runtimes
    """
    ran = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, Outcome)}
    whole = [name for name in ran if find(name).numbers == "int8"]
    used = reference if reference in ran else next(iter(whole), reference)
    groups = None if labels is None else np.full(len(labels), "all") if sources is None else np.array(sources)
    made = []
    for name in rows if rows is not None else outcomes:
        runtime, outcome = find(name), outcomes[name]
        if isinstance(outcome, str):
            made.append(Row(name, runtime.title, runtime.numbers, missing=outcome))
            continue
        steps = outcome.steps(scale, zero_point)
        decisions = lsb = exact = None
        if used in ran:
            theirs = ran[used].steps(scale, zero_point)
            _, here, there = np.intersect1d(outcome.at, ran[used].at, return_indices=True)
            apart = np.abs(steps[here] - theirs[there])
            decisions = int(((steps[here] > 0) == (theirs[there] > 0)).sum())
            lsb = float(apart.max(initial=0))
            exact = int((apart == 0).sum()) if outcome.integers else None
        made.append(
            Row(
                name, runtime.title, runtime.numbers, len(outcome.at), decisions, lsb, exact,
                _accuracies(steps > 0, outcome.at, labels, groups),
                outcome.size, outcome.memory, outcome.instructions,
            )
        )  # fmt: skip
    return Table(tuple(made), used, scale, zero_point, {name: o.logits for name, o in ran.items()})


def _accuracies(
    said: np.ndarray, at: np.ndarray, labels: np.ndarray | None, groups: np.ndarray | None
) -> dict[str, float]:
    """Balanced accuracy of each source of which all pictures were seen and both classes occur."""
    found: dict[str, float] = {}
    if labels is None or groups is None:
        return found
    for name in dict.fromkeys(groups.tolist()):
        inside = groups[at] == name
        truth = labels[at][inside]
        if inside.sum() == (groups == name).sum() and truth.any() and not truth.all():
            right = said[inside]
            found[name] = float((right[truth].mean() + (~right[~truth]).mean()) / 2)
    return found


def _checked(
    images: np.ndarray, labels: np.ndarray | None, sources: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    images = np.ascontiguousarray(images)
    if images.dtype != np.uint8:
        raise TypeError(f"images: expected dtype uint8, got {images.dtype}")
    if images.ndim != 4 or images.shape[1:] != (32, 32, 3) or not len(images):
        raise ValueError(f"images: expected shape (n, 32, 32, 3), got {images.shape}")
    if labels is not None:
        labels = np.asarray(labels, bool)
        if labels.shape != (len(images),):
            raise ValueError(f"labels: expected shape ({len(images)},), got {labels.shape}")
    groups = np.full(len(images), "all") if sources is None else np.asarray(sources)
    if groups.shape != (len(images),):
        raise ValueError(f"sources: expected {len(images)} names, got an array of shape {groups.shape}")
    return images, labels, groups


def _spread(n: int, limit: int | None) -> np.ndarray:
    """Indices of at most `limit` of n pictures, evenly spread."""
    if limit is None or limit >= n:
        return np.arange(n)
    if limit < 1:
        raise ValueError(f"limits: expected at least one picture, got {limit}")
    return np.arange(limit) * n // limit


def _try(
    runtime: Runtime, model: Model, images: np.ndarray, at: np.ndarray, advance: Callable[[int], None]
) -> Outcome | str:
    """Open a runtime and run it; where a tool is missing or the model is refused, what it says."""
    try:
        running = runtime.open(model)
        parts = []
        for start in range(0, len(images), _BATCH):
            parts.append(np.asarray(running.logits(images[start : start + _BATCH])))
            advance(len(parts[-1]))
    except refusals() as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return Outcome(np.concatenate(parts), at, running.size, running.memory, running.instructions)


def refusals() -> tuple[type[Exception], ...]:
    """What a runtime raises that lacks a tool, or that cannot run this model; all say it in a line or two.

    Book: deploy-runtimes
    """
    from textbook_code.deploy import arm, compilers, mcu, wasm

    missing = (ImportError, compilers.CompilerMissingError, mcu.EmulatorMissingError)
    failed = (compilers.CompileError, mcu.FirmwareError, arm.ArmError, wasm.WasmError)
    return (*missing, *failed, ValueError)


@contextmanager
def _bars(show: bool) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Gives what starts a runtime's bar and returns what moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns: Any = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    with bars if show else nullcontext():

        def begin(title: str, total: int) -> Callable[[int], None]:
            if not show:
                return lambda done: None
            task = bars.add_task(title, total=total)
            return lambda done: bars.update(task, advance=done)

        yield begin
