"""Whether a sweep's folder holds this sweep and nothing else.

A member's folder is named by its config's name and its own overrides. What else makes the run (what its
config and that one's bases say, the overrides of all, the data) isn't in the name, so it is compared here: of
each member that is there, finished or not, also of those that only an earlier submission has noted in
DIR/sweep.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, RunError, UserError
from configs.loading import difference, dump, load
from configs.sweep import Member, SweepConfig
from launch.runs.early_stop import SWEEP
from launch.runs.files import read_json
from pretrain.config import RunConfig, refused_changes

SHOWN = 8
"""Differences that a refusal lists."""


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """The members that DIR/sweep.json knows: name to its config and overrides; `RunError` where torn."""
    file = folder / SWEEP
    try:
        runs = json.loads(file.read_text())["runs"]
        return {str(name): {"config": str(own["config"]), **own} for name, own in runs.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{file}: can't be read as a sweep's record ({error!r}); restore it, or set another dir"
        ) from error


def require_distinct(configs: Mapping[str, RunConfig]) -> None:
    """Raises `ConfigError` where two members, by name, are one run: the same settings written otherwise."""
    seen: dict[str, str] = {}
    for name, config in configs.items():
        placed = config.placed()
        own = placed.run.model_copy(update={"dir": Path("/")})
        same = seen.setdefault(dump(placed.model_copy(update={"run": own})), name)
        if same != name:
            raise ConfigError(f"members: {same} and {name} are the same run; leave one of them out")


def require_same(sweep: SweepConfig, configs: Mapping[str, RunConfig]) -> None:
    """Refuse a folder with members that `sweep` wouldn't make so. `configs`: of its members, by name.

    Raises `RunError` listing what differs, each difference once with a member that has it.
    """
    found: dict[str, str] = {}
    known: dict[str, Mapping[str, str]] = {}
    for name, config in _compared(sweep, configs, recorded(sweep.dir)):
        folder = sweep.dir / name
        if not (folder / "config.yaml").is_file():
            continue
        for line in (*_other_settings(folder, config), *_other_data(folder, config, known)):
            found.setdefault(line, name)
    if found:
        lines = [f"{line} (in {name})" for line, name in list(found.items())[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(f"and {len(found) - SHOWN} more differences")
        lines.append(
            f"dir: {sweep.dir} holds members that this sweep wouldn't make; set another dir, "
            "or bring the file back to what they were made with"
        )
        raise RunError("\n".join(lines))


def _compared(
    sweep: SweepConfig, configs: Mapping[str, RunConfig], before: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, RunConfig]]:
    """Every member that is asked for, then those that were: as today's file would make them."""
    yield from configs.items()
    for name, own in before.items():
        if name in configs or not (sweep.dir / name / "config.yaml").is_file():
            continue
        overrides = {key: value for key, value in own.items() if key != "config"}
        member = Member(name, own["config"], overrides)
        try:
            yield name, load(member.config, RunConfig, member.dotlist(sweep))
        except UserError as error:
            raise RunError(
                f"{sweep.dir / name}: a member of the sweep that was here before, and can't be made with "
                f"today's settings: {str(error).splitlines()[0]}; set another dir, or remove that folder"
            ) from error


def _other_settings(folder: Path, config: RunConfig) -> Iterator[str]:
    there = load(folder / "config.yaml", RunConfig)
    for path, (before, new) in refused_changes(difference(there, config.placed())).items():
        yield f"{path}: found {new!r}, but it was {before!r}"


def _other_data(folder: Path, config: RunConfig, known: dict[str, Mapping[str, str]]) -> Iterator[str]:
    """`known`: what was learnt of data already. Data that aren't there any more can't be compared."""
    from data_pipeline.facts import facts_of

    before = {key: value for key, value in read_json(folder / "run.json").items() if key.endswith("_hash")}
    data = config.placed().data
    if not before or (data.manifest is not None and not data.manifest.is_file()):
        return
    key = data.model_dump_json()
    if key not in known:
        try:
            known[key] = facts_of(data).identity
        except UserError:
            known[key] = {}  # said where members that are due are made ready
    for name, new in known[key].items():
        if before.get(name, new) != new:
            what = name.removesuffix("_hash")
            yield f"data: the {what} there was {str(before[name])[:12]}, and is {new[:12]} now"
