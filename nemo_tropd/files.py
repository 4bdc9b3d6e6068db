"""Files and folders that appear complete or not at all, even if the machine crashes. Imports nothing of ours.

They are written under a temporary name in the same folder, flushed to the disk and renamed; that is flushed, too. What
killed processes left under temporary names is removed by the next one that writes to the same folder.
"""

import errno
import getpass
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_MACHINE = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<machine>[A-Za-z0-9._]*)-[0-9a-f]{8}-(?P<pid>\d+)")
_LONGEST_NAME = 255  # bytes
_STALE_AFTER_S = 24 * 3600.0
_COMPILER_FOLDER = "torchinductor_"  # torch's own
_in_use: set[Path] = set()
_cleaned: set[tuple[int, Path]] = set()  # (process, folder): a forked child cleans for itself


@contextmanager
def complete_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``: what the block writes there becomes ``path`` if it ends without an exception;
    else ``path`` is unchanged and the temporary file is gone."""
    path = Path(path)
    with _temporary(path) as temporary:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, see :func:`complete_file`."""
    with complete_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write ``content`` as indented JSON, see :func:`complete_file`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in ``path``; None if there is no such file, or, with a line that says so, if it is cut."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except FileNotFoundError:
        return None
    except ValueError:
        pass
    print(f"{path} is empty or damaged: continuing without it", flush=True)
    return None


@contextmanager
def complete_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, renamed to ``path`` if the block ends without an exception, else removed. An
    existing folder at ``path`` stays until the new one is complete; a link stays, and what it leads to is replaced."""
    path = Path(os.path.realpath(path))
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync(folder.parent)
    with _temporary(path) as temporary:
        temporary.mkdir()
        yield temporary
        finish_folder(temporary, path)


def finish_folder(temporary: Path, path: Path) -> None:
    """Flush the folder ``temporary`` and its files to the disk and rename it to ``path``, replacing an old one.
    If the rename fails, the old folder is back in its place."""
    for folder, _, names in os.walk(temporary):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))
    if not path.exists():
        temporary.rename(path)
        sync(path.parent)
        return
    with _temporary(path, "old") as old:
        path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            old.rename(path)
            raise
        sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _temporary(path: Path, kind: str = "tmp") -> Iterator[Path]:
    """An unused name beside ``path`` for a file or folder, which is removed afterwards if it still exists."""
    path = path.absolute()  # "." has no name
    path = Path(os.path.realpath(path.parent), path.name)  # one name for each that is in use
    mark = (os.getpid(), path.parent)
    if mark not in _cleaned:
        _cleaned.add(mark)
        remove_stale(path.parent)
    temporary = path.with_name(f".{path.name}.{kind}-{_MACHINE}-{secrets.token_hex(4)}-{os.getpid()}")
    _in_use.add(temporary)
    try:
        yield temporary
    finally:
        _remove(temporary)
        _in_use.discard(temporary)


def remove_stale(folder: Path, *, ours: bool = False) -> None:
    """Remove temporary files and folders of dead processes; a process's first write to a folder does so by itself.
    ``ours``: no other process writes to the folder, so every one is stale. A folder moved aside by a process that died
    before the new one was in its place is moved back. Names from another machine, whose processes are not visible here,
    are removed once they are a day old."""
    folder = Path(os.path.realpath(folder))
    for left_over in list(folder.iterdir()) if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(left_over.name)
        if match is None or left_over in _in_use:
            continue
        if not ours and not _is_stale(left_over, match["machine"], int(match["pid"])):
            continue
        target = folder / match["name"]
        with suppress(FileNotFoundError):  # another process may remove it at the same time
            if match["kind"] == "old" and not target.exists():
                left_over.rename(target)
            else:
                _remove(left_over)


def _is_stale(path: Path, machine: str, pid: int) -> bool:
    if machine == _MACHINE:
        # Not in use by us, so a name with our process id is from a process that had the id before.
        return pid == os.getpid() or not Path(f"/proc/{pid}").exists()
    try:
        return time.time() - path.stat().st_mtime > _STALE_AFTER_S
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def refusal(path: str | Path) -> str:
    """Why the system lets this process neither find nor make ``path``, with the remedy: a name that is too long, a
    folder that it may not enter, links in a circle. "" if nothing is in the way."""
    try:
        if any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(path).parts):  # below what is not there yet, too
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        os.stat(os.path.join(path, "."))
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        return f"the system refuses it ({error.strerror}): give another path, or the right to enter its folders"
    return ""


def default_cache_dir() -> Path:
    """``$NEMO_TROPD_CACHE``, else ``$XDG_CACHE_HOME/nemo_tropd``, else ``~/.cache/nemo_tropd``."""
    if os.environ.get("NEMO_TROPD_CACHE"):
        return Path(os.environ["NEMO_TROPD_CACHE"])
    return _caches() / "nemo_tropd"


def name_compiler_cache() -> None:
    """Call before torch's compiler is imported. Its kernels are kept beside our own caches, unless
    TORCHINDUCTOR_CACHE_DIR names another folder; its precompiled headers always in /tmp/torchinductor_NAME, and NAME
    may stand for all uids of a container: the first could keep the others from writing, or put code there for them.
    If that folder is not this uid's alone, LOGNAME, which torch reads first, becomes a name whose folder is."""
    headers = _own_compiler_folder()
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    folder = _caches() / "torchinductor"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder if os.access(folder, os.W_OK) else headers)


def _own_compiler_folder() -> Path:
    """torch's ``default_cache_dir``, made for this uid alone, after LOGNAME has been changed if it has to be."""
    try:
        named = getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):  # KeyError up to Python 3.12: a uid without a name
        named = f"uid_{os.getuid()}"
    named = re.sub(r'[\\/:*?"<>|]', "_", named)
    for name in (named, f"{named}_uid{os.getuid()}"):
        folder = Path(tempfile.gettempdir(), _COMPILER_FOLDER + name)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()  # of a link, not of what it leads to
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022:
            break
    else:
        folder = Path(tempfile.mkdtemp(prefix=_COMPILER_FOLDER))
    if (own := folder.name.removeprefix(_COMPILER_FOLDER)) != named:
        os.environ["LOGNAME"] = own
    return folder


def _caches() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
