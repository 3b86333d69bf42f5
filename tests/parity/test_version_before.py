"""The present version against the one before the refactoring: the same plans, item_ids, index rows and latents.

The data of the version before is in tests/data/version_before; tests/support/version_before.py says how it was made.
Bits may differ between CPUs, so latents are held to a distance here; scripts/compare_versions.py compares the bits of
two versions on one machine.
"""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from ltx_ray.dataset.layout import ADDED_COLUMNS
from tests.support import version_before
from tests.support.ray_settings import SYSTEM, quick_node
from tests.support.version_before import DTYPES, MANIFESTS, PLANS, ROOT, Version, kept


@pytest.fixture(scope="module")
def version(tmp_path_factory) -> Version:
    present = Version(ROOT, tmp_path_factory.mktemp("version"))
    version_before.check_toy(present)
    return present


@pytest.fixture(scope="module")
def cluster():
    """Address of a cluster for both runs. This process itself does not join it."""
    from ray.cluster_utils import Cluster

    node = {**quick_node(), "num_cpus": 8, "include_dashboard": False, "object_store_memory": 256 * 2**20}
    running = Cluster(initialize_head=True, head_node_args={**node, "_system_config": SYSTEM})
    yield running.address
    running.shutdown()


@pytest.fixture(scope="module")
def outputs(version, cluster):
    """A dataset in float32 for each manifest. Both runs go on at once, because each of them waits a lot."""
    more = ("--ray-address", cluster)
    outputs = {name: version.folder / f"out-{name}" for name in MANIFESTS}
    runs = [version.start_render(name, "float32", output.name, *more) for name, output in outputs.items()]
    version_before.finish_all(runs, timeout=1200)
    return outputs


@pytest.fixture(scope="module")
def index(outputs):
    """The index row of every row of both manifests."""
    found = {name: version_before.by_label(name, version_before.rows_of(output)) for name, output in outputs.items()}
    return {label: row for rows in found.values() for label, row in rows.items()}


@pytest.mark.parametrize("name", PLANS)
def test_rows_are_resolved_and_refused_as_before(version, name):
    """JSONL and Parquet, defaults of pipelines and of the command line, samples, selections, and illegal rows."""
    assert version.plan(name) == kept("plan.json")[name]


def test_a_config_file_sets_what_the_flags_set(version):
    assert version.plan("flags", ("--config", "config.yaml")) == kept("plan.json")["flags"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_row_without_an_id_is_named_by_its_item(version, manifest, dtype):
    """Which shows the item_ids of both recipes without a run."""
    planned = [line["id"] for line in version.plan(f"{manifest}-{dtype}") if isinstance(line, dict)]
    before = kept("ids.json")[dtype]
    ids = [row if isinstance(row, str) else row["item_id"] for row in map(before.get, version_before.labels(manifest))]
    assert planned == [item_id[:16] for item_id in ids]


def test_index_rows_are_as_before(index):
    """item_id, the clip's place, the recipe's digest, the ledger of noise and what else is no matter of machines."""
    assert {label: version_before.kept_columns(row) for label, row in index.items()} == kept("ids.json")["float32"]


def test_the_index_has_the_columns_of_before(outputs, index):
    schema = pq.read_schema(next((outputs["rows"] / "index").glob("part-*.parquet")))
    before = list(kept("ids.json")["index_columns"].items())
    columns = [(field.name, str(field.type)) for field in schema]
    assert columns[: len(before)] == before
    assert {name for name, _ in columns[len(before) :]} == ADDED_COLUMNS
    # verify calls rows comparable when these are equal
    assert json.loads(index["plain"]["numerics"]) == kept("ids.json")["numerics"]


def test_latents_are_those_of_before(outputs, index):
    distances, tolerance = {}, version_before.tolerance()
    for manifest in MANIFESTS:
        for label in version_before.labels(manifest):
            for name, distance in version_before.distances(outputs[manifest], index[label]["item_id"]).items():
                distances[f"{label}: {name}"] = distance
    assert len(distances) == 4 * len(index)
    too_far = {name: f"{distance:.1e}" for name, distance in distances.items() if not distance <= tolerance}
    assert not too_far
