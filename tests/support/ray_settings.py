"""Settings of the Ray clusters that tests start: everything that costs CPU time and that no test needs is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support import worker_forks

#: System settings of a cluster: no workers are started early, because none would have the environment of a rank.
SYSTEM: dict[str, Any] = {"enable_worker_prestart": False, "prestart_worker_first_driver": False}
_HERE = Path(__file__).parent


def quick_node() -> dict[str, Any]:
    """Arguments of `ray.cluster_utils.Cluster.add_node` for every node; its workers are made by `worker_forks`.

    Drivers connect with log_to_driver=False, so no log monitor is needed.
    """
    worker_forks.start()
    return {
        "num_gpus": 0, "include_log_monitor": False,
        "setup_worker_path": str(_HERE / "setup_worker.py"), "worker_path": str(_HERE / "worker_forks.py"),
    }  # fmt: skip
