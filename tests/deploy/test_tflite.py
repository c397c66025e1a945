"""From PyTorch to 8-bit TFLite, and its two runtimes."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from deploy_models import CALIBRATION, IMAGES, SMALL, channels_first, loud

from textbook_code import checkpoints
from textbook_code.data import people
from textbook_code.deploy import tflite
from textbook_code.deploy.graph import GraphError, read
from textbook_code.deploy.quiet import quiet
from textbook_code.deploy.tflite import (
    INPUT_RANGE,
    ExportError,
    LiteRT,
    OverBudgetError,
    TFLiteMicro,
    add_to_checkpoint,
    as_float,
    as_int8,
    calibration,
    check_integer,
    constant_bytes,
    convert,
    float_ops,
    folded_float,
    moving_average,
    observe,
    op_counts,
    quantize,
    smallest_arena,
)
from textbook_code.models.vision.tiny_vit import TinyViT, TinyViTConfig

torch.set_num_threads(1)


class Made:
    """A model and its two files."""

    def __init__(self, folder: Path, config: TinyViTConfig) -> None:
        self.model = loud(config)
        self.float = convert(self.model, folder / "float.tflite")
        self.ranges = observe(self.float, CALIBRATION)
        self.int8 = quantize(self.float, folder / "int8.tflite", ranges=self.ranges)
        with torch.no_grad():
            self.logits = self.model(channels_first(IMAGES)).numpy()


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("batch"), SMALL)


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Made:
    config = replace(SMALL, norm="layer", activation="hardswish")
    return Made(tmp_path_factory.mktemp("layer"), config)


@pytest.fixture(params=["batch", "layer"])
def made(request: pytest.FixtureRequest) -> Made:
    return request.getfixturevalue(request.param)


def values(path: Path, logits: np.ndarray) -> np.ndarray:
    graph = read(path)
    output = graph.tensors[graph.outputs[0]]
    return (logits.astype(np.float64) - output.zero_point[0]) * output.scale[0]


def test_a_byte_is_its_own_integer() -> None:
    bytes_ = np.arange(256, dtype=np.uint8)
    assert (as_int8(bytes_) / 128 == as_float(bytes_)).all()
    assert (as_float(bytes_)[0], as_float(bytes_)[-1]) == INPUT_RANGE


def test_the_float_file_is_the_model(made: Made) -> None:
    assert np.abs(LiteRT(made.float).logits(IMAGES) - made.logits).max() < 1e-4
    assert made.logits.std() > 0.1  # else that says little


def test_what_is_left_after_folding(batch: Made) -> None:
    kinds = {"RESHAPE", "TRANSPOSE", "FULLY_CONNECTED", "ADD", "BATCH_MATMUL", "SOFTMAX", "CONV_2D", "MEAN"}
    counts = op_counts(read(batch.int8))
    assert set(counts) == kinds
    assert (counts["SOFTMAX"], counts["BATCH_MATMUL"], counts["CONV_2D"]) == (1, 2, 1)
    assert list(counts.values()) == sorted(counts.values(), reverse=True)


def test_the_model_is_not_changed_and_nothing_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], batch: Made
) -> None:
    model = loud(SMALL).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = convert(model, tmp_path / "new folder" / "m.tflite")
        quantize(file, tmp_path / "q.tflite", CALIBRATION[:2])
        TFLiteMicro(tmp_path / "q.tflite").logits(IMAGES[:1])
    assert capfd.readouterr() == ("", "")
    assert model.training and all(torch.equal(before[k], t) for k, t in model.state_dict().items())
    assert file.read_bytes() == batch.float.read_bytes()  # the same model in evaluation: the same bytes


def test_a_file_that_differs_from_the_model_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tflite.LiteRT.logits
    monkeypatch.setattr(tflite.LiteRT, "logits", lambda self, images: real(self, images) + 1e-3)
    file = tmp_path / "m.tflite"
    file.write_bytes(b"old")
    with pytest.raises(ExportError, match=r"path: the file's logits are 0\.001 from"):
        convert(loud(SMALL), file)
    assert [f.name for f in tmp_path.iterdir()] == ["m.tflite"] and file.read_bytes() == b"old"


def test_half_precision_is_folded_in_single() -> None:
    half = loud(SMALL).half()
    whole = copy.deepcopy(half).float()
    folded = folded_float(half)
    assert half.head.weight.dtype == torch.float16 and folded.head.weight.dtype == torch.float32
    with torch.no_grad():
        off = (folded(channels_first(IMAGES)) - whole(channels_first(IMAGES))).abs().max()
    assert off < 1e-4


def test_an_activation_without_an_integer_kernel(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'gelu' in blocks\.0\.ffn .*expected one of relu, hardswish"):
        convert(loud(replace(SMALL, activation="gelu")), tmp_path / "m.tflite")


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model: expected a TinyViT, got Linear"):
        convert(torch.nn.Linear(2, 2), tmp_path / "m.tflite")  # type: ignore[arg-type]


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    model = loud(SMALL)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(ExportError, match=r"head\.bias has values that are not finite"):
        convert(model, tmp_path / "m.tflite")


def test_only_integers_are_left(made: Made) -> None:
    graph = read(made.int8)
    assert float_ops(graph) == []
    assert len(float_ops(read(made.float))) == len(read(made.float).ops)
    source, target = graph.tensors[graph.inputs[0]], graph.tensors[graph.outputs[0]]
    assert (source.name, source.dtype, source.scale, source.zero_point) == ("image", "int8", (1 / 128,), (0,))
    assert (target.name, target.dtype, target.size) == ("logit", "int8", 1)


def test_scales_of_weights_biases_and_softmax(batch: Made) -> None:
    graph = read(batch.int8)
    assert "SOFTMAX in TinyViTBlock_0/attn" in float_ops(read(batch.float))
    for op in graph.ops:
        if op.kind in ("FULLY_CONNECTED", "CONV_2D"):
            x, weight, bias = (graph.tensors[i] for i in op.inputs)
            assert len(weight.scale) == weight.shape[0] and set(weight.zero_point) == {0}
            assert weight.data is not None and weight.data.min() >= -127
            assert np.allclose(bias.scale, np.array(weight.scale) * x.scale[0], rtol=1e-6)
            assert bias.dtype == "int32"
        if op.kind == "SOFTMAX":
            output = graph.tensors[op.outputs[0]]
            assert (output.scale, output.zero_point) == ((1 / 256,), (-128,))


def test_constants_are_the_model_s_weights(batch: Made) -> None:
    graph = read(batch.int8)
    parameters = sum(parameter.numel() for parameter in batch.model.blocks.parameters())
    assert parameters < constant_bytes(graph) < batch.int8.stat().st_size
    (head,) = [op for op in graph.ops if graph.layer(op) == "head" and op.kind == "FULLY_CONNECTED"]
    weight = graph.tensors[head.inputs[1]]
    assert weight.data is not None and weight.shape == (1, SMALL.d_model)
    norm = batch.model.final_norm
    folded = batch.model.head.weight * norm.weight * (norm.running_var + norm.norm_eps).rsqrt()  # type: ignore
    off = weight.data * weight.scale[0] - folded.detach().numpy()
    assert np.abs(off).max() <= weight.scale[0] * 0.51


def test_ranges_are_the_true_ones(batch: Made) -> None:
    graph = read(batch.float)
    with torch.no_grad():
        images = channels_first(CALIBRATION)
        logits, (weights,) = batch.model.attended(images)
    output = batch.ranges[graph.tensors[graph.outputs[0]].name]
    assert output == pytest.approx((float(logits.min()), float(logits.max())), abs=1e-4)
    assert batch.ranges[graph.tensors[graph.inputs[0]].name] == INPUT_RANGE
    (softmax,) = [op for op in graph.ops if op.kind == "SOFTMAX"]
    seen = batch.ranges[graph.tensors[softmax.outputs[0]].name]
    assert seen == pytest.approx((float(weights.min()), float(weights.max())), abs=1e-4)


def test_moving_averages_lose_the_logit(batch: Made, tmp_path: Path) -> None:
    graph = read(batch.float)
    name = graph.tensors[graph.outputs[0]].name
    averages = moving_average(batch.float, CALIBRATION)
    low, high = averages[name]
    true_low, true_high = batch.ranges[name]
    assert high - low < 0.01 * (true_high - true_low)
    lost = quantize(batch.float, tmp_path / "lost.tflite", ranges=averages)
    clipped = np.isin(LiteRT(lost).logits(IMAGES), (-128, 127)).mean()
    kept = np.isin(LiteRT(batch.int8).logits(IMAGES), (-128, 127)).mean()
    assert clipped > 0.9 and kept < 0.1
    off = [np.abs(values(p, LiteRT(p).logits(IMAGES)) - batch.logits).mean() for p in (batch.int8, lost)]
    assert off[0] < 0.2 * off[1]


def test_the_same_input_gives_the_same_bytes(made: Made, tmp_path: Path) -> None:
    again = quantize(made.float, tmp_path / "again.tflite", CALIBRATION)
    assert again.read_bytes() == made.int8.read_bytes()


def test_integers_stay_near_the_floats(made: Made) -> None:
    integers = values(made.int8, LiteRT(made.int8, reference=True).logits(IMAGES))
    assert np.abs(integers - made.logits).mean() < 0.12 * made.logits.std()
    assert np.corrcoef(integers, made.logits)[0, 1] > 0.98


def test_the_runtimes_agree(made: Made) -> None:
    micro = TFLiteMicro(made.int8).logits(IMAGES).astype(int)
    reference = LiteRT(made.int8, reference=True).logits(IMAGES).astype(int)
    fast = LiteRT(made.int8).logits(IMAGES).astype(int)
    zero = read(made.int8).tensors[read(made.int8).outputs[0]].zero_point[0]
    assert len(np.unique(micro)) > 10 and 0.2 < (micro > zero).mean() < 0.8
    for other in (reference, fast):  # not equal: they round differently
        assert np.abs(micro - other).max() <= 12
        assert np.abs(micro - other).mean() <= 3


def test_another_input_scale_is_refused(batch: Made, tmp_path: Path) -> None:
    graph = read(batch.float)
    wide = batch.ranges | {graph.tensors[graph.inputs[0]].name: (-2.0, 2.0)}
    with pytest.raises(ExportError, match="int8 input of scale 1/128 and zero point 0"):
        quantize(batch.float, tmp_path / "q.tflite", ranges=wide)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [None, (1.0, 0.0), (0.0, float("nan"))])
def test_a_range_that_is_none(batch: Made, tmp_path: Path, bad: tuple[float, float] | None) -> None:
    name = read(batch.float).tensors[read(batch.float).outputs[0]].name
    ranges = {key: pair for key, pair in batch.ranges.items() if key != name} | ({name: bad} if bad else {})
    with pytest.raises(
        ExportError, match=f"ranges: expected a least and a greatest value of {re.escape(name)}"
    ):
        quantize(batch.float, tmp_path / "q.tflite", ranges=ranges)


def test_calibration_or_ranges(batch: Made, tmp_path: Path) -> None:
    for given in ({}, {"calibration": CALIBRATION, "ranges": batch.ranges}):
        with pytest.raises(ValueError, match="calibration: expected it, or ranges in its place"):
            quantize(batch.float, tmp_path / "q.tflite", **given)  # type: ignore[arg-type]


def test_over_budget(batch: Made, tmp_path: Path) -> None:
    file, size = tmp_path / "q.tflite", batch.int8.stat().st_size
    file.write_bytes(b"old")
    with pytest.raises(OverBudgetError, match=rf"at most {size - 7:,} bytes, got {size:,}: 7 over"):
        quantize(batch.float, file, ranges=batch.ranges, max_bytes=size - 7)
    assert file.read_bytes() == b"old"
    assert quantize(batch.float, file, ranges=batch.ranges, max_bytes=size).stat().st_size == size


@pytest.mark.parametrize(
    "images",
    [
        IMAGES[:0],
        IMAGES[0],
        IMAGES.astype(np.float32),
        IMAGES[:, :16],
        IMAGES.transpose(0, 3, 1, 2),
    ],
)
def test_images_of_another_kind(batch: Made, images: np.ndarray) -> None:
    for runner in (LiteRT(batch.int8), TFLiteMicro(batch.int8)):
        with pytest.raises(ValueError, match=r"images: expected uint8 \(n, 32, 32, 3\) with n ≥ 1, got"):
            runner.logits(images)
    with pytest.raises(ValueError, match="images: expected uint8"):
        observe(batch.float, images)


def test_a_float_model_is_not_for_the_microcontroller(batch: Made) -> None:
    with pytest.raises(ExportError, match=r"expected integers only, found \d+ float operations: .*CONV_2D"):
        TFLiteMicro(batch.float)


def test_the_arena(made: Made) -> None:
    arena = TFLiteMicro(made.int8).arena
    assert arena.total == arena.activations + arena.tables
    patches, d_model = SMALL.num_patches, SMALL.d_model
    assert arena.activations >= SMALL.num_heads * patches**2 + patches * d_model
    least = smallest_arena(made.int8)
    assert least >= arena.total
    enough = TFLiteMicro(made.int8, least)
    assert (enough.logits(IMAGES[:3]) == TFLiteMicro(made.int8).logits(IMAGES[:3])).all()
    for less in (least - 16, 1024, 1):
        with pytest.raises(
            ExportError, match=r"TensorFlow Lite Micro refuses|arena_bytes: expected at least"
        ):
            TFLiteMicro(made.int8, less)


@pytest.mark.parametrize("runner", [LiteRT, TFLiteMicro])
def test_files_that_are_no_models(runner: type, tmp_path: Path, batch: Made) -> None:
    file = tmp_path / "broken.tflite"
    for data in (b"", b"nothing", batch.int8.read_bytes()[:2000]):
        file.write_bytes(data)
        with pytest.raises(GraphError, match=r"broken\.tflite"):
            runner(file)
    with pytest.raises(FileNotFoundError, match=r"none\.tflite"):
        runner(tmp_path / "none.tflite")


def test_quiet_keeps_what_was_said_for_the_error(capfd: pytest.CaptureFixture[str]) -> None:
    import os

    with pytest.raises(RuntimeError) as raised, quiet():
        print("python")
        os.write(2, b"native")
        raise RuntimeError("failed")
    assert raised.value.__notes__ == ["native"]
    with quiet() as said:
        os.write(1, b"more")
    assert said.text == "more"
    print("after")
    assert capfd.readouterr().out == "after\n"


# ------------------------------------------------------------------ the model of the book


def test_the_calibration_pictures_are_of_the_training_splits() -> None:
    pictures = calibration()
    assert pictures.dtype == np.uint8 and pictures.shape == (sum(tflite.CALIBRATION.values()), 32, 32, 3)
    assert (calibration() == pictures).all()
    assert tflite.CALIBRATION_NAME == "training pictures: 128 of emoji, 64 of pedestrians, 64 of faces"
    seen = {picture.tobytes() for picture in pictures}
    assert len(seen) > 0.98 * len(pictures)
    for source, n in tflite.CALIBRATION.items():
        train, test = (people.examination(people.load(source, split)).numpy() for split in ("train", "test"))
        assert len(seen & {picture.tobytes() for picture in train}) >= 0.98 * n
        assert not seen & {picture.tobytes() for picture in test}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A checkpoint in an empty folder in place of the package's."""
    monkeypatch.setattr(checkpoints, "_HOME", tmp_path / "kept")
    monkeypatch.setattr(tflite, "calibration", lambda: CALIBRATION)
    (tmp_path / "kept").mkdir()
    return checkpoints.save(
        loud(SMALL), "small", experiment="e", arm="a", seed=0, metric="m", value=0.5, sample=0.1
    ).name


def test_an_integer_model_beside_its_weights(kept: str) -> None:
    before = checkpoints.manifest()[kept]
    file = add_to_checkpoint(kept)
    checkpoints.verify(kept)
    entry = checkpoints.manifest()[kept]
    assert set(entry.pop("files")) == {"config.json", "model.safetensors", "model_int8.tflite"}
    del before["files"]
    assert entry == before
    zero = read(file).tensors[read(file).outputs[0]].zero_point[0]
    with torch.no_grad():
        expected = TinyViT.from_pretrained(checkpoints.path(kept)).float().eval()(channels_first(IMAGES)) > 0
    assert (expected.numpy() == (TFLiteMicro(file).logits(IMAGES) > zero)).mean() > 0.9


def test_a_checkpoint_stays_as_it_was_when_its_integer_model_fails(
    kept: str, monkeypatch: pytest.MonkeyPatch, batch: Made
) -> None:
    monkeypatch.setattr(tflite, "MAX_FLASH", 1000)
    monkeypatch.setattr(tflite, "convert", lambda model, path: batch.float)
    with pytest.raises(OverBudgetError, match="at most 1,000 bytes"):
        add_to_checkpoint(kept)
    checkpoints.verify(kept)
    assert not (checkpoints.path(kept) / tflite.INT8_FILE).exists()
    with pytest.raises(FileNotFoundError, match="expected a checkpoint of this package: small"):
        add_to_checkpoint("none")


def test_the_integer_model_of_the_book() -> None:
    file = checkpoints.path("person-vit") / tflite.INT8_FILE
    graph = read(file)
    check_integer(graph)
    assert file.stat().st_size <= tflite.MAX_FLASH
    model = TinyViT.from_pretrained("person-vit").float().eval()
    output = graph.tensors[graph.outputs[0]]
    for source in ("emoji", "pedestrians", "faces"):
        pictures = people.load(source, "test")
        images = people.examination(pictures[torch.arange(20) * len(pictures) // 20]).numpy()
        with torch.no_grad():
            logits = model(channels_first(images)).numpy()
        micro = TFLiteMicro(file).logits(images).astype(int)
        low, high = ((q - output.zero_point[0]) * output.scale[0] for q in (-128, 127))
        off = np.abs((micro - output.zero_point[0]) * output.scale[0] - logits.clip(low, high))
        assert off.max() < 16 * output.scale[0]
        sure = np.abs(logits) > 16 * output.scale[0]
        assert ((micro > output.zero_point[0]) == (logits > 0))[sure].all() and sure.sum() >= 10


@pytest.mark.slow
def test_the_integer_model_is_made_again(tmp_path: Path) -> None:
    kept = read(checkpoints.path("person-vit") / tflite.INT8_FILE)
    float_path = convert(TinyViT.from_pretrained("person-vit"), tmp_path / "float.tflite")
    made = read(quantize(float_path, tmp_path / "int8.tflite", calibration()))
    assert made.ops == kept.ops
    for again, before in zip(made.tensors, kept.tensors, strict=True):
        assert (again.name, again.shape, again.dtype) == (before.name, before.shape, before.dtype)
        assert again.scale == pytest.approx(before.scale, rel=1e-3)  # another processor sums in another order
        assert again.zero_point == pytest.approx(before.zero_point, abs=1)
        if before.data is not None and before.dtype == "int8":
            assert again.data is not None
            assert np.abs(again.data.astype(int) - before.data).max() <= 1
