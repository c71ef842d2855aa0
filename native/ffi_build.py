"""Describes the extension `tiermem._ffi` to cffi. Owns no declaration: the public header is the one source."""

import re
from pathlib import Path

import cffi

HEADER = Path(__file__).parent / "include" / "tiermem.h"


def declarations(header: str) -> str:
    """The part of the header between the ffi marks; the compiler, not cffi, evaluates the constants."""
    region = header.split("/* ffi: begin */")[1].split("/* ffi: end */")[0]
    return re.sub(r"^#define (\w+) .*$", r"#define \1 ...", region, flags=re.MULTILINE)


ffibuilder = cffi.FFI()
ffibuilder.cdef(declarations(HEADER.read_text()))
ffibuilder.set_source("tiermem._ffi", '#include "tiermem.h"', py_limited_api=True)
