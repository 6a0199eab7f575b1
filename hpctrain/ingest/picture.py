"""Opens a picture and brings it to the size that all pictures of a data set have."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

Size = tuple[int, int]


@dataclass(frozen=True)
class Fitted:
    """`pixels`: side * side * 3 bytes, RGB, row by row; `size`: width and height of the picture in its file; `scale`:
    by what its x and y were multiplied."""

    pixels: bytes
    size: Size
    scale: tuple[float, float]


def padded(size: Size, side: int) -> Size:
    """The longer side becomes `side`; what the shorter one leaves free is black, on the right or below."""
    longer = max(size)
    return max(1, round(size[0] * side / longer)), max(1, round(size[1] * side / longer))


def stretched(size: Size, side: int) -> Size:
    """Both sides become `side`."""
    return side, side


FITS: dict[str, Callable[[Size, int], Size]] = {"pad": padded, "stretch": stretched}


def opened_picture(path: Path) -> Image.Image:
    """The picture in that file, as RGB. Raises ValueError, saying what is wrong, if there is none that can be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                return file.convert("RGB")
    except FileNotFoundError:
        raise ValueError("is missing") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:  # of a damaged file, Pillow's formats raise anything
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, UnidentifiedImageError):
            reason = "it is of no known format"
        raise ValueError(f"cannot be read ({reason})") from None


def fitted(picture: Image.Image, side: int, fit: str) -> Fitted:
    """The picture (RGB) in a square; the left upper corner stays where it is, so boxes need only be scaled."""
    width, height = FITS[fit](picture.size, side)
    square = picture.resize((width, height), Image.Resampling.BILINEAR)
    if (width, height) != (side, side):
        small, square = square, Image.new("RGB", (side, side))
        square.paste(small)
    return Fitted(square.tobytes(), picture.size, (width / picture.width, height / picture.height))
