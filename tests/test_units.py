"""Bytes, shares and seconds, read and shown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoaccum.errors import UsageError
from autoaccum.units import parse_bytes, parse_part, show_bytes

SCALES = {"": 1, "B": 1, "K": 2**10, "KiB": 2**10, "KB": 10**3, "M": 2**20, "MiB": 2**20, "MB": 10**6}
SCALES |= {"G": 2**30, "GiB": 2**30, "GB": 10**9, "T": 2**40, "TiB": 2**40, "TB": 10**12}


@pytest.mark.parametrize("unit", SCALES)
@given(number=st.integers(1, 10**12), space=st.sampled_from(["", " "]), fold=st.sampled_from([str.lower, str.upper]))
def test_a_number_and_its_unit_are_read_exactly_however_they_are_written(
    unit: str, number: int, space: str, fold: Callable[[str], str]
) -> None:
    assert parse_bytes(f" {number}{space}{fold(unit)} ") == number * SCALES[unit]


@given(size=st.integers(1, 2**70))
def test_a_number_of_bytes_is_itself_to_the_byte(size: int) -> None:
    assert parse_bytes(size) == parse_bytes(str(size)) == parse_bytes(f"{size}B") == size


@pytest.mark.parametrize(
    ("text", "size"),
    [("1.5GiB", 3 * 2**29), ("1.5 GB", 1_500_000_000), ("0.5K", 512), ("2gib", 2**31), ("1.1B", 1), ("0.1TB", 10**11)],
)
def test_fractions_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@given(size=st.integers(1, 2**50))
def test_what_is_shown_reads_back_to_within_a_rounding(size: int) -> None:
    assert parse_bytes(show_bytes(size)) == pytest.approx(size, rel=0.051 if size < 2**30 else 0.006)
    assert len(show_bytes(size).split()[0].split(".")[0]) <= 4 or size >= 10_000 * 2**30


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (2**30 - 1, "1.00 GiB"),
        (3 * 2**29, "1.50 GiB"),
        (-3 * 2**20, "-3.0 MiB"),
        (2**41, "2048.00 GiB"),
    ],
)
def test_bytes_are_shown_in_the_unit_in_which_they_are_short(size: int, text: str) -> None:
    assert show_bytes(size) == text


BAD = ["", "GiB", "two", "1,5GB", "-1", "1e9", "5%", "1 PiB", "0x10", "nan", "inf", "1.GiB", "9" * 5000, "1.5 G i B"]


@pytest.mark.parametrize("text", [*BAD, True, None, [], 0, -5, "0", "0GiB", "0.1B", "9" * 31 + "GiB"])
def test_what_is_no_size_is_an_error_in_three_parts_that_quotes_it(text: object) -> None:
    with pytest.raises(UsageError, match="is not an amount of memory") as raised:
        parse_bytes(text, what="an amount of memory")  # type: ignore[arg-type]
    assert repr(text) in raised.value.what
    assert all((raised.value.what, raised.value.why, raised.value.hint))


@given(text=st.text())
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    for read in (parse_bytes, lambda text: parse_part(text, 1000)):
        with contextlib.suppress(UsageError):
            assert (read(text) or 0) >= 0


@given(percent=st.integers(0, 99), whole=st.integers(0, 2**60))
def test_a_percentage_is_of_the_whole(percent: int, whole: int) -> None:
    assert parse_part(f" {percent} % ", whole) == whole * percent // 100


@pytest.mark.parametrize(
    ("text", "size"), [(None, None), (0, 0), ("0", 0), ("0%", 0), ("0GiB", 0), ("2K", 2048), (7, 7), ("2.5%", 25)]
)
def test_a_part_may_be_nothing_or_a_size(text: str | int | None, size: int | None) -> None:
    assert parse_part(text, 1000) == size


@pytest.mark.parametrize("text", ["100%", "250.5%", "-5%", "five", -1, True])
def test_a_part_that_leaves_nothing_or_is_none_is_an_error(text: str | int) -> None:
    with pytest.raises(UsageError) as raised:
        parse_part(text, 1000, what="a headroom")
    assert all((raised.value.what, raised.value.why, raised.value.hint))
