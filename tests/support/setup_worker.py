"""A replacement of Ray's setup_worker.py without its half second of imports.

Ray runs that script before every worker with an environment of its own, which every rank has. `ray_settings.quick_node`
names this one instead. It sets environment variables and becomes the worker, which is all that the tests need; it fails
when asked for more, and for a value with a `$`, which Ray would expand. The product's own clusters use Ray's script.
"""

from __future__ import annotations

import json
import os
import sys

OWN_ARGUMENTS = ("--serialized-runtime-env-context=", "--language=")


def main(*arguments: str) -> None:
    context, language = (
        next((a.partition("=")[2] for a in arguments if a.startswith(name)), "") for name in OWN_ARGUMENTS
    )
    settings = json.loads(context or "{}")
    variables = settings.pop("env_vars", None) or {}
    assert not any("$" in value for value in variables.values()), variables
    os.environ.update(variables)
    python = settings.pop("py_executable", sys.executable)
    assert language == "PYTHON" and not any(settings.values()), arguments
    os.execv(python, [python, *(a for a in arguments if not a.startswith(OWN_ARGUMENTS))])


if __name__ == "__main__":
    main(*sys.argv[1:])
