"""What Ray clusters that tests start have in common: whatever takes a processor's time and no test looks at is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: Of every node, as `ray.cluster_utils.Cluster.add_node` takes them. Drivers have log_to_driver=False: nobody reads
#: what a log monitor finds.
QUICK: dict[str, Any] = {
    "num_gpus": 0, "include_log_monitor": False, "setup_worker_path": str(Path(__file__).with_name("setup_worker.py")),
}  # fmt: skip
#: Of a cluster: workers without the environment of a rank serve nobody here.
SYSTEM: dict[str, Any] = {"enable_worker_prestart": False, "prestart_worker_first_driver": False}
