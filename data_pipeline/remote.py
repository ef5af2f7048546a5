"""Files behind a URL (s3, gs, http, ...): listing and fetching whole, through fsspec.

A server may not have a file, refuse it, be busy, or be out of reach: told apart by what it answered, and the
last two are asked again after growing pauses, with a word each time. fsspec turns nearly every answer into
FileNotFoundError; what was answered is found in what caused it.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import fsspec  # slow to import, but everything that reads shards may need it
from fsspec.core import url_to_fs

from configs.errors import DataError
from data_pipeline.files import published

log = logging.getLogger(__name__)

_PROTOCOLS = frozenset(
    ["http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "ftp", "sftp", "hdfs", "file"]
)
_PIECE = 1 << 20
_ATTEMPTS = 6
_FIRST_WAIT = 0.5  # seconds, doubled after each failure
_LONGEST_WAIT = 60.0  # seconds, whatever a server asks for
_BUSY = (408, 425, 429)  # and all from 500 on

_Got = TypeVar("_Got")


class FetchError(DataError):
    """A remote file that can't be had, after all attempts."""


@dataclass(frozen=True)
class _Trouble:
    """Why a file couldn't be had, and whether asking again may help, after at least `wait` seconds."""

    words: str
    again: bool
    wait: float = 0.0


class _BrokenOffError(Exception):
    """The server's side of a transfer failed, for the reason that caused this."""


def is_remote(name: str) -> bool:
    """Whether a name is a URL and not a path."""
    return "://" in name


def check_name(name: str) -> None:
    """Refuse what isn't a path or a URL of a file: shell commands above all. Raises `DataError`."""
    if name.startswith("pipe:") or "::" in name or "\0" in name:
        raise DataError(f"{name[:80]!r}: shards are files or URLs; commands and chained URLs aren't run")
    protocol = name.partition("://")[0]
    if is_remote(name) and protocol not in _PROTOCOLS:
        raise DataError(f"{name[:80]!r}: unknown protocol; known are {', '.join(sorted(_PROTOCOLS))}")


def listed(pattern: str, wait: Callable[[float], Any] = time.sleep) -> list[str]:
    """The URLs that a remote glob pattern matches, sorted. Raises `FetchError`."""
    protocol = pattern.partition("://")[0]

    def ask() -> list[str]:
        system, path = url_to_fs(pattern)
        return sorted(f"{protocol}://{_bare(found, protocol)}" for found in system.glob(path))

    return _patiently(pattern, ask, wait)


def size_of(url: str, wait: Callable[[float], Any] = time.sleep) -> int | None:
    """Bytes of a remote file, where its server says. Raises `FetchError`."""

    def ask() -> int | None:
        system, path = url_to_fs(url)
        size = system.info(path).get("size")
        return None if size is None else int(size)

    return _patiently(url, ask, wait)


def version_of(url: str) -> dict[str, str] | None:
    """What tells this version of a remote file from others, where its server says: ETag, date and size.

    None where it says nothing but the size, or can't be asked.
    """
    try:
        system, path = url_to_fs(url)
        info = system.info(path)
    except Exception:  # every fsspec backend has exceptions of its own; fetching will say what is wrong
        return None
    names = (
        "ETag",
        "etag",
        "Last-Modified",
        "LastModified",
        "last_modified",
        "md5Hash",
        "generation",
        "mtime",
    )
    known = {name: str(info[name]) for name in names if info.get(name)}
    return {**known, "size": str(info.get("size"))} if known else None


def fetch(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    wait: Callable[[float], Any] = time.sleep,
    timeout: float = 60.0,
) -> int:
    """Fetch a whole file to `target`, checked against `size` and `sha256` where given; gives its bytes.

    Tried several times with growing pauses; a read that stalls for `timeout` seconds counts as failed. The
    file is whole or absent. Raises `FetchError`, or `DataError` where `target` can't be written.
    """
    return _patiently(url, lambda: _fetched(url, target, size, sha256, timeout), wait)


@contextmanager
def opened(url: str, timeout: float = 60.0, wait: Callable[[float], Any] = time.sleep) -> Iterator[Any]:
    """A remote file to be read from beginning to end. Raises `FetchError` where it can't be opened."""
    with _patiently(url, lambda: fsspec.open(url, "rb", **_options(url, timeout)).open(), wait) as stream:
        yield stream


@contextmanager
def fetched(url: str) -> Iterator[Path]:
    """A remote file in a temporary folder, for as long as the block lasts. Raises `FetchError`."""
    with tempfile.TemporaryDirectory(prefix="keel-") as folder:
        path = Path(folder) / "shard.tar"
        fetch(url, path)
        yield path


def _patiently(url: str, ask: Callable[[], _Got], wait: Callable[[float], Any]) -> _Got:
    """What `ask` gives, asked again while that may help. Raises `FetchError`."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return ask()
        except DataError:
            raise
        except Exception as error:  # every fsspec backend has exceptions of its own
            trouble = _trouble(error)
        if not trouble.again:
            raise FetchError(f"{url}: {trouble.words}")
        if attempt < _ATTEMPTS:
            pause = min(max(_FIRST_WAIT * 2 ** (attempt - 1), trouble.wait), _LONGEST_WAIT)
            told = (url, trouble.words, pause, attempt + 1, _ATTEMPTS)
            log.warning("%s: %s; trying again in %g s (attempt %d of %d)", *told)
            wait(pause)
    raise FetchError(f"{url}: can't be fetched after {_ATTEMPTS} attempts: {trouble.words}")


def _trouble(error: BaseException) -> _Trouble:
    chain = _chain(error)
    for one in chain:
        status = _status(one)
        if status is not None:
            return _answered(status, one)
    for one in chain:
        if isinstance(one, ConnectionError | TimeoutError) or "Connect" in type(one).__name__:
            return _Trouble(f"its server can't be reached ({_said(one)})", again=True)
    for one in chain:
        if "Credentials" in type(one).__name__:  # botocore's and google.auth's
            told = f"its server wants credentials: {_said(one)}; set them as its client reads them"
            return _Trouble(told, again=False)
        if isinstance(one, PermissionError):
            return _Trouble(f"its server refuses access: {_said(one)}", again=False)
        if isinstance(one, FileNotFoundError):
            return _Trouble("missing shard: its server has no such file", again=False)
        if isinstance(one, ImportError | ValueError):
            return _Trouble(_said(one), again=False)
    return _Trouble(_said(chain[-1]), again=True)


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what caused it, the innermost last."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return [one for one in chain if not isinstance(one, _BrokenOffError)] or chain


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of aiohttp (`status`), gcsfs (`code`) or botocore (`response`)."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        # aiohttp has a `code` as well, for bodies that break off, which no server has answered.
        found = getattr(error, "code" if type(error).__module__.startswith("gcsfs") else "status", None)
    return int(found) if str(found).isdecimal() and 300 <= int(str(found)) < 600 else None


def _answered(status: int, error: BaseException) -> _Trouble:
    name = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
    told = f"{status} {name}".strip()
    if status in (404, 410):
        return _Trouble(f"missing shard: its server has no such file ({told})", again=False)
    if status in (401, 403, 407):
        return _Trouble(
            f"its server refuses access ({told}): check the address and who may read it", again=False
        )
    if status in _BUSY or status >= 500:
        asked = str((getattr(error, "headers", None) or {}).get("Retry-After", ""))
        return _Trouble(
            f"its server is busy ({told})", again=True, wait=float(asked) if asked.isdecimal() else 0.0
        )
    return _Trouble(f"its server answers {told}", again=False)


def _fetched(url: str, target: Path, size: int | None, sha256: str | None, timeout: float) -> int:
    digest, got = hashlib.sha256(), 0
    with fsspec.open(url, "rb", **_options(url, timeout)) as source:
        try:
            with published(target) as file:
                while piece := _read(source):
                    file.write(piece)
                    digest.update(piece)
                    got += len(piece)
                if size is not None and got != size:
                    raise _BrokenOffError from OSError(f"{got} bytes came of {size}")
                if sha256 is not None and digest.hexdigest() != sha256:
                    told = "its checksum differs from the manifest's: a changed or damaged shard"
                    raise _BrokenOffError from OSError(told)
        except OSError as error:
            raise DataError(
                f"{target.parent}: {url} can't be written there: {error.strerror or error}"
            ) from None
    return got


def _read(source: Any) -> bytes:
    try:
        return bytes(source.read(_PIECE))
    except Exception as error:
        raise _BrokenOffError from error


def _options(url: str, timeout: float) -> dict[str, Any]:
    if url.startswith(("http://", "https://")):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        return {"client_kwargs": {"timeout": limits}, "block_size": 0}
    return {}


def _bare(path: str, protocol: str) -> str:
    return path.removeprefix(f"{protocol}://")


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
