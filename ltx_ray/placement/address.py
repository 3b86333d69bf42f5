"""The address of a running Ray cluster: what a user gave, and whether a cluster answers there.

Ray itself tries a wrong address for minutes, and ends with a message of its own.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
from pathlib import Path

from ltx_ray.placement.job_cluster import cluster_of_this_job

_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:.%\w]+\]|[^\s:/\[\]]+):(?P<port>[0-9]{1,5})")
#: Seconds for the whole of the check, and for each of its steps: to connect, to be greeted, and to be answered.
_CHECK_SECONDS = 9.0
_CONNECT_SECONDS, _GREETING_SECONDS, _ANSWER_SECONDS = 4.0, 1.0, 3.0
#: The cheapest question that every GCS answers, with an empty request.
_QUESTION = "/ray.rpc.NodeInfoGcsService/CheckAlive"


def find_cluster(given: str | None) -> str | None:
    """The address, host:port, of the cluster that `given` or RAY_ADDRESS names; None for a private cluster.

    Raises ValueError within ten seconds when it is no address, when no cluster answers there, or when RAY_ADDRESS names
    another cluster than the one whose job this process is.
    """
    option, address = "--ray-address", (given or "").strip()
    # Ray, too, lets the variable say which cluster "auto" is.
    if address in ("", "auto") and (variable := os.environ.get("RAY_ADDRESS", "").strip()):
        option, address = "RAY_ADDRESS", variable
    if address in ("", "local"):
        return None
    if _has_joined():
        return address
    found: list[str | ValueError] = []

    def check() -> None:
        try:
            found.append(_checked(option, _found_here(option) if address == "auto" else address))
        except ValueError as error:
            found.append(error)

    # A name server that is gone keeps a process waiting for longer than anyone would like.
    thread = threading.Thread(target=check, name="cluster address", daemon=True)
    thread.start()
    thread.join(_CHECK_SECONDS)
    answer = found[0] if found else _refusal(option, address, "does not answer")
    if isinstance(answer, ValueError):
        raise answer
    return answer


def _has_joined() -> bool:
    """Whether this process belongs to a cluster already, as it may when it is not the command's own."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _refuse_that_of_another_head(address: str) -> None:
    """Raise ValueError when Ray gave a job the address of another head of its machine."""
    own = cluster_of_this_job()
    # A head has one port and, by its machine's names, several hosts. Heads of one machine have different ports.
    if own is not None and address.rpartition(":")[2] != own.rpartition(":")[2]:
        raise ValueError(
            f"RAY_ADDRESS: {address}, but this is a job of {own}: Ray gives jobs the head that started last in the "
            f"same --temp-dir; legal: a --temp-dir of its own for each head, or --ray-address with the one you mean"
        )


def _found_here(option: str) -> str:
    """The address of the cluster of this machine that Ray would take for "auto"."""
    if "RAY_AUTH_MODE" not in os.environ and _saved_token():
        os.environ["RAY_AUTH_MODE"] = "token"  # As Ray does for "auto" alone. It has to know before it is imported.
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        return canonicalize_bootstrap_address_or_die("auto")
    except (ConnectionError, ValueError):
        raise ValueError(
            f"{option}: auto, but not exactly one cluster runs on this machine; legal: host:port of one, or local"
        ) from None


def _checked(option: str, address: str) -> str:
    """`address` when a cluster that this process may join answers there; else ValueError."""
    scheme, found, rest = address.partition("://")
    if found:
        raise _refusal(option, address, _what_a_uri_is(scheme.lower(), rest))
    match = _HOST_AND_PORT.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise _refusal(option, address, "is no address")
    if option == "RAY_ADDRESS":
        _refuse_that_of_another_head(address)
    try:
        greeting = _greeting(match["host"].strip("[]"), int(match["port"]))
    except OSError as error:
        raise _refusal(option, address, f"cannot be reached ({error.strerror or error})") from None
    if greeting.startswith(b"HTTP/"):
        raise _refusal(option, address, "is the port of a dashboard, which takes jobs (ray job submit)")
    if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
        _ask(option, address)
    return address


def _refusal(option: str, address: str, what: str) -> ValueError:
    return ValueError(
        f"{option}: {address}, {what}; legal: host:port of a head, such as 127.0.0.1:6379, "
        "auto (the cluster of this machine), or local (a private one)"
    )


def _what_a_uri_is(scheme: str, rest: str) -> str:
    if scheme in ("http", "https"):
        return "is the address of a dashboard, which takes jobs (ray job submit)"
    if scheme == "ray":
        head = rest.partition("/")[0].rpartition(":")[0] or rest
        return f"is the address of a Ray Client server; a run joins the cluster itself, as at {head}:6379"
    return f"has the scheme {scheme}://"


def _greeting(host: str, port: int) -> bytes:
    """The first bytes that the server answers to a web browser; none when it waits for more. Raises OSError."""
    with socket.create_connection((host, port), timeout=_CONNECT_SECONDS) as connection:
        connection.settimeout(_GREETING_SECONDS)
        try:
            connection.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            return connection.recv(16)
        except OSError:
            return b""


def _ask(option: str, address: str) -> None:
    """Raise ValueError unless a head answers at `address` and takes this process's token."""
    import grpc  # It comes with Ray.

    token = _token()
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_QUESTION)(b"", timeout=_ANSWER_SECONDS, metadata=metadata)
            return
        except grpc.RpcError as error:
            code = error.code()
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        wrong = "refuses this token" if token else "wants a token"
        raise ValueError(
            f"{option}: {address}, {wrong}; legal: RAY_AUTH_MODE=token, with the cluster's token in RAY_AUTH_TOKEN or "
            "~/.ray/auth_token"
        )
    known = code is not grpc.StatusCode.UNIMPLEMENTED
    raise _refusal(option, address, "does not answer as a head" if known else "is the port of another service")


def _token() -> str | None:
    """The token that Ray will send; None when it sends none."""
    return _saved_token() if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" else None


def _saved_token() -> str | None:
    """The token that this process would find, in Ray's order."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        return (Path(path) if path else Path.home() / ".ray" / "auth_token").read_text().strip()
    except (OSError, RuntimeError, UnicodeDecodeError):
        return None
