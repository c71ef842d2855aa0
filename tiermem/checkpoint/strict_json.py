"""JSON from strangers: text -> a dict, at least as strictly as serde_json, so that no two readers can disagree on it.

Refuses what Python's reader would let through: duplicate keys, NaN and Infinity, lone surrogates. Knows no format.
"""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from typing import NoReturn

_U64_DIGITS = 20

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 120
_shown.maxlist = 12


def shown(value: object) -> str:
    """`value` for an error message: escaped, and short however long the value is."""
    return _shown.repr(value)


def parse_object(text: bytes) -> dict[str, object]:
    """The JSON object in `text`. Numbers that fit no unsigned 64-bit integer come as floats, as serde_json has them.

    Raises ValueError with a reason that has no location in a file: the caller adds it.
    """
    try:
        decoded = text.decode()
        value = json.loads(
            decoded, object_pairs_hook=_unique, parse_int=_unsigned_or_float, parse_constant=_refuse_constant
        )
        if "\\u" in decoded:
            # Escapes are the only way to a lone surrogate, which no UTF-8 can carry.
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"not UTF-8: {error.reason} at {error.start}") from error
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but a {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {shown(key)} occurs twice")
    return unique


def _unsigned_or_float(digits: str) -> int | float:
    # "-0" is a float to serde_json too. The length also keeps int() from its quadratic time and its digit limit.
    return float(digits) if digits[0] == "-" or len(digits) > _U64_DIGITS else int(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
