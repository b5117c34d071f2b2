"""Addresses: which elements an argument has, and when each byte of its memory was last touched."""

import mmap

import numpy as np
import torch

SPACE_BITS = 46  # of addresses that belong to one argument, so many that no computed offset reaches another's
MIDDLE = 1 << (SPACE_BITS - 1)  # about where the argument's first element is in its space
ALIGNMENT = 256  # bytes to which a GPU aligns allocations; virtual addresses keep the real ones' remainder
PAGE = 4096  # bytes of memory that get a shadow together
WRITER, ATOMIC, FIRST_READER, LAST_READER, LANE = range(5)  # rows of a shadow


def far_apart(shape, stride, dtype):
    """Zeros of any stride. The range of addresses is only reserved; pages take memory when they are touched."""
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, a name that Python has since 3.13
    return torch.frombuffer(mmap.mmap(-1, extent * dtype.itemsize, flags=flags), dtype=dtype).as_strided(shape, stride)


class Memory:
    """When the bytes of a storage were touched: one time on the check's clock for each `unit` bytes, 0 for never.

    Pages that were never touched have no shadow, so a view with enormous strides costs no more than its rows.
    """

    def __init__(self, storage):
        self.storage = storage  # kept alive, so that its address never becomes another tensor's
        self.unit = 8
        self.page_place = np.zeros(
            storage.nbytes() // PAGE + 1, np.int64
        )  # a page's place in the shadow, from 1; 0: none
        self.pages = 0
        self.shadow = np.zeros((5, 0), np.int32)

    def cells(self, offsets, size):
        """The columns of the shadow for elements of `size` bytes: size // unit columns for each."""
        if size < self.unit:
            self.shadow = np.repeat(self.shadow, self.unit // size, axis=1)
            self.unit = size
        page = offsets // PAGE
        if not self.page_place[page].all():
            new = np.unique(page[self.page_place[page] == 0])
            self.page_place[new] = np.arange(self.pages, self.pages + len(new)) + 1
            self.pages += len(new)
            missing = self.pages * PAGE // self.unit - self.shadow.shape[1]
            if missing > 0:  # at least doubled, because many small steps would copy it many times
                more = np.zeros((5, max(missing, self.shadow.shape[1])), np.int32)
                self.shadow = np.concatenate([self.shadow, more], axis=1)
        first = ((self.page_place[page] - 1) * PAGE + offsets % PAGE) // self.unit
        each = size // self.unit
        return first if each == 1 else (first[:, None] + np.arange(each)).ravel()


class View:
    """A pointer argument of one launch. Offsets are relative to its first element."""

    def __init__(self, name, tensor, memory):
        self.name, self.memory = name, memory
        self.shape, self.stride, self.itemsize = tuple(tensor.shape), tensor.stride(), tensor.element_size()
        self.start = tensor.data_ptr()
        self.in_storage = self.start - memory.storage.data_ptr()  # bytes
        self.dims = []  # outermost first, merged where no gap is between the rows
        steps = [(n, s) for n, s in zip(self.shape, self.stride, strict=True) if n > 1 and s > 0]
        for n, s in sorted(steps, key=lambda dim: -dim[1]):
            if self.dims and self.dims[-1][1] == n * s:
                n *= self.dims.pop()[0]
            self.dims.append((n, s))
        reach = [1 + sum((n - 1) * s for n, s in self.dims[i:]) for i in range(len(self.dims) + 1)]
        self.extent = 0 if 0 in self.shape else reach[0]
        self.overlaps = any(s < inner for (_, s), inner in zip(self.dims, reach[1:], strict=True))

    def elements(self):
        offsets = np.zeros(1 if self.extent else 0, np.int64)
        for n, s in self.dims:
            offsets = (offsets[:, None] + np.arange(n) * s).ravel()
        return offsets

    def contains(self, offsets):
        inside = (offsets >= 0) & (offsets < self.extent)
        if self.overlaps:  # such as a sliding window, where an offset does not determine the indices
            return inside & np.isin(offsets, self.elements())
        if self.dims and self.dims[0][1] > 1:
            for n, s in self.dims:
                index = offsets // s
                inside &= index < n
                offsets = offsets - index * s
            inside &= offsets == 0
        return inside
