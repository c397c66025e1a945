"""Read a .tflite file as what it is: a list of tensors, and a list of operations on them.

In this file: `read`, and the four plain records that it returns. The file is a flatbuffer, tables that point
to one another by offsets, and nothing in it is protected by a checksum; so everything that is relied on later
(indices, types, the bytes of each constant) is checked here once.

Format: TensorFlow Lite's schema, version 3 (schema.fbs); its field names, in snake_case, are the names of
the options.

Book: deploy-graph
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from textbook_code.extras import require

MAGIC = b"TFL3"
"""What stands at byte 4 of every .tflite file."""

_DTYPES = {
    "FLOAT32": np.float32, "FLOAT16": np.float16, "FLOAT64": np.float64, "BOOL": np.bool_,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
}  # fmt: skip
_NAMED = {"padding": "Padding", "fused_activation_function": "ActivationFunctionType"}
"""Options that the file holds as numbers of these enumerations."""


class GraphError(ValueError):
    """A file that is no whole .tflite model, or one of a kind that is not deployed here.

    Book: deploy-graph
    """


class UnsupportedOpError(ValueError):
    """A whole model with something in it for which there is no kernel; the message names it and its layer.

    Book: deploy-graph
    """


@dataclass(frozen=True)
class Tensor:
    r"""A tensor: name, shape, type, how its integers stand for numbers, and its data if it is constant.

    An integer $q$ stands for $s\,(q - z)$: scale $s$ and zero point $z$, one pair for the whole tensor, or
    one for each index along `quantized_dimension`.

    Args:
        index: its place in `Graph.tensors`.
        name: from the converter; it leads with the names of the modules.
        shape: () for a single number.
        dtype: of NumPy, such as "int8".
        scale: none, one or one a channel.
        zero_point: as many.
        data: of `shape` and `dtype`, not writeable; None where it is computed or an input.
        quantized_dimension: the axis of the channels.

    Book: deploy-graph
    """

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: tuple[float, ...] = ()
    zero_point: tuple[int, ...] = ()
    data: np.ndarray | None = field(default=None, compare=False, repr=False)
    quantized_dimension: int = 0

    @property
    def size(self) -> int:
        """How many numbers it holds.

        Book: deploy-graph
        """
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """How many bytes they take.

        Book: deploy-graph
        """
        return self.size * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Op:
    """An operation: what it is, the tensors that it reads and writes, and its options.

    Args:
        kind: as the schema has it, "FULLY_CONNECTED"; a custom operation is "CUSTOM name".
        inputs: indices into `Graph.tensors`; −1 where an optional input is left out.
        outputs: indices into `Graph.tensors`.
        options: by their names in the schema, in snake_case; `padding` and `fused_activation_function` as
            words ("VALID", "RELU"), everything else as the number or bool that it is.

    Book: deploy-graph
    """

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """A model: the operations in the order in which they run.

    Args:
        inputs: indices into `tensors`.
        outputs: indices into `tensors`.
        tensors: all of them.
        ops: each reads only inputs, constants, and what an earlier one has written.

    Book: deploy-graph
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    ops: tuple[Op, ...]

    def layer(self, op: Op) -> str:
        """Where in the model an operation comes from, for messages: "TinyViTBlock_0/attn/q_proj".

        Book: deploy-graph
        """
        return layer_of(self.tensors[op.outputs[0]].name) if op.outputs else ""


def layer_of(name: str) -> str:
    """The path of modules in a tensor's name: "TinyViTBlock_0/attn/q_proj".

    The converter writes the class and the attribute of each module, `package.file.Attention_attn`, and one
    such path for each operation that went into a fused one, of which we give the last. A name of another
    kind is returned as it is.

    Book: deploy-graph
    """
    paths = [path for path in name.split(";") if path and not path.isdigit()] or [name]
    modules = []
    for part in paths[-1].split("/")[1:]:
        found = re.fullmatch(r"(?:.*\.)?([A-Z][A-Za-z0-9]*)_(\w+)", part)
        modules.append(part if found is None or found[2].isdigit() else found[2])
    modules = [part.rpartition(".")[2] for part in modules if part != "model"]
    return "/".join(modules) or paths[-1]


def read(source: str | Path | bytes) -> Graph:
    """Read a model with one subgraph and fixed shapes.

    Args:
        source: a .tflite file, or its bytes.

    Raises:
        FileNotFoundError: there is no such file.
        GraphError: the file is empty, no .tflite, cut short or damaged; it has several subgraphs, a shape
            that is not known, or a tensor of a type that NumPy does not have.
        ImportError: ai-edge-litert, which brings the schema, is missing.

    Book: deploy-graph
    """
    data, name = _bytes(source)
    schema = require("ai_edge_litert.schema_py_generated", extra="deploy")
    try:
        model = schema.ModelT.InitFromPackedBuf(data, 0)
        return _graph(model, name)
    except GraphError:
        raise
    except Exception as error:  # an offset that leads out of the file fails in whatever read it
        raise GraphError(
            f"{name}: cut short or damaged ({len(data):,} bytes; {type(error).__name__}: {error})"
        ) from error


def _bytes(source: str | Path | bytes) -> tuple[bytes, str]:
    if isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), "source"
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"source: expected a .tflite file, found none at {path}")
        data, name = path.read_bytes(), str(path)
    if not data:
        raise GraphError(f"{name}: expected a .tflite model, got a file of zero bytes")
    if data[4:8] != MAGIC:
        raise GraphError(f"{name}: expected a .tflite model, with {MAGIC!r} at byte 4, got {data[4:8]!r}")
    return data, name


@cache
def _words(enumeration: str) -> dict[int, str]:
    """What an enumeration of the schema calls its numbers."""
    schema = require("ai_edge_litert.schema_py_generated", extra="deploy")
    known = vars(getattr(schema, enumeration)).items()
    return {number: word for word, number in known if isinstance(number, int)}


def _graph(model: Any, name: str) -> Graph:
    if len(model.subgraphs) != 1:
        raise GraphError(f"{name}: expected one subgraph, got {len(model.subgraphs)}")
    subgraph = model.subgraphs[0]
    tensors = tuple(_tensor(i, t, model.buffers, name) for i, t in enumerate(subgraph.tensors))
    ops = tuple(_op(op, model.operatorCodes) for op in subgraph.operators)
    graph = Graph(_indices(subgraph.inputs), _indices(subgraph.outputs), tensors, ops)
    _check_order(graph, name)
    return graph


def _tensor(index: int, packed: Any, buffers: list[Any], name: str) -> Tensor:
    label = f"{name}: tensor {index} ({_text(packed.name)})"
    kind = _words("TensorType").get(packed.type, str(packed.type))
    if kind not in _DTYPES:
        raise GraphError(f"{label}: expected one of the types {', '.join(_DTYPES)}, got {kind}")
    shape = _indices(packed.shape)
    if min((*shape, *_indices(packed.shapeSignature)), default=1) < 1:
        raise GraphError(f"{label}: expected a fixed shape, got {_indices(packed.shapeSignature) or shape}")
    buffer = buffers[packed.buffer]
    if packed.externalBuffer or buffer.offset or packed.sparsity is not None:
        raise GraphError(f"{label}: expected dense data inside the model's tables")
    quantization = packed.quantization
    scale: tuple[float, ...] = ()
    zero: tuple[int, ...] = ()
    if quantization is not None and quantization.scale is not None:
        scale, zero = tuple(map(float, quantization.scale)), _indices(quantization.zeroPoint)
        zero = zero or (0,) * len(scale)
    tensor = Tensor(index, _text(packed.name), shape, np.dtype(_DTYPES[kind]).name, scale, zero)
    axis = quantization.quantizedDimension if len(scale) > 1 else 0
    if len(scale) != len(zero) or (len(scale) > 1 and len(scale) != shape[axis]):
        raise GraphError(f"{label}: {len(scale)} scales and {len(zero)} zero points for the shape {shape}")
    if not all(0 < s < float("inf") for s in scale):
        raise GraphError(f"{label}: expected positive scales, got {min(scale)} to {max(scale)}")
    values = None
    if buffer.data is not None and len(buffer.data):
        if len(buffer.data) != tensor.nbytes:
            raise GraphError(f"{label}: expected {tensor.nbytes:,} bytes of data, got {len(buffer.data):,}")
        raw = bytes(bytearray(buffer.data))
        values = np.frombuffer(raw, np.dtype(_DTYPES[kind]).newbyteorder("<")).reshape(shape)
    return Tensor(index, tensor.name, shape, tensor.dtype, scale, zero, values, axis)


def _op(packed: Any, codes: list[Any]) -> Op:
    code = codes[packed.opcodeIndex]
    # the old field has 8 bits; kinds from 127 up stand in the new one
    kind = _words("BuiltinOperator")[max(code.builtinCode, code.deprecatedBuiltinCode)]
    if kind == "CUSTOM":
        kind = f"CUSTOM {_text(code.customCode)}"
    options = {}
    for key, value in vars(packed.builtinOptions or packed.builtinOptions2 or object).items():
        if key.startswith("_") or callable(value):
            continue
        key = re.sub(r"([A-Z])", lambda letter: f"_{letter[1].lower()}", key)
        if key in _NAMED:
            value = _words(_NAMED[key])[value]
        options[key] = tuple(value.tolist()) if isinstance(value, np.ndarray) else value
    return Op(kind, _indices(packed.inputs), _indices(packed.outputs), MappingProxyType(options))


def _check_order(graph: Graph, name: str) -> None:
    """Raise unless every index leads to a tensor that is there by then."""
    ready = {t.index for t in graph.tensors if t.data is not None} | set(graph.inputs)
    known = range(len(graph.tensors))
    if not graph.inputs or not graph.outputs:
        raise GraphError(f"{name}: expected inputs and outputs, got {graph.inputs} and {graph.outputs}")
    for number, op in enumerate(graph.ops):
        for index in (*(i for i in op.inputs if i != -1), *op.outputs):
            if index not in known:
                raise GraphError(f"{name}: op {number} ({op.kind}) names tensor {index} of {len(known)}")
        if missing := [i for i in op.inputs if i != -1 and i not in ready]:
            raise GraphError(
                f"{name}: op {number} ({op.kind}) reads tensor {missing[0]} before it is written"
            )
        ready |= set(op.outputs)
    if missing := [i for i in graph.outputs if i not in ready]:
        raise GraphError(f"{name}: no op writes the output, tensor {missing[0]}")


def _indices(values: Any) -> tuple[int, ...]:
    return () if values is None else tuple(int(value) for value in values)


def _text(value: bytes | str | None) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else value or ""
