"""Triton's own launchers on a CUDA driver that only records (stub_libcuda.c), with CPU tensors: launches are counted, every
kernel parameter that would reach the GPU is compared, and the host's calls are counted.

Import it before anything that starts Triton's driver, in a process of its own with TRITON_LIBCUDA_PATH (see `build`).
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def build(folder: Path) -> dict[str, str]:
    """Compiles the stub into `folder`; returns the environment of a process that uses it."""
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")]
    subprocess.run([*command, str(HERE / "stub_libcuda.c")], check=True)
    paths = os.pathsep.join([str(HERE), str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {
        "TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_DEFAULT_FP_FUSION": "1",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": paths,
    }  # fmt: skip


class Stub:
    """The recording driver, active for Triton. `calls` counts what a function does on the host."""

    def __init__(self) -> None:
        from triton.backends.nvidia.driver import CudaDriver
        from triton.runtime.driver import driver

        self.library = ctypes.CDLL(
            str(Path(os.environ["TRITON_LIBCUDA_PATH"]) / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL
        )
        self.library.stub_grid.restype = ctypes.POINTER(ctypes.c_uint)
        self.library.stub_parameters.restype = ctypes.POINTER(ctypes.c_uint64)
        self.library.stub_stream.restype = self.library.stub_function.restype = ctypes.c_void_p
        active = CudaDriver()
        active.get_current_device = int  # one call into C, as torch._C._cuda_getDevice is
        active.get_current_stream = {0: 7}.__getitem__
        active.get_device_capability = lambda index=0: (9, 0)
        driver.set_active(active)

    def launches(self, call, parameters=0):
        """(grid, kernel parameters, stream and kernel) of each launch that `call` makes."""
        self.library.stub_reset(parameters)
        try:
            call()
            return [
                (
                    tuple(self.library.stub_grid(i)[:3]),
                    tuple(self.library.stub_parameters(i)[:parameters]),
                    (self.library.stub_stream(i), self.library.stub_function(i)),
                )
                for i in range(self.library.stub_launches())
            ]
        finally:
            self.library.stub_reset(0)  # another kernel may have fewer

    def calls(self, call):
        """(calls of Python functions, calls into C) of the second time that `call` runs."""
        counts = {"call": -1, "c_call": -1}  # its own frame, and that of setprofile

        def note(frame, event, argument):
            if event in counts:
                counts[event] += 1

        call()
        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(None)
        return counts["call"], counts["c_call"]
