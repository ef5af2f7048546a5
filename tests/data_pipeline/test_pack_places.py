"""Where a set is made: whole or not at all, on the disk asked for, and what is finished survives."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from configs.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.pack import pack
from data_pipeline.verify import verify
from tests.data_pipeline.test_pack_folder import picture, samples
from tests.places import FullDisk, unprivileged

ROOT = Path(__file__).resolve().parents[2]
WHOLE = ["index", "manifest.json", "names.jsonl", "shard-000000.tar", "shard-000001.tar"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        picture(tmp_path / "in" / "ab"[number % 2] / f"{number}.png", number)
    return tmp_path / "in"


def inside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def keel(*words: str | Path, prefix: list[str] | None = None, cwd: Path | None = None) -> list[str]:
    """Runs `keel data pack`; gives the lines of its complaint, which has to be no traceback."""
    command = [*(prefix or []), sys.executable, "-m", "launch", "data", "pack", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr
    complaint = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert bool(complaint) == (done.returncode == 2), done.stderr
    return complaint


def test_an_empty_folder_is_filled_however_it_is_named(folder: Path, tmp_path: Path) -> None:
    expected = pack(folder, tmp_path / "fresh", per_shard=2).hash
    for name in ("here", "there", "disk"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "dangling").symlink_to(tmp_path / "to come")
    (tmp_path / "disk" / "lost+found").mkdir()
    assert keel("../in", "--out", ".", "--per-shard", "2", cwd=tmp_path / "here") == []
    for name in ("link", "dangling", "disk"):
        pack(folder, tmp_path / name, per_shard=2)
    for name in ("here", "there", "to come"):
        assert inside(tmp_path / name) == WHOLE
        assert (
            Manifest.load(tmp_path / name).hash == expected and verify(Manifest.load(tmp_path / name)).whole
        )
    assert inside(tmp_path / "disk") == sorted(["lost+found", *WHOLE])
    assert not list(tmp_path.glob(".*"))


def test_a_mount_point_is_filled(folder: Path, tmp_path: Path) -> None:
    for name in ("big", "mounted"):
        (tmp_path / name).mkdir()
    script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    if subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", tmp_path, tmp_path, "true"]).returncode:
        return  # no right to mount here; a folder that can't be renamed over is tried below
    prefix = ["unshare", "-m", "sh", "-c", script, "sh", str(tmp_path / "big"), str(tmp_path / "mounted")]
    assert keel(folder, "--out", tmp_path / "mounted", "--per-shard", "2", prefix=prefix) == []
    assert inside(tmp_path / "mounted") == [] and inside(tmp_path / "big") == WHOLE


def tried(folder: Path, places: list[Path]) -> list[str]:
    """What packing into each place says, in one process that permission bits count for."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom configs.errors import DataError\n"
        "from data_pipeline.pack import pack\n"
        "for place in sys.argv[2:]:\n"
        "    try: print(pack(Path(sys.argv[1]), Path(place)))\n"
        "    except DataError as error: print(error)\n"
    )
    command = [*unprivileged(), sys.executable, "-c", script, str(folder), *map(str, places)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("existing", [False, True])
def test_whatever_call_finds_the_disk_full(folder: Path, tmp_path: Path, existing: bool) -> None:
    """One line, never half a set in its place, and the next start completes it without doing things twice."""
    expected = pack(folder, tmp_path / "fresh", per_shard=2).hash

    def fresh(number: int) -> Path:
        place = tmp_path / f"{number}" / "out"
        (place if existing else place.parent).mkdir(parents=True)
        return place

    first = fresh(0)
    with FullDisk(first.parent) as disk:
        pack(folder, first, per_shard=2)
    assert disk.calls > 20
    for at in range(disk.calls):
        out = fresh(at + 1)
        with (
            FullDisk(out.parent, at) as full,
            pytest.raises(DataError, match="can't be written: No space") as raised,
        ):
            pack(folder, out, per_shard=2)
        assert len(str(raised.value).splitlines()) == 1, full.log
        assert not (out / "manifest.json").exists(), full.log
        assert existing or not out.exists(), full.log
        receipts = [path.name for path in out.parent.rglob("done/*.json")]
        with FullDisk(out.parent) as again:
            assert pack(folder, out, per_shard=2).hash == expected, full.log
        written = [call for call in again.log if call.startswith("open") and "/set/.shard-" in call]
        assert len(written) == 2 - len(receipts), (receipts, again.log)
        assert inside(out) == WHOLE and inside(out.parent) == ["out"], full.log
        shutil.rmtree(out.parent)


def test_one_failing_call_among_good_ones(folder: Path, tmp_path: Path) -> None:
    """As a quota or a flaky network file system has it: nothing that follows may publish half."""
    (tmp_path / "0" / "out").mkdir(parents=True)
    with FullDisk(tmp_path / "0") as disk:
        pack(folder, tmp_path / "0" / "out", per_shard=2)
    for at in range(disk.calls):
        out = tmp_path / f"{at + 1}" / "out"
        out.mkdir(parents=True)
        with FullDisk(out.parent, at, errno.EIO, stays=False) as flaky:
            try:
                made = pack(folder, out, per_shard=2)
            except DataError as error:
                assert "Input/output error" in str(error), flaky.log
                assert inside(out) in ([], [".pack.part"]), flaky.log
                made = pack(folder, out, per_shard=2)
        assert verify(made).whole and inside(out) == WHOLE, flaky.log


def test_places_that_cant_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0o555)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "blind").mkdir(mode=0)
    cases = {
        "shut/out": "can't be written: Permission denied",
        "shut": "can't be written: Permission denied",
        "blind/out": "can't be written: Permission denied",
        "file": "is a file; name a folder",
        "file/out": "can't be written: Not a directory",
        "loop": "is a link that leads nowhere but in circles",
        "in": "holds other files (a, b); name another folder",
        "n" * 300: "can't be written: File name too long",
    }
    told = tried(folder, [tmp_path / name for name in cases])
    for (name, named), line in zip(cases.items(), told, strict=True):
        assert line.startswith(str(tmp_path / name)) and named in line, line
    (tmp_path / "blind").chmod(0o755)
    assert inside(tmp_path) == ["blind", "file", "in", "loop", "shut"] and inside(tmp_path / "shut") == []


def test_sources_that_cant_be_read(folder: Path, tmp_path: Path) -> None:
    picture(tmp_path / "shut" / "0.png").parent.chmod(0)
    picture(tmp_path / "listed" / "0.png").parent.chmod(0o444)
    (tmp_path / "t.csv").write_text("path\n")
    (tmp_path / "t.csv").chmod(0)
    (tmp_path / "x.tar").write_bytes(b"")
    cases = {
        "shut": "can't be",
        "listed": "can't be read: Permission denied",
        "t.csv": "can't be read: Permission denied",
        "x.tar": "keel data index",
        "gone": "no such folder or table",
    }
    for name, named in cases.items():
        (line,) = tried(tmp_path / name, [tmp_path / "out"])
        assert line.startswith(str(tmp_path / name)) and named in line, line
    assert not list(tmp_path.glob(".out*")) and not (tmp_path / "out").exists()
    for name in ("shut", "listed"):
        (tmp_path / name).chmod(0o755)


def test_mended_pictures_are_packed_anew_and_the_others_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import pack as packing

    written: list[str] = []
    real = packing.write_shard
    monkeypatch.setattr(
        packing, "write_shard", lambda path, rows: written.append(path.name) or real(path, rows)
    )
    (folder / "b" / "3.png").write_bytes(b"nonsense")

    def again() -> Manifest:
        written.clear()
        return pack(folder, tmp_path / "out", per_shard=1, shuffle_seed=None)

    with pytest.raises(DataError, match=r"3\.png: bad picture"):
        again()
    assert len(written) == 4
    with pytest.raises(DataError, match=r"3\.png: bad picture"):
        again()
    assert written == [], "nothing has changed: nothing is done twice"
    picture(folder / "a" / "0.png", 77)
    picture(folder / "b" / "3.png", 78)
    manifest = again()
    assert written == ["shard-000000.tar", "shard-000003.tar"]
    for name, fields in samples(manifest).items():
        assert fields["png"] == (folder / name).read_bytes(), name
    assert manifest.hash == pack(folder, tmp_path / "fresh", per_shard=1, shuffle_seed=None).hash


def test_a_picture_that_couldnt_be_read_is_tried_again(folder: Path, tmp_path: Path) -> None:
    """A file system that stumbles changes neither size nor time of a file."""
    table = tmp_path / "in" / "t.csv"
    table.write_text("path\na/0.png\nb/1.png\n")
    real = Path.read_bytes

    def stumbling(path: Path) -> bytes:
        if path.name == "1.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(DataError, match=r"1\.png: can't be read: Input"),
    ):
        patch.setattr(Path, "read_bytes", stumbling)
        pack(table, tmp_path / "out")
    assert pack(table, tmp_path / "out").samples == 2


def test_other_settings_leave_nothing_of_the_old_ones(folder: Path, tmp_path: Path) -> None:
    (folder / "b" / "3.png").write_bytes(b"nonsense")
    for options in ({"per_shard": 1}, {"per_shard": 2, "shuffle_seed": 5}, {"per_shard": 3}):
        with pytest.raises(DataError, match="bad picture"):
            pack(folder, tmp_path / "out", **options)  # type: ignore[arg-type]
    picture(folder / "b" / "3.png", 3)
    manifest = pack(folder, tmp_path / "out", per_shard=2)
    assert inside(manifest.directory) == WHOLE and len(inside(manifest.directory / "index")) == 2
    assert manifest.hash == pack(folder, tmp_path / "fresh", per_shard=2).hash


def test_broken_pictures_are_named_in_one_run_and_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    for number in (1, 3):
        (folder / "b" / f"{number}.png").write_bytes(b"nonsense")
    for most in (0, 1):
        with pytest.raises(DataError, match=r"2 of 4 can't be packed.*--skip-broken 2") as raised:
            pack(folder, tmp_path / "out", per_shard=1, skip_broken=most)
        first, second, _ = str(raised.value).splitlines()
        assert "1.png: bad picture" in first and "3.png: bad picture" in second
        assert not (tmp_path / "out").exists()
    manifest = pack(folder, tmp_path / "out", per_shard=1, skip_broken=2)
    assert set(samples(manifest)) == {"a/0.png", "a/2.png"} and len(manifest.shards) == 2
    assert [one["name"] for one in manifest.about["broken"]] == ["b/1.png", "b/3.png"]
    assert verify(manifest).whole
    with pytest.raises(DataError, match=r"2 files left out: broken .*an error because of --strict"):
        pack(folder, tmp_path / "strict", per_shard=1, skip_broken=2, strict=True)
    assert not (tmp_path / "strict").exists()
    (folder / "a" / "0.png").unlink()
    (folder / "a" / "2.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of its 3 pictures can be packed"):
        pack(folder, tmp_path / "none", skip_broken=3)


def test_pictures_of_more_pixels_on_request(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"0\.png: bad picture: 6x4 pixels are more than the 23 allowed; --max-pix"
    ):
        pack(folder, tmp_path / "out", max_pixels=23)
    assert pack(folder, tmp_path / "out", max_pixels=24).samples == 4
    assert Image.MAX_IMAGE_PIXELS is None, "Pillow refuses what is larger, whatever is asked for"


def test_a_killed_packing_goes_on_and_two_at_once_are_refused(tmp_path: Path) -> None:
    for number in range(60):
        picture(tmp_path / "in" / f"{number:02d}.png", number)
    command = [sys.executable, "-m", "launch", "data", "pack", "in", "--out", "out", "--per-shard", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    part = tmp_path / ".out.part"
    with subprocess.Popen([*command, "--processes", "1"], cwd=tmp_path, env=environment) as process:
        wait_for(lambda: len(list(part.glob("done/*.json"))) >= 3 or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    (part / "set" / ".shard-000059.tar.1-aa.part").write_bytes(b"half")
    with (part / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"another keel data pack is at work on it"):
            pack(tmp_path / "in", tmp_path / "out", per_shard=1)
    manifest = pack(tmp_path / "in", tmp_path / "out", per_shard=1)
    assert manifest.hash == pack(tmp_path / "in", tmp_path / "fresh", per_shard=1).hash
    assert not part.exists() and not list((tmp_path / "out").rglob("*.part"))


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def test_a_publication_that_was_killed_half_way_is_finished(folder: Path, tmp_path: Path) -> None:
    """Shards lie in their place already, the manifest doesn't: no set, and the next start makes it one."""
    whole = pack(folder, tmp_path / "whole", per_shard=2)
    out, made = tmp_path / "out", tmp_path / "out" / ".pack.part" / "set"
    made.mkdir(parents=True)
    (made.parent / "done").mkdir()
    for name in ("manifest.json", "names.jsonl"):
        shutil.copy(tmp_path / "whole" / name, made)
    for shard in ("shard-000000.tar", "shard-000001.tar"):
        shutil.copy(tmp_path / "whole" / shard, out)
    shutil.copytree(tmp_path / "whole" / "index", out / "index")
    with pytest.raises(DataError, match="no such manifest"):
        Manifest.load(out)
    assert pack(folder, out, per_shard=2).hash == whole.hash and inside(out) == WHOLE
    (out / "manifest.json").unlink()
    with pytest.raises(DataError, match="holds other files"):
        pack(folder, out, per_shard=2)


def test_names_lead_back_to_the_files(folder: Path, tmp_path: Path) -> None:
    manifest = pack(folder, tmp_path / "out", per_shard=3)
    lines = [json.loads(line) for line in (tmp_path / "out" / "names.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"{number:09d}" for number in range(4)]
    for name, fields in samples(manifest).items():
        assert fields["png"] == (folder / name).read_bytes()
