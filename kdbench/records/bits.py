"""Which test samples a network predicts right, as a text in its record: a bit a sample."""

from __future__ import annotations

import base64
import binascii

import numpy as np
from numpy.typing import ArrayLike, NDArray


def packed(bits: ArrayLike) -> str:
    """`N:BASE64` of N bits, eight to a byte, the first the highest."""
    each = np.asarray(bits, dtype=bool)
    return f"{len(each)}:{base64.b64encode(np.packbits(each).tobytes()).decode()}"


def unpacked(text: str) -> NDArray[np.bool_]:
    """The bits, bool [N]. Raises ValueError for a text that `packed` does not give."""
    count, _, content = text.partition(":")
    try:
        octets = np.frombuffer(base64.b64decode(content, validate=True), dtype=np.uint8)
    except binascii.Error as error:
        raise ValueError(f"no bits: {error}") from error
    if not count.isdecimal() or len(count) > 12 or len(octets) != -(-int(count) // 8):
        raise ValueError(f"no bits: {len(octets)} bytes are said to hold {count[:12]!a} of them")
    return np.unpackbits(octets, count=int(count)).astype(bool)
