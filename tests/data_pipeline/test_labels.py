"""Labels come from the sidecars, and are those in the tars."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from configs.errors import DataError
from data_pipeline.account import BAD_LABEL, NO_LABEL, Account
from data_pipeline.indexing import add_shard
from data_pipeline.labels import doubt_labels, labels_of
from data_pipeline.manifest import Manifest, all_fields
from data_pipeline.read import Reader
from data_pipeline.shards import write_shard


def labelled(folder: Path, payloads: list[bytes | None], classes: tuple[str, ...] = ()) -> Manifest:
    """Two shards of samples with these payloads in their label field; the manifest's folder."""
    samples = [
        (f"{n:04d}", {"png": b"picture"} | ({} if label is None else {"cls": label}))
        for n, label in enumerate(payloads)
    ]
    made = []
    half = len(samples) // 2
    for number, part in enumerate((samples[:half], samples[half:])):
        write_shard(folder / f"{number}.tar", part)
        made.append(add_shard(folder, folder / f"{number}.tar", f"{number}.tar"))
    manifest = Manifest(folder, tuple(m.shard for m in made), all_fields(m.fields for m in made), classes)
    manifest.save()
    return Manifest.load(folder)


def by_tarfile(manifest: Manifest) -> list[int]:
    found = []
    for number in range(len(manifest.shards)):
        with tarfile.open(manifest.shard_path(number)) as tar:
            found += [int(tar.extractfile(m).read()) for m in tar if m.name.endswith(".cls")]  # type: ignore[union-attr]
    return found


def test_labels_are_those_of_the_tars_however_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual spelling is known without a read; each other one is read once."""
    spelled = [b"3", b"0", b"3\n", b"07", b" 12 ", b"30000", b"3", b"3\n", b"07", b"21999"]
    manifest = labelled(tmp_path, spelled)
    read: list[int] = []
    plain = Reader.read

    def counted(self: Reader, shard: int, sample: int, *rest: object) -> object:
        read.append(sample)
        return plain(self, shard, sample, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Reader, "read", counted)
    labels = labels_of(manifest)
    assert labels is not None and labels.tolist() == by_tarfile(manifest) == [int(each) for each in spelled]
    assert len(read) == len({b"3\n", b"07", b" 12 ", b"30000"})
    assert labels_of(manifest) is labels, "one look is enough"
    assert labels.dtype == np.int64


@pytest.mark.parametrize(
    ("payloads", "said"),
    [
        ([b"1", b"2", None, b"1"], "1.tar: sample '0002' has no label"),
        ([None, None, None, None], "0.tar: sample '0000' has no label"),
        (
            [b"1", b"cat", b"2", b"1"],
            "'0001': field cls: a label is a whole number, found 'cat'",
        ),
    ],
)
def test_a_sample_without_a_usable_label_is_named(
    tmp_path: Path, payloads: list[bytes | None], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        labels_of(labelled(tmp_path, payloads))


def doubted(manifest: Manifest) -> dict[str, tuple[int, list[str]]]:
    account = Account()
    doubt_labels(manifest, account)
    return {what: (seen.count, list(seen.examples)) for what, seen in account.doubts.items()}


def test_labels_that_training_would_refuse_are_counted_and_shown(tmp_path: Path) -> None:
    payloads = [b"0", b"1\n", b"cat", b"-1", None, b"5.0", b"", b"cat", b"2", b"1"]
    manifest = labelled(tmp_path, payloads, ("dog", "cat"))
    found = doubted(manifest)
    assert found[NO_LABEL] == (1, ["0004"])
    count, examples = found[BAD_LABEL]
    assert count == sum(one not in (b"0", b"1\n", b"1", None) for one in payloads)
    assert "0002: a label is a whole number, found 'cat'" in examples


def test_a_label_beyond_the_named_classes_is_doubted_in_any_spelling(tmp_path: Path) -> None:
    for number, payload in enumerate((b"7", b"7\n")):
        manifest = labelled(tmp_path / str(number), [b"0", payload], ("dog", "cat"))
        assert doubted(manifest)[BAD_LABEL] == (1, ["0001: 7 isn't a class of the 2 there are"])
        assert not doubted(labelled(tmp_path / f"unnamed{number}", [b"0", payload]))


def test_named_classes_want_labels_and_pictures_alone_do_not(tmp_path: Path) -> None:
    assert doubted(labelled(tmp_path / "named", [None, None], ("dog",)))[NO_LABEL] == (2, ["0000", "0001"])
    assert not doubted(labelled(tmp_path / "unnamed", [None, None]))
