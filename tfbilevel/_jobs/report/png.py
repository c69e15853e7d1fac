"""Images as PNG, written without any package."""

import base64
import struct
import zlib
from typing import NamedTuple

import numpy as np

# The widest or highest thumbnail, in pixels.
LARGEST = 128
# The colour type in a PNG's header, by number of channels.
COLOUR = {1: 0, 2: 4, 3: 2, 4: 6}


class Thumbnail(NamedTuple):
    """An image for an HTML page: its data address and its size in pixels."""

    uri: str
    width: int
    height: int

    @property
    def small(self) -> bool:
        """Whether it is shown larger than it is."""
        return max(self.width, self.height) < LARGEST // 2


def thumbnail(image: np.ndarray, low: float, high: float) -> Thumbnail:
    """An image [h, w, c] as a PNG of at most `LARGEST` pixels a side.

    Args:
        image: of any numeric dtype.
        low: what is black.
        high: what is white.
    """
    image = _smaller(np.asarray(image, np.float64))
    if image.shape[-1] not in COLOUR:
        image = image[..., :1]
    scaled = (image - low) * (255.0 / ((high - low) or 1.0))
    pixels = np.clip(np.rint(np.nan_to_num(scaled)), 0, 255).astype(np.uint8)
    encoded = base64.b64encode(png(pixels)).decode()
    height, width = pixels.shape[:2]
    return Thumbnail(f"data:image/png;base64,{encoded}", width, height)


def png(pixels: np.ndarray) -> bytes:
    """Pixels [h, w, 1 to 4 channels] of uint8 as the bytes of a PNG file."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, COLOUR[channels], 0, 0, 0)
    # Every line begins with the number of its filter; 0 is none.
    lines = np.zeros((height, 1 + width * channels), np.uint8)
    lines[:, 1:] = pixels.reshape(height, -1)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, content)
        for kind, content in (
            (b"IHDR", header),
            (b"IDAT", zlib.compress(lines.tobytes(), 9)),
            (b"IEND", b""),
        )
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def _smaller(image: np.ndarray) -> np.ndarray:
    """The means of square blocks of pixels, so that the larger side is short enough."""
    height, width, channels = image.shape
    block = -(-max(height, width) // LARGEST)
    if block == 1:
        return image
    rows, columns = max(height // block, 1), max(width // block, 1)
    high, wide = min(block, height), min(block, width)
    image = image[: rows * high, : columns * wide]
    return image.reshape(rows, high, columns, wide, channels).mean(axis=(1, 3))
