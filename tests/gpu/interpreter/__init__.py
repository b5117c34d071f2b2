"""Triton's interpreter with a GPU's arithmetic, and without its own leniency.

    with checked(out=("y",), seed=0) as check:
        kernel[grid](...)                          # any number of launches, also deep inside library functions
    assert check.coverage() == {"y": 1.0} and not check.atomics()
    check.counts()["x"].load.launch_bytes          # what the argument x must move, in bytes
    check.launches[0].kernel, check.launches[0].compulsory("x"), check.flops["bf16"]

The stock interpreter runs kernels on CPU tensors, but it computes on the bit patterns of bf16, truncates casts, gives 0
for masked loads without `other`, reads any address it is given, and runs the programs one after another. Here

- bf16, fp16, fp8 and tf32 round as on a GPU (tf32 to nearest; hardware may truncate, for twice the error);
- a pointer argument has an address space of its own. Touching anything but the elements of its view, such as the gap
  between two rows, raises OutOfBoundsError with the argument's name;
- masked loads without `other` give NaN, or random integers;
- programs run in random order, and two programs that need an order raise RaceError;
- loading what no kernel has stored of an argument named in `out`, as "y" or "kernel.y", raises UnwrittenReadError (an
  argument that starts from what the host put there is no `out`);
- int32 overflow, misaligned accesses, and tensor descriptors and dots that hardware can't do raise an error.

What was touched is recorded by memory, not by argument: a tensor may have another name in the next launch. The end of a
launch orders everything. `race=False` drops the race checks, `compute=False` the arithmetic of dots, `trace=True` keeps
what l2_replay needs. Not modelled: rounding at every step of an fp16 reduction, contraction of `a * b + c` to an FMA,
and threads of one program that are out of step.

Files: `errors`, what is raised; `arithmetic`, how numbers round; `memory`, addresses and when they were touched;
`check`, bounds and races; `counting`, bytes and FLOPs; `patches`, how all of it gets into Triton's interpreter.
"""

from .counting import Traffic
from .errors import (
    CheckError,
    IntegerOverflowError,
    MisalignedError,
    NoSuchInstructionError,
    OutOfBoundsError,
    RaceError,
    UnwrittenReadError,
)
from .memory import Memory, View, far_apart
from .patches import checked

__all__ = [
    "CheckError", "IntegerOverflowError", "Memory", "MisalignedError", "NoSuchInstructionError", "OutOfBoundsError",
    "RaceError", "Traffic", "UnwrittenReadError", "View", "checked", "far_apart",
]  # fmt: skip
