"""NumPy arrays and torch tensors alike: the few things that the array API standard lacks.

A search works with arrays of the decoder's kind where they have an entry per token of the vocabulary or per cell of the
grid, on the decoder's device, and with NumPy where they are small. torch is never imported here before a tensor comes:
it takes seconds.

Shapes: N rows, V entries of a row, K chosen ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = Any
"""A NumPy array or a torch tensor, as the decoder has it. The array API standard has no static type yet."""

Floats: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]

_SORT_BELOW = 64  # a shorter row is sorted as fast as it is searched
_SEARCH_BELOW = 64  # more maxima than these are found faster by sorting


def namespace(array: Array) -> Any:
    """Return the array API namespace of an array's kind.

    Args:
        array: of NumPy or torch.

    Returns:
        A module. For NumPy it is NumPy itself, which follows the standard; array-api-compat's wrapper of it would
        import all of NumPy's parts, for half a second.
    """
    if isinstance(array, np.ndarray):
        return np
    from array_api_compat import array_namespace

    return array_namespace(array)


@contextlib.contextmanager
def inference(like: Array) -> Iterator[None]:
    """Compute without gradients, and let -inf and NaN come without warnings: they have a meaning in a search.

    Args:
        like: an array of the decoder.

    Yields:
        Nothing.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(np.errstate(invalid="ignore", over="ignore"))
        if not isinstance(like, np.ndarray):
            import torch

            stack.enter_context(torch.inference_mode())
        yield


def send(host: npt.NDArray[Any], like: Array) -> Array:
    """Return a NumPy array as one of the decoder's kind on its device, without waiting for the device.

    Args:
        host: not to be written to afterwards: the two may share memory.
        like: an array of the decoder.

    Returns:
        The same values.
    """
    if isinstance(like, np.ndarray):
        return host
    # CUDA copies ordinary memory aside before it returns, so nothing need be waited for; other devices promise less.
    return namespace(like).asarray(host).to(like.device, non_blocking=like.device.type == "cuda")


def fetch(*arrays: Array) -> tuple[npt.NDArray[Any], ...]:
    """Return arrays as NumPy ones, with one wait for the device in all.

    Args:
        *arrays: float32 or int64 below 2 ** 31, of one kind and device.

    Returns:
        Arrays of the same types and shapes; not to be written to.
    """
    if isinstance(arrays[0], np.ndarray):
        return arrays
    if arrays[0].device.type == "cpu":
        return tuple(array.numpy() for array in arrays)
    return unpack(pack(*arrays).cpu().numpy(), arrays)


def pack(*tensors: Array) -> Array:
    """Return tensors of float32 and int64 as one of int32, the bits of floats as they are; see `unpack`."""
    xp = namespace(tensors[0])
    bits = [tensor.view(xp.int32) if tensor.dtype == xp.float32 else tensor.int() for tensor in tensors]
    return xp.concat([tensor.reshape(-1) for tensor in bits])


def unpack(packed: npt.NDArray[np.int32], tensors: Sequence[Array]) -> tuple[npt.NDArray[Any], ...]:
    """Take apart what `pack` joined.

    Args:
        packed: on the host.
        tensors: what was packed, for types and shapes.

    Returns:
        The same values as NumPy arrays.
    """
    parts = np.split(packed, np.cumsum([tensor.numel() for tensor in tensors])[:-1])
    return tuple(
        (part.view(np.float32) if tensor.is_floating_point() else part.astype(np.int64)).reshape(tuple(tensor.shape))
        for part, tensor in zip(parts, tensors, strict=True)
    )


def to_numpy(array: Array) -> npt.NDArray[Any]:
    """Return an array as a NumPy one, on the host.

    Args:
        array: of any type that NumPy has.

    Returns:
        The same values; it may share memory with the array.
    """
    host: npt.NDArray[Any] = array if isinstance(array, np.ndarray) else array.cpu().numpy()
    return host


def float32(array: Array) -> Array:
    """Return an array as float32, itself when it is so already."""
    return array.astype(np.float32, copy=False) if isinstance(array, np.ndarray) else array.float()


def log_softmax(logits_NV: Array) -> Array:
    """Return the log-softmax of each row.

    Args:
        logits_NV: unnormalised, of any floating type.

    Returns:
        float32 [N, V]; all of a row is NaN when one of its logits is NaN or +inf, or all are -inf.
    """
    if not isinstance(logits_NV, np.ndarray):
        return logits_NV.float().log_softmax(dim=-1)
    logits_NV = float32(logits_NV)
    shifted_NV = logits_NV - logits_NV.max(axis=-1, keepdims=True)
    total_N1 = np.exp(shifted_NV).sum(axis=-1, keepdims=True)
    shifted_NV -= np.log(total_N1, out=total_N1)
    return shifted_NV


def topk(values_NV: Array, count: int) -> tuple[Array, Array]:
    """Return the largest values of each row and where they stand, largest first.

    Args:
        values_NV: without NaN in rows whose result matters.
        count: how many, at most V.

    Returns:
        [N, K] and int64 [N, K]. Of equal values NumPy takes the first, torch so for a count of 1. Where fewer than
        `count` values lie above -inf, the places of the others are not defined.
    """
    if not isinstance(values_NV, np.ndarray):
        if count == 1:  # `topk` does not say which of equal ones it takes, `max` does
            best = values_NV.max(dim=-1, keepdim=True)
            return best.values, best.indices
        found = values_NV.topk(count, dim=-1)
        return found.values, found.indices
    rows, width = values_NV.shape
    first_N = np.arange(0, rows * width, width)
    if width < _SORT_BELOW or count >= _SEARCH_BELOW:
        index_NK = np.argsort(-values_NV, axis=-1, kind="stable")[:, :count]
        return values_NV.reshape(-1)[index_NK + first_N[:, None]], index_NK
    # The fastest by far for few: a search for a maximum takes as many values at a time as the processor can.
    left_NV = values_NV.copy()
    left = left_NV.reshape(-1)
    index_NK = np.empty((rows, count), dtype=np.int64)
    best_NK = np.empty((rows, count), dtype=values_NV.dtype)
    for place in range(count):
        index_N = left_NV.argmax(axis=-1)
        index_NK[:, place] = index_N
        index_N += first_N
        best_NK[:, place] = left[index_N]
        left[index_N] = -np.inf
    return best_NK, index_NK


def kth_largest(values_NV: Array, count: int) -> Array:
    """Return [N, 1], the value of rank `count` of each row.

    Args:
        values_NV: without NaN.
        count: 1 is the largest; at most V.

    Returns:
        The values.
    """
    if isinstance(values_NV, np.ndarray):
        place = values_NV.shape[-1] - count
        return np.partition(values_NV, place, axis=-1)[:, place : place + 1]
    return values_NV.topk(count, dim=-1).values[:, -1:]


def unsort(sorted_NV: Array, order_NV: Array) -> Array:
    """Put sorted values back: the opposite of `take_along_axis(values_NV, order_NV, axis=1)`.

    Args:
        sorted_NV: in that order.
        order_NV: int64, a permutation of each row.

    Returns:
        The values in their own places.
    """
    if isinstance(sorted_NV, np.ndarray):
        values_NV = np.empty_like(sorted_NV)
        np.put_along_axis(values_NV, order_NV, sorted_NV, axis=1)
        return values_NV
    return sorted_NV.new_empty(sorted_NV.shape).scatter(1, order_NV, sorted_NV)
