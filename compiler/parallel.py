"""Independent pieces of linear algebra side by side, each on one core."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped, unused-ignore]

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """`function` of every item, in order; NumPy leaves the interpreter to other threads while it computes.

    A layer is too small for BLAS to share out: on a busy machine its threads wait for each other in thousands of short
    products (a solver that takes 0.1 s on one core took 7 s on two, 3.4 s of them spinning).
    """
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        yield from pool.map(function, items)
