"""A user's own data as tasks: parquet, json, jsonl and csv files, folders of pictures, data sets of the hub.

`check` reads a header or the first lines only. `draw` goes through the `datasets` library, which is imported then (it
is slow) and which uses the network for a hub id only. Rows count from 0.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from rlvlm.recipe.errors import ABSENT
from rlvlm.records import Chain, Task
from rlvlm.tasks.errors import (
    BadCellError,
    EmptyDataError,
    MissingColumnError,
    MissingDataError,
    TooFewTasksError,
    UnreadableDataError,
    UnreadableImageError,
    nearest,
)
from rlvlm.tasks.generator import split_of, user_message
from rlvlm.tasks.images import ImageStore, decode, probe

if TYPE_CHECKING:
    from rlvlm.recipe.schema import Source

Part = Literal["train", "held_out", "all"]

# The style under which a data set's chain goes: the plain one, which default recipes imitate.
CHAIN_STYLE = "medium"
IMAGE_MARK = "<image>"

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_PEEKED_LINES = 20


class Encoded(NamedTuple):
    """A picture as a row has it: encoded bytes, or the path of its file."""

    data: bytes | None
    path: str | None


@dataclass(frozen=True, slots=True)
class Row:
    """The cells of a row that make a task."""

    index: int
    prompt: str
    answer: str
    level: int
    chain: str | None
    pictures: tuple[Encoded, ...]
    others: Mapping[str, Any]

    @property
    def identity(self) -> bytes:
        """Tells rows apart by content, so that a row that occurs twice never stands on both sides of the split."""
        pictures = [
            picture.data if picture.data is not None else str(picture.path).encode() for picture in self.pictures
        ]
        # Hashes have one length: no two rows give the same bytes by a shift between their parts.
        parts = [hashlib.sha256(part).digest() for part in (self.prompt.encode(), *pictures)]
        return hashlib.sha256(b"".join(parts)).digest()


def name_of(source: Source) -> str:
    """The name of a data set in tasks and reports: its file name without ending, or the last part of its hub id."""
    path = Path(str(source.dataset))
    return path.stem if path.suffix in _BUILDERS else path.name


def same_rows(source: Source, other: Source) -> bool:
    """Whether both read the same split of the same data set."""
    if source.dataset is None or other.dataset is None:
        return False
    same_place = Path(source.dataset).resolve() == Path(other.dataset).resolve()
    return same_place and _split_name(source) == _split_name(other)


def check(source: Source, key: str) -> None:
    """Finds missing files, unknown columns and empty files without loading the data; of a hub id it checks nothing.

    key: the source's place in the recipe, as `tasks.train[0]`; the keys of errors start with it.
    Raises MissingDataError, UnreadableDataError, EmptyDataError or MissingColumnError.
    """
    path = _local(source, key)
    if path is None:
        return
    if path.is_dir() and source.columns.image is None:
        mend = "the pictures' column is called 'image'; for a data set without pictures give its file"
        raise MissingColumnError(f"{key}.columns.image", ABSENT, f"{path} is a folder of pictures", mend)
    columns = _peek(path, source, key)
    if columns is not None:
        _check_columns(source, columns, key)


def draw(
    source: Source, n: int, seed: int, part: Part, store: ImageStore, prefix: str, used: set[str], key: str
) -> list[Task]:
    """n tasks of different rows of one part (`all`: no split), in an order drawn by `seed`; ids are `<prefix>-<row>`.

    used: the fingerprints of the pool so far; rows in it are passed over, those drawn are added. The pictures are noted
    in `store`, not decoded. Raises TooFewTasksError, UnreadableImageError, BadCellError or what `check` raises.
    """
    table = _load(source, key)
    order = np.random.default_rng(_seed(seed, prefix)).permutation(len(table))
    tasks: list[Task] = []
    for index in order:
        row = _read_row(table, int(index), source, key)
        fingerprint = row.identity.hex()
        if fingerprint in used or (part != "all" and split_of(row.identity) != part):
            continue
        used.add(fingerprint)
        tasks.append(_task(row, table, source, store, f"{prefix}-{row.index:05d}", key))
        if len(tasks) == n:
            return tasks
    of = "" if part == "all" else f" for {part} (one row in ten is held out)"
    asked = "evaluation.tasks or sft.gate.tasks" if part == "held_out" else "sft.examples, rl.pool or evaluation.tasks"
    mend = f"lower {asked}, lower this source's weight, or give more data"
    if part == "held_out":
        mend += "; a data set of its own under tasks.evaluation is taken whole"
    problem = f"{n} tasks are asked for, {len(tasks)} different rows are there{of}"
    raise TooFewTasksError(f"{key}.dataset", source.dataset, problem, mend)


def _seed(seed: int, prefix: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {prefix}".encode()).digest()[:8], "big")


# --- finding and opening ---------------------------------------------------------------------------------------------


def _split_name(source: Source) -> str:
    """`train` of `train[:100]`."""
    return source.split.partition("[")[0]


def _local(source: Source, key: str) -> Path | None:
    """The file or folder; None for a hub id. Raises MissingDataError if it is neither."""
    path = Path(str(source.dataset))
    if path.is_dir() or (path.is_file() and path.suffix in _BUILDERS):
        return path
    if path.is_file():
        mend = f"give a {', '.join(_BUILDERS)} file or a folder of pictures"
        problem = f"files that end in {path.suffix!r} cannot be read"
        raise UnreadableDataError(f"{key}.dataset", source.dataset, problem, mend)
    if path.suffix not in _BUILDERS and _HUB_ID.fullmatch(str(source.dataset)):
        return None
    there = nearest(path.name, (file.name for file in path.parent.iterdir())) if path.parent.is_dir() else None
    mend = f"did you mean {str(path.parent / there)!r}?" if there else "give the path from the working directory"
    raise MissingDataError(f"{key}.dataset", source.dataset, "there is no such file or folder", mend)


def _load(source: Source, key: str) -> Any:
    """A `datasets.Dataset` of the columns in use and of those that a reward may want, giving raw values: pictures stay
    encoded."""
    check(source, key)
    import datasets  # slow to import: only when a data set is drawn
    import pyarrow as pa

    path = _local(source, key)
    try:
        table = _open(source, path, datasets)
    except (datasets.exceptions.DatasetsError, ValueError, OSError, pa.ArrowException) as error:
        _raise_unloadable(source, path, key, error)
    _check_columns(source, table.column_names, key)
    if len(table) == 0:
        raise EmptyDataError(
            f"{key}.dataset", source.dataset, f"the split {source.split!r} has no rows", "give more data"
        )
    used = _columns(source).values()
    others = [field.name for field in table.features.arrow_schema if not _holds_bytes(field.type)]
    return table.select_columns(list(dict.fromkeys([*used, *others]))).with_format("arrow")


def _holds_bytes(kind: Any) -> bool:
    """Whether values of this Arrow type hold something encoded: a picture, a sound."""
    import pyarrow as pa

    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return True
    return any(_holds_bytes(kind.field(index).type) for index in range(kind.num_fields))


def _open(source: Source, path: Path | None, datasets: Any) -> Any:
    if path is None:
        return datasets.load_dataset(source.dataset, split=source.split)
    if path.is_dir():
        return datasets.load_dataset("imagefolder", data_dir=str(path), split=source.split)
    options: dict[str, Any] = {}
    if path.suffix == ".csv":
        # Types are not guessed: the answers 007 and NA are text, and stay as they are.
        header = _csv_header(path)
        options = {
            "features": datasets.Features({column: datasets.Value("string") for column in header}),
            "keep_default_na": False,
        }
    files = {_split_name(source): str(path)}
    return datasets.load_dataset(_BUILDERS[path.suffix], data_files=files, split=source.split, **options)


def _raise_unloadable(source: Source, path: Path | None, key: str, error: Exception) -> None:
    # `datasets` wraps the reader's own complaint, which names the line or the column.
    reason = f"{error}" if error.__cause__ is None else f"{error} ({error.__cause__})"
    if re.match("Unknown split|Bad split", str(error)):
        mend = "give one of the splits of the data set"
        raise MissingDataError(f"{key}.split", source.split, reason, mend) from error
    if "corresponds to no data" in str(error):
        raise EmptyDataError(f"{key}.dataset", source.dataset, "it has no rows", "give more data") from error
    if path is None:
        mend = "for a file or folder give its path; for a hub id check its spelling, the network and your access"
        problem = f"no such path, and not loaded from the hub: {reason}"
        raise MissingDataError(f"{key}.dataset", source.dataset, problem, mend) from error
    raise UnreadableDataError(
        f"{key}.dataset", source.dataset, f"it cannot be loaded: {reason}", "mend the file"
    ) from error


# --- looking at the columns without loading --------------------------------------------------------------------------


def _columns(source: Source) -> dict[str, str]:
    """Key under `columns` -> the column that it names."""
    return {field: column for field, column in source.columns if column is not None}


def _check_columns(source: Source, existing: list[str], key: str) -> None:
    for field, column in _columns(source).items():
        if column not in existing:
            problem = f"{source.dataset} has no such column; it has {', '.join(existing)}"
            mend = f"did you mean {nearest(column, existing)!r}?"
            raise MissingColumnError(f"{key}.columns.{field}", column, problem, mend)


def _peek(path: Path, source: Source, key: str) -> list[str] | None:
    """The columns of a file, or of a folder's metadata; None where they cannot be told cheaply."""
    if path.is_dir():
        return _peek_folder(path, source, key)
    try:
        columns = _peek_file(path)
    except (ValueError, OSError, csv.Error) as error:  # pyarrow's errors and JSON's are ValueErrors
        problem = f"{path} cannot be parsed ({error})"
        raise UnreadableDataError(f"{key}.dataset", source.dataset, problem, "mend the file") from error
    if columns == []:
        raise EmptyDataError(f"{key}.dataset", source.dataset, f"{path} has no rows", "give more data")
    return columns


def _peek_folder(path: Path, source: Source, key: str) -> list[str] | None:
    places = [folder / name for folder in (path, path / _split_name(source)) for name in _METADATA]
    metadata = next((place for place in places if place.is_file()), None)
    if metadata is None:
        return None
    columns = _peek(metadata, source, key) or []
    # `datasets` makes the column `image` of `file_name`, and `left` of `left_file_name`.
    plain = {"file_name": "image", "file_names": "images"}
    return [plain.get(column) or re.sub(r"_file_names?$", "", column) for column in columns] or None


def _peek_file(path: Path) -> list[str] | None:
    """The columns; an empty list if there is no row."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path)
        return list(file.schema_arrow.names) if file.metadata.num_rows else []
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as lines:
            header, first = next(csv.reader(lines), []), next(csv.reader(lines), None)
        return header if first is not None else []
    return _peek_json(path)


def _csv_header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        return next(csv.reader(lines))


def _peek_json(path: Path) -> list[str] | None:
    with path.open(encoding="utf-8-sig") as file:
        start = next((line for line in file if line.strip()), "")
        if not start.lstrip().startswith("{"):  # an array in one piece: `datasets` will tell
            return None if start else []
        file.seek(0)
        try:
            rows = [json.loads(line) for line in islice(file, _PEEKED_LINES) if line.strip()]
        except json.JSONDecodeError:
            if path.suffix == ".json":  # one object over several lines
                return None
            raise
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no JSON object")
    return list(dict.fromkeys(column for row in rows for column in row))


# --- rows to tasks ---------------------------------------------------------------------------------------------------


def _cells(table: Any, index: int) -> Mapping[str, Any]:
    """A row as plain values."""
    from datasets import Json

    cells = table[index].to_pylist()[0]
    # `datasets` stores a column of mixed types (1, "one") as JSON text, and raw values still are that text.
    mixed = [column for column, feature in table.features.items() if isinstance(feature, Json)]
    return cells | {column: json.loads(cells[column]) for column in mixed if cells[column] is not None}


def _read_row(table: Any, index: int, source: Source, key: str) -> Row:
    cells = _cells(table, index)
    columns = source.columns

    def bad(field: str, problem: str, mend: str) -> BadCellError:
        column = getattr(columns, field)
        return BadCellError(f"{key}.columns.{field}", column, f"row {index} of {source.dataset} {problem}", mend)

    prompt, answer = cells[columns.prompt], cells[columns.answer]
    if not isinstance(prompt, str) or not prompt.strip():
        raise bad("prompt", f"has {prompt!r} where the question belongs", "name a column of texts")
    if answer is None or answer != answer or isinstance(answer, list | dict | bytes) or not str(answer).strip():
        raise bad("answer", f"has {answer!r} where the answer belongs", "fill it in or remove the row")
    level = 1 if columns.level is None else _as_level(cells[columns.level])
    if level is None:
        raise bad("level", f"has {cells[str(columns.level)]!r} for its level", "levels are whole numbers from 1")
    chain = None if columns.chain is None else cells[columns.chain]
    if chain is not None and not isinstance(chain, str):
        raise bad("chain", f"has {chain!r} where the chain belongs", "name a column of texts")
    try:
        pictures = () if columns.image is None else tuple(_pictures(cells[columns.image]))
    except TypeError as error:
        raise bad("image", f"has {error} for a picture", "give encoded bytes, a path, or a list of them") from error
    if IMAGE_MARK in prompt and prompt.count(IMAGE_MARK) != len(pictures):
        problem = f"has {prompt.count(IMAGE_MARK)} {IMAGE_MARK} in its prompt and {len(pictures)} pictures"
        raise bad("prompt", problem, f"write {IMAGE_MARK} once for each picture, or not at all")
    named = set(_columns(source).values())
    others = {column: value for column, value in cells.items() if column not in named}
    return Row(index, prompt, str(answer), level, chain, pictures, others)


def _as_level(value: object) -> int | None:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None


def _pictures(cell: Any) -> Iterator[Encoded]:
    """The pictures of a cell: none, one, or a list of them. Raises TypeError with the value that is none of these."""
    if isinstance(cell, list):
        for item in cell:
            yield from _pictures(item)
    elif isinstance(cell, bytes):
        yield Encoded(cell, None)
    elif isinstance(cell, str) and cell:
        yield Encoded(None, cell)
    elif isinstance(cell, dict) and (cell.get("bytes") is not None or cell.get("path")):
        yield Encoded(cell.get("bytes"), cell.get("path"))
    elif cell is not None and cell != "":
        raise TypeError(repr(cell))


def _task(row: Row, table: Any, source: Source, store: ImageStore, task_id: str, key: str) -> Task:
    where = f"{key}.columns.image"
    keys = []
    for position, picture in enumerate(row.pictures):
        data = _bytes_of(picture, source, row.index, where)
        probe(data, key=where, name=picture.path or str(source.dataset), row=row.index)
        keys.append(store.add_lazy(data, partial(_decode_cell, table, row.index, position, source, where)))
    chains = {} if row.chain is None else {CHAIN_STYLE: Chain(_thought(row.chain))}
    return Task(
        id=task_id,
        messages=(_message(row),),
        images=tuple(keys),
        answer=row.answer,
        reward=str(source.reward),
        level=row.level,
        source=name_of(source),
        chains=chains,
        columns=row.others,
    )


def _message(row: Row) -> dict[str, object]:
    """The user turn; pictures stand where the prompt marks them, else in front."""
    if IMAGE_MARK not in row.prompt:
        return user_message(row.prompt, len(row.pictures))
    first, *rest = row.prompt.split(IMAGE_MARK)
    content: list[dict[str, str]] = [{"type": "text", "text": first}]
    for text in rest:
        content += [{"type": "image"}, {"type": "text", "text": text}]
    return {"role": "user", "content": [part for part in content if part["type"] == "image" or part["text"].strip()]}


def _thought(chain: str) -> str:
    # Chains often come as whole responses, marks and answer included; SFT writes these itself.
    return chain.partition("</think>")[0].strip().removeprefix("<think>").strip()


def _bytes_of(picture: Encoded, source: Source, row: int, key: str) -> bytes:
    """The encoded bytes; a path is taken from the data file's folder. Raises UnreadableImageError."""
    if picture.data is not None:
        return picture.data
    given = Path(str(source.dataset))
    path = (given if given.is_dir() else given.parent) / str(picture.path)  # an absolute path stays as it is
    try:
        return path.read_bytes()
    except OSError as error:
        mend = "paths count from the folder of the data file"
        problem = f"the picture of row {row} cannot be opened ({error})"
        raise UnreadableImageError(key, picture.path, problem, mend) from error


def _decode_cell(table: Any, row: int, position: int, source: Source, key: str) -> Image.Image:
    """Decodes one picture of a row, from the table or its file: no encoded bytes stay in memory."""
    cell = _cells(table, row)[str(source.columns.image)]
    picture = list(_pictures(cell))[position]
    data = _bytes_of(picture, source, row, key)
    return decode(data, key=key, name=picture.path or str(source.dataset), row=row)
