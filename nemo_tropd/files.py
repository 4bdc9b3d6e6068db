"""Files and folders that appear complete or not at all, after a crash of the machine too.

Everything is written under a temporary name in the same folder, flushed to the disk (fsync), renamed, and the rename
itself flushed (fsync of the folder). Imports nothing of ours.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def complete_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``: what the block writes there becomes ``path`` when it ends without an exception.

    After an exception ``path`` is as it was and the temporary file is gone. A reader sees the old file or the new one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, see :func:`complete_file`."""
    with complete_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write ``content`` as indented JSON, see :func:`complete_file`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def complete_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, renamed to ``path`` when the block ends without an exception.

    A folder that was at ``path`` stays until the new one is complete. After an exception the temporary folder is gone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        finish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def finish_folder(temporary: Path, path: Path) -> None:
    """Flush the folder ``temporary`` and its files to the disk and rename it to ``path``, in place of an old one."""
    for folder, _, names in os.walk(temporary):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))
    if path.exists():
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old)
    else:
        temporary.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def default_cache_dir() -> Path:
    """``$NEMO_TROPD_CACHE``, else ``$XDG_CACHE_HOME/nemo_tropd``, else ``~/.cache/nemo_tropd``."""
    if os.environ.get("NEMO_TROPD_CACHE"):
        return Path(os.environ["NEMO_TROPD_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_tropd"
