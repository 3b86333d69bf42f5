"""Ray's setup_worker.py without its half second of imports: set a worker's environment, then become the worker.

Every rank has an environment of its own, so Ray runs that script before each of them; `clusters.QUICK` names this one
in its place. It sets variables, which is all that is asked of it here, and fails when asked for more; a `$` in one,
which Ray would expand, it refuses. Clusters of the product's own, in other tests, have Ray's.
"""

from __future__ import annotations

import json
import os
import sys

OURS = ("--serialized-runtime-env-context=", "--language=")


def main(*arguments: str) -> None:
    context, language = (next((a.partition("=")[2] for a in arguments if a.startswith(name)), "") for name in OURS)
    wanted = json.loads(context or "{}")
    variables = wanted.pop("env_vars", None) or {}
    assert not any("$" in value for value in variables.values()), variables
    os.environ.update(variables)
    python = wanted.pop("py_executable", sys.executable)
    assert language == "PYTHON" and not any(wanted.values()), arguments
    os.execv(python, [python, *(a for a in arguments if not a.startswith(OURS))])


if __name__ == "__main__":
    main(*sys.argv[1:])
