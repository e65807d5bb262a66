"""Values across the wire: they come back equal and of the same type, and what is forged is refused."""

from __future__ import annotations

import collections
import contextlib
import datetime
import decimal
import fractions
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlvlm_sandbox.grading.inside.wire import NoLinks, WireError, decode, encode

ATOMS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(min_value=1 << 200, max_value=1 << 300),
    st.floats(allow_nan=False), st.complex_numbers(allow_nan=False), st.text(), st.binary(),
    st.decimals(allow_nan=False), st.fractions(), st.text(st.characters(categories=["Cs"])),
    st.dates(), st.datetimes(), st.timedeltas(),
    st.builds(range, st.integers(-99, 99), st.integers(-99, 99), st.integers(1, 9)),
)  # fmt: skip
KEYS = st.recursive(ATOMS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=4), max_leaves=5)
VALUES = st.recursive(
    KEYS,
    lambda inner: st.one_of(
        st.lists(inner), st.tuples(inner, inner), st.dictionaries(KEYS, inner, max_size=4), st.sets(KEYS, max_size=4),
        st.lists(inner).map(collections.deque), st.dictionaries(KEYS, inner, max_size=4).map(collections.OrderedDict),
        st.lists(KEYS, max_size=5).map(collections.Counter), st.binary().map(bytearray),
    ),
    max_leaves=12,
)  # fmt: skip


def there_and_back(value: Any) -> Any:
    """Through real JSON, as between the processes."""
    sent, entries, _ = encode(value, NoLinks())
    sent, entries = json.loads(json.dumps([sent, entries]))
    return decode(sent, dict(enumerate(entries)), NoLinks())[0]


def types_of(value: Any) -> Any:
    """The types in a value, so that 1, 1.0 and True are told apart."""
    if isinstance(value, dict):
        return type(value), [(types_of(key), types_of(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple, collections.deque)):
        return type(value), [types_of(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value), sorted(repr(types_of(item)) for item in value)
    return type(value)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_values_come_back(value: Any) -> None:
    back = there_and_back(value)
    assert back == value
    assert types_of(back) == types_of(value)


def test_floats_keep_sign_and_nan() -> None:
    back = there_and_back([-0.0, math.inf, -math.inf, math.nan, 5e-324])
    assert [math.copysign(1, back[0]), back[1], back[2], back[4]] == [-1.0, math.inf, -math.inf, 5e-324]
    assert math.isnan(back[3])


def test_large_int_beyond_the_digits_that_python_writes() -> None:
    value = 7**20_000  # 16,902 digits
    assert there_and_back([value, -value]) == [value, -value]


def test_shared_and_cyclic_containers_stay_so() -> None:
    shared: list[Any] = [1]
    back = there_and_back([shared, shared, [1]])
    assert back[0] is back[1] and back[0] is not back[2]
    shared.append(shared)
    loop = there_and_back(shared)
    assert loop[0] == 1 and loop[1] is loop


def test_deep_lists_nest_without_end() -> None:
    deep: list[Any] = []
    for _ in range(20_000):
        deep = [deep]
    back, depth = there_and_back(deep), 0
    while back:
        back, depth = back[0], depth + 1
    assert depth == 20_000


def test_deep_tuples_are_refused() -> None:
    deep: tuple[Any, ...] = ()
    for _ in range(1_000):
        deep = (deep,)
    with pytest.raises(WireError, match="nested"):
        encode(deep, NoLinks())


class Liar(list):  # type: ignore[type-arg]
    def __eq__(self, other: object) -> bool:
        return True

    def __iter__(self) -> Any:
        return iter([9, 9])

    __hash__ = None  # type: ignore[assignment]


class EqualInt(int):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 7


def test_subclasses_arrive_as_the_plain_type() -> None:
    back = there_and_back([Liar([1, 2]), EqualInt(5)])
    assert back == [[1, 2], 5] and [type(item) for item in back] == [list, int]


def test_other_types_come_back() -> None:
    deque = there_and_back(collections.deque([1, 2], maxlen=3))
    assert deque == collections.deque([1, 2]) and deque.maxlen == 3
    counts = there_and_back(collections.defaultdict(int, {"a": 1}))
    assert counts == {"a": 1} and counts["missing"] == 0
    zone = datetime.timezone(datetime.timedelta(hours=2))
    moment = datetime.datetime(2024, 2, 29, 23, 59, tzinfo=zone)
    assert there_and_back(moment).utcoffset() == datetime.timedelta(hours=2)
    assert there_and_back({"a": 1}.keys()) == {"a"}
    assert list(there_and_back({"a": 1}.values())) == [1]
    assert there_and_back({"a": 1}.items()) == {("a", 1)}
    assert there_and_back([int, list]) == [int, list]
    assert list(there_and_back(iter([1, 2]))) == [1, 2]
    assert there_and_back(decimal.Decimal("NaN")).is_nan()
    assert there_and_back(fractions.Fraction(6, 4)) == fractions.Fraction(3, 2)


@pytest.mark.parametrize(
    "array",
    [np.arange(6, dtype=np.int16).reshape(2, 3), np.array([1.5, np.inf]), np.array(["ab", "c"]), np.array(True),
     np.zeros((0, 3)), np.array([1 + 2j]), np.array(["2024-02-29"], "datetime64[D]")],
)  # fmt: skip
def test_arrays_come_back(array: Any) -> None:
    back = there_and_back(array)
    assert back.dtype == array.dtype and back.shape == array.shape and (back == array).all()


def test_numpy_scalars_come_back() -> None:
    back = there_and_back([np.float32(0.5), np.int8(-3), np.bool_(True)])
    assert back == [0.5, -3, True] and [type(item) for item in back] == [np.float32, np.int8, np.bool_]


@pytest.mark.parametrize("value", [len, object(), lambda: 1, np.array([object()]), (x for x in [1])])
def test_what_is_no_data_is_refused(value: Any) -> None:
    with pytest.raises(WireError):
        encode(value, NoLinks())


@pytest.mark.parametrize(
    "sent",
    [["k", "os.system", "true"], ["k", "builtins.eval", "1"], ["y", "type"], ["y", "exit"], ["r", 0],
     ["p", 0, "f", True], ["@", 5], ["x"], [], {"a": 1}, ["N", "|O8", "AAAA"], ["t", ["t", {}]], ["i", "zz"], ["b", 3],
     ["I", 0, True],     ["@", [1]],
     ["k", "decimal.Decimal", "x"], ["k", "fractions.Fraction", "1e999999999"],
     ["k", "fractions.Fraction", ["k", "decimal.Decimal", "1e999999999"], 1], ["v", "items", 1], ["s", "/w=="]],
)  # fmt: skip
def test_forged_values_are_refused(sent: Any) -> None:
    with pytest.raises(WireError):
        decode(sent, {}, NoLinks())


@pytest.mark.parametrize(
    "entry",
    [["o", "int", 0], ["x"], ["d", 1], ["d", ["@", 0], 1], ["S", ["@", 0]], ["n", "|O8", [1], "AAAA"],
     ["n", "<i4", [99999], "AAAA"], ["D", "exit"], ["q", "x"], [], ["B", None]],
)  # fmt: skip
def test_forged_entries_are_refused(entry: Any) -> None:
    with pytest.raises(WireError):
        decode(["@", 0], {0: entry}, NoLinks())


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers(-2, 2) | st.sampled_from("@tfbislSBqCODdokyNIEuvpr") | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4),
    ),
    st.lists(st.lists(st.sampled_from("lSBqCODdon") | st.integers(-1, 2) | st.lists(st.integers(-1, 1))), max_size=3),
)
def test_fuzzed_messages_give_a_value_or_are_refused(sent: Any, entries: Any) -> None:
    with contextlib.suppress(WireError):
        decode(sent, dict(enumerate(entries)), NoLinks())


@pytest.mark.timeout(5)
def test_members_of_one_hash_are_refused() -> None:
    prime = (1 << 61) - 1  # the modulus of the hash of an int
    for tag, members in (("S", lambda n: [hex(prime * n)]), ("d", lambda n: [hex(prime * n), None])):
        parts = [["i", part] if part else None for n in range(1, 20_000) for part in members(n)]
        with pytest.raises(WireError, match="one hash"):
            decode(["@", 0], {0: [tag, *parts]}, NoLinks())


def test_what_came_back_is_filled_in_place() -> None:
    mine: list[Any] = [{"a": [1]}, {2}]
    _, _, objects = encode(mine, NoLinks())
    assert objects[0] is mine
    sent, back, _ = encode(None, NoLinks(), known=[[{"a": [1, 5]}, {2, 3}, "new"]])
    assert sent is None
    inner, kept = mine[0], mine
    decode(None, dict(enumerate(back)), NoLinks(), {0: mine}, fill=True)
    assert mine is kept and mine == [{"a": [1, 5]}, {2, 3}, "new"] and inner == {"a": [1]}
