"""What holds for every test: one thread a process, no network, GPU tests skipped without a GPU."""

from __future__ import annotations

import os
import secrets
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Before torch or Ray are imported. Processes that tests start, Ray's workers included, inherit all of it, and
# so import this clone even when the environment is shared with another.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(ROOT))]
)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's agents look at every process of their node each five seconds, for a dashboard that nobody opens.
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
# Drawn once: processes that run tests side by side must find the same ones.
os.environ.setdefault("LTX_RAY_PARITY_SEED", str(secrets.randbelow(10**9)))
# A test never joins a cluster that happens to be there.
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("RAY_API_SERVER_ADDRESS", None)
# Nor reaches a real object store; `s3` sets the endpoint.
os.environ.update(
    AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1",
    AWS_EC2_METADATA_DISABLED="true",
)  # fmt: skip

try:
    from hypothesis import settings
except ImportError:
    pass
else:
    settings.register_profile("ltx-ray", deadline=None, derandomize="CI" in os.environ)
    settings.load_profile("ltx-ray")

FOLDER_MARKS = ("gpu", "parity")
#: Folders whose tests share a cluster stay in one process when several run tests (scripts/test without arguments), but
#: for files that need none, or that make one of their own for long; of the other folders each file does.
TOGETHER = ("integration", "chaos", "gpu")
ALONE = (
    "integration/test_store_faults.py", "integration/test_schedule_submit.py", "integration/test_jobs.py",
    "chaos/test_driver.py", "chaos/test_schedules.py", "chaos/test_random.py",
)  # fmt: skip
#: What takes minutes, longest first, above all on clusters of its own: each of the first begins in a process of its
#: own, what is small fills up the end.
LONG = (
    "chaos", "integration", "tests/chaos/test_random.py",
    "tests/integration/test_schedule_submit.py", "tests/integration/test_jobs.py", "tests/parity/test_layouts.py",
    "tests/parity/test_version_before.py",
)  # fmt: skip
ORDER = ("unit", "parity", "integration", "gpu", "chaos")


@cache
def cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if _folder(item) in FOLDER_MARKS:
            item.add_marker(_folder(item))
    if hasattr(config, "workerinput"):
        groups = {group: place for place, group in enumerate(LONG)}
        items.sort(key=lambda item: groups.get(_group(item.path.relative_to(ROOT).as_posix()), len(LONG)))
    else:
        # tests that must not find a cluster come before those that start one for the session
        items.sort(key=lambda item: ORDER.index(_folder(item)) if _folder(item) in ORDER else len(ORDER))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """`--dist loadgroup`, whose own way of passing the groups on (xdist 3.8) does nothing from pytest 9.2 on."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid.partition("::")[0])

    return Groups(config, log)


def _group(path: str) -> str:
    """What stays together with the tests of a file, as its path in the clone says."""
    folder, _, file = path.removeprefix("tests/").partition("/")
    return folder if folder in TOGETHER and f"{folder}/{file}" not in ALONE else path


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT / "tests").parts[0]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not cuda_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def toy() -> dict[str, str]:
    """Paths of the toy model's files, by the names of the command line's options."""
    from ltx_ray.toy import ensure_toy_model

    return ensure_toy_model()


@pytest.fixture(scope="session")
def s3():
    """A real S3 endpoint on this machine, found through the environment as a MinIO would be.

    A pyarrow filesystem that may make buckets; what is stored lives as long as the session.
    """
    import pyarrow.fs as pafs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    yield pafs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], allow_bucket_creation=True)
    del os.environ["AWS_ENDPOINT_URL"]
    server.stop()


@pytest.fixture
def bucket(s3) -> str:
    """URI of an empty bucket of the test's own."""
    name = f"b{secrets.token_hex(6)}"
    s3.create_dir(name)
    return f"s3://{name}"
