"""What a run's data lack and keel can make: demo data, and a tokenizer from captions."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from configs.errors import ConfigError, DataError
from data_pipeline import demo
from data_pipeline.captions import Place, places, texts
from data_pipeline.config import DataConfig
from data_pipeline.files import write_whole
from data_pipeline.hashing import key, permutation
from data_pipeline.manifest import Manifest
from data_pipeline.parallel import Progress
from data_pipeline.read import SampleError
from data_pipeline.tokenize import train
from data_pipeline.visit import reading

log = logging.getLogger(__name__)

_VOCABULARY = 8192  # tokens of a demo's tokenizer, unless its config says
_SHARDS = 41  # what a permutation is for: part of the hash


def make_missing(config: DataConfig, run: Path, progress: Progress | None = None) -> None:
    """Make demo data at the manifest's place, and a tokenizer of their captions, where they are missing.

    Only where `demo` is set, and only in a place of keel's own: `require_own_places`. What is there is kept.
    Whole or absent, and the same bytes whoever makes them. `run`: the run folder. Raises `UserError`.
    """
    require_own_places(config, run)
    if config.demo is None:
        return
    if lacks_demo(config):
        split = config.first_manifest.parent
        with _placed("data.manifest: demo data", split.parent):
            demo.make(config.demo, split.parent, progress=progress)
    wanted = config.tokenizer
    if wanted is not None and wanted.path != "openai" and not wanted.path.exists():
        with _placed("data.tokenizer.path: a tokenizer", wanted.path.parent):
            vocabulary = wanted.vocabulary or _VOCABULARY
            manifest = Manifest.load(config.first_manifest)
            make_tokenizer(manifest, wanted.path, vocabulary, names=config.captions)


def lacks_demo(config: DataConfig) -> bool:
    """Whether demo data are to be made: asked for, and nothing at the manifest's place."""
    return config.demo is not None and not config.first_manifest.exists()


def require_own_places(config: DataConfig, run: Path) -> None:
    """Refuse to make demo data or a tokenizer where somebody's own were meant. Raises `ConfigError`.

    They are made in the run folder `run`, as the configs that ship with keel have it, or in data/NAME beside
    it, where the runs of a sweep share them. Any other path is one that its user mistyped.
    """
    if config.demo is None:
        return
    beside = run.absolute().parent / "data" / config.demo.name

    def own(path: Path) -> bool:
        plain = Path(os.path.abspath(path.expanduser()))  # noqa: PTH100  resolve would follow links
        return plain.is_relative_to(run.absolute()) or plain.is_relative_to(beside)

    manifest, wanted = config.first_manifest, config.tokenizer
    if lacks_demo(config):
        if not own(manifest):
            raise ConfigError(
                f"data.manifest: {manifest}: no such file, and demo data are only made in the run folder "
                f"{run} or in {beside}; mend the path, or make them with keel data demo {config.demo.name}"
            )
        if manifest.name != "manifest.json" or manifest.parent.name not in ("train", "val"):
            raise ConfigError(f"data.manifest: demo data lie in DIR/train/manifest.json, found {manifest}")
    if wanted is None or wanted.path == "openai" or wanted.path.exists() or own(wanted.path):
        return
    raise ConfigError(
        f"data.tokenizer.path: {wanted.path}: no such file, and a demo's tokenizer is only made in the run "
        f"folder {run} or in {beside}; mend the path, or make one there with keel data tokenizer"
    )


@contextmanager
def _placed(what: str, folder: Path) -> Iterator[None]:
    """Say in a line where something can't be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{what} can't be made in {folder}: {error.strerror}; choose another run.dir"
        ) from error


def make_tokenizer(
    manifest: Manifest,
    to: Path,
    vocabulary: int,
    *,
    names: Sequence[str] = ("txt",),
    limit: int = 10_000_000,
    progress: Progress | None = None,
) -> None:
    """Write a tokenizer.json of up to `vocabulary` tokens, made from a set's captions, to the file `to`.

    Reads shard by shard, in an order of its own, until it has read `limit` samples. The same set gives the
    same bytes. Raises `DataError`, or `ConfigError` where no caption is at `names`.
    """
    leading = places(names, manifest.fields)
    if not leading:
        raise ConfigError(
            f"data.captions: found {', '.join(names)}, but {manifest.path} has the fields "
            f"{', '.join(manifest.fields)}; name one that holds captions, or json.KEY"
        )
    write_whole(to, train(_captions(manifest, leading, limit, progress), vocabulary))


def _captions(
    manifest: Manifest, leading: Sequence[Place], limit: int, progress: Progress | None
) -> Iterator[str]:
    fields = tuple(dict.fromkeys(place.field for place in leading))
    total = min(limit, manifest.samples)
    done = unusable = 0
    for shard in permutation(key(_SHARDS), len(manifest.shards)).tolist():
        if done >= total:
            break
        with reading(manifest, shard) as reader:
            for sample in range(min(manifest.shards[shard].samples, total - done)):
                try:
                    payloads = dict(reader.read(shard, sample, (), fields))
                    for place in leading:
                        if place.field in payloads:
                            yield from texts(place, payloads[place.field])
                except (SampleError, ValueError):
                    unusable += 1
                done += 1
                if progress and done % 1000 == 0:
                    progress(done, total)
    if progress:
        progress(done, total)
    if unusable:
        log.warning("%s: %d of %d samples have captions that can't be read", manifest.path, unusable, done)


def captions_in_order(manifest: Manifest, names: Sequence[str], start: int, stop: int) -> Iterator[list[str]]:
    """All captions of the samples [start, stop) of a set, in its own order, for evaluation.

    Raises `ConfigError` where no caption is at `names`, `DataError` where a sample has none or a broken one.
    """
    leading = places(names, manifest.fields)
    if not leading:
        raise ConfigError(
            f"captions: found {', '.join(names)}, but {manifest.path} has the fields "
            f"{', '.join(manifest.fields)}; name one that holds captions, or json.KEY"
        )
    fields, first = tuple(dict.fromkeys(place.field for place in leading)), 0
    for shard, size in enumerate(manifest.sizes.tolist()):
        wanted = range(max(start - first, 0), min(stop - first, size))
        first += size
        if not wanted:
            continue
        with reading(manifest, shard) as reader:
            for sample in wanted:
                payloads = dict(reader.read(shard, sample, (), fields))
                try:
                    found = [t for p in leading if p.field in payloads for t in texts(p, payloads[p.field])]
                except ValueError as error:
                    raise DataError(f"{manifest.path}: sample {reader.key(shard, sample)}: {error}") from None
                if not found:
                    raise DataError(f"{manifest.path}: sample {reader.key(shard, sample)} has no caption")
                yield found
