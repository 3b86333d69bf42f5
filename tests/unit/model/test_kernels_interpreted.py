"""The Triton kernels without a GPU, in Triton's interpreter. tests/gpu runs them on one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest

#: The version whose interpreter tests/support/interpreted_kernels.py adapts.
TRITON = "3.6."
INSTALLED = importlib.util.find_spec("triton") is not None and importlib.metadata.version("triton").startswith(TRITON)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason=f"needs Triton {TRITON}*")
@pytest.mark.parametrize("check", ["passes", "head_places", "decoding", "merges"])
def test_kernels_do_as_plain_pytorch_and_stay_in_their_tensors(check):
    command = [sys.executable, "-m", "tests.support.interpreted_kernels", check]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
