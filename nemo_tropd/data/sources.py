"""Raw records of files and data sets, each with where it came from. No torch."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_FILE_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


class PromptError(ValueError):
    """Unusable prompts: names the file, the line or row, and what to change."""


def read_records(path: str | Path, *, split: str = "train") -> Iterator[tuple[dict[str, Any], str]]:
    """Raw records of a file or data set, each with its origin (file and line, or row). Raises PromptError."""
    given, local = str(path), Path(path).expanduser()
    if local.is_dir():
        return _read_saved_dataset(local, split)
    kind = _FILE_KINDS.get(local.suffix.lower())
    if local.is_file():
        if kind is None:
            raise PromptError(f"{local}: unsupported file type {local.suffix!r}; supported: {', '.join(_FILE_KINDS)}")
        return _read_jsonl(local) if kind == "jsonl" else _read_parquet(local)
    if kind or local.is_absolute() or given.startswith((".", "~")) or given.count("/") > 1:
        raise PromptError(f"no prompt file at {local.absolute()}")
    return _read_hub_dataset(given, split)


def _read_jsonl(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error}") from error
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise PromptError(f"{where}: not UTF-8 ({error})") from error
            except RecursionError as error:
                raise PromptError(f"{where}: not JSON that can be read: nested too deeply") from error
            except json.JSONDecodeError as error:
                shown = line.decode("utf-8", "replace").strip()[:80]
                raise PromptError(f"{where}: not JSON ({error.msg} at column {error.colno}): {shown}") from error
            if not isinstance(record, dict):
                raise PromptError(f"{where}: a line must be a JSON object, got {type(record).__name__}")
            yield record, where


def _read_parquet(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _rows((record for batch in file.iter_batches() for record in batch.to_pylist()), str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise PromptError(f"{path} is not a readable Parquet file: {error}") from error


def _read_saved_dataset(path: Path, split: str) -> Iterator[tuple[dict[str, Any], str]]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise PromptError(
            f"{path} is a directory, but not a data set written by datasets.save_to_disk ({error}): give a file"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise PromptError(f"{path} has no split {split!r}; it has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    return _rows(loaded, str(path))


def _read_hub_dataset(name: str, split: str) -> Iterator[tuple[dict[str, Any], str]]:
    import datasets

    repository, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:  # the hub client raises its own, network and file-system errors alike
        raise PromptError(
            f"{name!r} is not a local file, and could not be loaded as a data set (split {split!r}): "
            f"{type(error).__name__}: {error}. Check the path, or save the data set with datasets.save_to_disk"
        ) from error
    return _rows(loaded, name)


def _rows(dataset: Iterable[Any], name: str) -> Iterator[tuple[dict[str, Any], str]]:
    for row, record in enumerate(dataset, start=1):
        yield record, f"{name}, row {row}"
