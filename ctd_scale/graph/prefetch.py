"""Asking the processor for memory before it is needed: a step on a large table waits for little else.

Rows that a minibatch touches lie anywhere in gigabytes. What comes next is known, but not to the processor, which looks
ahead only as far as its own queue reaches.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import for_range_slice, unpack_tuple
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

# Rows to look ahead: 4, 8 and 16 took the same time.
AHEAD = 8
LINE_BYTES = 64
# For llvm.prefetch: to read (the same as to write on x86), to stay in every cache, data.
TO_READ = (0, 3, 1)


@intrinsic
def prefetch_row(typingctx, table, row):  # type: ignore[no-untyped-def]
    """Fetch all of `table[row]`, a row of a matrix without gaps."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        made = make_array(signature.args[0])(context, builder, arguments[0])
        stride = unpack_tuple(builder, made.strides, 2)[0]
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        start = builder.gep(builder.bitcast(made.data, byte), [builder.mul(stride, arguments[1])])
        nothing, step = (ir.Constant(stride.type, value) for value in (0, LINE_BYTES))
        with for_range_slice(builder, nothing, stride, step) as (line, _):
            builder.call(fetch, [builder.gep(start, [line]), *(ir.Constant(number, value) for value in TO_READ)])
        return context.get_dummy_value()

    return types.void(table, types.intp), generate
