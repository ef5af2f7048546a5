"""What timm is asked to open: a folder, a hub's model, or a name of its own; how long a hub is waited for."""

from __future__ import annotations

import difflib
import logging
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from configs.errors import RunError
from pretrain.encoders.torchvision_compat import ensure_torchvision

LOCAL, HUBS = "local-dir:", ("hf-hub:", "hf_hub:")
PATIENCE = 5.0
"""Seconds until a hub that doesn't answer counts as out of reach."""


def timm_name(source: str, where: str = "") -> str:
    """`source` as `timm.create_model` takes it: local-dir:FOLDER, hf-hub:OWNER/NAME, or a name of timm's.

    `where`: the setting, in front of what is said. Raises `RunError`, for a name with what it may have meant.
    """
    folder = folder_of(source)
    if folder is not None:
        _require_timms(folder, source, where)
        return LOCAL + str(folder.absolute())
    if source.startswith(HUBS):
        return source
    ensure_torchvision()
    import timm

    if timm.is_model(source):
        tag = source.partition(".")[2]
        if tag and source not in timm.list_pretrained():
            near = difflib.get_close_matches(source, timm.list_pretrained(), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RunError(f"{where}{source}: timm has no such weights{hint}")
        return source
    near = difflib.get_close_matches(source.partition(".")[0], timm.list_models(), n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    if where:
        raise RunError(
            f"{where}{source} is neither a file, nor a folder, nor a name that timm knows"
            f"{hint or '; check the path, or see timm.list_pretrained()'}"
        )
    raise RunError(f"{source}: neither a run folder, an exported folder, nor a model that timm knows{hint}")


def folder_of(source: str) -> Path | None:
    """The folder that `source` names, with or without local-dir: in front; None where it names none."""
    if source.startswith(LOCAL):
        return Path(source.removeprefix(LOCAL)).expanduser()
    path = Path(source).expanduser()
    return path if path.is_dir() else None


def config_file(source: str) -> Path | None:
    """config.json of a folder or of a hub's model that has been opened; None of a name of timm's."""
    folder = folder_of(source)
    if folder is not None:
        return folder / "config.json" if (folder / "config.json").is_file() else None
    if not source.startswith(HUBS):
        return None
    from huggingface_hub import try_to_load_from_cache

    owner, _, revision = source.partition(":")[2].partition("@")
    found = try_to_load_from_cache(owner, "config.json", revision=revision or None)
    return Path(found) if isinstance(found, str) else None


def _require_timms(folder: Path, source: str, where: str) -> None:
    if not folder.is_dir():
        raise RunError(f"{where}{source}: there is no folder {folder}; check the path")
    if not (folder / "config.json").is_file():
        if (folder / "open_clip_config.json").is_file():
            raise RunError(
                f"{where}{source}: is an export for open_clip, whose towers keel doesn't open; judge the run "
                "it came from, or an export with --format timm"
            )
        raise RunError(
            f"{where}{source}: neither a run folder nor one that timm opens: there is no config.yaml and no "
            "config.json in it"
        )


@contextmanager
def hub_within_reach(name: str) -> Iterator[None]:
    """Meanwhile a hub that can't be reached isn't waited for: what lies in its local cache is opened at once.

    `name`: what timm will open. Its client tries for a minute otherwise.
    """
    from huggingface_hub import constants

    if name.startswith(LOCAL) or constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT):
        yield
        return
    quiet = logging.getLogger("timm")
    level, constants.HF_HUB_OFFLINE = quiet.level, True
    quiet.setLevel(logging.ERROR)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False
        quiet.setLevel(level)


def _answers(endpoint: str) -> bool:
    """Whether a connection is made to a hub, or to the proxy on the way to it."""
    parts = urlsplit(endpoint)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme, 443)
    try:
        socket.create_connection((parts.hostname or "localhost", port), timeout=PATIENCE).close()
    except OSError:
        return False
    return True


def why(name: str, error: Exception) -> str:
    """What an error of timm's says, and where a hub was out of reach, that."""
    from huggingface_hub import constants

    told = " ".join(str(error).split())[:300]
    if name.startswith(LOCAL):
        return told
    if type(error).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError"):
        return f"it isn't in the hub's cache here, and {constants.ENDPOINT} can't be reached"
    return told
