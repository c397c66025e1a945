"""Reading .tflite files: what is in them, and what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from textbook_code.deploy.graph import GraphError, Op, Tensor, layer_of, read


def small(change: Callable[[Any], None] = lambda model: None) -> bytes:
    """One fully connected layer, 3 to 5, per channel; `change` may spoil its tables."""
    model, subgraph = schema.ModelT(), schema.SubGraphT()
    model.version, model.subgraphs, model.buffers = 3, [subgraph], []
    weight = np.arange(15, dtype=np.int8)
    for data in (b"", weight.tobytes()):
        model.buffers.append(schema.BufferT())
        model.buffers[-1].data = np.frombuffer(data, np.uint8)
    subgraph.tensors = [
        tensor("x", (1, 3), 0, [0.5], [-3]),
        tensor("w", (5, 3), 1, [0.1, 0.2, 0.3, 0.4, 0.5], [0] * 5),
        tensor("y", (1, 5), 0, [0.25], [7]),
    ]
    code, op, options = schema.OperatorCodeT(), schema.OperatorT(), schema.FullyConnectedOptionsT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.FULLY_CONNECTED
    options.fusedActivationFunction = schema.ActivationFunctionType.RELU
    op.opcodeIndex, op.inputs, op.outputs = 0, [0, 1, -1], [2]
    op.builtinOptionsType, op.builtinOptions = schema.BuiltinOptions.FullyConnectedOptions, options
    model.operatorCodes, subgraph.operators = [code], [op]
    subgraph.inputs, subgraph.outputs = [0], [2]
    change(model)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def tensor(name: str, shape: tuple[int, ...], buffer: int, scale: list[float], zero: list[int]) -> Any:
    result, result.quantization = (made := schema.TensorT()), schema.QuantizationParametersT()
    made.name, made.shape, made.buffer, made.type = name, list(shape), buffer, schema.TensorType.INT8
    made.quantization.scale, made.quantization.zeroPoint = scale, zero
    return result


def test_what_is_read() -> None:
    graph = read(small())
    assert (graph.inputs, graph.outputs) == ((0,), (2,))
    x, weight, y = graph.tensors
    assert (x.name, x.shape, x.dtype, x.scale, x.zero_point, x.data) == (
        "x",
        (1, 3),
        "int8",
        (0.5,),
        (-3,),
        None,
    )
    assert weight.scale == tuple(map(float, np.float32([0.1, 0.2, 0.3, 0.4, 0.5])))
    assert weight.data is not None and (weight.data == np.arange(15).reshape(5, 3)).all()
    assert (y.size, y.nbytes, weight.nbytes, weight.quantized_dimension) == (5, 5, 15, 0)
    (op,) = graph.ops
    assert (op.kind, op.inputs, op.outputs) == ("FULLY_CONNECTED", (0, 1, -1), (2,))
    assert op.options["fused_activation_function"] == "RELU"
    assert op.options["keep_num_dims"] is False


def test_a_constant_cannot_be_written_to() -> None:
    data = read(small()).tensors[1].data
    assert data is not None
    with pytest.raises(ValueError, match="read-only"):
        data[0] = 1


def test_the_library_reads_the_same(tmp_path: Path) -> None:
    file = tmp_path / "small.tflite"
    file.write_bytes(small())
    ours, theirs = read(file), Interpreter(str(file))
    for mine, other in zip(ours.tensors, theirs.get_tensor_details(), strict=False):
        assert mine.shape == tuple(other["shape"]) and mine.name == other["name"]
        assert mine.dtype == np.dtype(other["dtype"]).name
        assert np.allclose(mine.scale, other["quantization_parameters"]["scales"])


def test_a_new_kind_beyond_eight_bits_and_a_custom_one() -> None:
    def new(model: Any) -> None:
        model.operatorCodes[0].builtinCode = schema.BuiltinOperator.GELU
        model.operatorCodes[0].deprecatedBuiltinCode = 127

    def custom(model: Any) -> None:
        model.operatorCodes[0].builtinCode = model.operatorCodes[0].deprecatedBuiltinCode = 32
        model.operatorCodes[0].customCode = "Mine"

    assert [read(small(change)).ops[0].kind for change in (new, custom)] == ["GELU", "CUSTOM Mine"]


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"source: expected a \.tflite file.*none\.tflite"):
        read(tmp_path / "none.tflite")


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", "zero bytes"), (b"PK\3\4 no model at all", "'TFL3'.*at byte 4"), (b"....TFL", "TFL3")],
)
def test_what_is_no_model(tmp_path: Path, data: bytes, said: str) -> None:
    file = tmp_path / "broken.tflite"
    file.write_bytes(data)
    with pytest.raises(GraphError, match=rf"broken\.tflite: expected.*{said}"):
        read(file)


def test_cut_short_anywhere() -> None:
    whole = small()
    refused = 0
    for length in range(8, len(whole), 7):
        try:
            assert read(whole[:length]) == read(whole)  # only padding was cut
        except GraphError as error:
            refused += 1
            assert "source" in str(error)
    assert refused > 0.9 * len(range(8, len(whole), 7))


def test_one_changed_byte_never_escapes() -> None:
    whole, rng = small(), np.random.default_rng(0)
    for place in range(8, len(whole)):
        spoiled = bytearray(whole)
        spoiled[place] ^= int(rng.integers(1, 256))
        with contextlib.suppress(GraphError):
            read(bytes(spoiled))


def _two_subgraphs(model: Any) -> None:
    model.subgraphs *= 2


def _dynamic(model: Any) -> None:
    model.subgraphs[0].tensors[0].shapeSignature = [-1, 3]


def _string(model: Any) -> None:
    model.subgraphs[0].tensors[0].type = schema.TensorType.STRING


def _short_data(model: Any) -> None:
    model.buffers[1].data = model.buffers[1].data[:-1]


def _reads_too_early(model: Any) -> None:
    model.subgraphs[0].operators *= 1
    model.subgraphs[0].operators[0].inputs = [2, 1, -1]


def _no_such_tensor(model: Any) -> None:
    model.subgraphs[0].operators[0].inputs = [0, 9, -1]


def _unwritten_output(model: Any) -> None:
    model.subgraphs[0].operators = []


def _scales(model: Any) -> None:
    model.subgraphs[0].tensors[1].quantization.scale = [0.1, 0.2]


def _negative_scale(model: Any) -> None:
    model.subgraphs[0].tensors[0].quantization.scale = [-0.5]


def _no_inputs(model: Any) -> None:
    model.subgraphs[0].inputs = []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_two_subgraphs, "one subgraph, got 2"),
        (_dynamic, r"tensor 0 \(x\): expected a fixed shape, got \(-1, 3\)"),
        (_string, r"tensor 0 \(x\): expected one of the types .*, got STRING"),
        (_short_data, r"tensor 1 \(w\): expected 15 bytes of data, got 14"),
        (_reads_too_early, r"op 0 \(FULLY_CONNECTED\) reads tensor 2 before"),
        (_no_such_tensor, r"op 0 \(FULLY_CONNECTED\) names tensor 9 of 3"),
        (_unwritten_output, "no op writes the output, tensor 2"),
        (_scales, r"tensor 1 \(w\): 2 scales and 5 zero points"),
        (_negative_scale, r"tensor 0 \(x\): expected positive scales"),
        (_no_inputs, "expected inputs and outputs"),
    ],
)
def test_refused_by_name(change: Callable[[Any], None], said: str) -> None:
    with pytest.raises(GraphError, match=f"source: .*{said}|source: {said}"):
        read(small(change))


def test_where_an_op_comes_from() -> None:
    block = "p.TinyViTBlock_0/p.layers.Attention_attn"
    assert layer_of(f"p.tflite.Wrapper/p.TinyViT_model/{block};3") == "TinyViTBlock_0/attn"
    fused = f"p.Wrapper/p.TinyViT_model/p.N_norm;p.Wrapper/p.TinyViT_model/{block}/torch.nn.Linear_q_proj;1"
    assert layer_of(fused) == "TinyViTBlock_0/attn/q_proj"
    assert layer_of("serving_default_args_0:0") == "serving_default_args_0:0"
    assert read(small()).layer(Op("ADD", (0,), (2,))) == "y"


def test_a_scalar_has_one_number() -> None:
    assert Tensor(0, "s", (), "int32").nbytes == 4
