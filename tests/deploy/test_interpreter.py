"""The NumPy interpreter: the bytes of TensorFlow Lite Micro, tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from textbook_code import checkpoints
from textbook_code.compression.quantize import QuantisationAware, prepare
from textbook_code.deploy import interpreter, tflite
from textbook_code.deploy.graph import Graph, Op, UnsupportedOpError, read
from textbook_code.deploy.interpreter import Interpreter
from textbook_code.models.vision.tiny_vit import TinyViT, TinyViTConfig, fold

IMAGES = np.random.default_rng(3).integers(0, 256, (20, 32, 32, 3), np.uint8)


def small(norm: str, activation: str) -> TinyViT:
    """A small model, loud enough that its logits differ."""
    torch.manual_seed(1)
    sizes = {"d_model": 24, "num_layers": 1, "num_heads": 3, "d_ff": 20, "patch_size": 8}
    model = TinyViT(TinyViTConfig(norm=norm, activation=activation, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        model(torch.rand(16, 3, 32, 32) * 2 - 1)
    return model.eval()


def exported(folder: Path, norm: str, activation: str) -> Path:
    """That model as .tflite in int8."""
    pytest.importorskip("litert_torch", reason="litert-torch is not installed")
    pytest.importorskip("ai_edge_quantizer", reason="ai-edge-quantizer is not installed")
    tflite.convert(small(norm, activation), folder / "float.tflite", tolerance=1e-2)
    return tflite.quantize(folder / "float.tflite", folder / "int8.tflite", IMAGES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("batch"), "batch", "relu")


def equal(path: Path) -> None:
    pytest.importorskip("tflite_micro", reason="tflite-micro is not installed")
    ours, theirs = Interpreter(path).logits(IMAGES), tflite.TFLiteMicro(path).logits(IMAGES)
    assert len(np.unique(ours)) > 5
    np.testing.assert_array_equal(ours, theirs)


def test_equal_to_tflite_micro(model: Path) -> None:
    equal(model)


def test_the_checkpoint_is_equal_to_tflite_micro() -> None:
    equal(checkpoints.path("person-vit") / "model_int8.tflite")


def apart(path: Path, aware: QuantisationAware) -> np.ndarray:
    """How many LSB the model that is trained with rounding is from the file."""
    target = (graph := read(path)).tensors[graph.outputs[0]]
    x = torch.from_numpy(tflite.as_float(IMAGES)).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = aware(x).numpy()
    scale = float(aware.ranges["logit"].scale)
    assert scale == pytest.approx(target.scale[0], rel=1e-4)
    return np.abs(logits / scale + target.zero_point[0] - Interpreter(graph).logits(IMAGES))


def test_quantisation_aware_training_rounds_what_the_file_rounds(model: Path) -> None:
    x = torch.from_numpy(tflite.as_float(IMAGES)).permute(0, 3, 1, 2)
    aware = prepare(fold(small("batch", "relu")), x)
    off = apart(model, aware)
    assert off.max() < 3.5 and np.sqrt((off**2).mean()) < 1.5
    ranges = {t.scale[0] for t in read(model).tensors if len(t.scale) == 1 and t.dtype == "int8"}
    ours = np.array([float(a.scale) for a in aware.ranges.values()])
    for scale in ours:  # every range of the training is one of the file's
        assert min(abs(scale / theirs - 1) for theirs in ranges) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "activation"), [("layer", "relu"), ("batch", "hardswish")])
def test_other_models_too(norm: str, activation: str, tmp_path: Path) -> None:
    equal(exported(tmp_path, norm, activation))


def test_every_tensor_can_be_asked_for(model: Path) -> None:
    graph = read(model)
    values = Interpreter(graph).run(tflite.as_int8(IMAGES[:1]))
    assert values.keys() == {t.index for t in graph.tensors}
    for tensor in graph.tensors:
        assert values[tensor.index].shape == tensor.shape
        assert values[tensor.index].dtype == tensor.dtype


@pytest.mark.parametrize("kind", ["SOFTMAX", "BATCH_MATMUL", "ADD", "MEAN", "CONV_2D"])
def test_every_operation_counts(kind: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Interpreter(model).logits(IMAGES)
    kernel = interpreter.KERNELS[kind]
    monkeypatch.setitem(
        interpreter.KERNELS, kind, lambda *given: np.minimum(kernel(*given), 126) + np.int8(1)
    )
    assert not np.array_equal(Interpreter(model).logits(IMAGES), right)


def test_an_unknown_operation_is_named(model: Path) -> None:
    graph = read(model)
    odd = replace(graph, ops=(*graph.ops, Op("CUSTOM fft", graph.outputs, graph.outputs)))
    with pytest.raises(
        UnsupportedOpError, match=r"model: no kernel for CUSTOM fft in layer '.*'; there is one"
    ):
        Interpreter(odd)


def test_a_float_model_is_refused(model: Path) -> None:
    with pytest.raises(UnsupportedOpError, match="works on float32, expected int8"):
        Interpreter(model.with_name("float.tflite"))


def _with(graph: Graph, kind: str, **options: object) -> Graph:
    ops = [replace(op, options={**op.options, **options}) if op.kind == kind else op for op in graph.ops]
    return replace(graph, ops=tuple(ops))


def test_options_without_a_kernel_are_refused(model: Path) -> None:
    graph = read(model)
    for kind, option, message in (
        ("CONV_2D", {"stride_h": 2}, r"CONV_2D in layer '.*': expected the stride \(8, 8\), got \(2, 8\)"),
        ("FULLY_CONNECTED", {"fused_activation_function": "TANH"}, "FULLY_CONNECTED: expected one of NONE"),
    ):
        with pytest.raises(UnsupportedOpError, match=message):
            Interpreter(_with(graph, kind, **option)).logits(IMAGES[:1])


def test_pictures_of_another_kind_are_refused(model: Path) -> None:
    ours = Interpreter(model)
    with pytest.raises(TypeError, match="images: expected uint8, got float32"):
        ours.logits(IMAGES.astype(np.float32))
    with pytest.raises(ValueError, match=r"image: expected int8 \(1, 32, 32, 3\), got int8 \(1, 16, 32, 3\)"):
        ours.logits(IMAGES[:, :16])
    with pytest.raises(FileNotFoundError):
        Interpreter(model.with_name("none.tflite"))
