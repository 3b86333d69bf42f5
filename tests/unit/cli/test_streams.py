"""A command whose caller has closed its standard streams."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import os, sys
from ltx_ray.cli.streams import open_standard_streams
open_standard_streams()
print("x"); print("y", file=sys.stderr, flush=True); sys.stdin.read()
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2
    os.write(2, b"what a library prints")
    file.write("data")
"""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_closed_streams_lead_nowhere_and_to_no_file(tmp_path, closed):
    def close():
        for number in closed:
            os.close(number)

    file = tmp_path / "file"
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(file)], stdin=subprocess.DEVNULL, capture_output=True, preexec_fn=close
    )
    assert done.returncode == 0 and file.read_text() == "data"
    assert (done.stdout == b"x\n") == (1 not in closed)
