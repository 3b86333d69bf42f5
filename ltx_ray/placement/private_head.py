"""The process that a private cluster hangs on. It is run by its path and imports Ray alone.

It imports Ray, and reads one line from its standard input: a JSON object with the arguments of `ray.init`. It starts a
cluster, writes one line to its standard output, `{"address": ...}` or `{"error": ...}`, and ends the cluster and itself
when its standard input is closed: by the run, or by the kernel when the run has died.

The run starts it in a session of its own and with the signals that end a run blocked. Every process of the cluster
inherits both. A signal to the run's process group, or to every process of its systemd unit or Slurm step, therefore
reaches the run alone, and its cluster goes on until the run has drained.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import queue
import shutil
import signal
import threading
import time

#: Seconds that killed processes have to disappear.
_END_SECONDS = 10.0


def main() -> None:
    life, answer = os.dup(0), os.dup(1)
    # What Ray starts must not hold the pipes.
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    session: list[str] = []
    arguments: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    thread = threading.Thread(target=_wait_and_end, args=(life, arguments, session))
    thread.start()
    try:
        import ray

        ray.init(address="local", logging_level=logging.ERROR, log_to_driver=False, **json.loads(arguments.get()))
        context = ray.get_runtime_context()
        session.append(os.path.join(os.environ["RAY_TMPDIR"], "ray", context.get_session_name()))
        reply = {"address": context.gcs_address}
    except BaseException as error:
        reply = {"error": f"{type(error).__name__}: {error}"}
    try:
        os.write(answer, (json.dumps(reply) + "\n").encode())
    except OSError:
        pass  # The run is gone, and the other thread ends this process.
    # The kernel kills what Ray started from this thread as soon as it ends.
    thread.join()


def _wait_and_end(life: int, arguments: queue.SimpleQueue[bytes], session: list[str]) -> None:
    """Pass on the line that comes through `life`, wait until nobody holds its other end, and end this session.

    That is every process of it, this one last. Nothing here may fail because of the line: the run may have died while
    it wrote it, and without this thread the cluster would never end.
    """
    with os.fdopen(life, "rb") as lines:
        for line in lines:
            arguments.put(line)
    deadline = time.monotonic() + _END_SECONDS
    # They have nothing to lose: results are published by rename, and shared memory has no names.
    while (others := _others()) and time.monotonic() < deadline:
        for pid in others:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        time.sleep(0.02)
    for folder in session:
        for spilled in glob.glob(os.path.join(glob.escape(folder), "ray_spilled_objects*")):
            shutil.rmtree(spilled, ignore_errors=True)
    os._exit(0)


def _others() -> list[int]:
    """The other living processes of this session."""
    found, own = [], os.getsid(0)
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            if pid != os.getpid() and os.getsid(pid) == own and _is_alive(pid):
                found.append(pid)
        except OSError:
            continue  # It has ended.
    return found


def _is_alive(pid: int) -> bool:
    """Whether `pid` is more than an entry that waits for its parent. Raises OSError when there is no such process."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] not in "ZX"


if __name__ == "__main__":
    main()
