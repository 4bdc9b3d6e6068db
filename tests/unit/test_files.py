"""Files and folders that are complete or not there: killed processes, full disks, the order of flushes."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from nemo_tropd import files
from nemo_tropd.files import complete_file, complete_folder, finish_folder, write_json, write_text

_KILL = "import os, signal; die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
_FILE = "with files.complete_file(path) as new: new.write_text('new'); die()\n"
_FOLDER = "with files.complete_folder(path) as new: (new / 'a').write_text('new'); die()\n"
_AT_FSYNC = "os.fsync = die\nfiles.write_text(path, 'new')\n"
# The second rename puts the new folder in the place of the old one, which the first has moved aside.
_BETWEEN_RENAMES = """
renames = iter([os.rename, die])
os.rename = lambda *a, **k: next(renames)(*a, **k)
with files.complete_folder(path) as new: (new / 'a').write_text('new')
"""


def _run(code: str, path: Path) -> int:
    script = (
        f"{_KILL}import sys; from pathlib import Path; from nemo_tropd import files; path = Path(sys.argv[1])\n{code}"
    )
    return subprocess.run([sys.executable, "-c", script, str(path)], timeout=120).returncode


def _content(path: Path) -> str:
    return (path / "a").read_text() if path.is_dir() else path.read_text()


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(params=[_FILE, _AT_FSYNC, _FOLDER], ids=["file", "fsync", "folder"])
def killed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A target whose replacement was killed half-way."""
    path = tmp_path / "target"
    if request.param == _FOLDER:
        path.mkdir()
        (path / "a").write_text("old")
    else:
        path.write_text("old")
    assert _run(request.param, path) == -signal.SIGKILL
    return path


def test_what_the_system_refuses_is_told_from_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "closed").mkdir(mode=0o600)
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file", tmp_path / "file" / "below", tmp_path / "none" / "below", "~/none"):
        assert files.refusal(path) == ""
    long = "name too long): give another path"
    cases = {
        "/" + "abc/" * 1200: long,
        tmp_path / "none" / ("a" * 256): long,
        tmp_path / "loop" / "a": "symbolic links",
    }
    for refused, why in cases.items():
        assert why in files.refusal(refused)
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)
    try:
        assert "Permission denied" in files.refusal(tmp_path / "closed")
    finally:
        os.seteuid(user)


def test_a_killed_write_keeps_the_old_content_and_the_next_process_cleans_up(killed: Path):
    assert _content(killed) == "old"
    (left_over,) = [name for name in _names(killed.parent) if name != "target"]
    assert left_over.startswith(".target.tmp-")
    write_text(killed.parent / "another", "text")
    assert _names(killed.parent) == ["another", "target"]
    assert _content(killed) == "old"


def test_a_folder_killed_between_its_renames_comes_back(tmp_path: Path):
    path = tmp_path / "target"
    path.mkdir()
    (path / "a").write_text("old")
    assert _run(_BETWEEN_RENAMES, path) == -signal.SIGKILL
    assert not path.exists()
    write_text(tmp_path / "another", "text")
    assert _names(tmp_path) == ["another", "target"]
    assert _content(path) == "old"


def _left_over(path: Path, pid: int, machine: str = files._MACHINE) -> Path:
    left_over = path.with_name(f".{path.name}.tmp-{machine}-00c0ffee-{pid}")
    left_over.mkdir()
    (left_over / "part").write_text("half")
    return left_over


def test_a_recycled_process_id_does_not_block(tmp_path: Path):
    path = tmp_path / "target"
    (tmp_path / f".target.tmp-{os.getpid()}").mkdir()  # the only name there used to be
    _left_over(path, os.getpid())
    with complete_folder(path) as new:
        (new / "a").write_text("new")
    assert _content(path) == "new"
    assert _names(tmp_path) == [f".target.tmp-{os.getpid()}", "target"]


def test_temporary_names_in_use_are_left_alone(tmp_path: Path):
    """Of a living process, of this one, and of another machine until a day has gone by."""
    path = tmp_path / "target"
    living = _left_over(path, os.getppid())
    elsewhere = _left_over(path, 2**22 + 1, "elsewhere")
    with complete_folder(path) as first:
        (first / "a").write_text("first")
        files._cleaned.clear()
        write_text(tmp_path / "another", "text")
        assert first.is_dir() and living.is_dir() and elsewhere.is_dir()
    day_ago = time.time() - 86401
    os.utime(elsewhere, (day_ago, day_ago))
    files._cleaned.clear()
    write_text(tmp_path / "another", "text")
    assert _names(tmp_path) == [living.name, "another", "target"]


@pytest.mark.parametrize("names", [("real", "link"), ("link", "real"), ("real", "."), (".", "link")])
def test_temporary_names_in_use_are_known_by_every_name_of_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    first, second = (Path(name) if name == "." else tmp_path / name for name in names)
    with complete_folder(first / "target") as new, complete_file(first / "file") as file:
        file.write_text("file")
        write_text(second / "another", "text")
        assert new.is_dir() and file.is_file()
    assert _names(tmp_path / "real") == ["another", "file", "target"]


def test_a_full_disk_keeps_the_old_content(tmp_path: Path):
    path = tmp_path / "target"
    write_text(path, "old")
    with pytest.raises(OSError) as caught, complete_file(path) as new:
        new.write_text("half")
        with open("/dev/full", "w") as full:
            full.write("x")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old" and _names(tmp_path) == ["target"]


@pytest.mark.parametrize("folder", [False, True])
def test_a_disk_that_is_full_at_the_flush_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
):
    path = tmp_path / "target"
    (path if folder else tmp_path).mkdir(exist_ok=True)
    write_text(path / "a" if folder else path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        if folder:
            with complete_folder(path) as new:
                (new / "a").write_text("new")
        else:
            write_json(path, {"a": "new"})
    assert _content(path) == "old" and _names(tmp_path) == ["target"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, new = tmp_path / "target", tmp_path / "new"
    for folder, content in ((path, "old"), (new, "new")):
        folder.mkdir()
        (folder / "a").write_text(content)
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if source == new:
            raise OSError(errno.EIO, "input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="input/output error"):
        finish_folder(new, path)
    assert _content(path) == "old" and _names(tmp_path) == ["new", "target"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every flush and rename, in order, with the name it concerns; temporary names as ``tmp`` or ``old``."""
    seen: list[tuple[str, str]] = []

    def plain(path: str | Path) -> str:
        match = files._TEMPORARY.fullmatch(Path(path).name)
        return match["kind"] if match else Path(path).name

    def recording(name: str):
        real = getattr(os, name)

        def call(*args):
            path = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else args[0]
            seen.append((name, plain(path)))
            return real(*args)

        return call

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, recording(name))
    return seen


def test_a_file_is_flushed_before_its_rename_and_its_folder_after(tmp_path: Path, calls: list[tuple[str, str]]):
    write_text(tmp_path / "target", "text")
    assert calls == [("fsync", "tmp"), ("replace", "tmp"), ("fsync", tmp_path.name)]


def test_a_folder_is_flushed_with_all_it_has_before_its_rename(tmp_path: Path, calls: list[tuple[str, str]]):
    for renames in ([("rename", "tmp")], [("rename", "target"), ("rename", "tmp")]):
        calls.clear()
        with complete_folder(tmp_path / "parent" / "target") as new:
            (new / "sub").mkdir()
            (new / "sub" / "b").write_text("b")
            (new / "a").write_text("a")
        if len(renames) == 1:
            assert calls.pop(0) == ("fsync", tmp_path.name)  # the parent is new
        flushed = [("fsync", name) for name in ("a", "tmp", "b", "sub")]
        assert sorted(calls[:4]) == sorted(flushed)
        assert calls[4:] == [*renames, ("fsync", "parent")]


def test_writers_of_one_file_at_once_leave_one_of_theirs(tmp_path: Path):
    path = tmp_path / "target"
    with complete_file(path) as first, complete_file(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and _names(tmp_path) == ["target"]


def test_the_cache_directory_follows_the_environment(monkeypatch):
    for name in ("NEMO_TROPD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/x")
    assert files.default_cache_dir() == Path("/home/x/.cache/nemo_tropd")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert files.default_cache_dir() == Path("/var/cache/nemo_tropd")
    monkeypatch.setenv("NEMO_TROPD_CACHE", "/data")
    assert files.default_cache_dir() == Path("/data")


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A user called tropd, without caches, whose /tmp is a folder: torch's functions that name its compiler's."""
    from torch._inductor.runtime import cache_dir_utils

    for name in ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LOGNAME", "tropd")
    shared = tmp_path / "tmp"
    shared.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    return cache_dir_utils


def of_this_uid_alone(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


@pytest.mark.parametrize("home", ["home", "/proc/none"])
def test_torchs_compiler_keeps_its_cache_where_this_uid_can_write(monkeypatch, tmp_path, compiler, home):
    """In a container one user name may stand for many uids, and a home may be missing or another's."""
    monkeypatch.setenv("HOME", str(tmp_path / home))
    files.name_compiler_cache()
    headers = tmp_path / "tmp/torchinductor_tropd"
    assert Path(compiler.default_cache_dir()) == headers and of_this_uid_alone(headers)
    assert Path(compiler.cache_dir()) == (tmp_path / "home/.cache/torchinductor" if home == "home" else headers)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "given"))
    files.name_compiler_cache()
    assert Path(compiler.cache_dir()) == tmp_path / "given" and os.environ["LOGNAME"] == "tropd"


def in_the_way(kind: str, path: Path) -> None:
    """What another uid that shares /tmp and the user's name may have there."""
    if kind == "a link":
        (path.parent / "elsewhere").mkdir(exist_ok=True)
        path.symlink_to(path.parent / "elsewhere")
    elif kind == "a file":
        path.touch()
    else:
        path.mkdir()
        path.chmod(0o777 if kind == "open to all" else 0o755)
        if kind == "another's":
            os.chown(path, os.getuid() + 1, -1)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", ["another's", "open to all", "a link", "a file"])
def test_what_another_uid_left_in_tmp_is_neither_used_nor_in_the_way(monkeypatch, tmp_path, compiler, kind, given):
    """Precompiled headers hold code, and torch takes their folder by the user's name alone."""
    if kind == "another's" and os.geteuid() != 0:
        pytest.skip("only root can give a folder to another")
    if given:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "given"))
    first = tmp_path / "tmp/torchinductor_tropd"
    in_the_way(kind, first)
    files.name_compiler_cache()
    second = Path(compiler.default_cache_dir())
    assert second == tmp_path / f"tmp/torchinductor_tropd_uid{os.getuid()}" and of_this_uid_alone(second)
    monkeypatch.setenv("LOGNAME", "tropd")  # the next process
    files.name_compiler_cache()
    assert Path(compiler.default_cache_dir()) == second
    # Who left the first may have guessed the second.
    second.rmdir()
    in_the_way(kind, second)
    monkeypatch.setenv("LOGNAME", "tropd")
    files.name_compiler_cache()
    third = Path(compiler.default_cache_dir())
    assert third.parent == tmp_path / "tmp" and third not in (first, second) and of_this_uid_alone(third)


def test_a_uid_without_a_name_has_a_compilers_folder_too(monkeypatch, tmp_path, compiler):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # raises KeyError, as it does for an unknown uid
    files.name_compiler_cache()
    folder = tmp_path / f"tmp/torchinductor_uid_{os.getuid()}"
    assert Path(compiler.default_cache_dir()) == folder and of_this_uid_alone(folder) and "LOGNAME" not in os.environ
