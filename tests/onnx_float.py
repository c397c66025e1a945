"""An ONNX graph whose activations are not rounded to integers any more."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime


def without_rounding(path: Path) -> bytes:
    """The graph of ``path``, its QuantizeLinear → DequantizeLinear pairs on activations bridged.

    What is left is the graph that the integers stand for: weights still come out of their integers by the
    runtime's own DequantizeLinear, and everything between them is float.
    """
    model = onnx.load(path)
    rounded = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    bridged = {
        node.output[0]: rounded[node.input[0]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in rounded
    }
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            while name in bridged:
                name = bridged[name]
            node.input[index] = name
    kept = [
        node
        for node in model.graph.node
        if node.op_type != "QuantizeLinear" and not set(node.output) & bridged.keys()
    ]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    needed = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(needed)
    return model.SerializeToString()


def float_session(path: Path) -> onnxruntime.InferenceSession:
    """Run that graph as it stands: the runtime's optimiser would bring rounded activations back for speed."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(without_rounding(path), options)
