"""How obstore reaches the bucket that pyarrow reaches: the same endpoint, region and credentials."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs

from ltx_ray.storage.checksums import CRC32, CRC64NVME, SHA256

if TYPE_CHECKING:
    from obstore.store import ClientConfig, GCSConfig, GCSStore, ObjectStore, RetryConfig, S3Credential, S3Store

#: Seconds for which one request may run at all: a listing's page or a large object that keeps arriving.
_LONGEST_SECONDS = 600
#: Connections of the client that asks for checksums: as many as threads ask.
_CONNECTIONS = 32
#: How long credentials are used before they are asked for again. botocore renews those that expire within 10 minutes.
_CREDENTIALS_LIFE = timedelta(minutes=10)
#: Repeating requests is left to RetryPolicy, which then knows whether an answer was lost.
_NO_RETRIES: RetryConfig = {"max_retries": 0}
_GCS_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"


def connector(fs: pafs.FileSystem, root: str, connect_seconds: float) -> Callable[[float, bool], ObjectStore]:
    """A function that opens the bucket of `root` ("bucket/folder"), which `fs` reads.

    Its arguments are the seconds without an answer after which a request is lost, and whether the store is to keep the
    SHA-256 of what is written, which S3 alone does. It raises PermissionError when there are no credentials.
    """
    bucket = root.partition("/")[0]
    _, (options,) = fs.__reduce__()

    def client(seconds: float) -> ClientConfig:
        return {
            "allow_http": True,  # an endpoint with http:// is asked for
            "connect_timeout": timedelta(seconds=connect_seconds),
            "read_timeout": timedelta(seconds=seconds),
            "timeout": timedelta(seconds=_LONGEST_SECONDS),
        }

    if isinstance(fs, pafs.S3FileSystem):
        region = fs.region
        return lambda seconds, checksums: _s3_bucket(bucket, options, region, client(seconds), checksums)
    return lambda seconds, checksums: _gcs_bucket(bucket, options, client(seconds))


def whole_checksums(answer: Mapping[str, Any]) -> dict[str, str]:
    """The checksums (hex) of a whole object in an answer of S3's, by name; not those of the parts of an upload."""
    if answer.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
        return {}
    fields = {SHA256: "ChecksumSHA256", CRC64NVME: "ChecksumCRC64NVME", CRC32: "ChecksumCRC32"}
    kept = {name: answer.get(field, "") for name, field in fields.items()}
    return {name: base64.b64decode(value).hex() for name, value in kept.items() if value and "-" not in value}


def checksum_reader(fs: pafs.FileSystem, root: str, seconds: float) -> Callable[[str], dict[str, str]]:
    """A function that asks the bucket of `root` for the checksums (hex) that it keeps of a whole object, by name.

    It raises FileNotFoundError, PermissionError, and OSError for what may pass. Threads may share it. obstore and
    pyarrow do not tell checksums.
    """
    if not isinstance(fs, pafs.S3FileSystem):
        return lambda key: {}
    import botocore.exceptions
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config

    _, (options,) = fs.__reduce__()
    keys = {
        "aws_access_key_id": "access_key",
        "aws_secret_access_key": "secret_key",
        "aws_session_token": "session_token",
    }
    given = {name: options[key] for name, key in keys.items() if options["access_key"] and options[key]}
    unsigned = {"signature_version": UNSIGNED} if options["anonymous"] else {}
    config = Config(
        connect_timeout=seconds,
        read_timeout=seconds,
        retries={"total_max_attempts": 1},
        max_pool_connections=_CONNECTIONS,
        s3={"addressing_style": "virtual" if options.get("force_virtual_addressing") else "path"},
        **unsigned,
    )
    client = botocore.session.get_session().create_client(
        "s3", region_name=fs.region, endpoint_url=_endpoint(options), config=config,
        verify=options.get("tls_ca_file_path") or None, **given,
    )  # fmt: skip
    bucket = root.partition("/")[0]

    def read(key: str) -> dict[str, str]:
        try:
            answer = client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
        except botocore.exceptions.ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            kind = {404: FileNotFoundError, 403: PermissionError}.get(status, OSError)
            raise kind(f"{error} (HTTP status {status})") from None
        except botocore.exceptions.BotoCoreError as error:
            raise OSError(str(error)) from None
        return whole_checksums(answer)

    return read


def _s3_bucket(
    bucket: str, options: dict[str, Any], region: str, client: ClientConfig, checksums: bool
) -> S3Store:  # fmt: skip
    from obstore.store import S3Store

    if options.get("tls_ca_file_path"):
        client["root_certificate"] = Path(options["tls_ca_file_path"]).read_bytes()
    endpoint = _endpoint(options) or f"https://s3.{region}.amazonaws.com"
    virtual = bool(options.get("force_virtual_addressing"))
    if virtual:
        scheme, _, host = endpoint.partition("://")
        endpoint = f"{scheme}://{bucket}.{host}"
    # Every setting is given, because obstore takes what is left out from variables that pyarrow does not know.
    return S3Store(
        bucket,
        config={
            "region": region,
            "endpoint": endpoint,
            "aws_endpoint_url_s3": endpoint,
            "virtual_hosted_style_request": virtual,
            "skip_signature": bool(options["anonymous"]),
            **({"checksum_algorithm": "sha256"} if checksums else {}),
        },
        client_options=client,
        retry_config=_NO_RETRIES,
        credential_provider=None if options["anonymous"] else _s3_credentials(options),
    )


def _endpoint(options: dict[str, Any]) -> str | None:
    """The endpoint with its scheme; None for Amazon's own."""
    given = options["endpoint_override"] or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return given if not given or "://" in given else f"{options['scheme']}://{given}"


def _s3_credentials(options: dict[str, Any]) -> Callable[[], S3Credential]:
    if options["access_key"]:
        return _fixed(options["access_key"], options["secret_key"], options["session_token"])
    key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    if key and secret:
        return _fixed(key, secret, os.environ.get("AWS_SESSION_TOKEN"))
    return _from_botocore()


def _fixed(key: str, secret: str, token: str | None) -> Callable[[], S3Credential]:
    return lambda: {"access_key_id": key, "secret_access_key": secret, "token": token or None, "expires_at": None}


def _from_botocore() -> Callable[[], S3Credential]:
    """Credentials of a profile, single sign-on, a web identity, a container or an instance.

    obstore itself knows only the last three.
    """
    # They are imported here because a process with keys in its environment does not need them.
    import botocore.exceptions
    import botocore.session

    try:
        credentials = botocore.session.get_session().get_credentials()
    except botocore.exceptions.BotoCoreError as error:
        raise PermissionError(str(error)) from None
    if credentials is None:
        raise PermissionError("there are no AWS credentials")

    def current() -> S3Credential:
        now = credentials.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_LIFE,
        }

    return current


def object_store_options(fs: pafs.FileSystem) -> dict[str, str]:
    """How libraries that are built on the object_store crate, such as deltalake, reach what `fs` reads.

    Credentials may expire: they are for one operation. Google's are left to the environment. Raises PermissionError
    when there are none.
    """
    if not isinstance(fs, pafs.S3FileSystem):
        return {}
    _, (options,) = fs.__reduce__()
    found = {"AWS_REGION": fs.region, "AWS_ALLOW_HTTP": "true"}
    if endpoint := _endpoint(options):
        found["AWS_ENDPOINT_URL"] = endpoint
    if options["anonymous"]:
        return found | {"AWS_SKIP_SIGNATURE": "true"}
    key = _s3_credentials(options)()
    found |= {"AWS_ACCESS_KEY_ID": key["access_key_id"], "AWS_SECRET_ACCESS_KEY": key["secret_access_key"]}
    return found | ({"AWS_SESSION_TOKEN": token} if (token := key["token"]) else {})


def _gcs_bucket(bucket: str, options: dict[str, Any], client: ClientConfig) -> GCSStore:
    from obstore.store import GCSStore

    config: GCSConfig = {"skip_signature": bool(options["anonymous"])}
    if options["endpoint_override"]:
        config["base_url"] = f"{options['scheme']}://{options['endpoint_override']}"
    provider = None
    if not options["anonymous"]:
        import google.auth
        import google.auth.exceptions
        from obstore.auth.google import GoogleCredentialProvider

        try:
            credentials, _ = google.auth.default(scopes=[_GCS_SCOPE])
        except google.auth.exceptions.DefaultCredentialsError as error:
            raise PermissionError(str(error)) from None
        provider = GoogleCredentialProvider(credentials)
    return GCSStore(
        bucket, config=config, client_options=client, retry_config=_NO_RETRIES, credential_provider=provider
    )
