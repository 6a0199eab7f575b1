"""Captions: COCO's JSON files, or Flickr8k's list (`Flickr8k.token.txt`: NAME#i, a tab, the caption)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpctrain.errors import DataError
from hpctrain.ingest.folder import SUFFIXES
from hpctrain.ingest.reading import Column, Format, Item, LeftOut, Listing, Row

FLICKR_LIST = "Flickr8k.token.txt"
FLICKR_PLACES = ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images", ".")  # the first is how it is published
FLICKR_SPLITS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}


class Captions(Format):
    """Any number of captions per picture. Captions without a picture and pictures without a caption are reported."""

    kind = "captions"
    columns = (Column("captions", "|u1", offsets=True),)  # UTF-8, a zero after each caption

    def listing(self, root: Path) -> Listing:
        for folder in (root, root / "Flickr8k_text"):
            if (folder / FLICKR_LIST).is_file():
                return _flickr(root, folder)
        files = [path for folder in (root, root / "annotations") for path in sorted(folder.glob("captions*.json"))]
        if not files:
            raise DataError(f"{root}: no captions; expected captions*.json, there or in annotations, or {FLICKR_LIST}")
        return _coco(root, files)

    def row(self, root: Path, item: Item, size: tuple[int, int], scale: tuple[float, float]) -> tuple[Row, list[str]]:
        texts = [" ".join(text.replace("\0", " ").split()) for text in item.about]
        if not any(texts):
            raise LeftOut("it has no caption")
        return {"captions": [text for text in texts if text]}, []

    def values(self, row: Row, numbers: Mapping[str, int]) -> dict[str, list[Any]]:
        return {"captions": list("".join(f"{text}\0" for text in row["captions"]).encode(errors="replace"))}


def _coco(root: Path, files: list[Path]) -> Listing:
    """The pictures of all files; a file is a split, unless it says for each picture in which it is."""
    listing = Listing()
    for path in files:
        split = path.stem.removeprefix("captions").strip("_") or "all"
        places = [place for place in (split, f"images/{split}", "images", ".") if (root / place).is_dir()]
        images, captions = _coco_file(path)
        used: dict[str, set[str]] = {}
        for key, image in images.items():
            name = image["file_name"]
            folder = next((place for place in places if (root / place / name).exists()), places[0])
            used.setdefault(folder, set()).add(name)
            item = Item(os.path.normpath(f"{folder}/{name}"), f"{folder}/{name}", captions.pop(key, []))
            listing.add(str(image.get("coco_split") or image.get("split") or split), item)
        for key, texts in captions.items():
            listing.problems.append(f"{path.name}: {len(texts)} captions are of the picture {key}, which is not listed")
        for folder, names in used.items():
            listing.problems += _unused(root / folder, names)
    return listing


def _coco_file(path: Path) -> tuple[dict[Any, dict[str, Any]], dict[Any, list[str]]]:
    """(pictures, captions) by the pictures' ids. Raises DataError."""
    try:
        content = json.loads(path.read_bytes())
        images = {image["id"]: image for image in content["images"]}
        captions: dict[Any, list[str]] = {key: list(image.get("captions", ())) for key, image in images.items()}
        for entry in content.get("annotations", ()):
            captions.setdefault(entry["image_id"], []).append(entry["caption"])
        if not all(isinstance(image["file_name"], str) for image in images.values()):
            raise TypeError
        if not all(isinstance(text, str) for texts in captions.values() for text in texts):
            raise TypeError
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); download it again") from None
    except (KeyError, TypeError, AttributeError):
        raise DataError(
            f"{path} does not have COCO's form: expected `images` with `id` and `file_name`, and `annotations` with "
            "`image_id` and `caption`, or `captions` in each of the images"
        ) from None
    return images, captions


def _flickr(root: Path, texts: Path) -> Listing:
    folder = next(root / place for place in FLICKR_PLACES if (root / place).is_dir())
    listing, captions = Listing(), dict[str, list[str]]()
    for number, line in enumerate(_lines(texts / FLICKR_LIST), start=1):
        name, tab, caption = line.partition("\t")
        if not tab:
            listing.problems.append(f"{FLICKR_LIST}: line {number} has no tab; left out")
            continue
        captions.setdefault(name.rpartition("#")[0] or name, []).append(caption)
    lists = {split: texts / name for split, name in FLICKR_SPLITS.items() if (texts / name).is_file()}
    split_of = {name.strip(): split for split, path in lists.items() for name in _lines(path)}
    for name, given in captions.items():
        path = os.path.relpath(folder / name, root)
        listing.add(split_of.get(name, "other" if lists else "all"), Item(path, path, given))
    listing.problems += _unused(folder, set(captions))
    return listing


def _lines(path: Path) -> Iterator[str]:
    return (line for line in path.read_text(errors="replace").splitlines() if line.strip())


def _unused(folder: Path, names: set[str]) -> list[str]:
    """What to report of pictures in a folder that no caption names."""
    found = (entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(SUFFIXES))
    return [f"{folder.name}/{name}: the picture has no caption; left out" for name in sorted(set(found) - names)]
