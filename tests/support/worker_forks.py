"""Ray workers by fork: one process imports what ranks import, and each worker of a test's cluster is a copy of it.

A rank of the toy model imports torch, transformers and diffusers for four to eight seconds of CPU time, and one of the
fake engine imports for half a second. The suite starts hundreds. `ray_settings.quick_node` has Ray run this file for a
worker. It asks the process for a copy, which becomes the worker with the arguments, the environment, the folder and the
output that Ray gave. The product's own clusters run Ray's script instead, and so do nodes whose PYTHONPATH is another:
they are to find other modules than this process has imported. What a library reads of the environment when it is
imported is as it was for this process.

The process has one thread, so that a fork copies no lock that another thread holds. It imports nothing before the first
worker is asked for, and ends with the process that has started it. All processes of a run of the tests share it.
"""

from __future__ import annotations

import array
import atexit
import gc
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

#: Where the process listens; the clusters of a test process have it in their environment.
VARIABLE = "LTX_RAY_TEST_WORKERS"
#: The PYTHONPATH with which it imports.
_PATH_VARIABLE = "LTX_RAY_TEST_WORKERS_PYTHONPATH"
_SERVE = "--serve"
#: What ranks import, without Ray: its library reads the environment once, when it is loaded.
_IMPORTS = (
    "jsonschema", "requests", "asyncio", "logging.handlers",
    "torch", "torch.distributed", "transformers", "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.auto.tokenization_auto", "transformers.models.gemma.tokenization_gemma",
    "diffusers.pipelines.ltx2.connectors", "diffusers.pipelines.ltx2.vocoder",
    "diffusers.pipelines.ltx2.latent_upsampler", "diffusers.models.autoencoders.autoencoder_kl_ltx2",
    "diffusers.models.autoencoders.autoencoder_kl_ltx2_audio",
    "ltx_ray.engine.fake", "ltx_ray.engine.text", "ltx_ray.engine.diffusion", "ltx_ray.engine.decode",
)  # fmt: skip


def start() -> None:
    """Start the process, unless this one has it already or has inherited it from the one that started this one."""
    if VARIABLE in os.environ:
        return
    path = os.path.join(tempfile.mkdtemp(), "workers")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(128)
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__)), _SERVE, str(listener.fileno())],
        stdin=subprocess.PIPE, pass_fds=[listener.fileno()], start_new_session=True,
        # Arrow's allocator would start a thread.
        env={**os.environ, "JE_ARROW_MALLOC_CONF": "background_thread:false"},
    )  # fmt: skip
    listener.close()
    os.environ[VARIABLE] = path
    os.environ[_PATH_VARIABLE] = os.environ.get("PYTHONPATH", "")
    atexit.register(process.kill)


def ask(arguments: list[str]) -> None:
    """Ask for a worker with these arguments; it has this process's environment, folder and output."""
    request = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[VARIABLE])
        descriptors = array.array("i", [1, 2])
        connection.sendmsg([len(request).to_bytes(4)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        connection.sendall(request)
        assert connection.recv(1), "no worker was made"


def serve(listener: socket.socket) -> None:
    """Make workers until standard input ends; returns in each worker, too, which then runs Ray's script."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        _import_all()
        connection, _ = listener.accept()
        with connection:
            head, descriptors = _receive(connection)
            try:
                arguments, environment, folder = json.loads(_exactly(connection, int.from_bytes(head)))
            except (OSError, ValueError):
                # The process that asked has been killed, which is no reason to make no more workers.
                for descriptor in descriptors:
                    os.close(descriptor)
                continue
            if os.fork() == 0:
                listener.close()
                _become(environment, folder, descriptors)
                connection.send(b"1")
                break
            for descriptor in descriptors:
                os.close(descriptor)
    _run(arguments)


def _import_all() -> None:
    if _IMPORTS[-1] in sys.modules:
        return
    for name in _IMPORTS:
        importlib.import_module(name)
    assert "ray" not in sys.modules
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads, of which a fork copies one"
    # Objects of the imports stay where they are, so that a worker's garbage collection copies no page of them.
    gc.collect()
    gc.freeze()


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """The first four bytes, and the descriptors that come with them."""
    descriptors = array.array("i")
    head, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(2 * descriptors.itemsize))
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    return head, list(descriptors)


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise ConnectionError("the process that asked has ended")
        data += more
    return data


def _become(environment: dict[str, str], folder: str, descriptors: list[int]) -> None:
    """Take over what a process has from the one that starts it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # A raylet kills the group of a worker that ends.
    for number, descriptor in enumerate(descriptors, 1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    tempfile.tempdir = None


def _script() -> str:
    """Ray's script of a worker."""
    package = importlib.util.find_spec("ray")
    assert package is not None and package.submodule_search_locations
    return os.path.join(package.submodule_search_locations[0], "_private", "workers", "default_worker.py")


def _run(arguments: list[str]) -> None:
    """Run Ray's script, as `python SCRIPT ARGUMENTS` does."""
    sys.argv[:] = [_script(), *arguments]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == _SERVE:
        serve(socket.socket(fileno=int(sys.argv[2])))
    elif os.environ.get("PYTHONPATH", "") == os.environ[_PATH_VARIABLE]:
        ask(sys.argv[1:])
    else:
        os.execv(sys.executable, [sys.executable, _script(), *sys.argv[1:]])
