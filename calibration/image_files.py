"""Images that calibration records name or hold; no path leads out of the directory of the records."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from quantize.calibration.table_files import bounded_reading
from quantize.errors import QuantizeError, UsageError, shown

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow hands some others to other programs
LARGEST = 1 << 26  # pixels


def read_image(image: Any, root: Path | None, source: str) -> Image.Image:
    """Return an image in RGB.

    Args:
        image: a path, the `bytes` or the `path` of an image as tables hold them, or an image of Pillow.
        root: the directory of the records, which no path leads out of; None takes no paths.
        source: where the records come from, for messages.

    Raises:
        UsageError: the path leads out of the directory, or there is no such file.
        QuantizeError: the image is damaged, too large, or none.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    held = image.get("bytes") if isinstance(image, Mapping) else None
    if isinstance(held, bytes):
        return decoded(io.BytesIO(held), Path(source), f"an image in {source}")
    name = image.get("path") if isinstance(image, Mapping) else image
    if not isinstance(name, str):
        raise UsageError(f"{source} has {shown(image)} where an image is expected; give its path")
    what = f"the image {shown(name)} of {source}"
    if root is None:
        raise UsageError(f"{what} is a path, and there is no file that it could start from; give an image of Pillow")
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"{what} lies outside of the directory of the records; put it there")
    if not path.is_file():
        raise UsageError(f"{what} is no file in the directory of the records, and nothing is fetched; put it there")
    return decoded(path, path, what)


def decoded(file: Path | io.BytesIO, path: Path, what: str) -> Image.Image:
    """Return the image in a file in RGB; `path` and `what` name it in messages."""
    with bounded_reading(path):
        try:
            with Image.open(file, formats=FORMATS) as found:
                if found.width * found.height > LARGEST:
                    raise QuantizeError(f"{what} has more than {LARGEST:,} pixels; give a smaller one")
                return found.convert("RGB")
        except UnidentifiedImageError:
            raise QuantizeError(f"{what} is damaged, or none of {', '.join(FORMATS)}; give one of these") from None
