"""Files behind a URL (s3, gs, http, ...): listing and fetching whole, through fsspec."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import fsspec  # slow to import, but everything that reads shards may need it
from fsspec.core import url_to_fs

from configs.errors import DataError
from data_pipeline.files import published

_PROTOCOLS = frozenset(
    ["http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "ftp", "sftp", "hdfs", "file"]
)
_PIECE = 1 << 20
_ATTEMPTS = 6
_FIRST_WAIT = 0.5  # seconds, doubled after each failure


class FetchError(DataError):
    """A remote file that can't be had, after all attempts."""


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


def listed(pattern: str) -> list[str]:
    """The URLs that a remote glob pattern matches, sorted."""
    try:
        system, path = url_to_fs(pattern)
        protocol = pattern.partition("://")[0]
        return sorted(f"{protocol}://{_bare(found, protocol)}" for found in system.glob(path))
    except (OSError, ImportError, ValueError) as error:
        raise FetchError(f"{pattern}: can't be listed: {_said(error)}") from error


def size_of(url: str) -> int | None:
    """Bytes of a remote file, where its server says."""
    try:
        system, path = url_to_fs(url)
        size = system.info(path).get("size")
    except (OSError, ImportError, ValueError) as error:
        raise FetchError(f"{url}: can't be reached: {_said(error)}") from error
    return None if size is None else int(size)


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
    file is whole or absent. Raises `FetchError`.
    """
    problem = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            wait(_FIRST_WAIT * 2 ** (attempt - 1))
        try:
            return _fetched(url, target, size, sha256, timeout)
        except FileNotFoundError:
            raise FetchError(f"{url}: missing shard: its server has no such file") from None
        except PermissionError as error:
            raise FetchError(f"{url}: its server refuses access: {_said(error)}") from error
        except ImportError as error:
            raise FetchError(f"{url}: {_said(error)}") from error
        except Exception as error:  # every fsspec backend has exceptions of its own
            problem = _said(error)
    raise FetchError(f"{url}: can't be fetched after {_ATTEMPTS} attempts: {problem}")


def opened(url: str, timeout: float = 60.0) -> AbstractContextManager[Any]:
    """A remote file to be read from its beginning to its end, as a context."""
    found: AbstractContextManager[Any] = fsspec.open(url, "rb", **_options(url, timeout))
    return found


@contextmanager
def fetched(url: str) -> Iterator[Path]:
    """A remote file in a temporary folder, for as long as the block lasts. Raises `FetchError`."""
    with tempfile.TemporaryDirectory(prefix="keel-") as folder:
        path = Path(folder) / "shard.tar"
        fetch(url, path)
        yield path


def _fetched(url: str, target: Path, size: int | None, sha256: str | None, timeout: float) -> int:
    digest, got = hashlib.sha256(), 0
    with fsspec.open(url, "rb", **_options(url, timeout)) as source, published(target) as file:
        while piece := source.read(_PIECE):
            file.write(piece)
            digest.update(piece)
            got += len(piece)
        if size is not None and got != size:
            raise OSError(f"{got} bytes came of {size}")
        if sha256 is not None and digest.hexdigest() != sha256:
            raise OSError("its checksum differs from the manifest's: a changed or damaged shard")
    return got


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
