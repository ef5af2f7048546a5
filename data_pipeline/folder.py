"""A folder of pictures as a source of `keel data pack`: every file in it is taken, or left out for a reason.

Sub-folders are classes. Links are followed, each folder once a class, so that loops end. What hides (a dot in
front, thumbnails and copies that systems make) is left out on every level.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import DataError
from data_pipeline.books import Books
from data_pipeline.entries import ENDINGS, Entry, Offered, SourceOptions, listed, said
from data_pipeline.label_numbers import numbers_of
from data_pipeline.manifest import NAME

CAPTION_ENDINGS = {".txt": "txt", ".caption": "txt", ".json": "json"}
"""Files of a picture's name that go with it, and the field each becomes; of two for a field the first."""

HUB_TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Names that a hub's data set gives the table of its pictures."""

_AGAIN = "behind a link to a folder that is read already"
_SETS = "part of a data set that was packed"
_HIDDEN = "hidden, or a copy that a system made (.name, @eaDir, __MACOSX and the like)"
_SYSTEMS = frozenset(
    ("@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db")
)
_OTHER_PICTURES = frozenset(
    (
        *(".heic", ".heif", ".jxl", ".psd", ".tga", ".ico", ".icns", ".svg", ".pcx", ".eps", ".dng", ".cr2"),
        *(".cr3", ".nef", ".arw", ".raw", ".exr", ".hdr", ".dib", ".qoi", ".dds", ".pfm", ".sgi", ".xbm"),
        *(".xpm", ".wmf", ".emf", ".dcm", ".fits"),
    )
)
_TABLES = frozenset((".csv", ".tsv", ".jsonl", ".parquet"))
_LONGEST = 12  # signs of an ending that is named
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"))


@dataclass
class Files:
    """The files below one folder that are pictures, or may be a picture's texts."""

    pictures: dict[str, os.stat_result] = field(default_factory=dict)  # by path
    texts: dict[str, os.stat_result] = field(default_factory=dict)

    def add(self, other: Files) -> None:
        self.pictures |= other.pictures
        self.texts |= other.texts


def from_folder(source: Path, options: SourceOptions, avoid: Collection[Path] = ()) -> Offered:
    """The pictures in `source`, `avoid` (where the set is being made) left aside. Raises `DataError`."""
    walk = Walk(source, Books("files"), avoid)
    loose, folders = walk.top()
    found = {os.path.basename(folder): walk.below(folder) for folder in folders}
    by_class = {name: files for name, files in found.items() if files is not None}
    notes: list[str] = []
    if _as_classes(by_class, options, notes):
        return _labelled(source, loose, by_class, options, walk, notes)
    for files in by_class.values():
        loose.add(files)
    return _offered(source, [(loose, None)], (), options, walk, notes)


def _labelled(
    source: Path,
    loose: Files,
    by_class: dict[str, Files],
    options: SourceOptions,
    walk: Walk,
    notes: list[str],
) -> Offered:
    """The pictures of class folders. Raises `DataError` where that isn't what lies there."""
    if loose.pictures:
        name = said(Path(min(loose.pictures)).name)
        raise DataError(
            f"{source}: has pictures beside class folders, for instance {name}; "
            "put every picture in a class folder, or none (or give --no-class-folders)"
        )
    walk.leave_texts(loose)
    for name, found in by_class.items():
        if not found.pictures:
            why = "".join(f"; {line}" for line in walk.books.lines())
            raise DataError(
                f"{said(source / name)}: a class folder without pictures; remove it or fill it{why}"
            )
    names = sorted(by_class)
    numbers, classes = numbers_of(names, options.classes, source)
    groups = [(by_class[name], number) for name, number in zip(names, numbers, strict=True)]
    return _offered(source, groups, classes, options, walk, notes)


def _as_classes(by_class: dict[str, Files], options: SourceOptions, notes: list[str]) -> bool:
    """Whether sub-folders are classes: unless they are the parts of a download, or the user says no."""
    filled = [name for name, found in by_class.items() if found.pictures]
    if not filled or options.class_folders is False:
        if filled or options.classes:
            notes.append("no labels: sub-folders aren't taken for classes")
        return False
    if options.class_folders is None and _downloaded(by_class, filled):
        notes.append(
            f"folders {listed(sorted(filled))} are taken for the parts of a download (img2dataset), not for "
            "classes; if they are classes, give --class-folders"
        )
        return False
    if all(name.lower() in _SPLITS for name in filled):
        first = sorted(filled)[0]
        notes.append(
            f"the classes are called {listed(sorted(filled))}: those look like parts of a data set; to have "
            f"each packed by itself: keel data pack SOURCE/{first} --out OUT/{first}"
        )
    return True


def _downloaded(by_class: dict[str, Files], names: list[str]) -> bool:
    """Whether folders are numbered as a downloader does, and pictures have its records beside them."""
    if not all(re.fullmatch("[0-9]{5,}", name) for name in names):
        return False
    stems = {os.path.splitext(path)[0] for name in names for path in by_class[name].pictures}
    return any(os.path.splitext(path)[0] in stems for name in names for path in by_class[name].texts)


def _offered(
    source: Path,
    groups: Sequence[tuple[Files, int | None]],
    classes: tuple[str, ...],
    options: SourceOptions,
    walk: Walk,
    notes: list[str],
) -> Offered:
    entries: list[Entry] = []
    beside: dict[str, int] = {}
    for found, label in groups:
        entries += _entries(source, found, label, options, walk, beside)
    if beside:
        counts = ", ".join(f"{count} as field {name}" for name, count in sorted(beside.items()))
        notes.append(f"files with a picture's name are packed with it: {counts}")
    return Offered(entries, classes, walk.books, notes=notes, captioned=bool(beside))


def _entries(
    source: Path,
    found: Files,
    label: int | None,
    options: SourceOptions,
    walk: Walk,
    beside: dict[str, int],
) -> Iterator[Entry]:
    used = set()
    for path in sorted(found.pictures, key=lambda name: name.split("/")):
        stats, fields = [found.pictures[path]], dict[str, bytes | Path]()
        if label is not None:
            fields["cls"] = str(label).encode()
        for ending, name in CAPTION_ENDINGS.items() if options.sidecars else ():
            text = os.path.splitext(path)[0] + ending
            if text in found.texts and name not in fields:
                fields[name] = Path(text)
                stats.append(found.texts[text])
                used.add(text)
                beside[name] = beside.get(name, 0) + 1
        yield Entry(
            name=os.path.relpath(path, source),
            said=said(path),
            path=Path(path),
            fields=tuple(fields.items()),
            stamp=tuple(number for one in stats for number in (one.st_size, one.st_mtime_ns)),
        )
    walk.books.take(len(used))
    for text in used:
        del found.texts[text]
    walk.leave_texts(found)


class Walk:
    """Goes through a folder and enters what it doesn't take."""

    def __init__(self, source: Path, books: Books, avoid: Collection[Path] = (), used: Path | None = None):
        """`used`: a file that is entered as taken; folders to `avoid` aren't entered at all."""
        self.source, self.books = str(source), books
        self._used = used and os.path.join(source, used.name)
        self._avoid = {os.path.realpath(path) for path in avoid}

    def top(self) -> tuple[Files, list[str]]:
        """The files that lie in the source itself, and its folders. Raises `DataError`."""
        try:
            with os.scandir(self.source):
                pass
        except OSError as error:
            raise DataError(f"{said(self.source)}: can't be listed: {error.strerror or error}") from None
        return self._level(self.source)

    def below(self, folder: str) -> Files | None:
        """All files below `folder`, behind links too, each folder once; None where it is none of its own.

        That is a link that leads back up, and a data set.
        """
        if {NAME, "index"} <= set(_names(folder)):
            self._leave_all(_SETS, folder)
            return None
        found, waiting, links, seen = Files(), [folder], list[str](), self._above()
        while waiting or links:
            path = waiting.pop() if waiting else links.pop(0)
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                self._leave(_AGAIN, path)
                if path == folder:
                    return None
                continue
            seen.add((status.st_dev, status.st_ino))
            level, folders = self._level(path)
            found.add(level)
            waiting += [name for name in folders if not os.path.islink(name)]
            links = sorted([*links, *(name for name in folders if os.path.islink(name))])
        return found

    def leave_texts(self, files: Files) -> None:
        """Enter texts that belong to no picture."""
        for path in sorted(files.texts):
            self._leave_ending(path)
        files.texts.clear()

    def _above(self) -> set[tuple[int, int]]:
        """The source and all folders above it: a link to one of them would lead in circles."""
        real = Path(os.path.realpath(self.source))
        found = set()
        for folder in (real, *real.parents):
            with suppress(OSError):  # above it may lie what can't be looked into
                status = os.stat(folder)
                found.add((status.st_dev, status.st_ino))
        return found

    def _level(self, folder: str) -> tuple[Files, list[str]]:
        try:
            with os.scandir(folder) as scan:
                inside = sorted(scan, key=lambda one: one.name)
        except OSError as error:
            self._leave(f"in a folder that can't be listed ({error.strerror})", folder)
            return Files(), []
        found, folders = Files(), list[str]()
        names = {one.name for one in inside}
        if {NAME, "index"} <= names:
            self._leave_all(_SETS, folder)
            return found, folders
        for one in inside:
            try:
                status = os.stat(one.path)
            except OSError as error:
                why = "a link that leads nowhere" if one.is_symlink() else f"can't be read ({error.strerror})"
                self._leave(_HIDDEN if _hides(one.name) else why, one.path)
                continue
            if not stat.S_ISDIR(status.st_mode):
                self._file(one, status, found)
            elif os.path.realpath(one.path) in self._avoid:
                continue
            elif _hides(one.name):
                self._leave_all(_HIDDEN, one.path)
            else:
                folders.append(one.path)
        return found, folders

    def _file(self, one: os.DirEntry[str], status: os.stat_result, found: Files) -> None:
        ending = os.path.splitext(one.name)[1].lower()
        if _hides(one.name):
            self._leave(_HIDDEN, one.path)
        elif one.path == self._used:
            self.books.take()
        elif ending not in ENDINGS and ending not in CAPTION_ENDINGS:
            self._leave_ending(one.path)
        elif not stat.S_ISREG(status.st_mode):
            self._leave("a pipe, socket or device", one.path)
        elif not os.access(one.path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            self._leave("can't be read (Permission denied)", one.path)
        else:
            (found.pictures if ending in ENDINGS else found.texts)[one.path] = status

    def _leave(self, reason: str, path: str) -> None:
        self.books.leave_out(reason, said(os.path.relpath(path, self.source)))

    def _leave_all(self, reason: str, folder: str) -> None:
        for above, _, names in os.walk(folder, onerror=lambda _: self._leave(reason, folder)):
            for name in names:
                self._leave(reason, os.path.join(above, name))

    def _leave_ending(self, path: str) -> None:
        name = os.path.basename(path)
        ending = os.path.splitext(name)[1].lower()
        if name in HUB_TABLES and os.path.dirname(path) != self.source:
            reason = "a table of texts that lies in a sub-folder; pack that folder by itself"
        elif not ending:
            reason = "no ending"
        elif len(ending) > _LONGEST:
            reason = "an ending that no picture has"
        elif ending in _OTHER_PICTURES:
            reason = f"ending {ending}, a kind of picture that isn't read; convert them"
        elif ending in _TABLES:
            reason = f"ending {ending}, a table; to pack by it, name it in place of the folder"
        else:
            reason = f"ending {said(ending)}"
        self._leave(reason, path)


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []  # it will be said when it is gone through


def _hides(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEMS
