"""A first node with a GPU for a run on a cluster whose autoscaler has brought none yet.

What the nodes have decides how all of the run computes: the model of their GPUs, their memory, FlashAttention-3. So the
pools are laid out when one is there. Nothing but a request makes an autoscaler bring it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ltx_ray.placement.gpu_models import MODEL_PREFIX, GpuNode

#: Seconds between two looks, and for what is given back to be free again.
_PERIOD, _FREED = 2.0, 10.0
#: What a node has of the resource that names the model of its GPUs is 1, whatever their number.
_SOME = 0.001


def wait_for_first_node(
    nodes: Callable[[], Sequence[GpuNode]], model: str | None, seconds: float, say: Callable[[str], None]
) -> None:
    """Have a node with a GPU brought, unless the cluster has one of whatever model. `model`: that of its GPUs, for Ray.

    `nodes`: those with GPUs, as they are now. `say` is told once when there are none. Raises ValueError when none has
    come after `seconds`.
    """
    if nodes():
        return
    from ray.util.placement_group import placement_group, remove_placement_group

    say("waiting for a first node with a GPU, which decides how the run computes")
    group = placement_group([{"CPU": 1.0, "GPU": 1.0, **({f"{MODEL_PREFIX}{model}": _SOME} if model else {})}])
    until = time.monotonic() + seconds
    try:
        while not nodes():
            if time.monotonic() >= until:
                raise ValueError(
                    f"GPUs: at least 1 needed, and no node with {model or 'one'} has come in {seconds:g} s; legal: a "
                    f"cluster with GPUs, or whose autoscaler brings them within --start-timeout"
                )
            time.sleep(_PERIOD)
    finally:
        remove_placement_group(group)
    until = time.monotonic() + _FREED
    while not any(node.gpus for node in nodes()) and time.monotonic() < until:
        time.sleep(_PERIOD)
