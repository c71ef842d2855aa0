"""Frames: what a runner and its child say to one another. Owns the two wire forms; never reads or writes.

To the child, which trusts us: a pickle, its arrays beside it, so that they arrive as read-only memory without a copy.
From the child, which nobody trusts: msgpack of known shape and bounded size, checked before anything is made of it.
"""

from __future__ import annotations

import pickle
import struct
from typing import Any

import msgpack
import numpy as np

from tiermem.errors import PolicyError
from tiermem.policy import Move, Plan
from tiermem.policy.plan import MAX_MOVES

ANSWER = struct.Struct("<4sII")
"""Head of an answer: MAGIC, the number of the question, the bytes that follow."""
MAGIC = b"tmPA"
MAX_ANSWER_BYTES = 64 << 20
MAX_REASON = 200
"""Characters of a move's reason that are kept."""
QUESTION = struct.Struct("<QQ")
"""Head of a question: bytes of the pickle, bytes of the arrays (each padded to 8)."""

_NUMBERS = ("first", "pages", "source", "target")
_KINDS = ("move", "copy", "drop")


def pack_question(number: int, question: tuple[Any, ...]) -> list[memoryview]:
    """The parts to write, in order."""
    arrays: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> None:
        view = buffer.raw()
        arrays.extend((view, memoryview(bytes(-view.nbytes % 8))))

    body = pickle.dumps((number, question), protocol=5, buffer_callback=keep)
    sizes = pickle.dumps([view.nbytes for view in arrays[::2]])
    pickled = struct.pack("<I", len(sizes)) + sizes + body
    head = QUESTION.pack(len(pickled), sum(view.nbytes for view in arrays))
    return [memoryview(head + pickled), *arrays]


def unpack_question(pickled: bytes, arrays: memoryview) -> tuple[int, tuple[Any, ...]]:
    """(number, question); its arrays are parts of `arrays` and cannot be made writable."""
    (length,) = struct.unpack_from("<I", pickled)
    buffers, at, still = [], 0, arrays.toreadonly()
    for size in pickle.loads(pickled[4 : 4 + length]):
        buffers.append(still[at : at + size])
        at += size + -size % 8
    number, question = pickle.loads(memoryview(pickled)[4 + length :], buffers=buffers)
    return number, question


def pack_answer(number: int, answer: list[Any]) -> bytes:
    """Raises PolicyError for one that is too large."""
    body: bytes = msgpack.packb(answer, unicode_errors="replace")
    if len(body) > MAX_ANSWER_BYTES:
        raise PolicyError(f"an answer of {len(body)} bytes; {MAX_ANSWER_BYTES} may be")
    return ANSWER.pack(MAGIC, number, len(body)) + body


def unpack_answer(body: bytes | bytearray) -> list[Any]:
    """A list that starts with a word. Raises PolicyError for anything else."""
    try:
        answer = msgpack.unpackb(body, raw=False, strict_map_key=True)
    except Exception as error:  # msgpack has many
        raise PolicyError(f"its process answered nonsense ({type(error).__name__})") from None
    if not isinstance(answer, list) or not answer or not isinstance(answer[0], str):
        raise PolicyError("its process answered nonsense")
    return answer


def pack_plan(plan: Plan) -> list[Any]:
    """Columns of a plan whose moves have the right types and bounds (check_plan)."""
    numbers = np.array([[getattr(move, name) for name in _NUMBERS] for move in plan], np.int64)
    kinds = bytes(_KINDS.index(move.kind) for move in plan)
    return [numbers.tobytes(), kinds, [move.reason[:MAX_REASON] for move in plan]]


def unpack_plan(columns: list[Any]) -> Plan:
    """The plan again, possible or not. Raises PolicyError for columns that are none."""
    match columns:
        case [bytes(numbers), bytes(kinds), list(reasons)] if (
            len(reasons) <= MAX_MOVES
            and len(numbers) == 32 * len(reasons)
            and len(kinds) == len(reasons)
            and max(kinds, default=0) < len(_KINDS)
            and all(isinstance(reason, str) and len(reason) <= MAX_REASON for reason in reasons)
        ):
            columns = np.frombuffer(numbers, np.int64).reshape(-1, 4).T.tolist()
            return list(map(Move, *columns, reasons, map(_KINDS.__getitem__, kinds)))
    raise PolicyError("its process answered no plan")
