"""The graph in larger pieces, for the fast kernels: patches, attention, feed-forward, each one step.

Four patterns of operations are looked for, by what they compute and not by their names: a transposition is
followed element by element, so any that cancel cost nothing. What fits no pattern becomes the plain steps.

Book: deploy-c-simd
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from textbook_code.compression.integer import softmax_table
from textbook_code.deploy.c_codegen.plain import Plain
from textbook_code.deploy.c_codegen.program import (
    Linear,
    Program,
    Step,
    UnsupportedOpError,
    clamp,
    factor,
    linear,
    scale,
    zero,
)
from textbook_code.deploy.graph import Graph, Op

ROWS = 4
"""As many rows go through the product at a time; columns are taken in fours as well."""

_LIMIT = 1 << 30  # the product with a multiplier doubles a sum first


@dataclass(frozen=True)
class _Rescale:
    """A factor that is applied with one shift to the right."""

    multiplier: int
    rounding: int
    shift: int

    @property
    def sign(self) -> int:
        return -1 if self.shift else 0


def _rescale(multiplier: int, shift: int, offset: int = 0) -> _Rescale | None:
    """None if it would shift to the left, or if `offset`, which is added after the shift, does not fit."""
    right = 1 if multiplier == 0 else -shift
    rounding = (1 << right >> 1) + (offset << right) if right >= 0 else 0
    return _Rescale(multiplier, rounding, right) if 0 <= right < 31 and abs(rounding) < _LIMIT else None


class Fast(Plain):
    """Builds the `Program` of the fast kernels; arguments and errors as of `Plain`.

    Book: deploy-c-simd
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.makers = {t: n for n, op in enumerate(graph.ops) for t in op.outputs}
        self.users: dict[int, list[int]] = {}
        for n, op in enumerate(graph.ops):
            for t in op.inputs:
                self.users.setdefault(t, []).append(n)
        self.pieces: dict[int, Callable[[], None]] = {}  # by the operation that they take the place of
        self.gone: set[int] = set()

    def build(self) -> Program:
        """The pieces where a pattern fits, plain steps elsewhere."""
        ops = self.graph.ops
        for n, op in enumerate(ops):
            if op.kind == "SOFTMAX":
                self._find_attention(n)
        for n, op in enumerate(ops):
            if op.kind == "ADD" and n not in self.gone:
                self._find_sum(n)
        for n, op in enumerate(ops):
            if op.kind in ("FULLY_CONNECTED", "CONV_2D") and n not in self.gone and n not in self.pieces:
                self._find_product(n)
        image = self.graph.inputs[0]
        if any(n not in self.gone and n not in self.pieces for n in self.users.get(image, [])):
            self.image()
        for n, op in enumerate(ops):
            if n in self.pieces:
                self.pieces[n]()
            elif n not in self.gone:
                self.op(n, op)
        return self.program

    # following tensors

    def view(self, index: int) -> tuple[int, np.ndarray]:
        """The tensor that one is a rearrangement of, and where in it each element stands."""
        chain = []
        while self.makers.get(index, -1) >= 0 and self.graph.ops[self.makers[index]].kind in _VIEWS:
            op = self.graph.ops[self.makers[index]]
            if op.kind == "TRANSPOSE" and self.graph.tensors[op.inputs[1]].data is None:
                break
            chain.append(op)
            index = op.inputs[0]
        positions = np.arange(self.graph.tensors[index].size).reshape(self.graph.tensors[index].shape)
        for op in reversed(chain):
            positions = self._moved(op, positions)
        return index, positions

    def _moved(self, op: Op, values: np.ndarray) -> np.ndarray:
        order = self.graph.tensors[op.inputs[1]].data if op.kind == "TRANSPOSE" else None
        values = values if order is None else values.transpose(order.ravel())
        return values.reshape(self.graph.tensors[op.outputs[0]].shape)

    def chain(self, index: int) -> tuple[list[int], int]:
        """The operations that only rearrange a tensor for its one reader, and the tensor that that reads."""
        ops: list[int] = []
        while len(users := self.users.get(index, [])) == 1 and index not in self.graph.outputs:
            op = self.graph.ops[users[0]]
            if op.kind not in _VIEWS or op.inputs[0] != index:
                break
            ops.append(users[0])
            index = op.outputs[0]
        return ops, index

    def only_user(self, index: int) -> int | None:
        """The one operation that reads a tensor, if no other does and it is no output."""
        users = self.users.get(index, [])
        return users[0] if len(users) == 1 and index not in self.graph.outputs else None

    # what the kernels can do

    def product(self, number: int, *, rows: int) -> Linear | None:
        """The integers of a product, if the kernels of four rows can do it."""
        maps = linear(self.graph, self.graph.ops[number])
        worst = np.abs(maps.bias) + 128 * np.abs(maps.weight.astype(np.int64)).sum(1)
        fits = rows % ROWS == 0 and maps.inputs % 4 == 0 and (maps.low, maps.high) == (-128, 127)
        fits = fits and worst.max() < _LIMIT and None not in self._channels(maps)
        return maps if fits else None

    @staticmethod
    def _channels(maps: Linear) -> list[_Rescale | None]:
        pairs = zip(maps.multiplier.tolist(), maps.shift.tolist(), strict=True)
        found = [_rescale(multiplier, shift, maps.zero) for multiplier, shift in pairs]
        return [r if r is not None and r.shift > 0 else None for r in found]

    def rows(self, number: int) -> int:
        """Rows of a product."""
        op = self.graph.ops[number]
        return self.graph.tensors[op.outputs[0]].size // self.graph.tensors[op.inputs[1]].shape[0]

    def dense(self, number: int, maps: Linear) -> str:
        """The initialiser of a `struct net_dense`, whose arrays are added."""
        layer = self.graph.layer(self.graph.ops[number])
        weight = self.program.array(f"weight{number}", "int8_t", maps.weight, layer)
        lines = [
            f"{{{bias}, {r.multiplier}, {r.rounding}, {r.shift}}},"
            for bias, r in zip(maps.bias.tolist(), self._channels(maps), strict=True)
            if r is not None
        ]
        channel = self.program.struct(
            f"channel{number}", "net_channel", lines, 16 * len(lines), count=len(lines)
        )
        return f"{{{weight}, {channel}, {maps.inputs}, {maps.outputs}}}"

    def residual(self, number: int, own: int, other: int) -> str | None:
        """The name of the `struct net_residual` of an ADD, if it can be done after a product."""
        op = self.graph.ops[number]
        x, rest, y = (self.graph.tensors[i] for i in (own, other, op.outputs[0]))
        if x.size != y.size or rest.size != y.size or clamp(op, y) != (-128, 127):
            return None
        twice = 2 * max(scale(x), scale(rest))
        scales = [
            _rescale(*factor(scale(x) / twice)),
            _rescale(*factor(scale(rest) / twice)),
            _rescale(*factor(twice / (scale(y) * 2**20)), zero(y)),
        ]
        lines = [f".zero_x = {zero(x)}, .zero_other = {zero(rest)},"]
        for name, r in zip(("x", "other", "y"), scales, strict=True):
            if r is None:
                return None
            lines.append(f".{name} = {{{r.multiplier}, {r.rounding}, {r.shift}, {r.sign}}},")
        return self.program.struct(f"residual{number}", "net_residual", lines, 56)

    # the patterns

    def _find_product(self, number: int) -> None:
        """A product by itself."""
        op = self.graph.ops[number]
        rows = self.rows(number)
        maps = self.product(number, rows=rows)
        if maps is None or (op.kind == "CONV_2D" and not self._tiles(op)):
            return
        self.pieces[number] = lambda: self._emit_product(number, maps, None, None, op.outputs[0])

    def _find_sum(self, number: int) -> None:
        """A product, or two with ReLU between them, and the sum behind it."""
        op = self.graph.ops[number]
        for own, other in (op.inputs[:2], op.inputs[1::-1]):
            base, moved = self.view(own)
            made = self.makers.get(base)
            if made is None or made in self.gone or self.graph.ops[made].kind not in _PRODUCTS:
                continue
            before, reaches = self.chain(base)
            after, out = self.chain(op.outputs[0])
            if reaches != own or self.only_user(own) != number:
                continue
            maps = self.product(made, rows=self.rows(made))
            if maps is None or (
                self.graph.ops[made].kind == "CONV_2D" and not self._tiles(self.graph.ops[made])
            ):
                continue
            constant = self.graph.tensors[other].data
            straight = bool((moved.ravel() == np.arange(moved.size)).all())
            if constant is None and straight:
                after, out = [], op.outputs[0]
            elif constant is not None and constant.size == moved.size:
                restored, values = moved, constant.reshape(moved.shape)
                for step in after:
                    restored = self._moved(self.graph.ops[step], restored)
                    values = self._moved(self.graph.ops[step], values)
                if not (restored.ravel() == np.arange(restored.size)).all():
                    continue
            else:
                continue
            residual = self.residual(number, own, other)
            if residual is None:
                continue
            first = self._find_first(made)
            self.gone |= {made, number, *before, *after} | ({first[0]} if first else set())
            last = after[-1] if after else number
            self.gone.discard(last)
            place: str | int = other
            if constant is not None:
                layer = self.graph.layer(op)
                place = self.program.array(f"c{other}", "int8_t", values, layer)
            if first:
                self.pieces[last] = self._later(self._emit_mlp, *first, made, maps, residual, place, out)
            else:
                self.pieces[last] = self._later(self._emit_product, made, maps, residual, place, out)
            return

    @staticmethod
    def _later(function: Callable[..., None], *arguments: object) -> Callable[[], None]:
        return lambda: function(*arguments)

    def _find_first(self, second: int) -> tuple[int, Linear] | None:
        """The product whose only reader is another one."""
        base, moved = self.view(self.graph.ops[second].inputs[0])
        made = self.makers.get(base)
        straight = (moved.ravel() == np.arange(moved.size)).all()
        if (
            made is None
            or made in self.gone
            or self.graph.ops[made].kind != "FULLY_CONNECTED"
            or not straight
        ):
            return None
        if self.only_user(base) != second or self.rows(made) != self.rows(second):
            return None
        maps = self.product(made, rows=self.rows(made))
        return None if maps is None else (made, maps)

    def _tiles(self, op: Op) -> bool:
        """Whether the windows of a convolution are patches, side by side."""
        x, weight = (self.graph.tensors[i] for i in op.inputs[:2])
        out = self.graph.tensors[op.outputs[0]]
        stride = (op.options["stride_h"], op.options["stride_w"])
        covers = (out.shape[1] * stride[0], out.shape[2] * stride[1]) == x.shape[1:3]
        undilated = (op.options.get("dilation_h_factor", 1), op.options.get("dilation_w_factor", 1)) == (1, 1)
        return (
            covers
            and undilated
            and weight.shape[1:3] == stride
            and x.shape[0] == 1
            and weight.shape[3] == x.shape[3]
            and x.index == self.graph.inputs[0]
        )

    def _find_attention(self, number: int) -> None:
        """softmax(Q Kᵀ) V of all heads, from the input of the three projections to the heads side by side."""
        ops, tensors = self.graph.ops, self.graph.tensors
        softmax = ops[number]
        scores, moved = self.view(softmax.inputs[0])
        first = self.makers.get(scores)
        views, weights = self.chain(softmax.outputs[0])
        second = self.only_user(weights)
        if first is None or second is None or ops[first].kind != "BATCH_MATMUL":
            return
        if ops[second].kind != "BATCH_MATMUL" or ops[second].inputs[0] != weights:
            return
        straight = [moved, self.view(weights)[1]]
        if any((m.ravel() != np.arange(m.size)).any() for m in straight):
            return
        one, two = ops[first], ops[second]
        out_views, out = self.chain(two.outputs[0])
        rows, width = tensors[one.inputs[0]].shape[-2:]
        heads = tensors[one.inputs[0]].size // (rows * width)
        plain = np.arange(tensors[one.inputs[0]].size).reshape(rows, heads, width)
        by_head, turned = plain.transpose(1, 0, 2).ravel(), plain.transpose(1, 2, 0).ravel()
        wanted = (
            (one.inputs[0], by_head),
            (one.inputs[1], by_head if one.options.get("adj_y") else turned),
            (two.inputs[1], turned if two.options.get("adj_y") else by_head),
        )
        made, maps, used = [], [], {first, number, second, *views, *self.chain(scores)[0], *out_views}
        for index, order in wanted:
            base, moved = self.view(index)
            source = self.makers.get(base)
            if source is None or ops[source].kind != "FULLY_CONNECTED" or moved.size != plain.size:
                return
            product = self.product(source, rows=rows)
            before, reaches = self.chain(base)
            if (moved.ravel() != order).any() or product is None or reaches != index:
                return
            made.append(source)
            maps.append(product)
            used |= {source, *before}
        joined = np.arange(plain.size).reshape(heads, rows, width).transpose(1, 0, 2)
        if (self.view(out)[1].ravel() != joined.ravel()).any() or one.options.get("adj_x"):
            return
        if len({ops[n].inputs[0] for n in made}) != 1 or two.options.get("adj_x") or rows % 4 or width % 4:
            return
        if {scale(tensors[softmax.outputs[0]])} != {1 / 256} or zero(tensors[softmax.outputs[0]]) != -128:
            return
        if rows > 4095 or self._matmul_scale(one) is None or self._matmul_scale(two) is None:
            return
        self.gone |= used - {second}
        self.pieces[second] = self._later(self._emit_attention, number, one, two, made, maps, out)

    def _matmul_scale(self, op: Op) -> _Rescale | None:
        a, b, y = (self.graph.tensors[i] for i in (*op.inputs[:2], op.outputs[0]))
        found = _rescale(*factor(scale(a) * scale(b) / scale(y)), zero(y))
        return found if found is not None and found.shift > 0 else None

    # their steps

    def _emit(
        self,
        number: int,
        kind: str,
        call: str,
        reads: list[int],
        out: int,
        macs: int,
        scratch: int,
        in_place: int | None = None,
    ) -> None:
        tensors = self.graph.tensors
        shape = " x ".join(map(str, tensors[out].shape))
        comment = f"{number} {kind} {self.graph.layer(self.graph.ops[number])}: {shape}"
        self.program.steps.append(Step(kind, call, tuple(reads), out, comment, macs, scratch, in_place))

    def _other(self, residual: str | None, other: int | str | None) -> tuple[str, list[int], int | None]:
        """The arguments for a sum, the buffer read for it, and where the result may lie."""
        if residual is None or other is None:
            return "0, 0", [], None
        if isinstance(other, str):
            return f"&{residual}, {other}", [], None
        place = self.buffer(other)
        return f"&{residual}, {{t{place}}}", [place], place

    def _emit_product(
        self, number: int, maps: Linear, residual: str | None, other: int | str | None, out: int
    ) -> None:
        op, rows = self.graph.ops[number], self.rows(number)
        x = self.graph.tensors[op.inputs[0]]
        kind = op.kind + ("+ADD" if residual else "")
        addition, reads, place = self._other(residual, other)
        macs, scratch = rows * maps.weight.size, 8 * maps.inputs
        dense = self.dense(number, maps)
        if op.kind == "CONV_2D":
            _, high, wide, _ = self.graph.tensors[op.inputs[1]].shape
            _, height, width, channels = x.shape
            lines = [
                f".dense = {dense},",
                f".width = {width}, .channels = {channels},",
                f".rows = {height // high}, .columns = {width // wide},",
                f".height_patch = {high}, .width_patch = {wide},",
            ]
            name = self.program.struct(f"patches{number}", "net_patches", lines, 40)
            call = f"net_patches(rgb, &{name}, {addition}, {{t{out}}}, {{scratch}});"
        else:
            name = self.program.struct(f"dense{number}", "net_dense", [f"{dense[1:-1]},"], 16)
            source = self.buffer(op.inputs[0])
            call = f"net_dense({{t{source}}}, &{name}, {rows}, {addition}, {{t{out}}}, {{scratch}});"
            reads = [source, *reads]
        self._emit(number, kind, call, reads, out, macs, scratch, place)

    def _emit_mlp(
        self,
        first: int,
        first_maps: Linear,
        second: int,
        second_maps: Linear,
        residual: str,
        other: int | str,
        out: int,
    ) -> None:
        rows = self.rows(first)
        addition, reads, place = self._other(residual, other)
        names = []
        for number, maps in ((first, first_maps), (second, second_maps)):
            dense = self.dense(number, maps)
            names.append(self.program.struct(f"dense{number}", "net_dense", [f"{dense[1:-1]},"], 16))
        source = self.buffer(self.graph.ops[first].inputs[0])
        call = (
            f"net_mlp({{t{source}}}, &{names[0]}, &{names[1]}, {rows}, {addition}, {{t{out}}}, {{scratch}});"
        )
        macs = rows * (first_maps.weight.size + second_maps.weight.size)
        scratch = 8 * (first_maps.inputs + first_maps.outputs)
        self._emit(second, "FEED_FORWARD", call, [source, *reads], out, macs, scratch, place)

    def _emit_attention(
        self, number: int, one: Op, two: Op, made: list[int], maps: list[Linear], out: int
    ) -> None:
        tensors = self.graph.tensors
        softmax = self.graph.ops[number]
        rows, width = tensors[one.inputs[0]].shape[-2:]
        heads = maps[0].outputs // width
        table = softmax_table(scale(tensors[softmax.inputs[0]]), softmax.options.get("beta", 1.0))
        exponential = self.program.array(f"exponential{number}", "int32_t", table)
        score, mixed = self._matmul_scale(one), self._matmul_scale(two)
        if score is None or mixed is None:
            raise UnsupportedOpError(f"{one.kind}: a scale that the fast kernels have not")
        parts = [self.dense(n, m) for n, m in zip(made, maps, strict=True)]
        lines = [f".{name} = {part}," for name, part in zip(("query", "key", "value"), parts, strict=True)]
        lines += [
            f".exponential = {exponential}, .rows = {rows}, .heads = {heads}, .width = {width},",
            f".zero_query = {maps[0].zero}, .zero_key = {maps[1].zero}, .zero_value = {maps[2].zero},",
            f".score = {{0, {score.multiplier}, {score.rounding}, {score.shift}}},",
            f".mixed = {{0, {mixed.multiplier}, {mixed.rounding}, {mixed.shift}}},",
        ]
        name = self.program.struct(f"attention{number}", "net_attention", lines, 108)
        source = self.buffer(self.graph.ops[made[0]].inputs[0])
        # only the last block's attention is kept, so each may write it
        call = f"net_attention({{t{source}}}, &{name}, {{t{out}}}, {{scratch}}, {{seen}});"
        inputs = maps[0].inputs
        scratch = 8 * (inputs + width + rows) + 4 * rows + 2 * rows * width
        macs = rows * sum(m.weight.size for m in maps) + 2 * heads * rows * rows * width
        self._emit(number, "ATTENTION", call, [source], out, macs, scratch)
        self.program.seen = (len(self.program.steps) - 1, rows)


_VIEWS = ("RESHAPE", "TRANSPOSE")
_PRODUCTS = ("FULLY_CONNECTED", "CONV_2D")
