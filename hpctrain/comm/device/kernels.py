"""CUDA C++ source of the kernel that adds up arrays, compiled by CuPy (NVRTC) on first use. Not yet run on a GPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from hpctrain.comm.base import BFLOAT16

ADDITION = "add_up"  # the name of the kernel
THREADS = 256  # per block
BLOCKS = 4096  # at most; a thread then takes several elements

# Without NVIDIA's headers for 16-bit types, which NVRTC does not always find. Each has: the type in memory, the type in
# which to add, and the conversions. bfloat16 is rounded to nearest, ties to even, as torch does; a NaN stays one.
FLOAT16 = """
__device__ float wide(unsigned short x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
__device__ unsigned short narrow(float x) {
    unsigned short y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y;
}
"""
BFLOAT = """
__device__ float wide(unsigned short x) { return __uint_as_float((unsigned)x << 16); }
__device__ unsigned short narrow(float x) {
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40u;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
"""
SAME = "__device__ {0} wide({0} x) {{ return x; }} __device__ {0} narrow({0} x) {{ return x; }}"
TYPES: dict[np.dtype[Any], tuple[str, str, str]] = {
    np.dtype(np.float16): ("unsigned short", "float", FLOAT16),
    BFLOAT16: ("unsigned short", "float", BFLOAT),
    np.dtype(np.float32): ("float", "float", SAME.format("float")),
    np.dtype(np.float64): ("double", "double", SAME.format("double")),
}


@cache
def addition(count: int, dtype: np.dtype[Any]) -> str:
    """Source of a kernel with the arguments part_0, ..., part_(count-1), out, length (int64). `out` may be a part."""
    kept, added, conversions = TYPES[dtype]
    parts = ", ".join(f"const {kept}* part_{index}" for index in range(count))
    summands = "".join(f"\n        total += wide(part_{index}[i]);" for index in range(1, count))
    return f"""{conversions}
extern "C" __global__ void {ADDITION}({parts}, {kept}* out, long long length) {{
    long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < length; i += step) {{
        {added} total = wide(part_0[i]);{summands}
        out[i] = narrow(total);
    }}
}}
"""
