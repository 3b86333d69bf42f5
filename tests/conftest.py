"""Settings for every test: one thread a process, no network, GPU tests skipped without a GPU."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest

from tests.support import worker_forks

ROOT = Path(__file__).resolve().parents[1]

# Set before torch or Ray are imported. Processes that tests start, Ray's workers included, inherit these variables and
# therefore import this clone, even when it shares the environment with another.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(ROOT))]
)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# By default, Ray's agents inspect every process of their node every five seconds, for a dashboard that nobody opens.
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
# With a token of its own, Ray neither looks for one in the home directory nor writes one there.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
# Temporary files have a folder of this process's own. Ray keeps its sessions there, and which cluster "auto" is.
# Those of tests stay where pytest keeps the last three runs.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
TEMPORARY = tempfile.tempdir = os.environ["TMPDIR"] = os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ltx-")
# Drawn once, because all processes of one run must collect the same tests.
os.environ.setdefault("LTX_RAY_PARITY_SEED", str(secrets.randbelow(10**9)))
# Tests never connect to an existing cluster.
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("RAY_API_SERVER_ADDRESS", None)
# They never reach a real object store either: at the default endpoint nothing listens, and the `s3` fixture sets
# another. Without one, pyarrow asks Amazon for the region of each bucket.
os.environ.update(
    AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1",
    AWS_EC2_METADATA_DISABLED="true", AWS_ENDPOINT_URL="http://127.0.0.1:9",
)  # fmt: skip

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    pass
else:
    settings.register_profile(
        "ltx-ray", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("ltx-ray")

FOLDER_MARKS = ("gpu", "parity")
#: When several processes run the tests (scripts/test without arguments), those of one of these folders share a cluster
#: and stay in one process. Exceptions are files that need no cluster, or their own for a long time. In other folders,
#: the tests of a file stay together.
SHARED_CLUSTER_FOLDERS = ("integration", "chaos", "gpu")
SEPARATE_FILES = (
    "integration/test_store_faults.py", "integration/test_object_access.py", "integration/test_schedule_submit.py",
    "integration/test_jobs.py",
    "chaos/test_driver.py", "chaos/test_schedules.py", "chaos/test_random.py", "chaos/test_private_cluster.py",
)  # fmt: skip
#: Groups of tests that take minutes, mostly on clusters of their own, longest first. Each process begins with one of
#: them, and short tests fill the end.
LONG_GROUPS = (
    "chaos", "integration", "tests/chaos/test_random.py",
    "tests/integration/test_schedule_submit.py", "tests/parity/test_layouts.py", "tests/integration/test_jobs.py",
    "tests/parity/test_version_before.py",
)  # fmt: skip
ORDER = ("unit", "parity", "integration", "gpu", "chaos")


def pytest_configure(config: pytest.Config) -> None:
    # Several processes share the one that makes workers of Ray.
    if getattr(config.option, "numprocesses", None):
        worker_forks.start()


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
        order = {group: place for place, group in enumerate(LONG_GROUPS)}
        items.sort(key=lambda item: order.get(_group(item.path.relative_to(ROOT).as_posix()), len(LONG_GROUPS)))
    else:
        # Tests that need the absence of a cluster come before those that start one for the session.
        items.sort(key=lambda item: ORDER.index(_folder(item)) if _folder(item) in ORDER else len(ORDER))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Implement `--dist loadgroup`: xdist 3.8 passes the groups on in a way that has no effect since pytest 9.2."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid.partition("::")[0])

    return Groups(config, log)


def _group(path: str) -> str:
    """The name of the group of a file, whose tests stay in one process; `path` is relative to the clone."""
    folder, _, file = path.removeprefix("tests/").partition("/")
    return folder if folder in SHARED_CLUSTER_FOLDERS and f"{folder}/{file}" not in SEPARATE_FILES else path


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT / "tests").parts[0]


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(TEMPORARY, ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not cuda_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def heard_hangups() -> Iterator[None]:
    """SIGHUP has its default action, which `nohup` takes from the tests and from what they start."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def toy() -> dict[str, str]:
    """Paths of the toy model's files by option name."""
    from ltx_ray.toy import ensure_toy_model

    return ensure_toy_model()


@pytest.fixture(scope="session")
def s3():
    """A pyarrow filesystem, allowed to create buckets, on a local S3 server that lives as long as the session.

    The program under test finds the server through the environment, as it would find a MinIO.
    """
    import pyarrow.fs as pafs
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication
    from moto.server import ThreadedMotoServer

    serve, one_at_a_time = DomainDispatcherApplication.__call__, threading.Lock()

    def atomic(self, environ, start_response):
        # S3 keeps a checksum by its own header, moto by one that only Amazon's libraries send.
        if "HTTP_X_AMZ_CHECKSUM_SHA256" in environ:
            environ.setdefault("HTTP_X_AMZ_SDK_CHECKSUM_ALGORITHM", "SHA256")
        # moto looks at the condition of a write and writes in two steps, and S3 in one.
        with one_at_a_time if environ["REQUEST_METHOD"] == "PUT" else nullcontext():
            return serve(self, environ, start_response)

    DomainDispatcherApplication.__call__ = atomic
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    yield pafs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], allow_bucket_creation=True)
    os.environ["AWS_ENDPOINT_URL"] = before
    server.stop()
    DomainDispatcherApplication.__call__ = serve


@pytest.fixture
def bucket(s3) -> str:
    """URI of a new, empty bucket."""
    name = f"b{secrets.token_hex(6)}"
    s3.create_dir(name)
    return f"s3://{name}"
