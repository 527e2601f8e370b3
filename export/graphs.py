"""Modules as ONNX files of a type: constants folded, weights as 8-bit integers, or half precision behind float32.

module ─ to_onnx ─ constants folded ─┬─ fp32
                                     └─ matrices and tables in int8 ───── q8
module.half() ─ to_onnx ─ folded ─ casts at the ends ─ fp16
"""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.quant_utils import add_pre_process_metadata
from onnxscript import ir
from onnxscript.optimizer import fold_constants_ir, remove_unused_nodes

from .modules import Exportable

OPSET = 20
NO_LIMIT = 2**62  # elements of a constant
SMALL = 32  # a matrix with so short a side stays as it is: a router, the biases of experts
FEW_ROWS = 256  # a table of so few stays as it is: positions
CACHE = ("past_key_values.", "present.")  # inputs and outputs that keep the model's type


def graph_of(module: Exportable, all_constants: bool = False) -> onnx.ModelProto:
    """The module as ONNX, its weights as the products take them.

    Args:
        module: with sample inputs of its own dtype.
        all_constants: also a second, transposed copy of weights that two operators share: the word embeddings of a
            caption head that is tied to them.
    """
    with quiet("torch.onnx", "onnxscript"), warnings.catch_warnings():  # that torchvision is not installed
        warnings.simplefilter("ignore")
        graph = module.to_onnx(OPSET).model
    fold(graph, all_constants)
    return ir.to_proto(graph)


@contextlib.contextmanager
def quiet(*packages: str) -> Iterator[None]:
    """Keeps their logs to errors."""
    chatter = [logging.getLogger(name) for name in packages]
    levels = [each.level for each in chatter]
    try:
        for each in chatter:
            each.setLevel(logging.ERROR)
        yield
    finally:
        for each, level in zip(chatter, levels):
            each.setLevel(level)


def fold(graph: ir.Model, all_constants: bool):
    """Computes what hangs on weights alone, in place: the matrices of experts side by side, transposed weights."""

    def should_fold(node: ir.Node) -> bool | None:
        shared = node.op_type == "Transpose" and len(node.inputs[0].uses()) > 1
        return False if shared and not all_constants else None

    with quiet("onnxscript"):  # that norms of weights alone, of a pooler's queries, are left as they are
        fold_constants_ir(graph, input_size_limit=NO_LIMIT, output_size_limit=NO_LIMIT, should_fold=should_fold)
    remove_unused_nodes(graph)


def quantised(graph: onnx.ModelProto, path: Path):
    """Writes a graph with int8 weights: a scale for each column of a matrix and for each row of a table.

    What goes into a product is measured as it comes. Only products of matrices and look-ups: 8-bit convolutions of
    ONNX Runtime are slower than those in float32.
    """
    whole = ir.from_proto(graph)
    fold(whole, all_constants=True)
    graph = ir.to_proto(whole)
    quantise_tables(graph)
    sizes = {weight.name: tuple(weight.dims) for weight in graph.graph.initializer}
    left_out = [
        node.name
        for node in graph.graph.node
        if any(len(sizes.get(name, ())) == 2 and min(sizes[name]) <= SMALL for name in node.input)
    ]
    left_out += [f"{name}_MatMul" for name in left_out]  # what a Gemm is called once it is a MatMul
    add_pre_process_metadata(graph)
    quantize_dynamic(
        graph,
        path,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul"],  # and Gemm, which becomes one
        per_channel=True,
        nodes_to_exclude=left_out,
    )


def quantise_tables(graph: onnx.ModelProto):
    """Look-ups in a table of float32 rows as look-ups of int8 rows times their scales, in place.

    `quantize_dynamic` has one scale for a whole table, which costs word embeddings most of their precision.
    """
    tables = {weight.name: weight for weight in graph.graph.initializer}
    nodes = []
    for node in graph.graph.node:
        table = tables.get(node.input[0]) if node.op_type == "Gather" else None
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        is_large = table is not None and len(table.dims) == 2 and table.dims[0] > FEW_ROWS
        if not is_large or table.data_type != TensorProto.FLOAT or axis != 0:
            nodes.append(node)
            continue
        rows = numpy_helper.to_array(table)
        scales = np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / 127
        names = [f"{node.name}_{what}" for what in ("rows", "scales", "integers", "floats", "scale")]
        kept, scale_table, integers, floats, scale = names
        graph.graph.initializer.extend(
            [
                numpy_helper.from_array((rows / scales).round().astype(np.int8), kept),
                numpy_helper.from_array(scales.astype(np.float32), scale_table),
            ]
        )
        nodes += [
            helper.make_node("Gather", [kept, node.input[1]], [integers], name=integers),
            helper.make_node("Cast", [integers], [floats], name=floats, to=TensorProto.FLOAT),
            helper.make_node("Gather", [scale_table, node.input[1]], [scale], name=scale),
            helper.make_node("Mul", [floats, scale], list(node.output), name=f"{node.name}_scaled"),
        ]
    used = {name for node in nodes for name in node.input}
    weights = [weight for weight in graph.graph.initializer if weight.name in used]
    for field, entries in ((graph.graph.node, nodes), (graph.graph.initializer, weights)):
        del field[:]
        field.extend(entries)


def half(module: Exportable) -> onnx.ModelProto:
    """The module in float16, but for its inputs and outputs that are not of the cache."""
    graph = graph_of(_in_half(module))
    inside = graph.graph
    nodes = list(inside.node)
    before, after = [], []
    for value in [*inside.input, *inside.output]:
        kind = value.type.tensor_type
        if kind.elem_type != TensorProto.FLOAT16 or value.name.startswith(CACHE):
            continue
        name, inner = value.name, f"{value.name}_float16"
        for node in nodes:
            for names in (node.input, node.output):
                for place, each in enumerate(names):
                    if each == name:
                        names[place] = inner
        if value in inside.input:
            before.append(helper.make_node("Cast", [name], [inner], name=f"{name}_cast", to=TensorProto.FLOAT16))
        else:
            after.append(helper.make_node("Cast", [inner], [name], name=f"{name}_cast", to=TensorProto.FLOAT))
        kind.elem_type = TensorProto.FLOAT
    del inside.node[:]
    inside.node.extend([*before, *nodes, *after])
    return graph


def _in_half(module: Exportable) -> Exportable:
    return copy.deepcopy(module).half()


def mark(path: Path, properties: dict[str, str]):
    """Writes properties into a file, such as of which weights it is, and checks that it is whole."""
    graph = onnx.load(path)
    helper.set_model_props(graph, properties)
    onnx.checker.check_model(graph)
    onnx.save(graph, path)


def save(graph: onnx.ModelProto, path: Path):
    """Writes a graph, which may be of up to 2 GB."""
    onnx.save(graph, path)
