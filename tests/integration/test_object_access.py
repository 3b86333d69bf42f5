"""pyarrow and obstore sign their requests to one bucket with the same credentials and region."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ltx_ray.storage.store import Store
from tests.support.google_store import GoogleStore
from tests.support.s3_faults import Proxy

#: Writes one object with each library. A process of its own, because pyarrow reads files of profiles once.
WRITE = """
import sys
from ltx_ray.storage.store import Store
store = Store(sys.argv[1], retry_seconds=0)
store.write_bytes("a b/by-pyarrow", b"1")
assert store.create("a b/by-obstore", b"1")
assert sorted(store.names("a b")) == ["by-obstore", "by-pyarrow"] == store.list_names("a b")
print(*sorted(name for name in ("obstore", "botocore") if name in sys.modules))
"""


@pytest.fixture
def proxy(s3):
    proxy = Proxy(os.environ["AWS_ENDPOINT_URL"])
    yield proxy
    proxy.close()


@pytest.fixture
def surroundings(proxy, tmp_path) -> dict[str, str]:
    """An environment without credentials, in which the endpoint is the proxy."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return {**own, "HOME": str(tmp_path), "AWS_ENDPOINT_URL": proxy.url, "AWS_EC2_METADATA_DISABLED": "true"}


def modules(environment: dict[str, str], uri: str) -> list[str]:
    """Which libraries a process imports that writes with both."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE, uri], env=environment, check=True, timeout=600, capture_output=True
    )
    return done.stdout.decode().split()


def signatures(proxy: Proxy, environment: dict[str, str], uri: str) -> dict[str, tuple[str, str, str | None]]:
    """(access key, region, session token) with which each library has written its object."""
    modules(environment, uri)
    found = {}
    for method, path, headers in proxy.requests:
        if method == "PUT":
            lower = {name.lower(): value for name, value in headers.items()}
            key, region = re.search(r"Credential=([^/]+)/\d+/([^/]+)/s3/", lower["authorization"]).groups()
            found[path.rpartition("by-")[2]] = (key, region, lower.get("x-amz-security-token"))
    assert set(found) == {"pyarrow", "obstore"}
    return found


def in_file(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "KEY-OF-ENVIRONMENT", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "eu-west-1"}
PROFILES = """
[default]
aws_access_key_id = KEY-OF-DEFAULT
aws_secret_access_key = secret
[team]
aws_access_key_id = KEY-OF-TEAM
aws_secret_access_key = secret
aws_session_token = TOKEN-OF-TEAM
"""
CONFIGURATION = """
[default]
region = eu-central-1
[profile tool]
region = eu-central-1
credential_process = {program}
"""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (ENVIRONMENT, ("KEY-OF-ENVIRONMENT", "eu-west-1", None)),
        ({**ENVIRONMENT, "AWS_SESSION_TOKEN": "TOKEN"}, ("KEY-OF-ENVIRONMENT", "eu-west-1", "TOKEN")),
        ({**ENVIRONMENT, "profiles": "yes"}, ("KEY-OF-ENVIRONMENT", "eu-west-1", None)),
        ({"profiles": "yes", "AWS_DEFAULT_REGION": "eu-west-2"}, ("KEY-OF-DEFAULT", "eu-west-2", None)),
        ({"profiles": "yes", "AWS_PROFILE": "team", "AWS_REGION": "a-1"}, ("KEY-OF-TEAM", "a-1", "TOKEN-OF-TEAM")),
        ({"configuration": "yes", "AWS_PROFILE": "tool", "AWS_REGION": "a-1"}, ("KEY-OF-PROGRAM", "a-1", "TOKEN")),
    ],
    ids=["environment", "token", "environment before profile", "profile", "named profile", "program"],
)
def test_credentials_of_the_environment_and_of_profiles(proxy, surroundings, bucket, tmp_path, changes, expected):
    changes = dict(changes)
    if changes.pop("profiles", None):
        changes["AWS_SHARED_CREDENTIALS_FILE"] = in_file(tmp_path, "profiles", PROFILES)
    if changes.pop("configuration", None):
        answer = {"Version": 1, "AccessKeyId": "KEY-OF-PROGRAM", "SecretAccessKey": "s", "SessionToken": "TOKEN"}
        answer["Expiration"] = "2099-01-01T00:00:00Z"
        program = f"cat {in_file(tmp_path, 'answer.json', json.dumps(answer))}"
        changes["AWS_CONFIG_FILE"] = in_file(tmp_path, "config", CONFIGURATION.format(program=program))
    found = signatures(proxy, {**surroundings, **changes}, f"{bucket}/out")
    assert found == {"pyarrow": expected, "obstore": expected}


def test_credentials_and_options_of_a_uri_are_taken_before_those_of_the_environment(proxy, surroundings, bucket):
    place = bucket.replace("s3://", "s3://KEY-OF-URI:secret/of+uri@")
    place += f"/out?region=eu-north-1&scheme=http&endpoint_override={proxy.url.removeprefix('http://')}"
    other = {**ENVIRONMENT, "AWS_SESSION_TOKEN": "TOKEN", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    found = signatures(proxy, {**surroundings, **other}, place)
    assert found == dict.fromkeys(("pyarrow", "obstore"), ("KEY-OF-URI", "eu-north-1", None))


def test_the_role_of_a_container(proxy, surroundings, bucket):
    """Roles of instances and of pods come the same way, from other addresses."""
    answer = {"AccessKeyId": "KEY-OF-ROLE", "SecretAccessKey": "s", "Token": "T", "Expiration": "2099-01-01T00:00:00Z"}

    class Role(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Role)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/role"
    changes = {"AWS_CONTAINER_CREDENTIALS_FULL_URI": address, "AWS_REGION": "eu-west-1"}
    try:
        found = signatures(proxy, {**surroundings, **changes}, f"{bucket}/out")
    finally:
        server.shutdown()
        server.server_close()
    assert found == dict.fromkeys(("pyarrow", "obstore"), ("KEY-OF-ROLE", "eu-west-1", "T"))


def test_a_web_identity(proxy, surroundings, bucket, tmp_path):
    """Only obstore's half: pyarrow asks Amazon's own service, whatever the environment says."""
    changes = {
        "AWS_WEB_IDENTITY_TOKEN_FILE": in_file(tmp_path, "token", "a token"),
        "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/renderer",
        "AWS_REGION": "us-east-1",
    }
    program = "import sys; from ltx_ray.storage.store import Store; assert Store(sys.argv[1]).create('x', b'1')"
    subprocess.run([sys.executable, "-c", program, bucket], env={**surroundings, **changes}, check=True, timeout=600)
    headers = next(headers for method, _, headers in proxy.requests if method == "PUT")
    assert "X-Amz-Security-Token" in {name.title() for name in headers}


def test_a_bucket_without_credentials_is_forbidden(surroundings, bucket):
    program = "import sys; from ltx_ray.storage.store import Store; Store(sys.argv[1]).create('x', b'1')"
    for changes, told in (({}, "there are no AWS credentials"), ({"AWS_PROFILE": "none"}, "config profile (none)")):
        environment = {**surroundings, "AWS_REGION": "us-east-1", **changes}
        done = subprocess.run(
            [sys.executable, "-c", program, bucket], env=environment, timeout=600, capture_output=True
        )
        assert f"PermissionError: {told}" in done.stderr.decode().replace("The ", "")


def test_a_library_is_imported_only_where_it_is_needed(surroundings, bucket, tmp_path):
    environment = {**surroundings, **ENVIRONMENT}
    assert modules(environment, str(tmp_path / "out")) == []
    assert modules(environment, bucket) == ["obstore"]


@pytest.fixture
def google(tmp_path, monkeypatch):
    """Google's store, and the key of a service account in the environment."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    google = GoogleStore("bucket")
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    account = {
        "type": "service_account",
        "project_id": "p",
        "client_email": "a@p.iam.gserviceaccount.com",
        "private_key": key.private_bytes(*form).decode(),
        "token_uri": f"http://{google.address}/token",
    }
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", in_file(tmp_path, "account.json", json.dumps(account)))
    yield google
    google.close()


def test_conditional_writes_in_googles_store(google):
    store = Store(f"gs://bucket/out?scheme=http&endpoint_override={google.address}", wait=pytest.fail)
    assert [store.create("a b/x", data) for data in (b"one", b"two")] == [True, False]
    data, version = store.read_versioned("a b/x")
    assert data == b"one" and [store.update("a b/x", data, version) for data in (b"two", b"three")] == [True, False]
    assert google.objects == {"out/a b/x": (2, b"two")} and not store.update("none", b"1", version)
    assert store.refuses_second_create() and sorted(store.names("")) == ["a b/x", "state/probe"]
    store.delete_many(["a b/none", "a b/x", "a b/none either", "state/probe"])
    assert google.objects == {} and google.tokens == {"TOKEN"}
    with pytest.raises(FileNotFoundError):
        store.read_versioned("a b/x")


def test_googles_store_without_credentials_is_forbidden(google, tmp_path, monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    store = Store(f"gs://bucket/out?scheme=http&endpoint_override={google.address}", wait=pytest.fail)
    with pytest.raises(PermissionError, match=r"none\.json"):
        store.create("y", b"1")
