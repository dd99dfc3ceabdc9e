"""Numbers as files hold them, and the two conversions between them. numpy has no bf16: it is carried as its 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foundation.errors import RequestError


@dataclass(frozen=True)
class DType:
    """A kind of number.

    Attributes:
        name: as the command line says it.
        size: bytes.
        safetensors: its name in a safetensors header.
        torch: its name in `torch`.
        storage: the name of torch's storage class, which rank files and distributed checkpoints hold.
        carrier: the numpy type of the same size that its bits travel in.
    """

    name: str
    size: int
    safetensors: str
    torch: str
    storage: str
    carrier: Any


FP32 = DType("fp32", 4, "F32", "float32", "FloatStorage", np.float32)
BF16 = DType("bf16", 2, "BF16", "bfloat16", "BFloat16Storage", np.uint16)
FP16 = DType("fp16", 2, "F16", "float16", "HalfStorage", np.float16)
FP64 = DType("fp64", 8, "F64", "float64", "DoubleStorage", np.float64)
DTYPES = (FP32, BF16, FP16, FP64)

BY_NAME = {dtype.name: dtype for dtype in DTYPES}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES}
BY_STORAGE = {dtype.storage: dtype for dtype in DTYPES}

ROUND_BLOCK = 1 << 20
"""Elements rounded at a time: intermediate arrays stay in the cache."""


def dtype_named(known: dict[str, DType], name: str, tensor: str, where: str) -> DType:
    """The dtype that a file calls `name`.

    Raises:
        RequestError: weights of no floating-point kind that is converted.
    """
    if name not in known:
        raise RequestError(
            f"tensor {tensor} is {name}",
            where=where,
            rule=f"weights are {', '.join(dtype.name for dtype in DTYPES)}; quantised ones are not converted",
            cure="export the model unquantised first",
        )
    return known[name]


def converted(values: NDArray[Any], source: DType, target: DType) -> NDArray[Any]:
    """`values` (in `source.carrier`) in another dtype (in `target.carrier`), rounded to nearest, ties to even.

    Follows torch's `Tensor.to` bit for bit, except that a NaN keeps no payload.
    """
    if source is target:
        return values
    wide = _widened(values, source)
    if target is FP64:
        return wide.astype(np.float64)
    single = wide.astype(np.float32, copy=False)
    if target is BF16:
        return _rounded_to_bf16(single)
    with np.errstate(over="ignore"):  # to infinity, as torch does
        return single.astype(target.carrier, copy=False)


def _widened(values: NDArray[Any], source: DType) -> NDArray[Any]:
    if source is BF16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _rounded_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    flat = np.ascontiguousarray(values).reshape(-1)
    rounded = np.empty(flat.size, np.uint16)
    for start in range(0, flat.size, ROUND_BLOCK):
        part = flat[start : start + ROUND_BLOCK]
        bits = part.view(np.uint32)
        upper = bits + (0x7FFF + ((bits >> 16) & 1))
        upper >>= 16
        upper[np.isnan(part)] = 0x7FC0
        rounded[start : start + ROUND_BLOCK] = upper
    return rounded.reshape(values.shape)


def as_float64(values: NDArray[Any], dtype: DType) -> NDArray[np.float64]:
    """For comparisons."""
    return _widened(values, dtype).astype(np.float64)
