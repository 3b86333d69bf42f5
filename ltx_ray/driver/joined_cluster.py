"""What a run has got once it has joined its cluster."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ltx_ray.config import PoolSpec
from ltx_ray.driver.admission import Answers, Claims
from ltx_ray.manifest.rules import RowProblem
from ltx_ray.placement.output_pools import Node
from ltx_ray.pools.protocol import ReplicaSet
from ltx_ray.records import RenderRequest, WorkItem


@dataclass(frozen=True)
class JoinedCluster:
    """The cluster of a run: its replica set, its pools, and the numerics (JSON) that the pools render with."""

    replicas: ReplicaSet
    pools: list[PoolSpec]
    numerics: str
    #: Bytes of the object store that the results of items in flight may take, as large as it is now.
    max_bytes: Callable[[], float] = lambda: math.inf
    #: Seconds since the run's right to write was renewed.
    lease_age: Callable[[], float] = lambda: 0.0
    #: What the run says of its replicas, what earlier runs into its output have computed, and who is told the versions
    #: of the ranks' packages.
    claims: Claims = Claims()  # noqa: RUF009 (frozen)
    answers: Answers | None = None
    on_versions: Callable[[Mapping[str, str | None]], None] = lambda versions: None
    #: A tiny clip that passes every pool before the pools grow beyond one replica each.
    preflight: WorkItem | None = None
    #: Whether the cluster grows and shrinks on request: replicas are given back when no row needs them.
    elastic: bool = False
    #: What is free on each node that has joined since, and the most GPUs that all pools may take.
    new_nodes: Callable[[], Sequence[Node]] = tuple
    max_gpus: int | None = None
    #: Why none of the replicas can render a row; None when one can.
    problem: Callable[[RenderRequest], RowProblem | None] = lambda request: None
