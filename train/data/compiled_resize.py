"""`resize_area`, compiled: the same result but for rounding, crop and mirror included, without the GIL.

Rows are summed first, whole rows at a time, which the compiler turns into vector instructions; the columns of
the one row that is left follow. Two and three taps, nearly all of what training sees, are written out.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

# Of turbojpeg.h.
TJPF_RGB = 0
TJFLAG_ACCURATEDCT = 4096
TJERR_WARNING = 0


def num_threads(num_workers: int) -> int:
    """`data.num_workers` as a number of threads that numba can have: at least 1."""
    return min(max(1, num_workers), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


@numba.njit(nogil=True, error_model="numpy", cache=True)
def crop_resize_flip(pixels, box, flip, image):
    """Crop, resize by area, and perhaps mirror from left to right.

    Args:
        pixels: uint8, shape (height, width, 3).
        box: top, left, height, width.
        image: uint8, shape (side, side, 3), written to.
    """
    top, left, height, width = np.int64(box[0]), np.int64(box[1]), np.int64(box[2]), np.int64(box[3])
    side = image.shape[0]
    shrinks = height >= side and width >= side
    most = max(2, math.ceil(max(height, width) / side) + 1)
    first = np.empty((2, side), np.int64)
    weights = np.empty((2, side, most), np.float32)
    num_rows = fill_taps(height, side, shrinks, first[0], weights[0])
    num_columns = fill_taps(width, side, shrinks, first[1], weights[1])
    row = np.empty(3 * width, np.float32)
    flat = pixels.reshape(-1)
    stride = 3 * pixels.shape[1]
    begin, step = (3 * (side - 1), -3) if flip else (0, 3)
    for y in range(side):
        start = (top + first[0, y]) * stride + 3 * left
        sum_rows(flat, start, stride, weights[0, y], num_rows, row)
        sum_columns(row, first[1], weights[1], num_columns, begin, step, image[y].reshape(-1))


@numba.njit(nogil=True, error_model="numpy", cache=True)
def fill_taps(size, side, shrinks, first, weights):
    """Which of `size` pixels make each of `side` results: see `train.data.resize`, whose weights these are.

    Args:
        first: int64, shape (side,), the first pixel of each. weights: float32, shape (side, most).

    Returns:
        how many pixels make one result, at most; where there are fewer, weights are 0.
    """
    inverse = side / size
    scale = 1.0 / inverse
    most = 1
    weights[:] = 0
    for place in range(side):
        if shrinks:
            begin, end = place * (size / side), (place + 1) * (size / side)
            start = min(int(begin + 1e-9), size - 1)  # not the pixel that ends where this one begins
            num_taps = 0
            while num_taps < weights.shape[1] and start + num_taps < size:
                pixel = float(start + num_taps)
                covered = min(end, pixel + 1.0) - max(begin, pixel)
                if covered <= 1e-9:
                    break
                weights[place, num_taps] = covered / (size / side)
                num_taps += 1
        else:
            start = math.floor(place * scale)
            fraction = (place + 1) - (start + 1) * inverse
            fraction = 0.0 if fraction <= 0 else fraction - math.floor(fraction)
            if start >= size - 1:
                start, fraction = size - 1, 0.0
            weights[place, 0], weights[place, 1] = 1 - fraction, fraction
            num_taps = 2 if fraction > 0 else 1
        first[place] = start
        most = max(most, num_taps)
    for place in range(side):  # all have as many taps now: none may lie beyond the last pixel
        shift = first[place] + most - size
        if shift > 0:
            first[place] -= shift
            for tap in range(most - 1, -1, -1):
                weights[place, tap] = weights[place, tap - shift] if tap >= shift else 0
    return most


@numba.njit(nogil=True, fastmath=True, error_model="numpy", cache=True, inline="always")
def sum_rows(flat, start, stride, weights, num_taps, row):
    length = len(row)
    a = flat[start : start + length]
    if num_taps == 1:
        for j in range(length):
            row[j] = a[j]
        return
    b = flat[start + stride : start + stride + length]
    if num_taps == 2:
        u, v = weights[0], weights[1]
        for j in range(length):
            row[j] = u * a[j] + v * b[j]
        return
    c = flat[start + 2 * stride : start + 2 * stride + length]
    u, v, w = weights[0], weights[1], weights[2]
    for j in range(length):
        row[j] = u * a[j] + v * b[j] + w * c[j]
    for tap in range(3, num_taps):
        u = weights[tap]
        a = flat[start + tap * stride : start + tap * stride + length]
        for j in range(length):
            row[j] += u * a[j]


@numba.njit(nogil=True, fastmath=True, error_model="numpy", cache=True, inline="always")
def sum_columns(row, first, weights, num_taps, begin, step, out):
    to = begin
    for x in range(len(first)):
        at = 3 * first[x]
        if num_taps == 1:
            out[to], out[to + 1], out[to + 2] = (
                np.uint8(np.rint(row[at])),
                np.uint8(np.rint(row[at + 1])),
                np.uint8(np.rint(row[at + 2])),
            )
        elif num_taps == 2:
            u, v = weights[x, 0], weights[x, 1]
            out[to] = np.uint8(np.rint(u * row[at] + v * row[at + 3]))
            out[to + 1] = np.uint8(np.rint(u * row[at + 1] + v * row[at + 4]))
            out[to + 2] = np.uint8(np.rint(u * row[at + 2] + v * row[at + 5]))
        elif num_taps == 3:
            u, v, w = weights[x, 0], weights[x, 1], weights[x, 2]
            out[to] = np.uint8(np.rint(u * row[at] + v * row[at + 3] + w * row[at + 6]))
            out[to + 1] = np.uint8(np.rint(u * row[at + 1] + v * row[at + 4] + w * row[at + 7]))
            out[to + 2] = np.uint8(np.rint(u * row[at + 2] + v * row[at + 5] + w * row[at + 8]))
        else:
            red = green = blue = np.float32(0)
            for tap in range(num_taps):
                u = weights[x, tap]
                red += u * row[at]
                green += u * row[at + 1]
                blue += u * row[at + 2]
                at += 3
            out[to], out[to + 1], out[to + 2] = (
                np.uint8(np.rint(red)),
                np.uint8(np.rint(green)),
                np.uint8(np.rint(blue)),
            )
        to += step


@intrinsic
def _bytes_at(_context, address):
    """A number as a pointer to bytes."""

    def generate(_context, builder, signature, arguments):
        from llvmlite import ir

        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.CPointer(types.uint8)(address), generate


@numba.njit(nogil=True, parallel=True, error_model="numpy", cache=True)
def resize_flip_all(addresses, heights, widths, flips, images):
    """Whole images that lie anywhere in memory, resized to a batch.

    Args:
        addresses, heights, widths: int64, shape (n,): of uint8 images of shape (height, width, 3).
        flips: bool, shape (n,). images: uint8, shape (n, side, side, 3), written to.
    """
    for position in numba.prange(len(images)):
        height, width = heights[position], widths[position]
        pixels = numba.carray(_bytes_at(addresses[position]), (height, width, 3))  # type: ignore[call-arg]
        box = (np.int64(0), np.int64(0), height, width)
        crop_resize_flip(pixels, box, flips[position], images[position])


@intrinsic
def _call_decompress(
    _context, function, decoder, jpeg, num_bytes, pixels, width, pitch, height, pixel_format, flags
):
    """`tjDecompress2` at an address: a number as argument can be cached, a ctypes function cannot."""
    long, integer = types.int64, types.int32
    taken = (decoder, jpeg, num_bytes, pixels, width, pitch, height, pixel_format, flags)
    wanted = (long, long, long, long, integer, integer, integer, integer, integer)

    def generate(context, builder, signature, arguments):
        from llvmlite import ir

        passed = [
            context.cast(builder, value, given, kind)
            for value, given, kind in zip(arguments[1:], taken, wanted, strict=True)
        ]
        kind = ir.FunctionType(ir.IntType(32), [value.type for value in passed])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), passed)

    return integer(function, *taken), generate


@intrinsic
def _call_error_code(_context, function, decoder):
    """`tjGetErrorCode` at an address."""

    def generate(_context, builder, signature, arguments):
        from llvmlite import ir

        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64)])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])

    return types.int32(function, decoder), generate


@numba.njit(nogil=True, parallel=True, error_model="numpy", cache=True)
def decode_crop_resize_flip(
    functions, decoders, jpegs, bounds, widths, heights, boxes, flips, scratch, images, is_strict
):
    """Decode the JPEGs that lie one after the other in `jpegs`, each between two of `bounds`.

    It is here since numba looks for changes only in the file of what it has cached.

    Args:
        functions: int64, the addresses of `tjDecompress2` and `tjGetErrorCode`.
        decoders: int64, a handle of TurboJPEG for each thread. scratch: room for an image for each thread.
        is_strict: whether a warning of the decoder counts as an error.

    Returns:
        int64, shape (n,): 0 where an image was decoded.
    """
    statuses = np.zeros(len(images), np.int64)
    for position in numba.prange(len(images)):
        height, width = heights[position], widths[position]
        jpeg = jpegs[bounds[position] : bounds[position + 1]]
        thread = numba.get_thread_id()
        decoder = decoders[thread]
        pixels = scratch[thread][: 3 * height * width]
        statuses[position] = _call_decompress(  # type: ignore[call-arg]
            functions[0],
            decoder,
            jpeg.ctypes.data,
            jpeg.size,
            pixels.ctypes.data,
            width,
            0,
            height,
            TJPF_RGB,
            TJFLAG_ACCURATEDCT,
        )
        if (
            statuses[position] != 0
            and not is_strict
            and _call_error_code(functions[1], decoder) == TJERR_WARNING
        ):
            statuses[position] = 0
        if statuses[position] == 0:
            whole = pixels.reshape(height, width, 3)
            crop_resize_flip(whole, boxes[position], flips[position], images[position])
    return statuses
