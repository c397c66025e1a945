"""From PyTorch to ONNX, to 8 bits, and ONNX Runtime."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx as library
import pytest
import torch
from deploy_models import CALIBRATION, IMAGES, SMALL, channels_first, loud

from textbook_code.deploy import onnx
from textbook_code.deploy.onnx import (
    SIGNED,
    OnnxRuntime,
    export,
    float_nodes,
    load,
    op_counts,
    optimized,
    quantize,
)
from textbook_code.deploy.tflite import ExportError
from textbook_code.models.vision.tiny_vit import TinyViTConfig

torch.set_num_threads(1)


class Made:
    def __init__(self, folder: Path, config: TinyViTConfig) -> None:
        self.model = loud(config)
        self.float = export(self.model, folder / "float.onnx")
        self.int8 = quantize(self.float, folder / "int8.onnx", CALIBRATION, name="smooth pictures, seed 2")
        with torch.no_grad():
            self.logits = self.model(channels_first(IMAGES)).numpy()


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("batch"), SMALL)


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("layer"), replace(SMALL, norm="layer", activation="hardswish"))


@pytest.fixture(params=["batch", "layer"])
def made(request: pytest.FixtureRequest) -> Made:
    return request.getfixturevalue(request.param)


def test_the_float_file_is_the_model(made: Made) -> None:
    assert np.abs(OnnxRuntime(made.float).logits(IMAGES) - made.logits).max() < 1e-5
    assert made.logits.std() > 0.2


def test_a_valid_file_of_opset_18_with_fixed_shapes(made: Made) -> None:
    for file in (made.float, made.int8):
        proto = library.load(file)
        library.checker.check_model(proto, full_check=True)
        assert {o.domain: o.version for o in proto.opset_import}[""] == 18
        (image,), (logit,) = proto.graph.input, proto.graph.output
        assert (image.name, logit.name) == ("image", "logit")
        assert [axis.dim_value for axis in image.type.tensor_type.shape.dim] == [1, 3, 32, 32]


def test_nothing_of_this_machine_is_in_the_files(made: Made) -> None:
    for file in (made.float, made.int8):
        assert str(Path(onnx.__file__).parents[2]).encode() not in file.read_bytes()
        assert b"tiny_vit.py" not in file.read_bytes()


def test_nothing_is_said_and_the_same_input_gives_the_same_bytes(
    batch: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = loud(SMALL).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        float_file = export(model, tmp_path / "new" / "float.onnx")
        int8_file = quantize(float_file, tmp_path / "int8.onnx", CALIBRATION, name="smooth pictures, seed 2")
        OnnxRuntime(int8_file).logits(IMAGES[:1])
    assert capfd.readouterr() == ("", "")
    assert model.training
    assert float_file.read_bytes() == batch.float.read_bytes()
    assert int8_file.read_bytes() == batch.int8.read_bytes()


def test_integers_stay_near_the_floats(made: Made) -> None:
    logits = OnnxRuntime(made.int8).logits(IMAGES)
    assert logits.dtype == np.float32 and logits.shape == (60,)
    assert np.abs(logits - made.logits).mean() < 0.12 * made.logits.std()
    assert np.corrcoef(logits, made.logits)[0, 1] > 0.98


def test_weights_are_integers_with_a_scale_a_channel(batch: Made) -> None:
    proto = library.load(batch.int8)
    constants = {c.name: library.numpy_helper.to_array(c) for c in proto.graph.initializer}
    weights = {k: v for k, v in constants.items() if v.dtype == np.int8 and v.ndim > 1}
    assert len(weights) == 1 + 4 + 2 + 1 + 1  # patches, attention, feed-forward, head, positions
    assert sum(v.size for v in weights.values()) > 0.9 * sum(
        p.numel() for name, p in batch.model.named_parameters() if p.dim() > 1
    )
    (head,) = [k for k, v in weights.items() if SMALL.d_model in v.shape and 1 in v.shape and v.ndim == 2]
    scale = constants[head.replace("_quantized", "_scale")]
    assert scale.shape == (1,)
    (wide,) = [k for k, v in weights.items() if v.shape == (SMALL.d_model, SMALL.d_ff)]
    assert constants[wide.replace("_quantized", "_scale")].shape == (SMALL.d_ff,)


def test_the_input_is_the_image_s_bytes(batch: Made) -> None:
    proto = library.load(batch.int8)
    constants = {c.name: library.numpy_helper.to_array(c) for c in proto.graph.initializer}
    (first,) = [n for n in proto.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "image"]
    assert (constants[first.input[1]], constants[first.input[2]]) == (np.float32(1 / 128), 0)


def test_the_calibration_set_is_named(batch: Made) -> None:
    known = {pair.key: pair.value for pair in library.load(batch.int8).metadata_props}
    assert known == {
        "calibration": "smooth pictures, seed 2",
        "calibration_images": "64",
        "calibration_sha256": hashlib.sha256(CALIBRATION.tobytes()).hexdigest(),
    }
    assert not library.load(batch.float).metadata_props


def test_what_stays_float(batch: Made, layer: Made) -> None:
    assert [node.kind for node in float_nodes(batch.int8, SIGNED)] == ["ReduceMean"]
    kinds = {node.kind for node in float_nodes(layer.int8, SIGNED)}
    assert {"LayerNormalization", "ReduceMean"} <= kinds and "Add" not in kinds
    (mean,) = float_nodes(batch.int8, SIGNED)
    assert "no integer kernel for ReduceMean between two pairs" in mean.why
    more = {node.name: node for node in float_nodes(batch.int8)}  # on x86 the sums as well, on Arm not
    assert {node.kind for node in more.values()} <= {"ReduceMean", "Add"} and mean.name in more
    assert all("SIGNED" in node.why for node in more.values() if node.kind == "Add")
    assert len(float_nodes(batch.float)) > 10


def test_signed_or_not_the_bits_are_the_same(made: Made) -> None:
    signed, default = OnnxRuntime(made.int8, SIGNED), OnnxRuntime(made.int8)
    assert (signed.logits(IMAGES) == default.logits(IMAGES)).all()


def test_what_runs_is_fused(batch: Made) -> None:
    kinds = [node.op_type for node in optimized(batch.int8, SIGNED).graph.node]
    assert kinds.count("QLinearMatMul") == 2 and kinds.count("QLinearSoftmax") == 1
    counts = op_counts(batch.int8)
    assert counts["DequantizeLinear"] > counts["QuantizeLinear"] > counts["Gemm"]


def test_a_file_that_differs_from_the_model_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = onnx.OnnxRuntime.logits
    monkeypatch.setattr(onnx.OnnxRuntime, "logits", lambda self, images: real(self, images) + 1e-3)
    file = tmp_path / "m.onnx"
    file.write_bytes(b"old")
    with pytest.raises(ExportError, match=r"path: the file's logits are 0\.001 from"):
        export(loud(SMALL), file)
    assert [f.name for f in tmp_path.iterdir()] == ["m.onnx"] and file.read_bytes() == b"old"


def test_models_that_are_not_deployed(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'gelu'"):
        export(loud(replace(SMALL, activation="gelu")), tmp_path / "m.onnx")
    with pytest.raises(TypeError, match="expected a TinyViT, got Linear"):
        export(torch.nn.Linear(2, 2), tmp_path / "m.onnx")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("images", [IMAGES[:0], IMAGES[0], IMAGES / 255, IMAGES[:, :16]])
def test_images_of_another_kind(batch: Made, tmp_path: Path, images: np.ndarray) -> None:
    said = r"images: expected uint8 \(n, 32, 32, 3\) with n ≥ 1, got"
    with pytest.raises(ValueError, match=said):
        OnnxRuntime(batch.int8).logits(images)
    with pytest.raises(ValueError, match=said):
        quantize(batch.float, tmp_path / "q.onnx", images, name="bad")


def test_a_calibration_set_without_a_name(batch: Made, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name: expected what the calibration set is called"):
        quantize(batch.float, tmp_path / "q.onnx", CALIBRATION, name=" ")


def test_files_that_are_no_models(tmp_path: Path, batch: Made) -> None:
    file = tmp_path / "broken.onnx"
    with pytest.raises(FileNotFoundError, match=r"path: expected an ONNX file, found none at .*broken\.onnx"):
        load(file)
    for data, said in (
        (b"", "zero bytes"),
        (b"nothing", "no whole ONNX model"),
        (batch.int8.read_bytes()[:999], ""),
    ):
        file.write_bytes(data)
        for refuse in (load, OnnxRuntime, float_nodes):
            with pytest.raises(ExportError, match=rf"broken\.onnx: .*{said}"):
                refuse(file)
        with pytest.raises(ExportError, match=r"broken\.onnx"):
            quantize(file, tmp_path / "q.onnx", CALIBRATION, name="smooth")
    assert not (tmp_path / "q.onnx").exists()
