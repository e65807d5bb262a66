"""Data sets of every kind, from files written here, through the real `datasets` library."""

import io
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rlvlm.recipe.schema import Columns, Source, Tasks
from rlvlm.records import Chain, Task
from rlvlm.tasks import ImageStore, check_sources, draw_pool, draw_tasks
from rlvlm.tasks.errors import (
    BadCellError,
    BadLevelsError,
    EmptyDataError,
    MissingColumnError,
    MissingDataError,
    MissingRewardError,
    TaskSourceError,
    TooFewTasksError,
    UnreadableDataError,
    UnreadableImageError,
)

WITH_IMAGE = Columns(image="image")


@pytest.fixture(autouse=True)
def own_cache_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def refuse(*address: object) -> None:
        raise AssertionError(f"a local data set went to the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def shade(i: int) -> Image.Image:
    """Row i's picture: its red channel says which row it belongs to."""
    return Image.new("RGB", (4, 4), (i, 0, 255))


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    shade(i).save(buffer, format="PNG")
    return buffer.getvalue()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_jsonl(folder: Path, n: int) -> Path:
    """Paths relative to the file, in a folder beside it."""
    (folder / "pictures").mkdir()
    for i in range(n):
        shade(i).save(folder / "pictures" / f"{i}.png")
    rows = [{"image": f"pictures/{i}.png", "prompt": f"q {i}", "answer": i} for i in range(n)]
    return write_lines(folder / "data.jsonl", rows)


def write_json(folder: Path, n: int) -> Path:
    jsonl = write_jsonl(folder, n)
    path = folder / "data.json"
    path.write_text(json.dumps([json.loads(line) for line in jsonl.read_text().splitlines()], indent=1))
    return path


def write_csv(folder: Path, n: int) -> Path:
    write_jsonl(folder, n)
    path = folder / "data.csv"
    path.write_text("image,prompt,answer\n" + "".join(f"pictures/{i}.png,q {i},{i}\n" for i in range(n)))
    return path


def write_parquet_bytes(folder: Path, n: int) -> Path:
    table = pa.table({"image": [png(i) for i in range(n)], "prompt": [f"q {i}" for i in range(n)], "answer": range(n)})
    pq.write_table(table, folder / "data.parquet")
    return folder / "data.parquet"


def write_parquet_of_datasets(folder: Path, n: int) -> Path:
    rows = {"image": [shade(i) for i in range(n)], "prompt": [f"q {i}" for i in range(n)], "answer": list(range(n))}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def write_folder(folder: Path, n: int) -> Path:
    pictures = folder / "shades"
    (pictures / "train").mkdir(parents=True)
    for i in range(n):
        shade(i).save(pictures / "train" / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "prompt": f"q {i}", "answer": i} for i in range(n)]
    write_lines(pictures / "train" / "metadata.jsonl", rows)
    return pictures


def source_of(path: Path, columns: Columns = WITH_IMAGE, **more: Any) -> Source:
    return Source(dataset=str(path), columns=columns, reward="number", **more)


def text_of(task: Task) -> str:
    return "".join(part.get("text", "") for part in task.messages[0]["content"])


WRITERS = [write_jsonl, write_json, write_csv, write_parquet_bytes, write_parquet_of_datasets, write_folder]


@pytest.mark.parametrize("write", WRITERS)
def test_every_kind_gives_the_same_tasks(write: Callable[[Path, int], Path], tmp_path: Path, store: ImageStore) -> None:
    path = write(tmp_path, 40)
    sources = Tasks(train=(source_of(path),))
    check_sources(sources)
    train = draw_tasks(sources, 30, 5, "train", store)
    assert len({task.id for task in train}) == 30
    for task in train:
        row = int(task.answer)
        assert task.id == f"{path.stem}-train-{row:05d}"
        assert task.messages == (
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"q {row}"}]},
        )
        assert store.image(task.images[0]).getpixel((1, 1)) == (row, 0, 255)
        assert (task.level, task.reward, task.source, dict(task.chains)) == (1, "number", path.stem, {})
    assert [task.answer for task in train] != sorted((task.answer for task in train), key=int), "drawn in random order"


def test_same_seed_same_rows_and_a_longer_pool_starts_alike(tmp_path: Path, store: ImageStore) -> None:
    source = source_of(write_parquet_bytes(tmp_path, 100))
    ids = [
        [task.id for task in draw_pool([source], n, seed, "train", store)] for n, seed in ((20, 1), (50, 1), (20, 2))
    ]
    assert ids[0] == ids[1][:20]
    assert set(ids[0]) != set(ids[2])


def test_held_out_rows_are_one_in_ten_and_copies_stay_on_one_side(tmp_path: Path, store: ImageStore) -> None:
    rows = [{"prompt": f"q {i % 300}", "answer": i % 300} for i in range(600)]  # every row twice
    source = source_of(write_lines(tmp_path / "data.jsonl", rows), Columns())
    sides: dict[str, set[str]] = {}
    for split in ("train", "held_out"):
        with pytest.raises(TooFewTasksError) as caught:
            draw_pool([source], 600, 0, split, store)
        found = int(str(caught.value).split(" are asked for, ")[1].split(" different")[0])
        sides[split] = {task.answer for task in draw_pool([source], found, 0, split, store)}
        assert len(sides[split]) == found, "a copy came along"
    assert len(sides["train"]) + len(sides["held_out"]) == 300
    assert not sides["train"] & sides["held_out"]
    assert 10 <= len(sides["held_out"]) <= 55  # 30 expected, 5 standard deviations


def test_evaluation_of_its_own_is_taken_whole_unless_it_is_trained_on(tmp_path: Path, store: ImageStore) -> None:
    rows = [{"prompt": f"q {i}", "answer": i} for i in range(50)]
    train = source_of(write_lines(tmp_path / "train.jsonl", rows), Columns())
    test = source_of(
        write_lines(tmp_path / "test.jsonl", [{**row, "prompt": "t" + row["prompt"]} for row in rows]), Columns()
    )
    whole = draw_tasks(Tasks(train=(train,), evaluation=(test,)), 50, 0, "held_out", store)
    assert sorted(int(task.answer) for task in whole) == list(range(50))
    trained = {task.answer for task in draw_tasks(Tasks(train=(train,), evaluation=(test,)), 40, 0, "train", store)}
    shared = draw_tasks(Tasks(train=(train,), evaluation=(train,)), 3, 0, "held_out", store)
    assert not {task.answer for task in shared} & trained
    with pytest.raises(
        TooFewTasksError, match=r"tasks\.evaluation\[0\]\.dataset.*50 tasks are asked for.*evaluation\.tasks"
    ):
        draw_tasks(Tasks(train=(train,), evaluation=(train,)), 50, 0, "held_out", store)


def test_levels_chains_lists_of_pictures_and_marks(tmp_path: Path, store: ImageStore) -> None:
    rows = [
        {
            "q": f"left <image> right <image> {i} ?",
            "a": f"{i}.50",
            "pics": [png(2 * i), png(2 * i + 1)],
            "hard": i % 3 + 1,
            "cot": f"<think>\nlook {i}\n</think>{i}",
        }
        for i in range(20)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    columns = Columns(prompt="q", answer="a", image="pics", level="hard", chain="cot")
    for task in draw_pool([source_of(tmp_path / "pairs.parquet", columns)], 10, 0, "train", store):
        row = int(task.id[-5:])
        assert [part["type"] for part in task.messages[0]["content"]] == ["text", "image", "text", "image", "text"]
        assert text_of(task) == f"left  right  {row} ?"
        assert [store.image(key).getpixel((0, 0))[0] for key in task.images] == [2 * row, 2 * row + 1]
        assert (task.answer, task.level) == (f"{row}.50", row % 3 + 1)
        assert task.chains == {"medium": Chain(f"look {row}")}


def test_other_columns_go_to_the_reward_but_nothing_encoded(tmp_path: Path, store: ImageStore) -> None:
    rows = [
        {
            "prompt": f"q {i}",
            "answer": "1",
            "image": png(i),
            "iou": i / 2,
            "box": [1, i],
            "raw": b"\x00",
            "thumb": [png(i)],
        }
        for i in range(20)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for task in draw_pool([source_of(tmp_path / "rows.parquet", WITH_IMAGE)], 10, 0, "train", store):
        row = int(task.id[-5:])
        assert task.columns == {"iou": row / 2, "box": [1, row]}


def test_text_only_rows_and_csv_answers_stay_as_written(tmp_path: Path, store: ImageStore) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(
        "\ufeffprompt,answer\n" + "".join(f"q {i},{a}\n" for i, a in enumerate(["007", "NA", "1.50", "none"] * 20))
    )
    tasks = draw_pool([source_of(path, Columns())], 50, 0, "train", store)
    assert {task.answer for task in tasks} == {"007", "NA", "1.50", "none"}
    assert tasks[0].images == () and tasks[0].messages[0]["content"][0]["type"] == "text"


def test_answers_of_mixed_types(tmp_path: Path, store: ImageStore) -> None:
    answers = [3, "three", 0.5, True, "3"]
    rows = [{"prompt": f"q {i}", "answer": answers[i % 5]} for i in range(100)]
    source = source_of(write_lines(tmp_path / "data.jsonl", rows), Columns())
    for task in draw_pool([source], 60, 0, "train", store):
        assert task.answer == str(answers[int(task.id[-5:]) % 5])


def test_slices_of_a_split(tmp_path: Path, store: ImageStore) -> None:
    path = write_parquet_bytes(tmp_path, 100)
    tasks = draw_pool([source_of(path, split="train[:20]")], 12, 0, "train", store)
    assert max(int(task.answer) for task in tasks) < 20


def test_truncated_picture_is_found_when_loaded_and_names_its_row(tmp_path: Path, store: ImageStore) -> None:
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    buffer = io.BytesIO()
    noise.save(buffer, format="JPEG")
    pictures = [png(i) for i in range(30)]
    pictures[7] = buffer.getvalue()[:-400]
    table = pa.table({"image": pictures, "prompt": [f"q {i}" for i in range(30)], "answer": range(30)})
    pq.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(
        UnreadableImageError, match=r"tasks\.train\[0\]\.columns\.image = .*data\.parquet: .*row 7 is broken"
    ):
        for task in draw_tasks(
            Tasks(train=(source_of(tmp_path / "data.parquet"),)), 24, 0, "train", store
        ):  # row 7 is among these
            store.image(task.images[0])


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("empty.jsonl", "", EmptyDataError, r"dataset = .*empty\.jsonl.* has no rows"),
        ("empty.json", "[]", EmptyDataError, r"dataset = .*has no rows"),
        ("ragged.csv", "prompt,answer\na,b\nc,d,e,f\n", UnreadableDataError, r"cannot be loaded: .*line 3, saw 4"),
        ("late.jsonl", '{"prompt": "a", "answer": 1}\n' * 30 + "{,}", UnreadableDataError, r"cannot be loaded"),
        ("header.csv", "prompt,answer\n", EmptyDataError, r"dataset = .*has no rows"),
        ("bad.jsonl", '{"prompt": "a", "answer"\n', UnreadableDataError, r"dataset = .*cannot be parsed"),
        ("list.jsonl", '{"prompt": "a", "answer": 1}\n[1]\n', UnreadableDataError, r"a line is no JSON object"),
        ("bad.parquet", "this is text", UnreadableDataError, r"dataset = .*cannot be parsed"),
        ("data.xlsx", "?", UnreadableDataError, r"end in '\.xlsx' cannot be read.*\.parquet"),
        ("c.jsonl", '{"prompt": "a", "anwser": 1}', MissingColumnError, r"columns\.answer = answer: .*mean 'anwser'"),
        ("c.csv", "Prompt,answer\na,b\n", MissingColumnError, r"columns\.prompt = prompt.*mean 'Prompt'"),
        ("c.json", '[{"prompt": "a", "label": 1}]', MissingColumnError, r"columns\.answer = answer: .*prompt, label"),
        ("p.jsonl", '{"prompt": "", "answer": 1}', BadCellError, r"columns\.prompt = prompt: row 0 .* has ''"),
        ("a.jsonl", '{"prompt": "x", "answer": null}', BadCellError, r"columns\.answer.*row 0 .* has None"),
        ("l.jsonl", '{"prompt": "x", "answer": [1]}', BadCellError, r"columns\.answer.*row 0 .* has \[1\]"),
        ("m.jsonl", '{"prompt": "<image>?", "answer": 1}', BadCellError, r"1 <image> in its prompt and 0 pictures"),
    ],
)
def test_broken_files(
    name: str, content: str, error: type[TaskSourceError], message: str, tmp_path: Path, store: ImageStore
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message) as caught:
        draw_pool([Source(generator="digits_sum"), source_of(tmp_path / name, Columns())], 2, 0, "train", store)
    assert caught.value.mend
    assert caught.value.key.startswith("tasks.train[1].")


def test_bad_levels_in_rows(tmp_path: Path, store: ImageStore) -> None:
    for level, fine in ((3, 3), ("4", 4), (2.0, 2), (0, None), ("hard", None), (1.5, None), (True, None), (None, None)):
        folder = tmp_path / str(level)
        folder.mkdir()
        rows = [{"prompt": f"q {i}", "answer": 1, "level": level} for i in range(30)]
        source = source_of(write_lines(folder / "data.jsonl", rows), Columns(level="level"))
        if fine is not None:
            assert draw_pool([source], 1, 0, "train", store)[0].level == fine
            continue
        with pytest.raises(BadCellError, match=r"columns\.level = level: row \d+ .* whole numbers from 1"):
            draw_pool([source], 1, 0, "train", store)


def test_pictures_that_are_none_name_file_and_row(tmp_path: Path, store: ImageStore) -> None:
    path = write_jsonl(tmp_path, 1)
    (tmp_path / "pictures" / "0.png").write_text("no picture")
    message = r"columns\.image = pictures/0\.png: the picture of row 0 cannot be read"
    with pytest.raises(UnreadableImageError, match=message):
        draw_pool([source_of(path)], 1, 0, "train", store)
    (tmp_path / "pictures" / "0.png").unlink()
    with pytest.raises(UnreadableImageError, match=r"row 0 cannot be opened.*folder of the data file"):
        draw_pool([source_of(path)], 1, 0, "train", store)
    other = source_of(write_lines(tmp_path / "n.jsonl", [{"prompt": "q", "answer": 1, "image": 5}]))
    with pytest.raises(BadCellError, match=r"row 0 .* has 5 for a picture"):
        draw_pool([other], 1, 0, "train", store)


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write_parquet_bytes(tmp_path, 3)
    with pytest.raises(
        MissingDataError, match=r"tasks\.train\[0\]\.dataset = .*dat\.parquet: .*mean '.*data\.parquet'"
    ):
        check_sources(Tasks(train=(source_of(tmp_path / "dat.parquet"),)))
    with pytest.raises(MissingDataError, match="give the path from the working directory"):
        check_sources(Tasks(train=(source_of(tmp_path / "nowhere" / "x.csv"),)))


def test_missing_split_of_a_folder(tmp_path: Path, store: ImageStore) -> None:
    path = write_folder(tmp_path, 12)
    with pytest.raises(MissingDataError, match=r"tasks\.train\[0\]\.split = test: "):
        draw_pool([source_of(path, split="test")], 1, 0, "train", store)


def test_folder_needs_its_image_column(tmp_path: Path) -> None:
    path = write_folder(tmp_path, 3)
    with pytest.raises(MissingColumnError, match=r"columns\.image: .*called 'image'"):
        check_sources(Tasks(train=(source_of(path, Columns()),)))
    with pytest.raises(
        MissingColumnError, match=r"columns\.image = picture: .*has image, prompt, answer.*mean 'image'"
    ):
        check_sources(Tasks(train=(source_of(path, Columns(image="picture")),)))


def test_reward_and_levels_of_a_data_set(tmp_path: Path) -> None:
    path = str(write_parquet_bytes(tmp_path, 3))
    generator = Source(generator="digits_sum")
    with pytest.raises(MissingRewardError, match=r"tasks\.evaluation\[0\]\.reward: .*; give the reward"):
        check_sources(Tasks(train=(generator,), evaluation=(Source(dataset=path),)))
    with pytest.raises(BadLevelsError, match=r"tasks\.train\[0\]\.levels = \[1\]: .*; remove it; .*columns\.level"):
        check_sources(Tasks(train=(Source(dataset=path, reward="number", levels=(1,)),)))


def test_hub_is_asked_for_a_hub_id_only_and_says_what_failed(
    monkeypatch: pytest.MonkeyPatch, store: ImageStore
) -> None:
    check_sources(Tasks(train=(Source(dataset="nobody/nothing", reward="number"),)))  # no network, no complaint
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        MissingDataError, match=r"tasks\.train\[0\]\.dataset = nobody/nothing: .*not loaded from the hub"
    ):
        draw_pool([Source(dataset="nobody/nothing", reward="number")], 1, 0, "train", store)
