"""Settings of the Ray clusters that tests start: everything that costs CPU time and that no test needs is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: Arguments of `ray.cluster_utils.Cluster.add_node` for every node. Drivers connect with log_to_driver=False, so no log
#: monitor is needed.
QUICK: dict[str, Any] = {
    "num_gpus": 0, "include_log_monitor": False, "setup_worker_path": str(Path(__file__).with_name("setup_worker.py")),
}  # fmt: skip
#: System settings of a cluster: no workers are started early, because none would have the environment of a rank.
SYSTEM: dict[str, Any] = {"enable_worker_prestart": False, "prestart_worker_first_driver": False}
