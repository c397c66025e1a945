r"""From PyTorch to a .tflite file, from floats to 8 bits, and the two runtimes that read it.

In this file: `convert`, `observe` and `quantize`, the three steps to an integer model; what can be read off
its graph; `LiteRT` and `TFLiteMicro`, which run it.

An image is rgb bytes, (32, 32, 3). The float model reads $(b - 128)/128$. The integer model's input has the
scale 1/128 and the zero point 0, so the integer that stands for that number is $b - 128$: the same byte with
its highest bit flipped. Nothing is computed between the camera and the first layer.

Numbers: TensorFlow Lite's 8-bit quantisation specification; Jacob et al. (2018).

Book: deploy-tflite
"""

from __future__ import annotations

import copy
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from textbook_code import checkpoints
from textbook_code.data import people
from textbook_code.deploy.graph import MAGIC, Graph, Op, layer_of, read
from textbook_code.deploy.quiet import quiet
from textbook_code.extras import require
from textbook_code.models.vision.tiny_vit import TinyViT, fold
from textbook_code.weights import moved_into_place

DEPLOYABLE = ("relu", "hardswish")
"""The activations that TensorFlow Lite Micro has an 8-bit kernel for."""
INPUT_RANGE = (-1.0, 127 / 128)
"""What the bytes 0 and 255 stand for."""

MAX_FLASH = 250_000
"""Bytes of flash that the book allows itself for a model."""
INT8_FILE = "model_int8.tflite"
"""The integer model in the folder of a checkpoint."""
CALIBRATION = {"emoji": 128, "pedestrians": 64, "faces": 64}
"""How many training pictures of each source `calibration` takes."""
CALIBRATION_NAME = "training pictures: " + ", ".join(f"{n} of {name}" for name, n in CALIBRATION.items())

Ranges = Mapping[str, tuple[float, float]]
"""The least and the greatest value of each tensor, by its name."""


class ExportError(ValueError):
    """A model that cannot be brought into the form that was asked for; it says what stands in the way.

    Book: deploy-tflite
    """


class OverBudgetError(ExportError):
    """A model that takes more bytes than it may.

    Book: deploy-tflite
    """


class _ChannelsLast(nn.Module):
    """The model, reading (1, height, width, channel) as cameras write it."""

    def __init__(self, model: TinyViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.permute(0, 3, 1, 2))


def as_float(images: np.ndarray) -> np.ndarray:
    """What the float model reads: uint8 (n, 32, 32, 3) as float32 (n, 32, 32, 3), $(b - 128)/128$.

    Book: deploy-tflite
    """
    return (np.asarray(images, np.float32) - 128) / 128


def as_int8(images: np.ndarray) -> np.ndarray:
    """What the integer model reads: each byte with its highest bit flipped, which is b − 128 as int8.

    Book: deploy-tflite
    """
    return (np.asarray(images) ^ np.uint8(0x80)).view(np.int8)


def check_deployable(model: TinyViT) -> None:
    """Raise unless a model is one that the converters here take.

    Raises:
        TypeError: no `TinyViT`.
        ExportError: its activation has no 8-bit kernel, or a weight is not finite.

    Book: deploy-tflite
    """
    if not isinstance(model, TinyViT):
        raise TypeError(f"model: expected a TinyViT, got {type(model).__name__}")
    if model.config.activation not in DEPLOYABLE:
        raise ExportError(
            f"model: its activation {model.config.activation!r} in blocks.0.ffn has no 8-bit operation in "
            f"TensorFlow Lite Micro; expected one of {', '.join(DEPLOYABLE)}"
        )
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ExportError(f"model: {name} has values that are not finite")


@contextmanager
def _without_progress() -> Iterator[None]:
    """Switch off the converter's progress, which in a notebook is displayed past every stream."""
    progress = require("litert_torch.progress", extra="deploy").config
    shown, progress.show_progress = progress.show_progress, False
    try:
        yield
    finally:
        progress.show_progress = shown


def folded_float(model: TinyViT) -> TinyViT:
    """The folded model in float32, whatever the precision that its weights are kept in.

    Book: deploy-tflite
    """
    return fold(copy.deepcopy(model).float())


def convert(model: TinyViT, path: str | Path, *, tolerance: float = 1e-4) -> Path:
    """Fold a model and write it as a float32 .tflite file that reads (1, 32, 32, 3).

    Args:
        model: it is not changed; in training mode, too, it is converted as in evaluation.
        path: replaced if it exists.
        tolerance: how far LiteRT's logits may be from PyTorch's.

    Returns:
        The path.

    Raises:
        TypeError: no `TinyViT`.
        ExportError: an activation without an 8-bit kernel, weights that are not finite, or a file whose
            logits differ from the model's; nothing is written then.
        ImportError: litert-torch is missing.

    Book: deploy-tflite
    """
    check_deployable(model)
    path = Path(path)
    wrapped = _ChannelsLast(folded_float(model)).eval()
    size, channels = model.config.image_size, model.config.in_channels
    sample = (torch.zeros(1, size, size, channels),)
    with quiet():
        litert_torch = require("litert_torch", extra="deploy")
        path.parent.mkdir(parents=True, exist_ok=True)
        with _without_progress(), moved_into_place(path) as partial:
            litert_torch.convert(wrapped, sample).export(str(partial))
            images = np.random.default_rng(0).integers(0, 256, (4, size, size, channels), np.uint8)
            with torch.no_grad():
                expected = wrapped(torch.from_numpy(as_float(images))).numpy()
            off = float(np.abs(LiteRT(partial).logits(images) - expected).max())
            if not off <= tolerance:
                raise ExportError(
                    f"path: the file's logits are {off:.2g} from the model's, over {tolerance:g}"
                )
    return path


def calibration() -> np.ndarray:
    """The pictures by which the book's models are quantised, uint8 (256, 32, 32, 3).

    They are the pictures of the training splits that stand at even steps, as `examination` shows them, so
    that the test splits have no part in it.

    Book: deploy-tflite
    """
    parts = []
    for source, n in CALIBRATION.items():
        pictures = people.load(source, "train")
        parts.append(people.examination(pictures[torch.arange(n) * len(pictures) // n]).numpy())
    return np.concatenate(parts)


def observe(float_path: str | Path, calibration: np.ndarray) -> dict[str, tuple[float, float]]:
    """The true least and greatest value of every float tensor, over a set of images.

    Args:
        float_path: what `convert` has written.
        calibration: uint8 (n, 32, 32, 3).

    Returns:
        By the tensors' names; the input's is `INPUT_RANGE`, whatever the images are.

    Raises:
        ValueError: no images, or of another dtype or shape than the model's.

    Book: quantize-observers
    """
    graph = read(float_path)
    calibration = _images(calibration, graph)
    interpreter = _interpreter(Path(float_path).read_bytes(), delegates=False, preserve=True)
    (source,) = graph.inputs
    names = {t.index: t.name for t in graph.tensors if t.dtype == "float32"}
    seen = dict.fromkeys(names.values(), (math.inf, -math.inf))
    for image in as_float(calibration):
        interpreter.set_tensor(source, image[None])
        interpreter.invoke()
        for index, name in names.items():
            values = interpreter.get_tensor(index)
            low, high = seen[name]
            seen[name] = (min(low, float(values.min())), max(high, float(values.max())))
    return seen | {names[source]: INPUT_RANGE}


def moving_average(float_path: str | Path, calibration: np.ndarray) -> dict[str, tuple[float, float]]:
    """The ranges that the quantiser would use by itself: moving averages of each image's.

    An average over images of a scalar's least value is near that scalar's mean, and so is that of its
    greatest: between them almost nothing of a logit's range is left. For comparison with `observe`.

    Raises:
        ValueError: as `observe`.
        ImportError: ai-edge-quantizer is missing.

    Book: quantize-observers
    """
    graph = read(float_path)
    images = as_float(_images(calibration, graph))
    with quiet():
        quantizer = _quantizer(float_path)
        ((signature, names),) = _interpreter(Path(float_path).read_bytes()).get_signature_list().items()
        samples = {signature: [{names["inputs"][0]: image[None]} for image in images]}
        found = quantizer.calibrate(samples, num_threads=1)
    ranges = {key: (float(np.min(q["min"])), float(np.max(q["max"]))) for key, q in found.items() if q}
    return ranges | {graph.tensors[graph.inputs[0]].name: INPUT_RANGE}


def quantize(
    float_path: str | Path,
    int8_path: str | Path,
    calibration: np.ndarray | None = None,
    *,
    ranges: Ranges | None = None,
    max_bytes: int | None = None,
) -> Path:
    """Write a float .tflite file again with 8-bit integers only, weights and activations.

    Weights get one scale a channel and are symmetric; activations get one scale and one zero point a tensor,
    from their ranges; biases are 32-bit. The input reads bytes (see `as_int8`), the output is one int8.
    Tensors are called after their layers, in place of the converter's names, which are longer than many of
    the tensors.

    Args:
        float_path: what `convert` has written.
        int8_path: replaced if it exists.
        calibration: uint8 (n, 32, 32, 3), from which the ranges are observed.
        ranges: in place of `calibration`, where they come from elsewhere.
        max_bytes: what the file may take in flash.

    Returns:
        `int8_path`.

    Raises:
        ValueError: neither or both of `calibration` and `ranges`, or as `observe`.
        ExportError: a tensor has no range, or an operation stays float; nothing is written then.
        OverBudgetError: the file takes more than `max_bytes`; nothing is written then.
        ImportError: ai-edge-quantizer is missing.

    Book: deploy-tflite
    """
    float_path, int8_path = Path(float_path), Path(int8_path)
    if (calibration is None) == (ranges is None):
        raise ValueError("calibration: expected it, or ranges in its place, and not both")
    graph = read(float_path)
    if ranges is None:
        assert calibration is not None
        ranges = observe(float_path, calibration)
    with quiet():
        quantizer = _quantizer(float_path)
        made = quantizer.quantize(_as_calibration(graph, ranges), enable_progress_report=False)
    data = _short_names(bytes(made.quantized_model))
    check_integer(read(data))
    if max_bytes is not None and len(data) > max_bytes:
        raise OverBudgetError(
            f"int8_path: expected at most {max_bytes:,} bytes, "
            f"got {len(data):,}: {len(data) - max_bytes:,} over"
        )
    int8_path.parent.mkdir(parents=True, exist_ok=True)
    with moved_into_place(int8_path) as partial:
        partial.write_bytes(data)
    return int8_path


def add_to_checkpoint(name: str) -> Path:
    """Put `INT8_FILE` into the folder of a checkpoint of this package, made from its weights.

    Args:
        name: of a `TinyViT`, such as "person-vit".

    Returns:
        The file.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        TypeError, ExportError: as `convert` and `quantize`; the checkpoint is left as it was.

    Book: deploy-tflite
    """
    entry = {
        key: value
        for key, value in checkpoints.manifest()[checkpoints.path(name).name].items()
        if key not in _COUNTED
    }
    with tempfile.TemporaryDirectory() as folder:
        files = Path(shutil.copytree(checkpoints.path(name), Path(folder) / name))
        float_path = convert(TinyViT.from_pretrained(files), Path(folder) / "float.tflite")
        quantize(float_path, files / INT8_FILE, calibration(), max_bytes=MAX_FLASH)
        return checkpoints.adopt(files, name, entry) / INT8_FILE


_COUNTED = ("sha256", "bytes", "files")  # what the manifest says of the files themselves


def _short_names(data: bytes) -> bytes:
    """The same model, its tensors called after their layers."""
    schema = require("ai_edge_litert.schema_py_generated", extra="deploy")
    flatbuffers = require("flatbuffers", extra="deploy")
    graph, model = read(data), schema.ModelT.InitFromPackedBuf(data, 0)
    for tensor, packed in zip(graph.tensors, model.subgraphs[0].tensors, strict=True):
        packed.name = f"/{layer_of(tensor.name)};{tensor.index}"
    model.subgraphs[0].tensors[graph.inputs[0]].name = "image"
    model.subgraphs[0].tensors[graph.outputs[0]].name = "logit"
    builder = flatbuffers.Builder(len(data))
    builder.Finish(model.Pack(builder), MAGIC)
    return bytes(builder.Output())


def _as_calibration(graph: Graph, ranges: Ranges) -> dict[str, dict[str, np.ndarray]]:
    """The ranges in the quantiser's own form; those of constants it takes from their data."""
    found = {}
    for tensor in graph.tensors:
        if tensor.dtype != "float32" or tensor.data is not None:
            continue
        low, high = ranges.get(tensor.name, (math.nan, math.nan))
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ExportError(
                f"ranges: expected a least and a greatest value of {tensor.name}, got {low}, {high}"
            )
        shape = (1,) * len(tensor.shape)
        found[tensor.name] = {"min": np.full(shape, low, np.float32), "max": np.full(shape, high, np.float32)}
    return found


def _quantizer(float_path: str | Path) -> Any:
    module = require("ai_edge_quantizer.quantizer", extra="deploy")
    recipe = require("ai_edge_quantizer.recipe", extra="deploy")
    quantizer = module.Quantizer(str(float_path))
    quantizer.load_quantization_recipe(recipe.static_wi8_ai8())
    return quantizer


def float_ops(graph: Graph) -> list[str]:
    """The operations that read or write floats, each with its layer: "SOFTMAX in TinyViTBlock_0/attn".

    Book: deploy-tflite
    """

    def floats(op: Op) -> bool:
        indices = (i for i in (*op.inputs, *op.outputs) if i != -1)
        return any(graph.tensors[i].dtype.startswith("float") for i in indices)

    return [f"{op.kind} in {graph.layer(op)}" for op in graph.ops if floats(op)]


def op_counts(graph: Graph) -> dict[str, int]:
    """How many operations there are of each kind, the most frequent first.

    Book: deploy-tflite
    """
    return dict(Counter(op.kind for op in graph.ops).most_common())


def constant_bytes(graph: Graph) -> int:
    """What the weights, biases and other constants take, without the file's tables.

    Book: deploy-tflite
    """
    return sum(tensor.nbytes for tensor in graph.tensors if tensor.data is not None)


def check_integer(graph: Graph) -> None:
    """Raise unless a model is of integers only, reads image bytes, and gives one int8.

    Raises:
        ExportError: the operations that stay float are named; or the input's scale and zero point are not
            1/128 and 0; or the output is not one int8.

    Book: deploy-tflite
    """
    if floats := float_ops(graph):
        raise ExportError(
            f"graph: expected integers only, found {len(floats)} float operations: {floats[:5]}"
        )
    source, target = graph.tensors[graph.inputs[0]], graph.tensors[graph.outputs[0]]
    if (source.dtype, source.scale, source.zero_point) != ("int8", (1 / 128,), (0,)):
        raise ExportError(
            f"graph: expected an int8 input of scale 1/128 and zero point 0, "
            f"got {source.dtype}, {source.scale} and {source.zero_point}"
        )
    if (target.dtype, target.size, len(target.scale)) != ("int8", 1, 1):
        raise ExportError(f"graph: expected one int8 as output, got {target.dtype} {target.shape}")


def _images(images: np.ndarray, graph: Graph) -> np.ndarray:
    images = np.asarray(images)
    shape = graph.tensors[graph.inputs[0]].shape[1:]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape or not len(images):
        raise ValueError(
            f"images: expected uint8 (n, {', '.join(map(str, shape))}) with n ≥ 1, "
            f"got {images.dtype} {images.shape}"
        )
    return images


def _interpreter(
    data: bytes, *, delegates: bool = True, reference: bool = False, preserve: bool = False
) -> Any:
    with quiet():
        module = require("ai_edge_litert.interpreter", extra="deploy")
        kinds = module.OpResolverType
        kind = kinds.AUTO if delegates else kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        interpreter = module.Interpreter(
            model_content=data,
            num_threads=1,
            experimental_op_resolver_type=kinds.BUILTIN_REF if reference else kind,
            experimental_preserve_all_tensors=preserve,
        )
        interpreter.allocate_tensors()
    return interpreter


class LiteRT:
    """Run a .tflite file with Google's runtime for phones and servers, one thread, one image at a time.

    Args:
        path: of `convert` or `quantize`.
        reference: whether to use its plain kernels in place of XNNPACK's fast ones.

    Raises:
        FileNotFoundError, GraphError: as `read`.
        ImportError: ai-edge-litert is missing.

    Book: deploy-runtimes
    """

    def __init__(self, path: str | Path, reference: bool = False) -> None:
        self.graph = read(path)
        self._interpreter = _interpreter(Path(path).read_bytes(), reference=reference)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """uint8 (n, 32, 32, 3) to (n,): int8 of an integer model, float32 of a float one.

        Raises:
            ValueError: another dtype or shape, or no image.

        Book: deploy-runtimes
        """
        (source,), (target,) = self.graph.inputs, self.graph.outputs
        found = []
        for image in _prepared(images, self.graph):
            self._interpreter.set_tensor(source, image[None])
            self._interpreter.invoke()
            found.append(self._interpreter.get_tensor(target).reshape(()))
        return np.stack(found)


def _prepared(images: np.ndarray, graph: Graph) -> np.ndarray:
    images = _images(images, graph)
    return as_int8(images) if graph.tensors[graph.inputs[0]].dtype == "int8" else as_float(images)


@dataclass(frozen=True)
class Arena:
    """The memory of TensorFlow Lite Micro, in bytes, as its own allocator counts it.

    Args:
        total: what the interpreter keeps. While it starts it needs more for a moment, which shows where the
            activations are few; `smallest_arena` finds what is enough.
        activations: of that, what tensors share while the model runs.
        tables: of that, what its records of tensors and operations take. They are full of pointers, which
            are twice as wide here as on a 32-bit microcontroller.

    Book: deploy-arena
    """

    total: int
    activations: int
    tables: int


class TFLiteMicro:
    """Run an integer .tflite file with the runtime for microcontrollers, here through its Python binding.

    Args:
        path: of `quantize`.
        arena_bytes: the memory that it may use; by default more than enough.

    Raises:
        FileNotFoundError, GraphError: as `read`.
        ExportError: the model is not of integers only, or needs more memory than `arena_bytes`.
        ImportError: tflite-micro is missing.

    Book: deploy-runtimes
    """

    def __init__(self, path: str | Path, arena_bytes: int | None = None) -> None:
        self.graph = read(path)
        check_integer(self.graph)
        if arena_bytes is not None and arena_bytes < 1024:  # below, its C++ crashes in place of refusing
            raise ExportError(f"arena_bytes: expected at least 1,024, got {arena_bytes:,}")
        runtime = require("tflite_micro.python.tflite_micro.runtime", extra="deploy")
        try:
            with quiet():
                self._interpreter = runtime.Interpreter.from_bytes(
                    Path(path).read_bytes(), arena_size=arena_bytes
                )
        except RuntimeError as error:
            said = "; ".join([str(error), *getattr(error, "__notes__", [])])
            raise ExportError(f"path: TensorFlow Lite Micro refuses {path} ({said})") from error

    def logits(self, images: np.ndarray) -> np.ndarray:
        """uint8 (n, 32, 32, 3) to int8 (n,).

        Raises:
            ValueError: another dtype or shape, or no image.

        Book: deploy-runtimes
        """
        found = []
        for image in _prepared(images, self.graph):
            self._interpreter.set_input(image[None], 0)
            self._interpreter.invoke()
            found.append(self._interpreter.get_output(0).reshape(()))
        return np.stack(found)

    @property
    def arena(self) -> Arena:
        """How much memory it has taken.

        Book: deploy-arena
        """
        with quiet() as said:
            self._interpreter.print_allocations()
        found = dict(re.findall(r"Arena allocation (total|head|tail) (\d+) bytes", said.text))
        return Arena(int(found["total"]), int(found["head"]), int(found["tail"]))


def smallest_arena(path: str | Path) -> int:
    """The least memory, in steps of 16 bytes, with which TensorFlow Lite Micro starts and runs a model.

    Book: deploy-arena
    """
    low = -(-max(TFLiteMicro(path).arena.total, 1024) // 16) * 16
    high, image = low, np.zeros((1, *read(path).tensors[read(path).inputs[0]].shape[1:]), np.uint8)

    def enough(size: int) -> bool:
        try:
            TFLiteMicro(path, size).logits(image)
        except ExportError:
            return False
        return True

    if enough(low):
        return low
    while not enough(high):
        low, high = high, high + high // 4 // 16 * 16
    while high - low > 16:  # low is too little, high is enough
        middle = (low + high) // 32 * 16
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
