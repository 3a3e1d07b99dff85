"""Pictures in bands of rows, so that intermediate values never take more memory than the picture."""

from __future__ import annotations

from collections.abc import Iterator

BAND = 256  # rows; a multiple of 4, for squares of 4x4 pixels


def bands(height: int) -> Iterator[slice]:
    """
    >>> list(bands(300))
    [slice(0, 256, None), slice(256, 300, None)]
    """
    for top in range(0, height, BAND):
        yield slice(top, min(top + BAND, height))
