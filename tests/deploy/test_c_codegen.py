"""Generated C: the bits of TensorFlow Lite Micro from both sets of kernels, and no undefined behaviour."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from textbook_code.compression.integer import Rescale
from textbook_code.deploy import compilers
from textbook_code.deploy.c_codegen import Budget, OverBudgetError, UnsupportedOpError, emit, generate
from textbook_code.deploy.compilers import STRICT, CNet, CompileError, CompilerMissingError, build
from textbook_code.deploy.graph import GraphError

schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="ai-edge-litert is not installed")
flatbuffers = pytest.importorskip("flatbuffers", reason="flatbuffers is not installed")

INT8, INT32 = 9, 2
CODES = schema.BuiltinOperator


class Model:
    """A .tflite model made by hand: tensors with scales, operations with options."""

    def __init__(self, shape: Sequence[int] = (1, 8, 8, 3), scale: float = 1 / 128, zero: int = 0) -> None:
        self.tensors: list[Any] = []
        self.buffers = [schema.BufferT()]
        self.codes: list[int] = []
        self.ops: list[Any] = []
        self.input = self.tensor(shape, scale, zero, name="image")

    def tensor(
        self,
        shape: Sequence[int],
        scale: Any = None,
        zero: Any = 0,
        data: Any = None,
        dtype: int = INT8,
        name: str = "",
    ) -> int:
        t = schema.TensorT()
        t.shape, t.type, t.name = list(shape), dtype, (name or f"tensor{len(self.tensors)}").encode()
        t.buffer = 0
        if data is not None:
            b = schema.BufferT()
            b.data = np.frombuffer(
                np.asarray(data, np.int8 if dtype == INT8 else np.int32).tobytes(), np.uint8
            )
            self.buffers.append(b)
            t.buffer = len(self.buffers) - 1
        if scale is not None:
            q = schema.QuantizationParametersT()
            q.scale = np.atleast_1d(np.float32(scale))
            q.zeroPoint = np.broadcast_to(np.int64(zero), q.scale.shape).copy()
            t.quantization = q
        self.tensors.append(t)
        return len(self.tensors) - 1

    def op(self, kind: str, inputs: Sequence[int], out: int, options: str = "", **values: Any) -> int:
        o, code = schema.OperatorT(), getattr(CODES, kind)
        if code not in self.codes:
            self.codes.append(code)
        o.opcodeIndex, o.inputs, o.outputs = self.codes.index(code), list(inputs), [out]
        if options:
            o.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            o.builtinOptions = getattr(schema, options + "T")()
            for key, value in values.items():
                setattr(o.builtinOptions, key, value)
        self.ops.append(o)
        return out

    def ints(self, *values: int) -> int:
        return self.tensor([len(values)], data=values, dtype=INT32)

    def reshape(self, x: int, *shape: int) -> int:
        t = self.tensors[x]
        out = self.tensor(shape, t.quantization.scale, t.quantization.zeroPoint[0])
        return self.op("RESHAPE", [x, self.ints(*shape)], out, "ReshapeOptions", newShape=list(shape))

    def transpose(self, x: int, *order: int) -> int:
        t = self.tensors[x]
        shape = [t.shape[i] for i in order]
        out = self.tensor(shape, t.quantization.scale, t.quantization.zeroPoint[0])
        return self.op("TRANSPOSE", [x, self.ints(*order)], out, "TransposeOptions")

    def dense(
        self, x: int, n: int, rng: np.random.Generator, *, act: int = 0, scale: float = 0.0, zero: int = 3
    ) -> int:
        t = self.tensors[x]
        k = t.shape[-1]
        s = rng.uniform(0.5, 2, n) * 0.01
        w = self.tensor([n, k], s, 0, rng.integers(-127, 128, (n, k)))
        s_x = float(t.quantization.scale[0])
        b = self.tensor([n], s_x * s, 0, rng.integers(-9999, 9999, n), INT32)
        scale = scale or s_x * 0.012 * 70 * np.sqrt(k)
        out = self.tensor([*t.shape[:-1], n], scale, -128 if act else zero)
        return self.op(
            "FULLY_CONNECTED", [x, w, b], out, "FullyConnectedOptions",
            keepNumDims=True, fusedActivationFunction=act,
        )  # fmt: skip

    def pick(self, x: int, element: int = 0) -> int:
        """One byte of a tensor as the logit."""
        t = self.tensors[x]
        size = int(np.prod(t.shape))
        flat = self.reshape(x, 1, size)
        w = np.zeros((1, size))
        w[0, element] = 64
        scale, zero = t.quantization.scale[0], t.quantization.zeroPoint[0]
        weight = self.tensor([1, size], 1 / 64, 0, w)
        out = self.tensor([1, 1], scale, zero)
        return self.op("FULLY_CONNECTED", [flat, weight, -1], out, "FullyConnectedOptions")

    def save(self, folder: Path, output: int) -> Path:
        m, g = schema.ModelT(), schema.SubGraphT()
        g.tensors, g.inputs, g.outputs, g.operators = self.tensors, [self.input], [output], self.ops
        m.version, m.subgraphs, m.buffers = 3, [g], self.buffers
        m.operatorCodes = []
        for code in self.codes:
            c = schema.OperatorCodeT()
            c.builtinCode, c.deprecatedBuiltinCode, c.version = code, min(code, 127), 1
            m.operatorCodes.append(c)
        b = flatbuffers.Builder(1024)
        b.Finish(m.Pack(b), b"TFL3")
        path = folder / "model.tflite"
        path.write_bytes(bytes(b.Output()))
        return path


def vit(folder: Path, *, heads: int = 2, width: int = 8, hidden: int = 20, adj: bool = False) -> Path:
    """Patches, positions, one block, mean, logit: in the operations that the converter writes."""
    rng = np.random.default_rng(heads * width + hidden)
    m, d, n = Model((1, 16, 16, 3)), heads * width, 16
    w = m.tensor([d, 4, 4, 3], rng.uniform(0.5, 2, d) * 0.01, 0, rng.integers(-127, 128, (d, 4, 4, 3)))
    bias = m.tensor([d], rng.uniform(0.5, 2, d) * 1e-4, 0, rng.integers(-9999, 9999, d), INT32)
    x = m.op(
        "CONV_2D", [m.input, w, bias], m.tensor([1, 4, 4, d], 0.04, -3), "Conv2DOptions",
        padding=1, strideH=4, strideW=4, dilationHFactor=1, dilationWFactor=1,
    )  # fmt: skip
    x = m.reshape(m.transpose(x, 0, 3, 1, 2), 1, d, n)
    positions = m.tensor([1, d, n], 0.01, 4, rng.integers(-128, 128, (1, d, n)))
    x = m.op("ADD", [x, positions], m.tensor([1, d, n], 0.045, 2), "AddOptions")
    x = m.transpose(x, 0, 2, 1)

    def by_head(t: int, *order: int) -> int:
        t = m.transpose(m.reshape(t, 1, n, heads, width), *order)
        return m.reshape(t, heads, *m.tensors[t].shape[2:])

    q, k, v = (m.dense(x, d, rng, zero=z) for z in (2, -5, 7))
    q, v = by_head(q, 0, 2, 1, 3), by_head(v, 0, 2, 1, 3)
    k = by_head(k, *((0, 2, 1, 3) if adj else (0, 2, 3, 1)))
    s = m.tensors[q].quantization.scale[0] * m.tensors[k].quantization.scale[0] * 60 * np.sqrt(width) * 1.3
    scores = m.tensor([heads, n, n], min(s, 0.2), -4)
    m.op("BATCH_MATMUL", [q, k], scores, "BatchMatMulOptions", adjY=adj)
    scores = m.reshape(scores, 1, heads, n, n)
    p = m.op("SOFTMAX", [scores], m.tensor([1, heads, n, n], 1 / 256, -128), "SoftmaxOptions", beta=1.0)
    p = m.reshape(p, heads, n, n)
    y = m.tensor([heads, n, width], float(m.tensors[v].quantization.scale[0]) * 0.7, 5)
    m.op("BATCH_MATMUL", [p, v], y, "BatchMatMulOptions")
    y = m.reshape(m.transpose(m.reshape(y, 1, heads, n, width), 0, 2, 1, 3), n, d)
    y = m.dense(y, d, rng, zero=9)
    x = m.op("ADD", [x, y], m.tensor([1, n, d], 0.06, 7), "AddOptions")
    y = m.dense(m.dense(x, hidden, rng, act=1), d, rng, zero=-6)
    x = m.op("ADD", [y, x], m.tensor([1, n, d], 0.1, 12), "AddOptions")
    mean = m.op("MEAN", [x, m.ints(1)], m.tensor([1, d], 0.05, -6), "ReducerOptions")
    return m.save(folder, m.dense(mean, 1, rng, scale=0.15, zero=-9))


def images(n: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """Noise, plain pictures, the extremes."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (n, size, size, 3))
    x[: n // 2] = np.clip(
        rng.integers(0, 256, (n // 2, 1, 1, 3)) + rng.integers(-40, 40, x[: n // 2].shape), 0, 255
    )
    x[0], x[1] = 0, 255
    return x.astype(np.uint8)


def reference(path: Path, pictures: np.ndarray) -> np.ndarray:
    """What TensorFlow Lite Micro says."""
    runtime = pytest.importorskip(
        "tflite_micro.python.tflite_micro.runtime", reason="tflite-micro is not installed"
    )
    interpreter = runtime.Interpreter.from_bytes(path.read_bytes())
    logits = []
    for picture in pictures:
        interpreter.set_input((picture ^ np.uint8(0x80)).view(np.int8)[None], 0)
        interpreter.invoke()
        logits.append(int(interpreter.get_output(0).ravel()[0]))
    return np.array(logits, np.int8)


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    try:
        compilers.native()
    except CompilerMissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit(tmp_path_factory.mktemp("vit"))


def equal(path: Path, folder: Path, pictures: np.ndarray, kernels: str) -> np.ndarray:
    got = CNet(path, kernels, folder=folder, flags=["-O1"]).logits(pictures)
    wanted = reference(path, pictures)
    np.testing.assert_array_equal(got, wanted)
    return wanted


@pytest.mark.parametrize("kernels", ["plain", "fast"])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"adj": True}, {"heads": 3, "width": 4, "hidden": 12}, {"heads": 1, "width": 12, "hidden": 8}],
    ids=["two heads", "transposed keys", "three heads", "one head"],
)
def test_a_transformer_has_the_bits_of_tflite_micro(sizes: dict, kernels: str, tmp_path: Path) -> None:
    path = vit(tmp_path, **sizes)
    seen = equal(path, tmp_path, images(300), kernels)
    assert len(np.unique(seen)) > 20


def test_the_fast_program_is_five_pieces(model: Path, tmp_path: Path) -> None:
    """Each pattern is found; what is left is the mean, and the logit of one row."""
    fast = generate(model, tmp_path, kernels="fast")
    kinds = [step.kind for step in fast.steps]
    assert kinds == [
        "CONV_2D+ADD",
        "ATTENTION",
        "FULLY_CONNECTED+ADD",
        "FEED_FORWARD",
        "MEAN",
        "FULLY_CONNECTED",
    ]
    plain = generate(model, tmp_path)
    assert fast.macs == plain.macs
    assert f"#define PERSON_MACS {fast.macs} " in (tmp_path / "net.h").read_text()
    assert fast.arena_bytes < plain.arena_bytes


def test_what_fits_no_pattern_is_still_right(tmp_path: Path) -> None:
    """Heads of 6 numbers are no multiple of four, nor are 10 hidden ones."""
    path = vit(tmp_path, width=6, hidden=10)
    fast = generate(path, tmp_path / "c", kernels="fast")
    assert "SOFTMAX" in {step.kind for step in fast.steps}
    equal(path, tmp_path, images(100), "fast")


@pytest.mark.parametrize("zero", [-128, 127])
def test_a_zero_at_either_end(zero: int, tmp_path: Path) -> None:
    """A logit that is never above zero, or never below: the comparison is true or false for every picture."""
    m = Model()
    path = m.save(tmp_path, m.dense(m.reshape(m.input, 1, 192), 1, np.random.default_rng(0), zero=zero))
    net = CNet(path, folder=tmp_path)
    np.testing.assert_array_equal(net.persons(images(50, 8)), net.logits(images(50, 8)) > zero)


def test_attention_is_seen(model: Path, tmp_path: Path) -> None:
    pictures = images(20)
    plain, fast = (CNet(model, k, folder=tmp_path).attention(pictures) for k in ("plain", "fast"))
    np.testing.assert_array_equal(plain, fast)
    assert plain.shape == (20, 16)
    np.testing.assert_allclose(plain.sum(1), 2 * 16 * 256, rtol=0.05)
    with pytest.raises(ValueError, match=r"flags: expected -DNET_TRACE"):
        CNet(model, flags=["-O1"], folder=tmp_path).attention(pictures)


def test_calls_leave_nothing_behind(model: Path, tmp_path: Path) -> None:
    for kernels in ("plain", "fast"):
        net, pictures = CNet(model, kernels, folder=tmp_path), images(12)
        once = net.logits(pictures)
        np.testing.assert_array_equal(net.logits(pictures[::-1]), once[::-1])
        np.testing.assert_array_equal(net.persons(pictures), once > net.generated.output_zero)


# one operation at a time, on the byte that it makes of each picture


def pair(kind: str, m: Model, rng: np.random.Generator) -> int:
    a = m.dense(m.reshape(m.input, 1, 64, 3), 8, rng)
    b = m.dense(m.reshape(m.input, 1, 64, 3), 8, rng, scale=rng.uniform(0.002, 0.4), zero=-20)
    options = {"ADD": "AddOptions", "SUB": "SubOptions", "MUL": "MulOptions"}.get(kind, "")
    size = {"MUL": 0.2, "SQUARED_DIFFERENCE": 0.5}.get(kind, 1)
    out = m.tensor([1, 64, 8], float(rng.uniform(0.01, 0.3)) * size, int(rng.integers(-128, 60)))
    act = {} if kind == "SQUARED_DIFFERENCE" else {"fusedActivationFunction": int(rng.choice([0, 0, 1, 3]))}
    return m.op(kind, [a, b], out, options, **act)


@pytest.mark.parametrize("kind", ["ADD", "SUB", "MUL", "SQUARED_DIFFERENCE"])
@pytest.mark.parametrize("seed", range(2))
def test_pairs(kind: str, seed: int, tmp_path: Path) -> None:
    m = Model()
    out = pair(kind, m, np.random.default_rng(seed))
    seen = equal(m.save(tmp_path, m.pick(out, 11)), tmp_path, images(400, 8, seed), "plain")
    assert len(np.unique(seen)) > 8


def test_a_number_for_each_row_is_repeated(tmp_path: Path) -> None:
    m, rng = Model(), np.random.default_rng(0)
    x = m.dense(m.reshape(m.input, 1, 64, 3), 8, rng)
    mean = m.op("MEAN", [x, m.ints(2)], m.tensor([64], 0.02, 4), "ReducerOptions")
    column = m.reshape(mean, 1, 64, 1)
    d = m.op("SQUARED_DIFFERENCE", [x, column], m.tensor([1, 64, 8], 0.03, -128))
    constant = m.tensor([], 1e-3, -128, [-100])
    y = m.op("ADD", [d, constant], m.tensor([1, 64, 8], 0.03, -128), "AddOptions")
    for element in (0, 97, 511):
        equal(m.save(tmp_path, m.pick(y, element)), tmp_path, images(100, 8), "plain")


@pytest.mark.parametrize(("kind", "scale", "zero"), [
    ("RSQRT", 0.001, -128), ("RSQRT", 0.01, -128), ("HARD_SWISH", 0.05, -20), ("HARD_SWISH", 0.08, 3),
    ("HARD_SWISH", 0.011, 100), ("QUANTIZE", 0.03, 4), ("QUANTIZE", 0.08, -60),
])  # fmt: skip
def test_tables(kind: str, scale: float, zero: int, tmp_path: Path) -> None:
    m, rng = Model(), np.random.default_rng(1)
    x = m.dense(m.reshape(m.input, 1, 32, 6), 8, rng, scale=scale, zero=zero)
    if kind == "RSQRT":  # from zero up only
        m.ops[-1].builtinOptions.fusedActivationFunction = 1
    out = m.tensor([1, 32, 8], {"HARD_SWISH": scale * 0.9, "QUANTIZE": 0.05}.get(kind, 0.08), zero)
    m.op(kind, [x], out)
    seen = equal(m.save(tmp_path, m.pick(out, 5)), tmp_path, images(600, 8), "plain")
    assert len(np.unique(seen)) > 15


@pytest.mark.parametrize("scale", [0.001, 0.02, 0.3, 2.0])
def test_softmax(scale: float, tmp_path: Path) -> None:
    m, rng = Model(), np.random.default_rng(2)
    x = m.dense(m.reshape(m.input, 1, 192), 7, rng, scale=scale)
    out = m.op("SOFTMAX", [x], m.tensor([1, 7], 1 / 256, -128), "SoftmaxOptions", beta=1.0)
    equal(m.save(tmp_path, m.pick(out, 2)), tmp_path, images(300, 8), "plain")


@pytest.mark.parametrize("axes", [(1,), (1, 2), (2,)])
def test_means(axes: tuple[int, ...], tmp_path: Path) -> None:
    """Of 7, of 35 and of 5 numbers: no power of two, so the division is a rounding of its own."""
    m, rng = Model((1, 8, 8, 3)), np.random.default_rng(3)
    x = m.reshape(m.dense(m.reshape(m.input, 1, 192), 7 * 5 * 4, rng), 1, 7, 5, 4)
    shape = [size for axis, size in enumerate((1, 7, 5, 4)) if axis not in axes]
    out = m.op("MEAN", [x, m.ints(*axes)], m.tensor(shape, 0.06, 9), "ReducerOptions")
    equal(m.save(tmp_path, m.pick(out, 3)), tmp_path, images(300, 8), "plain")


def given(m: Model, values: np.ndarray, scale: float) -> int:
    """A computed tensor that holds these bytes whatever the picture is."""
    n = len(values)
    w = m.tensor([n, 192], np.full(n, scale * 128), 0, np.zeros((n, 192)))
    b = m.tensor([n], scale, 0, values, INT32)
    out = m.tensor([1, n], scale, 0)
    return m.op("FULLY_CONNECTED", [m.reshape(m.input, 1, 192), w, b], out, "FullyConnectedOptions")


@pytest.mark.parametrize("kind", ["FULLY_CONNECTED", "BATCH_MATMUL"])
def test_factors_are_products_in_double_precision(kind: str, tmp_path: Path) -> None:
    """A product of scales rounded to a float gives another byte for these sums, and would be wrong."""
    rng, found = np.random.default_rng(0), 0
    while found < 3:
        s, t = (float(np.float32(rng.uniform(*ends))) for ends in ((0.005, 0.03), (0.001, 0.01)))
        out = float(np.float32(s * t * rng.uniform(500, 4000)))
        sums = np.arange(60 * 100 * 100)
        rounded = Rescale.of(float(np.float32(s) * np.float32(t)) / out)(sums)
        differ = sums[(rounded != Rescale.of(s * t / out)(sums)) & (rounded < 120)]
        if not len(differ):
            continue
        hundreds, ones = divmod(int(differ[0]), 100)
        a = np.array([*([100] * (hundreds // 100)), hundreds % 100, ones])
        b = np.array([100] * (len(a) - 1) + [1])
        m, n = Model(), len(a)
        if kind == "FULLY_CONNECTED":
            weight = m.tensor([1, n], t, 0, b)
            y = m.op(kind, [given(m, a, s), weight, -1], m.tensor([1, 1], out, 0), "FullyConnectedOptions")
        else:
            pair = [m.reshape(given(m, a, s), 1, 1, n), m.reshape(given(m, b, t), 1, n, 1)]
            y = m.reshape(m.op(kind, pair, m.tensor([1, 1, 1], out, 0), "BatchMatMulOptions"), 1, 1)
        equal(m.save(tmp_path, y), tmp_path, images(2, 8), "plain")
        found += 1


def test_windows_that_overlap(tmp_path: Path) -> None:
    m, rng = Model(), np.random.default_rng(4)
    w = m.tensor([5, 3, 2, 3], rng.uniform(0.5, 2, 5) * 0.01, 0, rng.integers(-127, 128, (5, 3, 2, 3)))
    out = m.tensor([1, 3, 7, 5], 0.04, 6)
    m.op(
        "CONV_2D", [m.input, w, -1], out, "Conv2DOptions",
        padding=1, strideH=2, strideW=1, dilationHFactor=1, dilationWFactor=1,
    )  # fmt: skip
    for kernels in ("plain", "fast"):
        equal(m.save(tmp_path, m.pick(out, 52)), tmp_path, images(100, 8), kernels)


# what must be noticed

MUTATIONS = [
    ("kernels.h", "INT64_C(1) << 30)", "INT64_C(0))"),
    ("kernels.h", "(mask >> 1) + (x < 0)", "(mask >> 1)"),
    ("kernels.c", "sum += (a[i] - m->zero_a)", "sum += (a[i])"),
    ("kernels.c", "i < 3; i++) {\n        const int32_t rest", "i < 1; i++) {\n        const int32_t rest"),
    ("kernels.c", "int32_t sum = -m->count * m->zero_x;", "int32_t sum = 0;"),
    ("kernels.c", "column * c->stride_width", "column"),
    ("fast.c", "x + (x >> 31) + c->rounding", "x + c->rounding"),
    ("fast.c", "+ s->rounding) >> s->shift", ") >> s->shift"),
    ("fast.c", "if (columns & 4) {", "if (0) {"),
    ("fast.c", "start.c -= q[8] * a->zero_key;", ""),
    ("fast.c", "+ (UINT32_C(1) << (shift - 1))", ""),
    ("dsp.h", "(four >> 24 & 0xff)", "(four >> 16 & 0xff)"),
]


@pytest.mark.parametrize(("name", "old", "new"), MUTATIONS, ids=[f"{n}: {o}" for n, o, _ in MUTATIONS])
def test_a_wrong_kernel_shows(
    name: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = tmp_path / "kernels"
    shutil.copytree(emit.KERNELS, kernels)
    text = (kernels / name).read_text()
    assert text.count(old) == 1
    (kernels / name).write_text(text.replace(old, new))
    path = vit(tmp_path, heads=3, width=4, hidden=12)
    pictures = images(400)
    wanted = reference(path, pictures)
    monkeypatch.setattr(emit, "KERNELS", kernels)
    got = CNet(path, "plain" if name == "kernels.c" else "fast", folder=tmp_path,
               flags=["-O0", "-Wno-error"]).logits(pictures)  # fmt: skip
    assert (got != wanted).any()


FUZZ = """
#include <stdio.h>
#include "net.h"
int main(void)
{
    static uint8_t rgb[PERSON_IMAGE_BYTES];
    uint32_t state = 2463534242u, digest = 0;
    for (uint32_t n = 0; n < PICTURES; n++) {
        for (int i = 0; i < PERSON_IMAGE_BYTES; i++) {
            state ^= state << 13, state ^= state >> 17, state ^= state << 5;
            const uint32_t other = n % 4 == 1 ? (state & 1) * 255u : n % 4 == 2 ? n : (uint32_t)i * n;
            rgb[i] = (uint8_t)(n % 4 == 0 ? state : other);
        }
        digest = digest * 31 + (uint32_t)(person_logit(rgb) + 128);
    }
    printf("%lu\\n", (unsigned long)digest);
    return 0;
}
"""


@pytest.mark.parametrize("pictures", [250, pytest.param(5000, marks=pytest.mark.slow)])
def test_sanitizers_find_nothing(pictures: int, model: Path, tmp_path: Path) -> None:
    """Undefined behaviour and every access out of bounds end the program; both programs say the same."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("neither gcc nor clang is installed, whose sanitizers this needs: apt-get install gcc")
    digests = []
    for kernels in ("plain", "fast"):
        g = generate(model, tmp_path / kernels, kernels=kernels)
        (tmp_path / kernels / "fuzz.c").write_text(FUZZ)
        sources = [*(f for f in g.files if f.suffix == ".c"), tmp_path / kernels / "fuzz.c"]
        program = tmp_path / f"fuzz-{kernels}"
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g"]
        sanitizers += [f"-DPICTURES={pictures}"]
        build([compiler], sources, program, sanitizers)
        done = subprocess.run([program], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout)
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["gcc", "clang", "zig", "wasm", "arm"])
def test_every_compiler_takes_it_without_a_word(name: str, model: Path, tmp_path: Path) -> None:
    flags = [*STRICT, "-O2", "-c", "-ffreestanding", "-DNET_TRACE", "-DNET_PROFILE"]
    try:
        if name in ("gcc", "clang"):
            found = shutil.which(name)
            if found is None:
                pytest.skip(f"{name} is not installed: apt-get install {name}")
            command = [found]
        elif name == "arm":
            command = [*compilers.arm_none_eabi(), "-mcpu=cortex-m4", "-mthumb"]
        else:
            command = [*compilers.zig(), *(["--target=wasm32-freestanding"] if name == "wasm" else [])]
    except CompilerMissingError as error:
        pytest.skip(str(error))
    g = generate(model, tmp_path, kernels="fast")
    for file in g.files:
        if file.suffix == ".c":
            assert build(command, [file], tmp_path / "out.o", flags) == ""


def test_nothing_is_needed_at_link_time(model: Path, tmp_path: Path) -> None:
    """A WebAssembly module is linked with no library, and a symbol that is missing would be an error."""
    try:
        zig = compilers.zig()
    except CompilerMissingError as error:
        pytest.skip(str(error))
    g = generate(model, tmp_path, kernels="fast")
    flags = ["--target=wasm32-freestanding", "-O2", "-nostdlib", "-Wl,--no-entry", "-Wl,--export=person"]
    build(zig, [f for f in g.files if f.suffix == ".c"], tmp_path / "net.wasm", flags)
    for file in g.files:
        code = re.sub(r"/\*.*?\*/", "", file.read_text(), flags=re.DOTALL)
        assert not re.search(r"\b(float|double|malloc|free|memcpy|memset)\b", code), file.name
        headers = set(re.findall(r"#include <(.*)>", code))
        assert headers <= {"stdint.h"}, file.name


# refusals


def test_an_operation_without_a_kernel_is_named(tmp_path: Path) -> None:
    m, rng = Model(), np.random.default_rng(0)
    x = m.dense(m.reshape(m.input, 1, 64, 3), 8, rng)
    out = m.tensor([1, 64, 8], 1 / 256, -128, name="blocks/0/ffn/logistic")
    m.op("LOGISTIC", [x], out)
    path = m.save(tmp_path, m.pick(out))
    for kernels in ("plain", "fast"):
        with pytest.raises(
            UnsupportedOpError, match=r"LOGISTIC in layer '.*logistic': no kernel for it, only"
        ):
            generate(path, tmp_path / "c", kernels=kernels)
    assert not (tmp_path / "c").exists()


def test_windows_over_the_edge_are_refused(tmp_path: Path) -> None:
    m, rng = Model(), np.random.default_rng(4)
    w = m.tensor([5, 3, 3, 3], rng.uniform(0.5, 2, 5) * 0.01, 0, rng.integers(-127, 128, (5, 3, 3, 3)))
    out = m.tensor([1, 8, 8, 5], 0.04, 6)
    m.op("CONV_2D", [m.input, w, -1], out, "Conv2DOptions",
         padding=0, strideH=1, strideW=1, dilationHFactor=1, dilationWFactor=1)  # fmt: skip
    with pytest.raises(UnsupportedOpError, match=r"CONV_2D in layer .*only whole windows of one image"):
        generate(m.save(tmp_path, m.pick(out)), tmp_path / "c", kernels="fast")


def test_other_inputs_and_outputs_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for scale, zero in ((1 / 127, 0), (1 / 128, -1)):
        m = Model(scale=scale, zero=zero)
        path = m.save(tmp_path, m.dense(m.reshape(m.input, 1, 192), 1, rng))
        with pytest.raises(UnsupportedOpError, match=r"input 'image': expected scale 1/128 and zero point 0"):
            generate(path, tmp_path / "c")
    m = Model()
    path = m.save(tmp_path, m.dense(m.reshape(m.input, 1, 192), 2, rng))
    with pytest.raises(UnsupportedOpError, match=r"output .*: expected one int8, got int8 \(1, 2\)"):
        generate(path, tmp_path / "c")


def test_damaged_models_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.tflite").touch()
    with pytest.raises(GraphError, match=r"empty\.tflite"):
        generate(tmp_path / "empty.tflite", tmp_path / "c")
    (tmp_path / "short.tflite").write_bytes(model.read_bytes()[:500])
    with pytest.raises(GraphError, match=r"short\.tflite"):
        generate(tmp_path / "short.tflite", tmp_path / "c")
    with pytest.raises(FileNotFoundError, match=r"none\.tflite"):
        generate(tmp_path / "none.tflite", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_budget_says_by_how_much(model: Path, tmp_path: Path) -> None:
    g = generate(model, tmp_path / "c", budget=Budget())
    flash, ram = g.flash_bytes - 1, g.arena_bytes - 100
    with pytest.raises(
        OverBudgetError, match=r"flash: needs .* bytes, 1 more than the .*; ram: needs .* 100 more"
    ):
        generate(model, tmp_path / "d", budget=Budget(flash, ram))
    assert not (tmp_path / "d").exists()
    generate(model, tmp_path / "d", budget=Budget(flash + 1, ram + 100))


def test_unknown_kernels_and_pictures(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kernels: expected one of plain, fast, got 'quick'"):
        generate(model, tmp_path, kernels="quick")
    net = CNet(model, folder=tmp_path)
    with pytest.raises(TypeError, match=r"images: expected uint8, got float64"):
        net.logits(np.zeros((1, 16, 16, 3)))
    with pytest.raises(ValueError, match=r"images: expected shape \(n, 16, 16, 3\), got \(16, 16, 3\)"):
        net.logits(np.zeros((16, 16, 3), np.uint8))


def test_files_are_replaced_all_at_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = generate(model, tmp_path / "c")
    before = {file.name: file.read_bytes() for file in g.files}
    assert {p.name for p in (tmp_path / "c").iterdir()} == set(before)
    monkeypatch.setattr(emit, "KERNELS", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        generate(model, tmp_path / "c", kernels="fast")
    assert {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()} == before


def test_a_refused_program_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "wrong.c").write_text("int main(void) { return nothing; }\n")
    with pytest.raises(CompileError, match=r"nothing") as refused:
        compilers.host([tmp_path / "wrong.c"], tmp_path / "wrong")
    assert "undeclared" in refused.value.diagnostics
    assert {p.name for p in tmp_path.iterdir()} == {"wrong.c"}
    with pytest.raises(FileNotFoundError, match=r"sources: expected a C file"):
        compilers.host([tmp_path / "none.c"], tmp_path / "none")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(CompilerMissingError, match=r"apt-get install gcc-arm-none-eabi"):
        compilers.arm_none_eabi()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CompilerMissingError, match=r"no C compiler: expected gcc or clang"):
        compilers.native()
