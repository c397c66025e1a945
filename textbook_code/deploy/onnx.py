"""From PyTorch to ONNX, to 8 bits, and the runtime for phones, servers and Arm computers.

In this file: `export` and `quantize`, which write the two files; `float_nodes`, which says what ONNX Runtime
still computes in floats in the second; `OnnxRuntime`, which runs either. The files read (1, 3, 32, 32)
floats, (rgb − 128) / 128. In the 8-bit file every tensor passes through a pair of QuantizeLinear and
DequantizeLinear (QDQ); the runtime puts an integer kernel in place of what stands between two pairs where it
has one, and computes in floats elsewhere.

Format: ONNX, opset 18.

Book: deploy-onnx
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from textbook_code.deploy.quiet import quiet
from textbook_code.deploy.tflite import ExportError, as_float, check_deployable, folded_float
from textbook_code.extras import require
from textbook_code.models.vision.tiny_vit import TinyViT
from textbook_code.weights import moved_into_place

OPSET = 18
SIGNED = {"session.qdqisint8allowed": "1"}
"""A setting of ONNX Runtime: signed integers stay signed. On Arm it is so by default. On x86 they are made
unsigned first, for which its matrix products are faster, and sums of signed and unsigned stay float; the
results are the same bits."""
UNNAMED = "pictures without a name"
_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True)
class FloatNode:
    """A node that ONNX Runtime computes in floats in an 8-bit model, and why.

    Book: deploy-onnx
    """

    kind: str
    name: str
    why: str


def export(model: TinyViT, path: str | Path, *, tolerance: float = 1e-5) -> Path:
    """Fold a model and write it as a float32 ONNX file that reads (1, 3, 32, 32).

    Args:
        model: it is not changed; in training mode, too, it is exported as in evaluation.
        path: replaced if it exists.
        tolerance: how far ONNX Runtime's logits may be from PyTorch's.

    Returns:
        The path.

    Raises:
        TypeError: no `TinyViT`.
        ExportError: an activation or weights that are not deployed, or logits that differ from the model's;
            nothing is written then.
        ImportError: onnx, onnxscript or onnxruntime is missing.

    Book: deploy-onnx
    """
    check_deployable(model)
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, extra="deploy")
    path, folded = Path(path), folded_float(model)
    size, channels = model.config.image_size, model.config.in_channels
    with quiet():
        sample = (torch.zeros(1, channels, size, size),)
        program = torch.onnx.export(
            folded, sample, dynamo=True, opset_version=OPSET, input_names=["image"], output_names=["logit"]
        )
        assert program is not None  # as it is with dynamo=True
        proto = _plain(program.model_proto)
    path.parent.mkdir(parents=True, exist_ok=True)
    with moved_into_place(path) as partial:
        _write(proto, partial)
        images = np.random.default_rng(0).integers(0, 256, (4, size, size, channels), np.uint8)
        with torch.no_grad():
            expected = folded(torch.from_numpy(_channels_first(images))).numpy()
        off = float(np.abs(OnnxRuntime(partial).logits(images) - expected).max())
        if not off <= tolerance * max(1.0, float(np.abs(expected).max())):
            raise ExportError(f"path: the file's logits are {off:.2g} from the model's, over {tolerance:g}")
    return path


def quantize(
    float_path: str | Path, int8_path: str | Path, calibration: np.ndarray, *, name: str = UNNAMED
) -> Path:
    """Write a float ONNX file again with 8-bit weights, one scale a channel, and 8-bit activations.

    The ranges of activations are the least and greatest values over the calibration set; the input's scale is
    1/128 and its zero point 0, so that it is the image's bytes. What set it was stands in the file's metadata
    (`calibration`, `calibration_images` and `calibration_sha256`).

    Args:
        float_path: what `export` has written.
        int8_path: replaced if it exists.
        calibration: uint8 (n, 32, 32, 3).
        name: what the calibration set is called, such as `tflite.CALIBRATION_NAME`.

    Returns:
        `int8_path`.

    Raises:
        FileNotFoundError: there is no file at `float_path`.
        ValueError: no images, or of another dtype or shape; or no name.
        ExportError: `float_path` is no ONNX model. Nothing is written then.
        ImportError: onnx or onnxruntime is missing.

    Book: deploy-onnx
    """
    quantization = require("onnxruntime.quantization", extra="deploy")
    float_path, int8_path = Path(float_path), Path(int8_path)
    proto = load(float_path)
    images = _images(calibration, proto)
    if not name.strip():
        raise ValueError("name: expected what the calibration set is called, got an empty name")
    signed = quantization.QuantType.QInt8
    scales = {"scale": np.array(1 / 128, np.float32), "zero_point": np.array(0, np.int8)}
    with tempfile.TemporaryDirectory() as folder, quiet():
        prepared, made = Path(folder) / "prepared.onnx", Path(folder) / "made.onnx"
        shape = require("onnxruntime.quantization.shape_inference", extra="deploy")
        shape.quant_pre_process(str(float_path), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(made),
            _reader(quantization, images),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            weight_type=signed,
            activation_type=signed,
            extra_options={"TensorQuantOverrides": {"image": [scales]}},
        )
        proto = _plain(load(made))
    for key, value in {
        "calibration": name,
        "calibration_images": str(len(images)),
        "calibration_sha256": hashlib.sha256(np.ascontiguousarray(calibration).tobytes()).hexdigest(),
    }.items():
        proto.metadata_props.add(key=key, value=value)
    int8_path.parent.mkdir(parents=True, exist_ok=True)
    with moved_into_place(int8_path) as partial:
        _write(proto, partial)
    return int8_path


def _reader(quantization: Any, images: np.ndarray) -> Any:
    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._left: Iterator[np.ndarray] = iter(_channels_first(images))

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self._left, None)
            return None if image is None else {"image": image[None]}

    return Reader()


def _plain(proto: Any) -> Any:
    """Without what a deployed file does not need, such as in which file the code of each node stood."""
    del proto.metadata_props[:]
    graph = proto.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    return proto


def _write(proto: Any, path: Path) -> None:
    onnx = require("onnx", extra="deploy")
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def load(path: str | Path) -> Any:
    """Read an ONNX file and check it.

    Returns:
        An `onnx.ModelProto`.

    Raises:
        FileNotFoundError: there is no such file.
        ExportError: it is empty, cut short, or no valid ONNX model.

    Book: deploy-onnx
    """
    onnx = require("onnx", extra="deploy")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected an ONNX file, found none at {path}")
    if not (data := path.read_bytes()):
        raise ExportError(f"{path}: expected an ONNX model, got a file of zero bytes")
    try:
        proto = onnx.load_model_from_string(data)
        onnx.checker.check_model(proto)
    except Exception as error:  # protobuf's and the checker's own kinds
        said = str(error).strip().splitlines()[:1]
        raise ExportError(f"{path}: no whole ONNX model ({len(data):,} bytes; {said})") from error
    return proto


def op_counts(path: str | Path) -> dict[str, int]:
    """How many nodes there are of each kind, the most frequent first.

    Raises:
        FileNotFoundError, ExportError: as `load`.

    Book: deploy-onnx
    """
    return dict(Counter(node.op_type for node in load(path).graph.node).most_common())


def optimized(path: str | Path, session: Mapping[str, str] | None = None) -> Any:
    """The graph that ONNX Runtime really runs: after fusing what it has integer kernels for.

    Args:
        path: an ONNX file.
        session: settings in place of ONNX Runtime's own, such as `SIGNED`.

    Returns:
        An `onnx.ModelProto`.

    Raises:
        FileNotFoundError, ExportError: as `load`.

    Book: deploy-onnx
    """
    onnx = require("onnx", extra="deploy")
    load(path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "optimized.onnx"
        _session(path, session, file)
        return onnx.load(str(file))


def float_nodes(path: str | Path, session: Mapping[str, str] | None = None) -> list[FloatNode]:
    """What ONNX Runtime computes in floats, each with the reason; nodes that only move numbers do not count.

    Args:
        path: what `quantize` has written.
        session: settings in place of ONNX Runtime's own, such as `SIGNED`.

    Raises:
        FileNotFoundError, ExportError: as `load`.

    Book: deploy-onnx
    """
    always = {node.name for node in _floats(optimized(path, SIGNED))}
    found = []
    for node in _floats(optimized(path, session)):
        why = f"the runtime puts no integer kernel for {node.op_type} between two pairs"
        if node.name not in always:
            why = (
                "one of what it adds is signed, the other was made unsigned; with SIGNED it is an integer sum"
            )
        found.append(FloatNode(node.op_type, node.name, why))
    return found


def _floats(proto: Any) -> list[Any]:
    integer = ("QLinear", "QGemm", "QAttention")
    nodes = (node for node in proto.graph.node if node.op_type not in _MOVES)
    return [node for node in nodes if not node.op_type.startswith(integer)]


def _session(path: str | Path, settings: Mapping[str, str] | None, save_to: Path | None = None) -> Any:
    runtime = require("onnxruntime", extra="deploy")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if save_to is not None:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(save_to)
    for key, value in (settings or {}).items():
        options.add_session_config_entry(key, value)
    with quiet():
        return runtime.InferenceSession(Path(path).read_bytes(), options, providers=["CPUExecutionProvider"])


def _channels_first(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(as_float(images).transpose(0, 3, 1, 2))


def _images(images: np.ndarray, proto: Any) -> np.ndarray:
    images = np.asarray(images)
    _, channels, *size = (axis.dim_value for axis in proto.graph.input[0].type.tensor_type.shape.dim)
    shape = (*size, channels)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape or not len(images):
        raise ValueError(
            f"images: expected uint8 (n, {', '.join(map(str, shape))}) with n ≥ 1, "
            f"got {images.dtype} {images.shape}"
        )
    return images


class OnnxRuntime:
    """Run an ONNX file with ONNX Runtime, one thread, one image at a time.

    Args:
        path: of `export` or `quantize`.
        session: settings in place of ONNX Runtime's own, such as `SIGNED`.

    Raises:
        FileNotFoundError, ExportError: as `load`.
        ImportError: onnx or onnxruntime is missing.

    Book: deploy-runtimes
    """

    def __init__(self, path: str | Path, session: Mapping[str, str] | None = None) -> None:
        self._proto = load(path)
        self._session = _session(path, session)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """uint8 (n, 32, 32, 3) to float32 (n,).

        Raises:
            ValueError: another dtype or shape, or no image.

        Book: deploy-runtimes
        """
        inputs = _channels_first(_images(images, self._proto))
        return np.concatenate([self._session.run(None, {"image": image[None]})[0] for image in inputs])
