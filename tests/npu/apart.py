"""Processes of their own, for jobs that spoil torch for what comes after them: forked from one that has imported torch
and has not used a device, which is quicker than to import it again. Knows nothing of devices."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

JOB_S = 60
"""What a job may take until it tells something."""

Tell = Callable[[Any], None]


def prepare(environ: Mapping[str, str]) -> None:
    """Have that process import torch, which finds its libraries by `environ`."""
    before = dict(os.environ)
    os.environ.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    os.environ.update(environ)
    try:
        multiprocessing.get_context("forkserver").set_forkserver_preload(["torch"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


class Apart:
    """`job(tell, *arguments)` in a process of its own, with `environ` added to its environment."""

    def __init__(self, job: Callable[..., None], arguments: tuple[Any, ...], environ: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        self._said, saying = context.Pipe(duplex=False)
        self._process = context.Process(target=_carry_out, args=(saying, job, arguments, dict(environ)), daemon=True)
        self._process.start()
        saying.close()

    def hear(self) -> Any:
        """What the job tells next. Raises AssertionError where it tells no more, with its error or how it ended."""
        if not self._said.poll(JOB_S):
            raise AssertionError(f"nothing was told for {JOB_S} s")
        try:
            fine, value = self._said.recv()
        except EOFError:
            self._process.join(JOB_S)
            raise AssertionError(f"the process ended with {self._process.exitcode}") from None
        if not fine:
            raise AssertionError(value)
        return value

    def end(self) -> None:
        """Return when the job is done. Raises AssertionError where it failed."""
        with suppress(EOFError):
            if self._said.poll(JOB_S):
                fine, value = self._said.recv()
                assert fine, value
        self._process.join(JOB_S)
        assert self._process.exitcode == 0, f"the process ended with {self._process.exitcode}"

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _carry_out(saying: Connection, job: Callable[..., None], arguments: tuple[Any, ...], environ: Any) -> None:
    os.environ.update(environ)
    try:
        job(lambda value: saying.send((True, value)), *arguments)
    except BaseException:
        saying.send((False, traceback.format_exc()))
        raise SystemExit(1) from None
