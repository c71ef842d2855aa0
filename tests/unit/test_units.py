"""Bytes and seconds as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem.errors import ConfigError
from tiermem.units import format_bytes, format_rate, format_seconds, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("4096", 4096), ("7B", 7), ("512M", 512 << 20), ("4GiB", 4 << 30), (" 1.5 KiB ", 1536),
     ("3.1GB", 3_100_000_000), ("2T", 2 << 40), ("1KB", 1000)],
)  # fmt: skip
def test_sizes_are_binary_unless_decimal_units_are_written(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4 gigs", "4gib", "1e9", "4GiB/s", "0x10"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="4GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("30s", 30), ("30", 30), ("5min", 300), ("5m", 300), ("1.5h", 5400), ("10us", 1e-5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "soon", "-1s", "3 days", "1ns"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="250ms"):
        parse_seconds(text)


@given(st.integers(min_value=0, max_value=1 << 50))
def test_a_formatted_size_reads_back_within_its_last_digit(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.05, abs=0.5)


def test_formats() -> None:
    assert [format_bytes(count) for count in (0, 1023, 1024, 2 << 20, 3 << 39, -(4 << 30))] == [
        "0 B", "1023 B", "1.0 KiB", "2.0 MiB", "1.5 TiB", "-4.0 GiB"]  # fmt: skip
    assert [format_seconds(seconds) for seconds in (1.481, 1.0, 0.0123, 0.00084)] == [
        "1.48 s", "1.00 s", "12.3 ms", "840 us"]  # fmt: skip
    assert format_rate(2.1e9) == "2.10 GB/s"
