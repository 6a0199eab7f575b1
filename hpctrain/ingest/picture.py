"""Opens a picture and brings it to the size that all pictures of a data set have."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

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


class _TooDeep(ValueError):
    """A picture with more than 8 bits per colour."""


def stored_picture(path: Path) -> Image.Image:
    """The picture as the file stores it, as RGB, on white if it is transparent. Raises ValueError, saying what is
    wrong, if there is none that can be read."""
    with _loaded(path) as file:
        return _opaque(file)


def upright_picture(path: Path) -> Image.Image:
    """The same, turned or mirrored as EXIF says that it is to be looked at."""
    with _loaded(path) as file:
        with suppress(Exception):  # of damaged EXIF data, Pillow raises anything; the picture itself may be fine
            ImageOps.exif_transpose(file, in_place=True)
        return _opaque(file)


def _opaque(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")  # a copy would cost a tenth of the reading
    colours = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")


@contextmanager
def _loaded(path: Path) -> Iterator[Image.Image]:
    """The picture in that file. Errors of the block are its errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                if file.mode[0] in "IF":  # Pillow cuts their values off at 255 instead of scaling them
                    raise _TooDeep(f"has more than 8 bits per colour (mode {file.mode}); convert it to 8 bits")
                file.load()
                yield file
    except _TooDeep:
        raise
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
