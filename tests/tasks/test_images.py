import hashlib
import io
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlvlm.tasks.images import ImageStore, UnknownImageError, UnreadableImageError, decode, probe


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def test_key_is_a_hash_of_mode_size_and_pixels(store: ImageStore) -> None:
    image = Image.new("RGB", (2, 3), (1, 2, 3))
    assert store.add(image) == hashlib.sha256(b"RGB 2x3 " + bytes([1, 2, 3] * 6)).hexdigest()[:16]
    assert store.add(image.copy()) == store.add(image)
    assert store.add(Image.new("RGB", (3, 2), (1, 2, 3))) != store.add(image), "same bytes, other size"


def test_pictures_come_back_as_rgb(store: ImageStore) -> None:
    key = store.add(Image.new("L", (1, 1), 77))
    assert store.image(key).getpixel((0, 0)) == (77, 77, 77)


def test_lazy_pictures_load_when_needed_and_the_oldest_is_dropped(tmp_path: Path) -> None:
    store, loaded = ImageStore(tmp_path, cached=2), []

    def loader(shade: int) -> Image.Image:
        loaded.append(shade)
        return Image.new("RGB", (1, 1), (shade, 0, 0))

    keys = [store.add_lazy(bytes([shade]), lambda shade=shade: loader(shade)) for shade in range(3)]
    assert keys[1] == hashlib.sha256(b"\x01").hexdigest()[:16] and loaded == []
    for shade in (0, 1, 0, 2, 0, 1):  # 2 drops 1, which was used before 0
        assert store.image(keys[shade]).getpixel((0, 0)) == (shade, 0, 0)
    assert loaded == [0, 1, 2, 1]


def test_save_writes_once_and_another_store_finds_it(tmp_path: Path) -> None:
    first, second = ImageStore(tmp_path / "shared"), ImageStore(tmp_path / "shared")
    key = first.add(Image.new("RGB", (4, 4), (9, 8, 7)))
    path = first.save(key)
    assert path == tmp_path / "shared" / f"{key}.png"
    written = path.stat().st_mtime_ns
    assert first.save(key) == path and path.stat().st_mtime_ns == written
    assert second.image(key).getpixel((3, 3)) == (9, 8, 7)
    assert [file.name for file in path.parent.iterdir()] == [f"{key}.png"], "no half-written file stays"


def test_unknown_key_says_what_to_do(store: ImageStore) -> None:
    with pytest.raises(UnknownImageError, match=r"0123.*draw the tasks with this store"):
        store.image("0123")


def test_threads_share_a_small_cache(tmp_path: Path) -> None:
    store = ImageStore(tmp_path, cached=3)
    keys = [store.add_lazy(bytes([i]), lambda i=i: Image.new("RGB", (1, 1), (i, i, i))) for i in range(20)]
    wrong: list[int] = []

    def read(seed: int) -> None:
        for i in random.Random(seed).choices(range(20), k=300):
            if store.image(keys[i]).getpixel((0, 0)) != (i, i, i):
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_decode_lays_transparency_on_white_and_turns_photographs_upright() -> None:
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 51))  # a fifth of black on white: 255 * 0.8
    assert decode(encoded(half), key="k", name="f", row=0).getpixel((0, 0)) == (204, 204, 204)
    wide = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held so that the picture has to be turned clockwise
    upright = decode(encoded(wide, exif=turned), key="k", name="f", row=0)
    assert upright.size == (1, 2)
    assert [upright.getpixel((0, y)) for y in (0, 1)] == [(255, 0, 0), (0, 0, 255)]


def test_broken_pictures_name_file_and_row() -> None:
    whole = encoded(Image.effect_noise((64, 64), 50).convert("RGB"))
    where = {"key": "tasks.train[0].columns.image", "name": "x.png", "row": 12}
    for data in (b"", b"no picture", whole[: len(whole) // 2]):
        with pytest.raises(UnreadableImageError, match=r"tasks\.train\[0\]\.columns\.image = x\.png: .*row 12"):
            decode(data, **where)
    with pytest.raises(UnreadableImageError, match=r"row 12 has mode I;16.*8 bits"):
        probe(encoded(Image.new("I;16", (2, 2), 5000)), **where)
    probe(whole, **where)
