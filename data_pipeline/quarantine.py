"""Broken samples: written down once, counted, and too many of them stop the run."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.errors import DataError
from data_pipeline.locks import locked

log = logging.getLogger(__name__)

_LEAST_SEEN = 10_000  # the limit holds from this many samples on; before, as if so many had been seen


@dataclass(frozen=True)
class Broken:
    """A sample that couldn't be used, and the one of its shard that stood in for it."""

    source: int  # number in data.manifest, data.also
    index: int  # the sample's number over all sources
    shard: str
    key: str
    field: str
    reason: str
    substitute: str  # key


class Quarantine:
    """The file quarantine.jsonl (or none) and the limit `max_broken`, a fraction of the samples seen."""

    def __init__(self, path: Path | None, max_broken: float):
        self.path, self.max_broken = path, max_broken
        self.count = 0  # broken samples met by this rank, repeats included
        self._reasons: Counter[tuple[str, str]] = Counter()
        self._known: set[int] = set()

    def add(self, broken: Sequence[Broken], seen: int) -> None:
        """Take in the broken samples of a batch, `seen` samples into this rank's run.

        Raises `DataError` with a summary when there are more than the limit allows.
        """
        for one in broken:
            self.count += 1
            self._reasons[one.shard, one.reason] += 1
        met = {one.index: one for one in broken if one.index not in self._known}  # a batch may have it twice
        if met:
            self._known.update(met)
            self._write(list(met.values()))
        allowed = self.max_broken * max(seen, _LEAST_SEEN)
        if self.count > allowed:
            raise DataError(self._summary(seen))

    def _write(self, fresh: Sequence[Broken]) -> None:
        """Append what no rank and no earlier attempt has written."""
        for one in fresh:
            log.warning(
                "%s: sample %r: field %s: %s; %r stands in for it",
                *(one.shard, one.key, one.field, one.reason, one.substitute),
            )
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                locked(file)
                file.seek(0)
                before = file.read()
                written = {record.index for record in _parsed(before.decode(errors="replace"))}
                lines = [json.dumps(asdict(one)) + "\n" for one in fresh if one.index not in written]
                cut = (
                    b"\n" if before and not before.endswith(b"\n") else b""
                )  # a disk was full, a process died
                file.write(cut + "".join(lines).encode())
        except OSError as error:
            told = f"{self.path}: can't be written: {error.strerror or error}"
            raise DataError(f"{told}; broken samples are written there: make room, or mend them") from error

    def _summary(self, seen: int) -> str:
        often = "; ".join(f"{count} x {shard}: {why}" for (shard, why), count in self._reasons.most_common(3))
        return (
            f"data.max_broken: {self.count} of {max(seen, 1)} samples can't be used, more than "
            f"{self.max_broken:g} of them; most often: {often}; mend the data (keel data verify) or raise it"
        )


def quarantined(path: Path) -> list[Broken]:
    """The records of a quarantine.jsonl; none where there is no such file. A cut last line is left out."""
    return _parsed(path.read_text(errors="replace")) if path.exists() else []


def _parsed(text: str) -> list[Broken]:
    records = []
    for line in text.splitlines():
        try:
            records.append(Broken(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return records
