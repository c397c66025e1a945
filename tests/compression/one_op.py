"""Models of one int8 operation with scales and data of our choosing, run by the reference kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
import pytest

schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="ai-edge-litert is not installed")


@dataclass
class Given:
    """A tensor: an input without data, or a constant."""

    shape: tuple[int, ...]
    scale: Any = None
    zero: Any = 0
    data: np.ndarray | None = None
    dtype: type = np.int8


def model(kind: str, tensors: list[Given], options: Any = None, kind_of_options: str = "") -> bytes:
    """A .tflite of one operation; the last tensor is its output, those without data are inputs."""
    names = {np.int8: "INT8", np.int32: "INT32"}
    packed = []
    buffers = [schema.BufferT()]
    for i, given in enumerate(tensors):
        t = schema.TensorT()
        t.shape, t.name = list(given.shape), f"t{i}".encode()
        t.type = getattr(schema.TensorType, names[given.dtype])
        t.buffer = 0
        if given.data is not None:
            buffers.append(schema.BufferT())
            buffers[-1].data = np.frombuffer(
                np.ascontiguousarray(given.data, given.dtype).tobytes(), np.uint8
            )
            t.buffer = len(buffers) - 1
        if given.scale is not None:
            q = schema.QuantizationParametersT()
            q.scale = np.atleast_1d(np.float32(given.scale))
            q.zeroPoint = np.broadcast_to(np.int64(given.zero), q.scale.shape).copy()
            t.quantization = q
        packed.append(t)
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, kind)
    code.version = 4 if kind == "BATCH_MATMUL" else 2
    op = schema.OperatorT()
    op.opcodeIndex, op.inputs, op.outputs = 0, list(range(len(tensors) - 1)), [len(tensors) - 1]
    if options is not None:
        op.builtinOptions, op.builtinOptionsType = options, getattr(schema.BuiltinOptions, kind_of_options)
    graph = schema.SubGraphT()
    graph.tensors, graph.operators, graph.name = packed, [op], b"main"
    graph.inputs = [i for i, t in enumerate(tensors[:-1]) if t.data is None]
    graph.outputs = op.outputs
    whole = schema.ModelT()
    whole.version, whole.subgraphs, whole.operatorCodes, whole.buffers = 3, [graph], [code], buffers
    builder = flatbuffers.Builder(1024)
    builder.Finish(whole.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def micro(content: bytes, *inputs: np.ndarray) -> np.ndarray:
    """By TensorFlow Lite Micro."""
    runtime = pytest.importorskip(
        "tflite_micro.python.tflite_micro.runtime", reason="tflite-micro is not installed"
    )
    interpreter = runtime.Interpreter.from_bytes(content, arena_size=2_000_000)
    for i, x in enumerate(inputs):
        interpreter.set_input(x, i)
    interpreter.invoke()
    return interpreter.get_output(0)


def reference(content: bytes, *inputs: np.ndarray) -> np.ndarray:
    """By LiteRT's reference kernels."""
    module = pytest.importorskip("ai_edge_litert.interpreter", reason="ai-edge-litert is not installed")
    interpreter = module.Interpreter(
        model_content=content, num_threads=1, experimental_op_resolver_type=module.OpResolverType.BUILTIN_REF
    )
    interpreter.allocate_tensors()
    for detail, x in zip(interpreter.get_input_details(), inputs, strict=True):
        interpreter.set_tensor(detail["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def activation(options: Any, word: str = "NONE") -> Any:
    """Options with a fused activation."""
    options.fusedActivationFunction = getattr(schema.ActivationFunctionType, word)
    return options
