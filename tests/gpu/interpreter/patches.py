"""How the checks get into Triton's interpreter: checked versions of its builder and executor, for one block."""

import contextlib
import copy
import inspect
import math
import warnings
from dataclasses import replace
from unittest import mock

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as stock
from triton.language.semantic import TritonSemantic
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from .arithmetic import is_narrow, narrow, round_to_tf32, widen
from .check import Check
from .errors import CheckError, IntegerOverflowError, NoSuchInstructionError

if not isinstance(tl.zeros_like, stock.InterpretedFunction):
    raise RuntimeError("TRITON_INTERPRET=1 has to be in the environment before triton is first imported, and was not")


class CheckedBuilder(stock.InterpreterBuilder):
    check: Check

    def set_grid_dim(self, nx, ny, nz):
        super().set_grid_dim(nx, ny, nz)
        launch, programs = self.check.launch, math.prod((nx, ny, nz))
        launch.grid = (nx, ny, nz)
        launch.order = np.arange(programs) if self.check.seed is None else self.check.random.permutation(programs)

    def set_grid_idx(self, x, y, z):
        self.check.clock += 1
        super().set_grid_idx(*self.check.launch.program(self.check.clock))

    # memory: the hints after mask and value differ between versions of Triton
    def create_masked_load(self, ptrs, mask, other, *hints, **named_hints):
        real = self.check.access("load", ptrs, mask.data)
        other = self.poison(ptrs.get_element_ty(), ptrs.data.shape) if other is None else other
        return super().create_masked_load(real, mask, other, *hints, **named_hints)

    def create_masked_store(self, ptrs, value, mask, *hints, **named_hints):
        real = self.check.access("store", ptrs, mask.data, value.data)
        return super().create_masked_store(real, value, mask, *hints, **named_hints)

    def create_atomic_rmw(self, operation, ptr, val, mask, sem, scope):
        return super().create_atomic_rmw(operation, self.check.access("atomic", ptr, mask.data), val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        return super().create_atomic_cas(self.check.access("atomic", ptr, True), cmp, val, sem, scope)

    def create_make_tensor_descriptor(self, base, shape, strides, block_shape, *rest, **named_rest):
        self.check.check_descriptor(base.data, [stride.data.item() for stride in strides], block_shape)
        return super().create_make_tensor_descriptor(base, shape, strides, block_shape, *rest, **named_rest)

    def poison(self, ty, shape):
        """What masked lanes may find in their registers."""
        if ty.is_floating():
            return narrow(np.full(shape, np.nan), ty)
        dtype = stock._get_np_dtype(ty)
        noise = np.frombuffer(self.check.random.bytes(math.prod(shape) * dtype.itemsize), f"u{dtype.itemsize}")
        noise = noise % 2 == 1 if dtype.kind == "b" else noise.view(dtype)
        return stock.TensorHandle(noise.reshape(shape), ty)

    # arithmetic
    def cast_impl(self, src, dst_type):
        return narrow(widen(src), dst_type) if is_narrow(src.dtype, dst_type) else super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if rounding_mode in (None, stock._ir.ROUNDING_MODE.RTNE) and is_narrow(src.dtype, dst_type):
            return narrow(widen(src), dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def unary_op(self, arg, op):
        return narrow(op(widen(arg)), arg.dtype) if is_narrow(arg.dtype) else super().unary_op(arg, op)

    def binary_op(self, lhs, rhs, op):
        if not is_narrow(lhs.dtype):
            return super().binary_op(lhs, rhs, op)
        numbers = op(widen(lhs), widen(rhs))
        return stock.TensorHandle(numbers, tl.int1) if numbers.dtype.kind == "b" else narrow(numbers, lhs.dtype)

    def ternary_op(self, lhs, rhs, other, op):
        if op is np.where or not is_narrow(other.dtype):  # a selection of bit patterns is one of numbers
            return super().ternary_op(lhs, rhs, other, op)
        return narrow(op(widen(lhs), widen(rhs), widen(other)), other.dtype)

    def create_fma(self, x, y, z):
        # products are exact in float64; its own rounding of the sum shows in one result of 2^29
        return narrow(widen(x).astype(np.float64) * widen(y) + widen(z), z.dtype)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        self.check.launch.flops[a.dtype.scalar.name] += 2 * d.data.size * a.data.shape[-1]
        if not self.check.compute:
            return stock.TensorHandle(d.data, d.dtype.scalar)
        kind = np.float32 if a.dtype.is_floating() and a.data.itemsize < 8 else d.data.dtype
        x, y = widen(a).astype(kind), widen(b).astype(kind)
        if a.dtype.scalar == tl.float32 and self.check.tf32 and input_precision == stock._ir.INPUT_PRECISION.TF32:
            x, y = round_to_tf32(x), round_to_tf32(y)
        return narrow(np.matmul(x, y) + widen(d), d.dtype)


class CheckedExecutor(stock.GridExecutor):
    def _init_args_hst(self, args_dev, kwargs):
        """All arguments by name, with pointers in place of tensors. The stock conversion does not know the names."""
        self.check = stock.interpreter_builder.check
        bound = inspect.signature(self.fn).bind(*args_dev, **kwargs)
        bound.apply_defaults()
        self.check.begin(self.fn.__name__, bound.arguments)
        values = bound.arguments.items()
        return [], {name: v if name in self.constexprs else self.convert(name, v) for name, v in values}

    def convert(self, name, value):
        if isinstance(value, tuple):
            members = [self.convert(f"{name}[{i}]", member) for i, member in enumerate(value)]
            return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
        if isinstance(value, TensorDescriptor):
            value = copy.copy(value)  # the constructor wants a tensor
            value.base = self.check.bind(name, value.base)
            self.check.check_descriptor(value.base.handle.data, value.strides, value.block_shape)
        elif hasattr(value, "data_ptr"):
            return self.check.bind(name, value)
        elif isinstance(value, (bool, float)):  # a Python float would take on the type of what it meets
            ty = tl.int1 if isinstance(value, bool) else tl.float32
            return tl.tensor(stock.TensorHandle(np.array([value], stock._get_np_dtype(ty)), ty), ty)
        return value

    def _restore_args_dev(self, *args):
        """Nothing to do: kernels worked on the tensors themselves."""

    def __call__(self, *args, **kwargs):
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Triton 3.6 makes integers of arrays
                super().__call__(*args, **kwargs)
        except InterpreterError as error:
            cause = error
            while isinstance(cause, InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__
            raise cause if isinstance(cause, CheckError) else error from None


stock_apply, stock_patch_lang = stock.ReduceScanOpInterface.apply, stock._patch_lang


def reduce_or_scan(self, inputs):
    for block in inputs if isinstance(inputs, tuple) else (inputs,):
        if is_narrow(block.dtype):
            raise NoSuchInstructionError(
                f"reduction or scan of {block.dtype}, rounded at each step: cast to fp32 first"
            )
    return stock_apply(self, inputs)


def check_overflow(semantic, lhs, rhs, operation):
    """Replaces Triton's own check, which takes six interpreted operations for each of the kernel's."""
    x, y, name = lhs.handle.data, rhs.handle.data, operation.__name__
    if x.dtype.kind in "iu" and x.dtype.itemsize < 8:
        exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name](x, y, dtype=np.int64)
        if exact.size and not np.iinfo(x.dtype).min <= exact.min() <= exact.max() <= np.iinfo(x.dtype).max:
            raise IntegerOverflowError(f"{lhs.dtype} overflow in {name}, {semantic.builder.check.where()}")


def patch_lang_once(fn):
    """Patches each module once. It takes a millisecond, and every call of a device function such as tl.cdiv asks for it."""
    check, modules = stock.interpreter_builder.check, {id(tl), id(tl.core)} & set(map(id, fn.__globals__.values()))
    if not modules <= check.patched:
        check.patched |= modules
        return stock_patch_lang(fn)


def min_dot_size(lhs, rhs):
    least, k = 32 if lhs.scalar.primitive_bitwidth == 8 else 16, int(lhs.shape[-1])  # Triton 3.9 lets fp32 have K = 8
    if k < least:
        raise NoSuchInstructionError(f"a dot of {lhs} and {rhs}: expected K >= {least}, got {k}")
    return 1, 1, least


@contextlib.contextmanager
def checked(*, out=(), seed=0, race=True, tf32=True, compute=True, trace=False):
    """Checks all kernels that are launched in the block. With `seed=None`, programs run in launch order."""
    builder = stock.interpreter_builder
    if isinstance(builder, CheckedBuilder):
        raise RuntimeError("checked() within checked(): the outer one sees all launches")
    builder.__class__ = CheckedBuilder  # in place: functions that Triton 3.6 has patched hold on to this object
    builder.check = Check(out, seed, race, tf32, compute, trace)
    try:
        with (
            mock.patch.object(stock, "GridExecutor", CheckedExecutor),
            mock.patch.object(stock, "_patch_lang", patch_lang_once),
            mock.patch.object(stock.ReduceScanOpInterface, "apply", reduce_or_scan),
            mock.patch.object(TritonSemantic, "binary_op_sanitize_overflow_impl", check_overflow),
            mock.patch.object(builder, "options", replace(builder.options, debug=True)),  # kernels' own assertions
            mock.patch.dict(builder.codegen_fns, min_dot_size=min_dot_size),
        ):
            yield builder.check
    finally:
        del builder.check
        builder.__class__ = stock.InterpreterBuilder
