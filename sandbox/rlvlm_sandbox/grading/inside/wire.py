"""Values as plain data: from Python to JSON and back, without running code of the other side.

A value is an atom of JSON, or a list that starts with a tag. Containers that can change lie apart, in numbered entries;
a value refers to them by number. So what is shared stays shared, cycles and long linked lists are no special case, and
what has been changed can be told from what has not.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import re
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

MAX_BYTES = 16 << 20  # of one message
_DEPTH = 150  # of tuples in tuples; what lies in entries nests as deep as it likes
_CROWD = 64  # so many members of a set, mostly of one hash, are an attack

Entry = list[Any]


class WireError(Exception):
    """It cannot be plain data, or it is not what `encode` makes."""


class Links(Protocol):
    """What knows of objects that stay on their side; the other side has their number."""

    def give(self, value: object) -> int: ...
    def given(self, number: int) -> object: ...
    def remote(self, number: int, name: str, called: bool) -> object: ...
    def remote_number(self, value: object) -> int | None: ...
    def stream(self, number: int, ahead: bool) -> Iterator[Any]: ...
    def coroutine(self, number: int) -> Coroutine[Any, Any, Any]: ...
    def class_name(self, kind: type) -> str | None: ...
    def find_class(self, name: str) -> type | None: ...


class NoLinks:
    """Nothing stays on its side: functions and objects of unknown classes are refused."""

    def give(self, value: object) -> int:
        raise WireError(f"a value of type {type(value).__name__} is no plain data")

    def given(self, number: int) -> object:
        raise WireError("an object is no plain data")

    def remote(self, number: int, name: str, called: bool) -> object:
        raise WireError(f"{name} is no plain data")

    def remote_number(self, value: object) -> int | None:
        return None

    def stream(self, number: int, ahead: bool) -> Iterator[Any]:
        raise WireError("an iterator is no plain data")

    def coroutine(self, number: int) -> Coroutine[Any, Any, Any]:
        raise WireError("a coroutine is no plain data")

    def class_name(self, kind: type) -> str | None:
        return None

    def find_class(self, name: str) -> type | None:
        return None


def encode(value: object, links: Links, known: Sequence[object] = ()) -> tuple[Any, list[Entry], list[Any]]:
    """Returns the value, the entries, and the objects that the entries stand for, which start with `known`.
    Raises WireError for what cannot be sent."""
    encoder = _Encoder(links, known)
    try:
        sent = encoder.value(value)
        return sent, encoder.entries(), encoder.objects
    except RecursionError as error:
        raise WireError("it is nested too deep") from error


def decode(
    value: Any, entries: Mapping[int, Entry], links: Links, own: Mapping[int, object] | None = None, fill: bool = False
) -> tuple[Any, dict[int, Any]]:
    """Returns the value, and the objects by number. own: objects that we have already; fill: and that take the content
    of their entries. Raises WireError for whatever is not as `encode` makes it: the sender may be anybody."""
    try:
        decoder = _Decoder(links, own or {})
        decoder.add(entries, fill)
        return decoder.value(value), decoder.objects
    except WireError:
        raise
    except Exception as error:  # forged data can fail anywhere; it is refused under one name
        raise WireError(f"a message is malformed: {type(error).__name__}: {error}") from error


# ---- to data

_ATOMS = frozenset({type(None), bool, float})
_LARGE = 1 << 63
_BASES: dict[type, str] = {
    int: "i", float: "", complex: "k", str: "s", bytes: "b", tuple: "t", frozenset: "f", list: "l", set: "S",
    bytearray: "B", deque: "q", Counter: "C", OrderedDict: "O", defaultdict: "D", dict: "d",
}  # fmt: skip
_HEAP = frozenset({list, set, bytearray, deque, Counter, OrderedDict, defaultdict, dict})
_TYPES = {
    kind.__name__: kind
    for kind in (
        type(None), bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, range, object,
    )
}  # fmt: skip
# Values that are made again from the arguments of their class.
_MADE: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "builtins.complex": lambda x: (x.real, x.imag),
    "builtins.range": lambda x: (x.start, x.stop, x.step),
    "builtins.slice": lambda x: (x.start, x.stop, x.step),
    "decimal.Decimal": lambda x: (str(x),),
    "fractions.Fraction": lambda x: (x.numerator, x.denominator),
    "datetime.date": lambda x: (x.year, x.month, x.day),
    "datetime.time": lambda x: (x.hour, x.minute, x.second, x.microsecond, x.tzinfo),
    "datetime.datetime": lambda x: (x.year, x.month, x.day, x.hour, x.minute, x.second, x.microsecond, x.tzinfo),
    "datetime.timezone": lambda x: (x.utcoffset(None),),
    "datetime.timedelta": lambda x: (x.days, x.seconds, x.microseconds),
}
_VIEWS = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}
_FINITE = frozenset(map(type, ((iter(())), iter([]), iter(range(0)), iter(""), iter({}), iter(set()), reversed([]))))
_NUMBERS = re.compile(r"[<>|=][biufcSUMm]\d+(\[\w+\])?")  # numpy's name of a type of numbers or texts


class _Encoder:
    def __init__(self, links: Links, known: Sequence[object]) -> None:
        self.links = links
        self.objects: list[Any] = list(known)
        self._numbers = {id(value): number for number, value in enumerate(known)}

    def entries(self) -> list[Entry]:
        entries: list[Entry] = []
        while len(entries) < len(self.objects):  # an entry may bring more objects
            entries.append(self._entry(self.objects[len(entries)]))
        return entries

    def value(self, value: Any, depth: int = 0) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind is int and -_LARGE < value < _LARGE:
            return value
        if kind is str and value.isascii():
            return value
        if id(value) in self._numbers:
            return ["@", self._numbers[id(value)]]
        if (number := self.links.remote_number(value)) is not None:
            return ["r", number]
        if depth > _DEPTH:
            raise WireError(f"it is nested more than {_DEPTH} deep")
        if kind in _BASES:
            return self._plain(kind, value, depth)
        return self._other(kind, value, depth)

    def _plain(self, base: type, value: Any, depth: int) -> Any:
        """Of one of our types, or of a subclass: read by the type's own methods, whatever the subclass says."""
        if base in _HEAP:
            return self._put(value)
        if base in (tuple, frozenset):
            return [_BASES[base], *(self.value(item, depth + 1) for item in base.__iter__(value))]
        if base is bytes:
            return ["b", _text_of(bytes.__add__(value, b""))]
        if base is str:
            text = str.__str__(value)
            return text if _is_text(text) else ["s", _text_of(text.encode("utf-8", "surrogatepass"))]
        if base is int:
            number = int.__add__(value, 0)
            return number if -_LARGE < number < _LARGE else ["i", hex(number)]
        if base is float:
            return float.__pos__(value)
        return self._made("builtins.complex", complex.__pos__(value), depth)

    def _other(self, kind: type, value: Any, depth: int) -> Any:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in _MADE:
            return self._made(name, value, depth)
        if kind in _VIEWS:
            return ["v", _VIEWS[kind], *(self.value(item, depth + 1) for item in value)]
        if kind.__module__ == "numpy" and (sent := self._numpy(value)) is not None:
            return sent
        if kind is type and value.__name__ in _TYPES and _TYPES[value.__name__] is value:
            return ["y", value.__name__]
        own = self.links.class_name(kind)
        if own is not None and hasattr(kind, "__members__"):
            return ["E", own, value._name_, self.value(value._value_, depth + 1)]
        base = next((base for base in kind.__mro__ if base in _BASES), None)
        if own is not None and base is tuple:
            fields = [str(field) for field in getattr(kind, "_fields", ())]
            return ["u", own, fields, *(self.value(item, depth + 1) for item in tuple.__iter__(value))]
        if base is not None:
            return self._plain(base, value, depth)
        if own is not None and not issubclass(kind, (BaseException, Iterator)) and not callable(value):
            return self._put(value)
        if hasattr(kind, "__next__") and hasattr(kind, "__iter__"):
            return self._stream(kind, value, depth)
        if kind is types.CoroutineType:
            return ["A", self.links.give(value)]
        name = str(getattr(value, "__name__", None) or kind.__name__)
        return ["p", self.links.give(value), name[:100], callable(value)]

    def _made(self, name: str, value: Any, depth: int) -> Any:
        return ["k", name, *(self.value(item, depth + 1) for item in _MADE[name](value))]

    def _stream(self, kind: type, value: Any, depth: int) -> Any:
        """Iterators that are sure to end go whole, others item by item as they are asked for; or some ahead, where
        nothing else can be asked of them."""
        if kind in _FINITE:
            return ["I", None, *(self.value(item, depth + 1) for item in value)]
        return ["I", self.links.give(value), kind.__module__ in ("builtins", "itertools")]

    def _numpy(self, value: Any) -> Any:
        numpy: Any = sys.modules["numpy"]
        if not isinstance(value, (numpy.ndarray, numpy.generic)) or not _NUMBERS.fullmatch(value.dtype.str):
            return None
        return (
            self._put(value) if isinstance(value, numpy.ndarray) else ["N", value.dtype.str, _text_of(value.tobytes())]
        )

    def _put(self, value: Any) -> Any:
        number = self._numbers[id(value)] = len(self.objects)
        self.objects.append(value)  # and alive, or its id could be another's
        return ["@", number]

    def _entry(self, value: Any) -> Entry:
        kind = type(value)
        if self.links.remote_number(value) is not None:  # we know it by number only, and cannot change it
            return []
        base = kind if kind in _HEAP else next((base for base in kind.__mro__ if base in _HEAP), None)
        if base is None:
            return self._array(value) if kind.__module__ == "numpy" else self._instance(value)
        tag = _BASES[base]
        if base is bytearray:
            return [tag, _text_of(bytearray.__add__(value, b""))]
        if base in (list, set):
            return [tag, *map(self.value, base.__iter__(value))]
        if base is deque:
            return [tag, value.maxlen, *map(self.value, deque.__iter__(value))]
        head: Entry = [tag]
        if base is defaultdict:
            factory = value.default_factory
            head.append(factory.__name__ if factory in _TYPES.values() else None)
        return [*head, *(self.value(part) for pair in dict.items(value) for part in pair)]

    def _array(self, value: Any) -> Entry:
        return ["n", value.dtype.str, list(value.shape), _text_of(value.tobytes())]

    def _instance(self, value: Any) -> Entry:
        attributes = [(name, item) for name, item in attributes_of(value).items() if isinstance(name, str)]
        head = ["o", self.links.class_name(type(value)), self.links.give(value)]
        return [*head, *(self.value(part) for pair in attributes for part in pair)]


def attributes_of(value: object) -> dict[str, Any]:
    """What its dictionary and its slots hold."""
    attributes = dict(getattr(value, "__dict__", {}))
    for name, slot in _slots(type(value)).items():
        try:
            attributes[name] = slot.__get__(value)
        except AttributeError:  # not set
            continue
    return attributes


def _slots(kind: type) -> dict[str, Any]:
    members = ((name, member) for owner in kind.__mro__ for name, member in vars(owner).items())
    return {name: member for name, member in members if type(member) is types.MemberDescriptorType}


def _text_of(data: bytes | bytearray) -> str:
    import binascii  # takes long, and is seldom needed

    return binascii.b2a_base64(data, newline=False).decode()


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---- from data


class _Decoder:
    def __init__(self, links: Links, own: Mapping[int, object]) -> None:
        self.links = links
        self.objects: dict[int, Any] = dict(own)

    def add(self, entries: Mapping[int, Entry], fill: bool) -> None:
        own = set(self.objects)
        for number, entry in entries.items():
            if number not in own:
                self.objects[number] = self._empty(entry)
        # What is hashed comes last, as its hash may look into what is filled first.
        late = frozenset("SdOCD")
        for is_late in (False, True):
            for number, entry in entries.items():
                if entry and (entry[0] in late) is is_late and (fill or number not in own):
                    self._fill(self.objects[number], entry)

    def value(self, value: Any) -> Any:
        if type(value) is not list:
            if type(value) is dict:
                raise WireError("a message is malformed: it has an object of JSON")
            return value
        tag, *parts = value
        if tag == "@":
            return self.objects[parts[0]]
        return _READERS[tag](self, parts)

    def values(self, parts: Iterable[Any]) -> list[Any]:
        return [self.value(part) for part in parts]

    def _empty(self, entry: Entry) -> Any:
        tag, *parts = entry
        if tag == "q":
            return deque(maxlen=parts[0])
        if tag == "D":
            factory: Any = None if parts[0] is None else _TYPES[parts[0]]
            return defaultdict(factory)
        if tag == "n":
            return _array(parts[0], parts[2]).reshape(parts[1]).copy()
        if tag == "o":
            kind = self.links.find_class(parts[0])
            return self.links.remote(int(parts[1]), str(parts[0]), False) if kind is None else object.__new__(kind)
        return _EMPTY[tag]()

    def _fill(self, target: Any, entry: Entry) -> None:
        tag, *parts = entry
        if self.links.remote_number(target) is not None:
            return
        kind = type(target)
        if tag == "n":
            if kind.__module__ != "numpy" or target.shape != tuple(parts[1]) or target.dtype.str != parts[0]:
                raise WireError("an array came back with another shape")
            target[...] = _array(parts[0], parts[2]).reshape(parts[1])
        elif tag == "o":
            if self.links.class_name(kind) != parts[0]:
                raise WireError(f"an object came back as {parts[0]}")
            _set_attributes(target, _pairs(self.values(parts[2:])))
        elif tag == "B":
            bytearray.__setitem__(target, slice(None), _bytes_of(parts[0]))
        elif tag == "l":
            list.__setitem__(target, slice(None), self.values(parts))
        elif tag == "q":
            deque.clear(target)
            deque.extend(target, self.values(parts[1:]))
        elif tag == "S":
            items = uncrowded(self.values(parts))
            set.clear(target)
            set.update(target, items)
        else:
            pairs = _pairs(self.values(parts[tag == "D" :]))
            uncrowded([key for key, _ in pairs])
            dict.clear(target) if not isinstance(target, OrderedDict) else OrderedDict.clear(target)
            for key, item in pairs:
                target[key] = item

    def typed(self, parts: list[Any]) -> Any:
        name, *arguments = parts
        if name not in _MADE:
            raise WireError(f"no value is made by {name!r}")
        values = self.values(arguments)
        module, _, kind = name.rpartition(".")
        if kind == "Fraction" and not all(type(value) is int for value in values):
            raise WireError("a fraction is made of two ints")  # from a text or a Decimal it could take all memory
        return getattr(importlib.import_module(module), kind)(*values)

    def stream(self, parts: list[Any]) -> Iterator[Any]:
        return iter(self.values(parts[1:])) if parts[0] is None else self.links.stream(int(parts[0]), bool(parts[1]))

    def member(self, parts: list[Any]) -> Any:
        kind: Any = self.links.find_class(parts[0])
        return self.value(parts[2]) if kind is None else kind.__members__[parts[1]]

    def record(self, parts: list[Any]) -> Any:
        """A named tuple; of a class made for it where we have none."""
        kind = self.links.find_class(parts[0])
        items = self.values(parts[2:])
        if kind is not None and issubclass(kind, tuple):
            return tuple.__new__(kind, items)
        return _record_class(parts[0], tuple(parts[1]))._make(items) if parts[1] else tuple(items)

    def view(self, parts: list[Any]) -> Any:
        items = self.values(parts[1:])
        if parts[0] == "values":
            return dict(enumerate(items)).values()
        return dict.fromkeys(uncrowded(items)).keys() if parts[0] == "keys" else dict(items).items()

    def remote(self, parts: list[Any]) -> Any:
        return self.links.remote(int(parts[0]), str(parts[1]), bool(parts[2]))

    def given(self, parts: list[Any]) -> Any:
        return self.links.given(int(parts[0]))


_EMPTY: dict[str, Callable[[], Any]] = {
    "l": list, "S": set, "B": bytearray, "d": dict, "O": OrderedDict, "C": Counter,
}  # fmt: skip
_READERS: dict[str, Callable[[_Decoder, list[Any]], Any]] = {
    "t": lambda decoder, parts: tuple(decoder.values(parts)),
    "f": lambda decoder, parts: frozenset(uncrowded(decoder.values(parts))),
    "b": lambda decoder, parts: _bytes_of(parts[0]),
    "s": lambda decoder, parts: _bytes_of(parts[0]).decode("utf-8", "surrogatepass"),
    "i": lambda decoder, parts: int(parts[0], 16),
    "y": lambda decoder, parts: _TYPES[parts[0]],
    "N": lambda decoder, parts: _array(parts[0], parts[1])[0],
    "k": _Decoder.typed,
    "I": _Decoder.stream,
    "A": lambda decoder, parts: decoder.links.coroutine(int(parts[0])),
    "E": _Decoder.member,
    "u": _Decoder.record,
    "v": _Decoder.view,
    "p": _Decoder.remote,
    "r": _Decoder.given,
}


@functools.lru_cache(64)
def _record_class(name: str, fields: tuple[str, ...]) -> Any:
    return namedtuple(name, fields)


def uncrowded(items: list[Any]) -> list[Any]:
    """Raises WireError for members that were chosen to have one hash: a set of them takes quadratic time."""
    if len(items) > _CROWD and len({hash(item) for item in items}) < len(items) // 2:
        raise WireError("the members of a set or dict have one hash")
    return items


def _pairs(flat: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _bytes_of(text: str) -> bytes:
    import binascii

    return binascii.a2b_base64(text)


def _array(kind: str, text: str) -> Any:
    if not _NUMBERS.fullmatch(kind):
        raise WireError(f"an array of {kind!r} is no plain data")
    numpy: Any = importlib.import_module("numpy")
    return numpy.frombuffer(_bytes_of(text), dtype=numpy.dtype(kind))


def _set_attributes(target: Any, attributes: list[tuple[Any, Any]]) -> None:
    """Straight into its dictionary and its slots: no property and no __setattr__ of its class runs."""
    slots = _slots(type(target))
    if hasattr(target, "__dict__"):
        target.__dict__.clear()
    for name, value in attributes:
        if type(name) is not str or name.startswith("__"):
            raise WireError(f"an object has an attribute {name!r}")
        if name in slots:
            slots[name].__set__(target, value)
        else:
            target.__dict__[name] = value


def exception_class(name: str) -> type[BaseException] | None:
    """A built-in exception by its name."""
    kind = getattr(builtins, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, BaseException) else None
