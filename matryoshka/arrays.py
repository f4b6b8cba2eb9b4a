"""Checks of array arguments: what a function takes stands above it, and nothing else is cast.

    @takes(predictions=integers("G N"), labels=integers("N"))
    def agreement(predictions, labels): ...

NumPy turns a mask into row numbers 0 and 1, 2.9 into 2 and 2^64 - 1 into -1 without a word. With
`takes`, such an argument is an error. Letters are sizes, which must agree between the arguments;
with a "+" a size is at least 1. A number is the size itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import numpy as np

P = ParamSpec("P")
T = TypeVar("T")
INT64 = np.iinfo(np.int64)


class ArrayError(ValueError):
    """An array of another type, shape or range than a function takes; names the argument."""

    user_error = True


@dataclass(frozen=True)
class Expected:
    """What an argument must be: kinds of dtypes, see np.dtype.kind, and a size for each axis.

    sizes: letters or numbers, None for any shape. finite: no NaN and no infinity. low: the smallest
    value. itemsize: bytes of a number, 0 for any.
    """

    name: str
    kinds: str
    sizes: tuple[str, ...] | None
    finite: bool = False
    low: int | None = None
    itemsize: int = 0


def _sizes(shape: str | None) -> tuple[str, ...] | None:
    return None if shape is None else tuple(shape.split())


def integers(shape: str | None = None, *, low: int | None = None) -> Expected:
    """Integers of 64 bits at most, not booleans; uint64 arrives as int64."""
    return Expected("integers", "iu", _sizes(shape), low=low)


def booleans(shape: str | None = None) -> Expected:
    """Booleans."""
    return Expected("booleans", "b", _sizes(shape))


def floats(shape: str | None = None, *, finite: bool = False) -> Expected:
    """Floating point numbers of any width."""
    return Expected("floating point numbers", "f", _sizes(shape), finite)


def numbers(shape: str | None = None, *, finite: bool = False) -> Expected:
    """Integers or floating point numbers."""
    return Expected("numbers", "fiu", _sizes(shape), finite)


def uint8(shape: str | None = None) -> Expected:
    """Unsigned integers of 8 bits."""
    return Expected("uint8", "u", _sizes(shape), itemsize=1)


def takes(
    error: type[ValueError] = ArrayError, /, **arguments: Expected
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: check these arguments of a function before it runs, and make arrays of lists.

    An argument whose annotation has None may be None. Objects with a NumPy dtype, a shape and
    `ndim` pass as they are: they may be larger than memory. `error` is raised for all that does not
    fit.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        parameters = inspect.signature(function).parameters
        order = list(parameters)
        # Annotations are texts: all modules import them from __future__.
        optional = {name for name in arguments if "None" in str(parameters[name].annotation)}
        positions = [(name, order.index(name), arguments[name]) for name in arguments]

        @functools.wraps(function)
        def checked(*args: Any, **options: Any) -> T:
            given = list(args)
            lengths: dict[str, tuple[int, str]] = {}
            for name, position, expected in positions:
                value = options.get(name)
                if position < len(given):
                    value = given[position]
                elif name not in options:
                    continue  # its default, or the function's own error
                if value is None and name in optional:
                    continue
                value = as_array(value, name, error)
                value = _fitting(value, name, expected, lengths, error)
                if position < len(given):
                    given[position] = value
                else:
                    options[name] = value
            return function(*given, **options)  # pyright: ignore[reportCallIssue]

        checked.takes = arguments  # pyright: ignore[reportAttributeAccessIssue]
        return checked  # pyright: ignore[reportReturnType]

    return decorate


def as_array(value: Any, name: str, error: type[ValueError] = ArrayError) -> Any:
    """Arrays, lists and CPU tensors as an array; what has a NumPy dtype and a shape stays."""
    if isinstance(getattr(value, "dtype", None), np.dtype) and hasattr(value, "shape"):
        return value
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as reason:
        first_line = (str(reason).splitlines() or [type(reason).__name__])[0]
        raise error(f"{name}: {first_line}; give an array, or a tensor on the CPU") from None


def as_int64(array: np.ndarray, name: str, error: type[ValueError] = ArrayError) -> np.ndarray:
    """An array of integers as int64. `error` for other types, and for numbers that do not fit."""
    if array.dtype.kind not in "iu":
        # NumPy makes float64 of an empty list.
        if array.dtype.kind == "f" and array.shape == (0,):
            return np.zeros(0, np.int64)
        raise error(f"{name}: {_described(array)}, expected integers")
    if array.dtype.kind == "u" and array.dtype.itemsize == 8 and array.size:
        largest = int(array.max())
        if largest > INT64.max:
            raise error(f"{name}: has {largest}, expected at most {INT64.max}")
    return np.asarray(array, np.int64)


def as_float32(rows: np.ndarray) -> np.ndarray:
    """Rows as float32, [..., D]. Rows of wider types are scaled where float32 cannot hold them.

    The factor is a power of two for each row, the same for all its numbers, so that cosines do not
    change. NaN and infinity stay.
    """
    if rows.dtype.kind != "f" or rows.dtype.itemsize <= 4 or not rows.size:
        return np.asarray(rows, np.float32)
    with np.errstate(all="ignore"):
        finite = np.where(np.isfinite(rows), np.abs(rows), 0)
        largest = finite.max(-1, keepdims=True)
        _, exponent = np.frexp(largest)
        # Squares of 2^60 and of 2^-60 are far from both ends of float32.
        is_outside = (np.abs(exponent) > 60) & (largest > 0)
        scaled = np.ldexp(rows, np.where(is_outside, -exponent, 0))
        return scaled.astype(np.float32)


def _fitting(
    array: Any,
    name: str,
    expected: Expected,
    lengths: dict[str, tuple[int, str]],
    error: type[ValueError],
) -> Any:
    """The array, as int64 if it is uint64. `error` unless type, shape and range fit."""
    is_empty_list = array.dtype.kind == "f" and array.shape == (0,)
    is_right = array.dtype.kind in expected.kinds
    if expected.itemsize and array.dtype.itemsize != expected.itemsize:
        is_right = False
    if not is_right and not is_empty_list:
        raise error(f"{name}: {_described(array)}, expected {_wanted(expected)}")
    if expected.sizes is not None:
        _check_shape(array, name, expected, lengths, error)
    if "f" not in expected.kinds and is_empty_list:
        return array.astype(bool if expected.kinds == "b" else np.int64)
    if array.dtype.kind == "u" and array.dtype.itemsize == 8:
        array = as_int64(array, name, error)
    if expected.finite and array.dtype.kind == "f" and not np.isfinite(array).all():
        raise error(f"{name}: has NaN or infinity, expected finite numbers")
    if expected.low is not None and array.size and array.min() < expected.low:
        raise error(f"{name}: has {array.min()}, expected {expected.low} or more")
    return array


def _check_shape(
    array: Any,
    name: str,
    expected: Expected,
    lengths: dict[str, tuple[int, str]],
    error: type[ValueError],
) -> None:
    """`error` for another number of axes, an empty axis with "+", and sizes that disagree."""
    sizes = expected.sizes or ()
    if array.ndim != len(sizes):
        raise error(f"{name}: {_described(array)}, expected {_wanted(expected)}")
    for size, letter in zip(array.shape, sizes, strict=True):
        if letter.endswith("+") and not size:
            raise error(f"{name}: {_described(array)}, expected one or more")
        if letter.isdigit():
            if size != int(letter):
                raise error(f"{name}: {_described(array)}, expected {_wanted(expected)}")
            continue
        known, by = lengths.setdefault(letter.removesuffix("+"), (size, name))
        if size != known:
            raise error(
                f"{name}: {_described(array)}, but {by} has {known} where {name} has {size}"
            )


def _described(array: Any) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _wanted(expected: Expected) -> str:
    if expected.sizes is None:
        return expected.name
    return f"{expected.name} [{', '.join(s.removesuffix('+') for s in expected.sizes)}]"
