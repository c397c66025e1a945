"""The WebAssembly module: the bits of the C on the host, the same file every time, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from textbook_code import checkpoints
from textbook_code.deploy import compilers, graph, wasm

PIXELS = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
PLAIN = np.stack([np.full((32, 32, 3), value, np.uint8) for value in (0, 1, 127, 128, 254, 255)])
IMAGES = np.concatenate([PLAIN, PIXELS, PIXELS[:50] // 255 * 255])


@pytest.fixture(scope="module")
def model() -> Path:
    return checkpoints.path("person-vit") / "model_int8.tflite"


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wasm.build(model, tmp_path_factory.mktemp("wasm") / "person.wasm")


@pytest.fixture(scope="module")
def module(built: Path) -> wasm.Module:
    return wasm.Module(built)


def leb(n: int) -> bytes:
    """A number below 2^14 as WebAssembly writes it."""
    return bytes([n]) if n < 128 else bytes([n & 127 | 128, n >> 7])


def section(kind: int, content: bytes) -> bytes:
    return bytes([kind]) + leb(len(content)) + content


# ---------------------------------------------------------------- the same bits


def test_equal_to_the_c_on_the_host(model: Path, module: wasm.Module) -> None:
    host = compilers.CNet(model)
    ours = module.logits(IMAGES)
    assert ours.dtype == np.int8 and len(np.unique(ours)) > 10
    np.testing.assert_array_equal(ours, host.logits(IMAGES))
    np.testing.assert_array_equal(module.attention(IMAGES[:30]), host.attention(IMAGES[:30]))


def test_the_decision_is_the_sign(module: wasm.Module) -> None:
    for image, logit in zip(IMAGES[:40], module.logits(IMAGES[:40]), strict=True):
        module._write(image)
        assert module._call("person") == (logit > module.zero_point)


def test_the_same_file_every_time(model: Path, built: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    again = wasm.build(str(model), tmp_path / "deep" / "er" / "other-name.wasm", progress=steps.append)
    assert again.read_bytes() == built.read_bytes()
    assert len(steps) == 2
    assert [file.name for file in again.parent.iterdir()] == ["other-name.wasm"]


def test_small_and_self_contained(built: Path, module: wasm.Module) -> None:
    assert module.size == built.stat().st_size <= wasm.MAX_BYTES
    content = built.read_bytes()
    for path in (Path.home(), Path.cwd(), Path(sys.prefix)):
        assert str(path).encode() not in content
    assert module.memory_bytes < 2**20


def test_facts_are_those_of_the_graph(model: Path, module: wasm.Module) -> None:
    net = graph.read(model)
    out = net.tensors[net.outputs[0]]
    assert module.scale == float(np.float32(out.scale[0]))  # the fraction is exact
    assert module.zero_point == out.zero_point[0]
    assert module.num_patches == next(
        net.tensors[op.outputs[0]].shape[-1] for op in reversed(net.ops) if op.kind == "SOFTMAX"
    )


def test_attention_is_shared_out(module: wasm.Module) -> None:
    """Each head's query shares out 256, up to the softmax's rounding."""
    maps = module.attention(IMAGES[:20])
    assert maps.shape == (20, module.num_patches) and (maps >= 0).all()
    sums = maps.sum(1)
    heads = sums / (256 * module.num_patches)
    assert (abs(heads - np.round(heads)) < 0.15 * np.round(heads)).all() and heads.min() > 0.8
    assert len({tuple(row) for row in maps.tolist()}) > 1


def test_calls_do_not_remember(module: wasm.Module) -> None:
    forward, backward = module.logits(IMAGES[:30]), module.logits(IMAGES[:30][::-1])
    np.testing.assert_array_equal(forward, backward[::-1])
    assert module.logits(IMAGES[:0]).shape == (0,)


def test_tensors_bytes_and_views(built: Path, module: wasm.Module) -> None:
    import torch

    expected = module.logits(IMAGES[:8])
    other = wasm.Module(built.read_bytes())
    np.testing.assert_array_equal(other.logits(torch.from_numpy(IMAGES[:8])), expected)
    turned = np.ascontiguousarray(IMAGES[:8].transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)  # not contiguous
    np.testing.assert_array_equal(other.logits(turned), expected)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("images", "error", "says"),
    [
        (PIXELS.astype(np.float32), TypeError, "images: expected uint8, got float32"),
        (PIXELS.astype(np.int8), TypeError, "got int8"),
        (PIXELS[0], ValueError, r"expected a shape \(n, 32, 32, 3\), got \(32, 32, 3\)"),
        (PIXELS.transpose(0, 3, 1, 2), ValueError, r"got \(200, 3, 32, 32\)"),
        (PIXELS[:, :31], ValueError, r"got \(200, 31, 32, 3\)"),
    ],
)
def test_images_of_another_kind(
    module: wasm.Module, images: np.ndarray, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        module.logits(images)


def test_no_module_of_ours(built: Path, tmp_path: Path) -> None:
    content = built.read_bytes()
    empty = b"\0asm\1\0\0\0"
    wants = section(1, b"\1\x60\0\0") + section(2, b"\1\3env\4heap\0\0")
    for name, data, says in (
        ("empty.wasm", b"", "empty.wasm: expected a WebAssembly module, but it is empty"),
        ("text.wasm", b"hello there", "text.wasm: .*it begins with b'hell'"),
        ("cut.wasm", content[: len(content) // 2], "cut.wasm: a damaged WebAssembly module"),
        ("bare.wasm", empty, "bare.wasm: .*does not export attention, logit, memory"),
        ("wants.wasm", empty + wants, r"wants.wasm: .*it wants env\.heap"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(wasm.WasmError, match=says):
            wasm.Module(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        wasm.Module(tmp_path / "none.wasm")


def test_nothing_is_written_where_something_fails(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "person.wasm"
    with pytest.raises(wasm.WasmError, match=r"model_int8\.tflite: the module has [\d,]+ bytes, [\d,]+ more"):
        wasm.build(model, target, max_bytes=100_000)
    for content in (b"", b"not a model at all", model.read_bytes()[:5000]):
        (bad := tmp_path / "bad.tflite").write_bytes(content)
        with pytest.raises(graph.GraphError, match=r"bad\.tflite"):
            wasm.build(bad, target)
        bad.unlink()
    monkeypatch.setattr(compilers, "zig", lambda: [sys.executable, "-c", "import sys; sys.exit('refused')"])
    with pytest.raises(compilers.CompileError, match="refused"):
        wasm.build(model, target)
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(
    model: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "ziglang" else find_spec(name, *more)
    )
    with pytest.raises(compilers.CompilerMissingError, match=r"textbook_code\[deploy\]"):
        wasm.build(model, tmp_path / "person.wasm")
    monkeypatch.setitem(sys.modules, "wasmtime", None)
    with pytest.raises(ImportError, match=r"wasmtime is missing: pip install \"textbook_code\[deploy\]\""):
        wasm.Module(built)


def test_a_model_of_another_kind(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = wasm.generate
    for change, says in (
        ({"input_shape": (48, 48, 3)}, r"expected an input of \(32, 32, 3\), got \(48, 48, 3\)"),
        ({"num_patches": 0}, "no SOFTMAX"),
        ({"output_scale": 0.0}, "expected a positive number"),
    ):
        monkeypatch.setattr(
            wasm, "generate", lambda *a, c=change, **k: dataclasses.replace(real(*a, **k), **c)
        )
        with pytest.raises(wasm.WasmError, match=says):
            wasm.build(model, tmp_path / "person.wasm")


@pytest.mark.parametrize("scale", [1.0, 0.1, 3e-5, 1e-9, 12345.678])
def test_every_scale_is_a_fraction(scale: float) -> None:
    numerator, shift = wasm.fraction(scale)
    assert numerator / 2**shift == float(np.float32(scale))
