"""The cluster whose job this process is.

Ray gives a job RAY_ADDRESS. It reads the value from a file, `ray_current_cluster` in the head's folder of temporary
files (Ray 2.60, `JobSupervisor._get_driver_env_vars`). Heads that share the folder, /tmp/ray by default, share the
file, and the head that started last writes it. A job's own head is an ancestor of its process.
"""

from __future__ import annotations

import os
from pathlib import Path

#: Set in the environment of a job's processes.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def cluster_of_this_job() -> str | None:
    """host:port of the cluster whose job this process is; None when it is no job, or where /proc does not say."""
    if JOB_VARIABLE not in os.environ:
        return None
    process = os.getpid()
    while process > 1:
        try:
            folder = Path(f"/proc/{process}")
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            process = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return None
        if os.path.basename(words[0]) == "raylet":
            return next((word.partition("=")[2] for word in words if word.startswith("--gcs-address=")), None)
    return None
