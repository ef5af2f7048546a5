"""The contestants of `loader.py`, each an endless iterator over batch lengths, and the data they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIZE, BATCH, WORKERS, PER_SHARD = 224, 64, 2, 250


def make_data(folder: Path, samples: int) -> None:
    """Tar shards with a manifest, and the same in mosaicml's format where that is installed."""
    import numpy as np

    from data_pipeline.indexing import add_shard
    from data_pipeline.manifest import Manifest
    from data_pipeline.shards import write_shard

    pictures = [picture(np.random.default_rng(seed)) for seed in range(64)]
    keyed = [(f"{n:06d}", {"jpg": pictures[n % 64], "cls": b"1"}) for n in range(samples)]
    made = []
    for start in range(0, samples, PER_SHARD):
        path = folder / "tar" / f"shard-{start // PER_SHARD:06d}.tar"
        write_shard(path, keyed[start : start + PER_SHARD])
        made.append(add_shard(path.parent, path, path.name))
    Manifest(folder / "tar", tuple(one.shard for one in made), ("cls", "jpg")).save()
    try:
        streaming = mosaicml()
    except ImportError:
        return
    columns = {"jpg": "bytes", "cls": "int"}
    with streaming.MDSWriter(out=str(folder / "mds"), columns=columns, size_limit=PER_SHARD * 56_000) as out:
        for _, fields in keyed:
            out.write({"jpg": fields["jpg"], "cls": 1})


def picture(rng: Any) -> bytes:
    """A JPEG with a photograph's spectrum, 390 x 360, about 56 kB."""
    import numpy as np
    import simplejpeg

    rows, columns = np.fft.fftfreq(360)[:, None], np.fft.rfftfreq(390)[None]
    falloff = 1 / np.maximum(np.hypot(rows, columns), 1 / 390)
    noise = rng.normal(size=(3, 360, 390))
    layers = np.fft.irfft2(np.fft.rfft2(noise) * falloff, s=(360, 390))
    layers = layers.mean(0) + 0.3 * (layers - layers.mean(0))
    pixels = 128 + 50 * (layers - layers.mean()) / layers.std()
    image = np.ascontiguousarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))
    return min(
        (
            simplejpeg.encode_jpeg(image, quality=quality, colorsubsampling="420")
            for quality in range(60, 97, 3)
        ),
        key=lambda data: abs(len(data) - 56_000),
    )


def mosaicml() -> Any:
    from pretrain.encoders.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    import streaming

    return streaming


def keel(folder: Path, resize: str = "exact") -> Iterator[int]:
    from data_pipeline.config import DataConfig
    from data_pipeline.load import build_loader
    from data_pipeline.types import RandomResizedCrop, ViewSpec

    config = DataConfig.model_validate(
        {"manifest": folder / "tar", "workers": WORKERS, "resize": resize, "streams": 8, "window": 64}
    )
    view = ViewSpec((SIZE, SIZE), RandomResizedCrop(), interpolation="bilinear")
    with build_loader(
        config, [view], needs=frozenset({"views", "target"}), seed=0, batch_size=BATCH, rank=0, world_size=1,
        position=0,
    ) as loader:  # fmt: skip
        for batch in loader:
            yield len(batch)


def keel_fast(folder: Path) -> Iterator[int]:
    return keel(folder, "fast")


def keel_transform(fast: bool = False) -> Callable[[bytes], Any]:
    """The same decoder and resize as keel's, for another loader."""
    import numpy as np
    import torch

    from data_pipeline.decode import decode
    from data_pipeline.transform import WorkerHalf
    from data_pipeline.types import RandomResizedCrop, ViewSpec

    torch.set_num_threads(1)
    half = WorkerHalf([ViewSpec((SIZE, SIZE), RandomResizedCrop(), interpolation="bilinear")], fast)
    rng = np.random.default_rng()

    def apply(data: bytes) -> Any:
        seeds = rng.integers(0, 2**63, 1)
        out = torch.empty(3, SIZE, SIZE, dtype=torch.uint8)
        half.apply(decode(data), 0, half.numbers(seeds)[0][0].tolist(), out)
        return out

    return apply


def pil_transform() -> Callable[[bytes], Any]:
    import io

    from pretrain.encoders.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    from PIL import Image
    from torchvision import transforms

    steps = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, (0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    return lambda data: steps(Image.open(io.BytesIO(data)).convert("RGB"))


def by_webdataset(folder: Path, transform: Callable[[bytes], Any]) -> Iterator[int]:
    import torch
    import webdataset

    def images(sample: dict[str, Any]) -> Any:
        return transform(sample["jpg"]), int(sample["cls"])

    urls = sorted(str(path) for path in (folder / "tar").glob("*.tar"))
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), resampled=False).repeat().shuffle(500)
    data = data.map(images).batched(BATCH)
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=WORKERS, prefetch_factor=3, worker_init_fn=one_thread
    )
    for pixels, _ in loader:
        yield len(pixels)


def webdataset_pil(folder: Path) -> Iterator[int]:
    return by_webdataset(folder, pil_transform())


def webdataset_same(folder: Path) -> Iterator[int]:
    return by_webdataset(folder, keel_transform())


def mosaicml_same(folder: Path) -> Iterator[int]:
    import torch

    streaming = mosaicml()
    transform = keel_transform()

    class Pictures(streaming.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            return transform(sample["jpg"]), sample["cls"]

    data = Pictures(local=str(folder / "mds"), shuffle=True, batch_size=BATCH)
    while True:
        loader = torch.utils.data.DataLoader(
            data, batch_size=BATCH, num_workers=WORKERS, prefetch_factor=3, worker_init_fn=one_thread,
            persistent_workers=True,
        )  # fmt: skip
        for pixels, _ in loader:
            yield len(pixels)


def one_thread(_: int) -> None:
    import torch

    torch.set_num_threads(1)


def bare_decode(folder: Path) -> Iterator[int]:
    """libjpeg-turbo's full decode alone, in `WORKERS` processes: the limit for whole decoding."""
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        while True:
            yield from pool.imap_unordered(_decode_many, [str(folder / "tar")] * 16)


def _decode_many(folder: str) -> int:
    import simplejpeg

    for data in _pictures(folder):
        simplejpeg.decode_jpeg(data, colorspace="RGB")
    return BATCH


def _pictures(folder: str, known: dict[str, list[bytes]] = {}) -> list[bytes]:  # noqa: B006  a cache
    if folder not in known:
        from data_pipeline.manifest import Manifest
        from data_pipeline.read import Reader

        reader = Reader(Manifest.load(folder))
        known[folder] = [reader.read(0, row, [("jpg",)])[0][1] for row in range(BATCH)]
    return known[folder]


def keel_raw(folder: Path) -> Iterator[int]:
    """Samples in the run's order out of the index, every checksum verified; no decode, one process."""
    from data_pipeline.config import DataConfig
    from data_pipeline.facts import make_plan
    from data_pipeline.manifest import Manifest
    from data_pipeline.read import Reader

    manifest = Manifest.load(folder / "tar")
    plan = make_plan(DataConfig(manifest=manifest.path), [manifest], 0)
    reader, at = Reader(manifest), 0
    while True:
        drawn = plan.share(at, BATCH, 1, 0)
        for shard, sample in zip(drawn.shard.tolist(), drawn.sample.tolist(), strict=True):
            reader.read(shard, sample, [("jpg",), ("cls",)])
        at += BATCH
        yield BATCH


def webdataset_raw(folder: Path) -> Iterator[int]:
    import webdataset

    urls = sorted(str(path) for path in (folder / "tar").glob("*.tar"))
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls)).repeat().shuffle(500)
    for count, _ in enumerate(samples, 1):
        if count % BATCH == 0:
            yield BATCH


def keel_overhead(folder: Path) -> Iterator[int]:
    """All of the loader but decoding and resizing."""
    import torch

    from data_pipeline import assemble, pool

    blank = "import numpy as np, torch; from data_pipeline import assemble, worker\n"
    blank += "assemble.decode = lambda data, limit: np.zeros((1, 1, 3), np.uint8)\n"
    blank += "worker.Assembler.__init__.__globals__['WorkerHalf'].apply = lambda *_: None\nworker.main()"
    pool._PROGRAM = blank
    assert assemble and torch
    return keel(folder)


CONTESTANTS: dict[str, Callable[[Path], Iterator[int]]] = {
    "keel": keel,
    "keel, fast resize": keel_fast,
    "webdataset + PIL": webdataset_pil,
    "webdataset + same decoder": webdataset_same,
    "mosaicml-streaming + same decoder": mosaicml_same,
    "bare libjpeg-turbo": bare_decode,
    "keel, raw": keel_raw,
    "webdataset, raw": webdataset_raw,
    "keel, no decode": keel_overhead,
}
