"""Credentials of URIs are used, and stand nowhere else."""

from __future__ import annotations

import sys
import threading

import pyarrow.fs as pafs
import pytest

from ltx_ray.storage import credentials
from ltx_ray.storage.credentials import mask_tracebacks, masked, without_credentials
from ltx_ray.storage.store import Store

KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
ENCODED = SECRET.replace("/", "%2F").replace("+", "%2B")


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(credentials, "_words", set())


@pytest.mark.parametrize("secret", [SECRET, ENCODED])
def test_a_store_uses_them_encoded_or_not_and_names_itself_without(secret):
    store = Store(f"s3://{KEY}:{secret}@bkt/a folder/x?region=eu-west-1")
    assert isinstance(store._fs, pafs.S3FileSystem)
    _, (options,) = store._fs.__reduce__()
    assert (options["access_key"], options["secret_key"], options["region"]) == (KEY, SECRET, "eu-west-1")
    assert store.root == "bkt/a folder/x" and store.name == "s3://bkt/a folder/x?region=eu-west-1"
    # An error of the store has them without a URI around them.
    assert masked(f"InvalidAccessKeyId: {KEY}; {SECRET}; {ENCODED}") == "InvalidAccessKeyId: ***; ***; ***"
    assert store.retrying_for(1.0).root == store.root


@pytest.mark.parametrize(
    "text, shown",
    [
        (f"--output=s3://{KEY}:{SECRET}@bkt/ds", "--output=s3://***@bkt/ds"),
        (f"s3://{KEY}:{ENCODED}@bkt/ds: failed", "s3://***@bkt/ds: failed"),
        ("'s3://key@bkt/x' and gs://anonymous@b", "'s3://***@bkt/x' and gs://***@b"),
        ("http://user:pw@proxy:3128 says no", "http://***@proxy:3128 says no"),
        ("s3://b/x?region=r&access_key=AAAA&secret_key=BBBB", "s3://b/x?region=r&access_key=***&secret_key=***"),
        ("https://b/x?X-Amz-Credential=a%2Fb&X-Amz-Signature=c0ffee&versionId=3",
         "https://b/x?X-Amz-Credential=***&X-Amz-Signature=***&versionId=3"),
        ("https://a.blob/x?sv=2024&sig=ab%3D&se=1", "https://a.blob/x?sv=2024&sig=***&se=1"),
        ("s3://b/x?endpoint_override=http%3A%2F%2Fu%3Ap%40host", "s3://b/x?endpoint_override=http%3A%2F%2F***%40host"),
        ("s3://b/mail@example.org/x, me@example.org", "s3://b/mail@example.org/x, me@example.org"),
        ("http://host:8265/jobs@2?page=3#x", "http://host:8265/jobs@2?page=3#x"),
        ("a prompt: key=value?", "a prompt: key=value?"),
    ],
)  # fmt: skip
def test_masked(text, shown):
    assert masked(text) == shown == masked(shown)


@pytest.mark.parametrize(
    "uri, public",
    [
        (f"s3://{KEY}:{SECRET}@bkt/ds", "s3://bkt/ds"), (f"s3://{KEY}:{ENCODED}@bkt", "s3://bkt"),
        ("s3://k@b/x?region=r&session_token=t", "s3://b/x?region=r"), ("s3://b/x?secret=1", "s3://b/x"),
        ("s3://b/m@x/y?region=r", "s3://b/m@x/y?region=r"), ("/a@b:c", "/a@b:c"),
    ],
)  # fmt: skip
def test_without_credentials(uri, public):
    assert without_credentials(uri) == public == without_credentials(public)


def test_a_short_key_is_no_word_to_hide():
    Store("s3://a:fox@b/x?region=us-east-1")
    assert masked("a fox at s3://a:fox@b/x") == "a fox at s3://***@b/x"


def test_errors_of_the_store_do_not_have_them():
    with pytest.raises(ValueError) as caught:
        Store(f"s4://{KEY}:{SECRET}@bkt/ds")
    assert KEY not in str(caught.value) and "K7MDENG" not in str(caught.value)


def test_tracebacks_of_any_thread(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    mask_tracebacks()

    def fail() -> None:
        raise RuntimeError(f"s3://{KEY}:{SECRET}@bkt")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    try:
        fail()
    except RuntimeError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    err = capsys.readouterr().err
    assert err.count("RuntimeError: s3://***@bkt") == 2 and SECRET not in err
