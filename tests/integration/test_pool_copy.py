"""Copying a tensor into memory of the caller's own."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import CheckpointWriter
from tests.integration.conftest import PoolMaker
from tiermem.errors import Refused, TensorNotFound


def test_a_tensor_is_copied_whole_into_a_buffer_of_its_size(checkpoint: CheckpointWriter, embedded: PoolMaker) -> None:
    written = checkpoint()
    with embedded().open(written.path) as model:
        for name, expected in written.tensors.items():
            target = np.zeros_like(expected)
            model.copy_to(name, target)
            np.testing.assert_array_equal(target, expected)


def test_a_buffer_that_does_not_fit_is_refused_and_untouched(checkpoint: CheckpointWriter, embedded: PoolMaker) -> None:
    written = checkpoint()
    name, expected = next(iter(written.tensors.items()))
    with embedded().open(written.path) as model:
        short = bytearray(expected.nbytes - 1)
        with pytest.raises(Refused, match=f"has {expected.nbytes} bytes, the destination {expected.nbytes - 1}"):
            model.copy_to(name, short)
        assert not any(short)
        with pytest.raises(Refused, match="read-only"):
            model.copy_to(name, bytes(expected.nbytes))
        with pytest.raises(TensorNotFound):
            model.copy_to("no such tensor", bytearray(1))
