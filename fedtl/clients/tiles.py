"""The two matrix products of the softmax-regression kernel, as register tiles in vector code.

Numba's loop vectoriser cannot be told to keep a block of sums in registers, so the inner loops are
written as LLVM vector operations. That also fixes the order of every addition: the bits depend
neither on alignment nor on where a sample stands in its block. On processors whose vectors are
narrower, LLVM splits the operations; the answer stays the same, only slower.

Rows are given as a table of addresses, so that they are read where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import binding, ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

# NUMBA_CPU_FEATURES, where set, is what Numba compiles for instead of this machine.
_CHOSEN: str | None = getattr(config, "CPU_FEATURES", None)
_FEATURES = binding.get_host_cpu_features().flatten() if _CHOSEN is None else _CHOSEN
_WIDE = "+avx512f" in _FEATURES.split(",")
LANES = 16 if _WIDE else 8
"""Floats in a vector. A row's length is a whole number of vectors."""
# Sums held in registers: 5 x 5 leaves 7 of AVX-512's 32 registers for operands; 16 take 3 x 3.
SAMPLES = 5 if _WIDE else 3
CLASSES = 5 if _WIDE else 3
VECTORS = 4 if _WIDE else 3

_alloca: Any = cgutils.alloca_once
_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INT = ir.IntType(64)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    fused = builder.module.declare_intrinsic(f"llvm.fmuladd.v{LANES}f32", (), kind)
    return builder.call(fused, [a, b, c])


def _load(builder: Any, base: Any, offset: Any) -> Any:
    where = builder.bitcast(builder.gep(base, [offset]), _VECTOR.as_pointer())
    return builder.load(where, align=4)


def _total(builder: Any, vector: Any) -> Any:
    """The sum of a vector's lanes, halving it each time."""
    width = LANES
    while width > 1:
        width //= 2
        low, high = (
            builder.shuffle_vector(
                vector,
                ir.Constant(vector.type, ir.Undefined),
                ir.Constant(
                    ir.VectorType(ir.IntType(32), width), list(range(start, start + width))
                ),
            )
            for start in (0, width)
        )
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


def _spread(builder: Any, scalar: Any) -> Any:
    """A vector with ``scalar`` in every lane."""
    zero = ir.Constant(ir.IntType(32), 0)
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, zero)
    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), mask)


class _Matrix:
    """A float32 matrix argument: the address of an element in vector code."""

    def __init__(self, context: Any, builder: Any, kind: Any, value: Any) -> None:
        self._builder = builder
        array = context.make_array(kind)(context, builder, value)
        self._data = array.data
        self._width = builder.extract_value(array.shape, 1)

    def at(self, row: Any, column: Any) -> Any:
        start = self._builder.add(self._builder.mul(row, self._width), column)
        return self._builder.gep(self._data, [start])


def _row(builder: Any, table: Any, sample: Any) -> Any:
    return builder.inttoptr(builder.load(builder.gep(table, [sample])), _FLOAT.as_pointer())


def _sums(builder: Any, rows: int, columns: int) -> list[list[Any]]:
    return [[_alloca(builder, _VECTOR) for _ in range(columns)] for _ in range(rows)]


def _accumulate(
    builder: Any, sums: Sequence[Sequence[Any]], left: list[Any], right: list[Any]
) -> None:
    for j, b in enumerate(right):
        for i, a in enumerate(left):
            builder.store(_multiply_add(builder, a, b, builder.load(sums[i][j])), sums[i][j])


def _fetch(builder: Any, row: Any, offset: Any) -> None:
    """Ask for a cache line, to be in the second-level cache when it is needed."""
    flag = ir.IntType(32)
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
    where = builder.bitcast(builder.gep(row, [offset]), byte)
    read, soon, data = (ir.Constant(flag, value) for value in (0, 2, 1))
    builder.call(prefetch, [where, read, soon, data])


def _emit_scores(
    builder: Any, tables: list[Any], weight: _Matrix, out: _Matrix, at: Any, shape: tuple[int, int]
) -> None:
    (table,), (sample, cls, num_vectors) = tables, at
    zero = ir.Constant(_INT, 0)
    samples = [builder.add(sample, ir.Constant(_INT, s)) for s in range(shape[0])]
    classes = [builder.add(cls, ir.Constant(_INT, c)) for c in range(shape[1])]
    rows = [_row(builder, table, s) for s in samples]
    weights = [weight.at(c, zero) for c in classes]
    sums = _sums(builder, *shape)
    for line in sums:
        for place in line:
            builder.store(ir.Constant(_VECTOR, None), place)
    with cgutils.for_range(builder, num_vectors) as loop:
        offset = builder.mul(loop.index, ir.Constant(_INT, LANES))
        left = [_load(builder, row, offset) for row in rows]
        right = [_load(builder, row, offset) for row in weights]
        _accumulate(builder, sums, left, right)
    for i, s in enumerate(samples):
        for j, c in enumerate(classes):
            builder.store(_total(builder, builder.load(sums[i][j])), out.at(c, s))


def _emit_gradient(
    builder: Any,
    tables: list[Any],
    residual: _Matrix,
    out: _Matrix,
    at: Any,
    shape: tuple[int, int],
) -> None:
    (table, upcoming), (column, cls, num_samples) = tables, at
    columns = [builder.add(column, ir.Constant(_INT, LANES * v)) for v in range(shape[0])]
    classes = [builder.add(cls, ir.Constant(_INT, c)) for c in range(shape[1])]
    zero = ir.Constant(_INT, 0)
    places = [[out.at(c, d) for c in classes] for d in columns]
    residuals = [residual.at(c, zero) for c in classes]
    sums = _sums(builder, *shape)
    for line, targets in zip(sums, places, strict=True):
        for place, target in zip(line, targets, strict=True):
            builder.store(_load(builder, target, zero), place)
    with cgutils.for_range(builder, num_samples) as loop:
        with builder.if_then(builder.icmp_signed("==", cls, zero)):
            later = _row(builder, upcoming, loop.index)
            for d in columns:
                _fetch(builder, later, d)
        row = _row(builder, table, loop.index)
        left = [_load(builder, row, d) for d in columns]
        right = [
            _spread(builder, builder.load(builder.gep(base, [loop.index]))) for base in residuals
        ]
        _accumulate(builder, sums, left, right)
    for line, targets in zip(sums, places, strict=True):
        for place, target in zip(line, targets, strict=True):
            builder.store(
                builder.load(place), builder.bitcast(target, _VECTOR.as_pointer()), align=4
            )


def _tiles(emit: Any, signature: Any, rows: int) -> Any:
    """Code that runs the tile of the wanted shape: ``rows`` or 1, times 1 to CLASSES."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = list(zip(signature.args, args, strict=True))
        tables = [
            context.make_array(kind)(context, builder, value).data for kind, value in arrays[:-7]
        ]
        matrices = [_Matrix(context, builder, kind, value) for kind, value in arrays[-7:-5]]
        for shape in [(r, c) for r in (rows, 1) for c in range(1, CLASSES + 1)]:
            chosen = builder.and_(
                *(
                    builder.icmp_signed("==", wanted, ir.Constant(_INT, size))
                    for wanted, size in zip(args[-2:], shape, strict=True)
                )
            )
            with builder.if_then(chosen):
                emit(builder, tables, *matrices, args[-5:-2], shape)
        return context.get_dummy_value()

    return types.void(*signature, *[types.int64] * 5), codegen


def _scores(
    typingctx: Any, table: Any, weight: Any, out: Any,
    sample: Any, cls: Any, num_vectors: Any, samples: Any, classes: Any,
) -> Any:  # fmt: skip
    """out[c, s] = sum over d of row(s)[d] * weight[c, d].

    For one tile of ``samples`` (SAMPLES or 1) and ``classes`` (1 to CLASSES) from (sample, cls).
    """
    return _tiles(_emit_scores, (table, weight, out), SAMPLES)


def _gradient(
    typingctx: Any, table: Any, upcoming: Any, residual: Any, out: Any,
    column: Any, cls: Any, num_samples: Any, vectors: Any, classes: Any,
) -> Any:  # fmt: skip
    """out[c, d] += sum over s of residual[c, s] * row(s)[d], meanwhile fetching ``upcoming`` rows.

    For one tile of ``vectors`` (VECTORS or 1) and ``classes`` (1 to CLASSES) from (column, cls).
    """
    return _tiles(_emit_gradient, (table, upcoming, residual, out), VECTORS)


scores: Any = intrinsic(_scores)
gradient: Any = intrinsic(_gradient)
