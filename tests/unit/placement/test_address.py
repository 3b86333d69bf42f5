"""An address that no run can join is refused at the door, in one sentence that says what is legal."""

from __future__ import annotations

import http.server
import os
import socket
import threading
from concurrent import futures

import grpc
import pytest

from ltx_ray.placement.address import find_cluster

TOKEN = "0123456789abcdef"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch, tmp_path):
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("ltx_ray.placement.address._has_joined", lambda: False)
    # A busy machine takes long to answer.
    for name in ("_CHECK", "_CONNECT", "_GREETING", "_ANSWER"):
        monkeypatch.setattr(f"ltx_ray.placement.address.{name}_SECONDS", 120.0)


def refusal(given: str | None) -> str:
    with pytest.raises(ValueError) as caught:
        find_cluster(given)
    message = str(caught.value)
    assert "\n" not in message and "; legal: " in message
    return message


@pytest.fixture
def serve():
    """Starts a gRPC server that answers as a GCS, with or without a token, or as another service; returns its port."""
    servers = []

    def start(methods: tuple[str, ...] = ("/ray.rpc.NodeInfoGcsService/CheckAlive",), token: str | None = None) -> int:
        class Handler(grpc.GenericRpcHandler):
            def service(self, details):
                sent = dict(details.invocation_metadata).get("authorization")

                def answer(request, context):
                    if token is not None and sent != f"Bearer {token}":
                        context.abort(grpc.StatusCode.UNAUTHENTICATED, "missing or incorrect")
                    return b""

                return grpc.unary_unary_rpc_method_handler(answer) if details.method in methods else None

        server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[Handler()])
        servers.append(server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        return port

    yield start
    for server in servers:
        server.stop(None)


@pytest.fixture
def dashboard():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("given", [None, "", " ", "local"])
def test_no_address_and_local_mean_a_private_cluster(given):
    assert find_cluster(given) is None


def test_local_on_the_command_line_overrides_the_variable(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert find_cluster("local") is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("http://127.0.0.1:8265", "is the address of a dashboard, which takes jobs"),
        ("HTTPS://head", "is the address of a dashboard"),
        ("ray://head:10001", "is the address of a Ray Client server; a run joins the cluster itself, as at head:6379"),
        ("ray://head", "is the address of a Ray Client server; a run joins the cluster itself, as at head:6379"),
        ("redis://head:6379", "has the scheme redis://"),
        ("head", "is no address"),
        ("6379", "is no address"),
        (":6379", "is no address"),
        ("head:", "is no address"),
        ("head:port", "is no address"),
        ("head:0", "is no address"),
        ("head:65536", "is no address"),
        ("head:6379/path", "is no address"),
        ("a head:6379", "is no address"),
    ],
)
def test_what_is_no_address_of_a_head_is_named(monkeypatch, given, said):
    assert refusal(given).startswith(f"--ray-address: {given}, {said}")
    monkeypatch.setenv("RAY_ADDRESS", given)
    for option in (None, "auto"):
        assert refusal(option).startswith(f"RAY_ADDRESS: {given}, {said}")


def test_where_nothing_listens_is_said_at_once():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert refusal(address).startswith(f"--ray-address: {address}, cannot be reached (Connection refused)")


def test_a_name_that_is_unknown_is_said(monkeypatch):
    def unknown(*arguments):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "head:6379, cannot be reached (" in refusal("head:6379")


def test_a_dashboard_s_port_is_told_from_a_head_s(dashboard):
    assert f"127.0.0.1:{dashboard}, is the port of a dashboard" in refusal(f"127.0.0.1:{dashboard}")


def test_a_head_is_found_and_another_service_is_not(serve):
    address = f"127.0.0.1:{serve()}"
    assert find_cluster(address) == find_cluster(f" {address}\n") == address
    assert "is the port of another service" in refusal(f"127.0.0.1:{serve(methods=())}")


def test_a_server_that_says_nothing_is_not_waited_for(monkeypatch):
    for name in ("_GREETING", "_ANSWER"):
        monkeypatch.setattr(f"ltx_ray.placement.address.{name}_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "does not answer as a head" in refusal(f"127.0.0.1:{silent.getsockname()[1]}")


def test_a_name_server_that_is_gone_is_not_waited_for(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr("ltx_ray.placement.address._CHECK_SECONDS", 0.2)
    monkeypatch.setattr("ltx_ray.placement.address._greeting", lambda host, port: over.wait() and b"")
    assert "head:6379, does not answer; legal" in refusal("head:6379")
    over.set()


def test_a_head_with_a_token_says_what_to_set(serve, monkeypatch, tmp_path):
    address = f"127.0.0.1:{serve(token=TOKEN)}"
    wanted = "legal: RAY_AUTH_MODE=token, with the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
    assert refusal(address) == f"--ray-address: {address}, wants a token; {wanted}"
    # Ray sends a token only in this mode.
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert "wants a token" in refusal(address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert find_cluster(address) == address
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    assert refusal(address) == f"--ray-address: {address}, refuses this token; {wanted}"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    assert "wants a token" in refusal(address)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    assert find_cluster(address) == address


def test_auto_takes_the_one_cluster_of_this_machine(serve, monkeypatch, tmp_path):
    services = pytest.importorskip("ray._private.services")
    address = f"127.0.0.1:{serve(token=TOKEN)}"
    monkeypatch.setattr(services, "canonicalize_bootstrap_address_or_die", lambda given: address)
    assert "wants a token" in refusal("auto")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert find_cluster("auto") == address and os.environ["RAY_AUTH_MODE"] == "token"

    def none(given):
        raise ConnectionError("Could not find any running Ray instance.\nMore.")

    monkeypatch.setattr(services, "canonicalize_bootstrap_address_or_die", none)
    assert refusal("auto").startswith("--ray-address: auto, but not exactly one cluster runs on this machine")
