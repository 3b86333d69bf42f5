"""Credentials in URIs, such as s3://KEY:SECRET@bucket/folder: they are used, and never written or shown."""

from __future__ import annotations

import re
import sys
import threading
import traceback
from types import TracebackType
from urllib.parse import quote, unquote

MASK = "***"
#: Shorter credentials are masked in URIs only: as words of a text they may mean something else.
_SHORTEST_WORD = 8

#: A secret key may contain '/', which a bucket's name before it would end. A bucket's name has no ':'.
_USER_INFO = re.compile(r"(?<=://)[^\s/@?#'\"]+@|(?<=s3://)[^\s/@?#'\":]+:[^\s@?#'\"]+@", re.IGNORECASE)
#: The same inside a percent-encoded URI, such as an endpoint in the options of another.
_ENCODED_USER_INFO = re.compile(r"(?<=%3A%2F%2F)(?:(?!%2F|%40)[^\s&'\"])+(?=%40)", re.IGNORECASE)
#: Options that sign a request or name a secret (X-Amz-Signature, sig, access_key, session_token ...).
_SECRET_OPTION = re.compile(
    r"(?<=[?&])([^=&\s]*(?:signature|credential|secret|token|password|passwd|access_?key|key_?id|sig)[^=&\s]*)=[^&\s'\"]+",
    re.IGNORECASE,
)

_words: set[str] = set()


def split_user_info(rest: str) -> tuple[str, str]:
    """The part of a URI behind '://' as (user info, the rest). The user info is "" where there is none."""
    host = re.match(r"[^/?#]*", rest)
    assert host is not None
    if "@" not in (rest.partition("?")[0] if ":" in host.group() else host.group()):
        return "", rest
    info, _, rest = rest.partition("@")
    return info, rest


def encoded_user_info(info: str) -> str:
    """User info with everything but its colon percent-encoded, whether or not it was so before; ends in '@'.

    From now on `masked` also hides its parts where they stand alone, as in a store's error message.
    """
    parts = [unquote(part) for part in info.split(":", 1)]
    encoded = [quote(part, safe="") for part in parts]
    remember(*parts, *encoded)
    return ":".join(encoded) + "@" if info else ""


def remember(*secrets: str) -> None:
    """Have `masked` hide `secrets` wherever they stand in a text, except for those that a word of it could equal."""
    _words.update(secret for secret in secrets if len(secret) >= _SHORTEST_WORD)


def without_credentials(uri: str) -> str:
    """`uri` without user info and without options that are secret. It names the same place to people and in records."""
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return uri
    info, rest = split_user_info(rest)
    encoded_user_info(info)
    place, question, options = rest.partition("?")
    kept = [option for option in options.split("&") if option and not _SECRET_OPTION.match(f"?{option}", 1)]
    return f"{scheme}://{place}{question if kept else ''}{'&'.join(kept)}"


def masked(text: str) -> str:
    """`text` with the credentials of every URI in it replaced by ***, and those of URIs that were opened as well."""
    for word in _words:
        if word in text:
            text = text.replace(word, MASK)
    if "://" in text:
        text = _USER_INFO.sub(f"{MASK}@", text)
        text = _SECRET_OPTION.sub(rf"\1={MASK}", text)
    if "%" in text:
        text = _ENCODED_USER_INFO.sub(MASK, text)
    return text


def mask_tracebacks() -> None:
    """Have the traceback of an error that nobody catches, in any thread, appear without credentials."""

    def show(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        sys.stderr.write(masked("".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = show
    threading.excepthook = lambda args: show(args.exc_type, args.exc_value, args.exc_traceback)
