"""A few reads at a time, their results in order.

Assumes: reads release the GIL for most of their time (Parquet, S3).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_READERS = 8

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def in_order(items: Iterable[_In], read: Callable[[_In], _Out]) -> Iterator[_Out]:
    """`read` of every item, a few threads ahead of the consumer, in the order of the items."""
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[Future[_Out]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > _READERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
