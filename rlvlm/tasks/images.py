"""Pictures travel by reference: a record carries a key, the ImageStore of the run gives the picture."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image, ImageOps

from rlvlm.tasks.errors import UnreadableImageError

__all__ = ["ImageStore", "UnknownImageError", "UnreadableImageError", "content_key", "decode", "probe"]

# Pillow's decoders raise all of these on broken files.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_MEND = "mend or remove this row (rows count from 0)"


class UnknownImageError(KeyError):
    """A key that this store has never given out and whose folder has no such picture."""


def probe(data: bytes, *, key: str, name: str, row: int) -> None:
    """Raises UnreadableImageError unless encoded bytes look, by their header alone, like a picture for `decode`."""
    _open(data, key, name, row)


def decode(data: bytes, *, key: str, name: str, row: int) -> Image.Image:
    """The RGB picture that encoded bytes hold, upright and with transparency laid on white.

    key: the recipe key for the message; name, row: the file and the row (from 0) that the bytes came from.
    Raises UnreadableImageError if the bytes are no picture, are cut short, or have more than 8 bits a channel.
    """
    picture = _open(data, key, name, row)
    try:
        picture.load()
        picture = ImageOps.exif_transpose(picture)
    except _BROKEN as error:
        raise UnreadableImageError(key, name, f"the picture of row {row} is broken ({error})", _MEND) from error
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _open(data: bytes, key: str, name: str, row: int) -> Image.Image:
    try:
        picture: Image.Image = Image.open(io.BytesIO(data))
    except _BROKEN as error:
        raise UnreadableImageError(key, name, f"the picture of row {row} cannot be read ({error})", _MEND) from error
    if picture.mode[0] in "IF":  # Pillow would clip 16 bits to white without a word
        problem = f"the picture of row {row} has mode {picture.mode}, more than 8 bits a channel"
        raise UnreadableImageError(key, name, problem, "convert it to 8 bits a channel")
    return picture


def content_key(image: Image.Image) -> str:
    """The first 16 hex digits of the sha256 of a picture's mode, size and pixels as RGB."""
    rgb = _rgb(image)
    return hashlib.sha256(f"{rgb.mode} {rgb.width}x{rgb.height} ".encode() + rgb.tobytes()).hexdigest()[:16]


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


class ImageStore:
    """The pictures of a run. Drawn ones stay in memory; those of a data set are loaded when needed, and the `cached`
    last used of them are kept. A picture that another process saved to `folder` is found there. Safe to use from
    several threads. Pictures are shared: whoever wants to change one copies it."""

    def __init__(self, folder: Path, cached: int = 512) -> None:
        self.folder = Path(folder)
        self._cached = cached
        self._kept: dict[str, Image.Image] = {}
        self._loaders: dict[str, Callable[[], Image.Image]] = {}
        self._recent: OrderedDict[str, Image.Image] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, image: Image.Image) -> str:
        """Keeps a picture (as RGB) and returns its `content_key`."""
        rgb = _rgb(image)
        key = content_key(rgb)
        self._kept.setdefault(key, rgb)
        return key

    def add_lazy(self, key_bytes: bytes, load: Callable[[], Image.Image]) -> str:
        """Notes how to load a picture and returns its key: the first 16 hex digits of the sha256 of `key_bytes`, which
        stand for the content (the encoded file)."""
        key = hashlib.sha256(key_bytes).hexdigest()[:16]
        self._loaders.setdefault(key, load)
        return key

    def image(self, key: str) -> Image.Image:
        """The RGB picture. Raises UnknownImageError, or what the loader raises (UnreadableImageError)."""
        if key in self._kept:
            return self._kept[key]
        with self._lock:
            if key in self._recent:
                self._recent.move_to_end(key)
                return self._recent[key]
        picture = self._load(key)
        with self._lock:
            self._recent[key] = picture
            while len(self._recent) > self._cached:
                self._recent.popitem(last=False)
        return picture

    def save(self, key: str) -> Path:
        """Writes `<folder>/<key>.png` unless it is there, and returns its path; a reader never sees half a file."""
        path = self._path(key)
        if path.exists():
            return path
        picture = self.image(key)
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".{key}.{os.getpid()}.{threading.get_ident()}"
        picture.save(part, format="PNG")
        os.replace(part, path)
        return path

    def save_all(self, keys: Iterable[str]) -> None:
        """`save` for each."""
        for key in keys:
            self.save(key)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.png"

    def _load(self, key: str) -> Image.Image:
        if key in self._loaders:
            return _rgb(self._loaders[key]())
        if self._path(key).exists():
            with Image.open(self._path(key)) as file:
                return file.convert("RGB")
        mend = f"draw the tasks with this store, or save the picture to {self.folder}"
        raise UnknownImageError(f"there is no picture with the key {key!r}: {mend}")
