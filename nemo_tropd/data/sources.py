"""Raw records of files, folders and data sets, each with where it came from. No torch."""

import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

Records = Iterator[tuple[dict[str, Any], str]]

_KINDS = (".jsonl", ".ndjson", ".json", ".parquet")
_PACKED = (".gz", ".zst", ".zstd")
_TABLES = (".csv", ".tsv", ".xlsx", ".arrow")
_BY_START = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "Parquet"}  # what is not JSON
_LFS = b"version https://git-lfs.github.com/spec/"
_ROWS = 1000  # of an Arrow table that are Python objects at a time


class PromptError(ValueError):
    """Unusable prompts: names the file, the line or row, and what to change."""


def read_records(path: str | Path, *, split: str = "train") -> Records:
    """Raw records of whatever :func:`open_records` opens, each with its origin (file and line, record or row)."""
    return open_records(path, split=split)[0]


def open_records(path: str | Path, *, split: str = "train") -> tuple[Records, str]:
    """Raw records, and which files they come from if there is more to say than ``path``. Raises PromptError.

    ``path`` is a file (JSON lines or an array, also .gz or .zst, or Parquet); a glob of such files, or a folder: saved
    by datasets, a clone of a hub data set, or shards, which are read sorted by name; or the name of a hub data set.
    ``FOLDER:config`` and ``owner/name:config`` choose a configuration, ``split`` a split where there are any.
    """
    try:
        return _open_records(str(path), Path(os.path.expanduser(path)), split)
    except OSError as error:
        remedy = "give a path that this process may read"
        raise PromptError(f"{path} cannot be looked at ({error.strerror or error}): {remedy}") from error


def _open_records(given: str, local: Path, split: str) -> tuple[Records, str]:
    if local.is_file():
        return _read_files([local]), ""
    folder, _, config = str(local).rpartition(":")
    if local.is_dir() or (folder and Path(folder).is_dir()):
        found, config = (local, "") if local.is_dir() else (Path(folder), config)
        return _open_folder(Path(os.path.abspath(found)), config, split)
    if "://" in given:
        raise PromptError(f"{given} is an address: download it, and give the file or folder")
    if any(magic in given for magic in "*?["):
        files = [Path(name) for name in sorted(glob.glob(str(local), recursive=True)) if Path(name).is_file()]
        if not files:
            raise PromptError(f"no prompt file at {local.absolute()}: nothing matches this pattern")
        return _read_files(files), f"{len(files)} files of {given}"
    if _suffix(local) or local.is_absolute() or given.startswith((".", "~")) or given.count("/") > 1 or local.exists():
        several = "; several files: a glob, a folder or model.data.sources" if "," in given else ""
        raise PromptError(f"no prompt file at {local.absolute()}{several}")
    return _read_hub_dataset(given, split), ""


def _suffix(path: Path) -> str:
    """The kind of file: ``.jsonl``, ``.jsonl.gz``, ``.csv``; "" for one that is no table of records."""
    packed = path.suffix.lower() if path.suffix.lower() in _PACKED else ""
    inner = Path(path.name.lower().removesuffix(packed)).suffix
    return inner + packed if inner in _KINDS + _TABLES else ""


def _read_files(files: Sequence[Path]) -> Records:
    """The records of files of one kind, one after the other."""
    by_kind = {_suffix(file): file for file in reversed(files)}
    for kind, file in by_kind.items():
        inner = kind.removesuffix(Path(kind).suffix if Path(kind).suffix in _PACKED else "") or file.suffix
        if inner in _TABLES:
            raise PromptError(
                f"{file}: {inner} files are not read; make JSON Lines of it, such as by "
                f"pandas.read_csv('{file.name}').to_json('prompts.jsonl', orient='records', lines=True)"
                if inner != ".arrow"
                else f"{file}: give the folder that datasets.save_to_disk wrote, not one of its .arrow files"
            )
        if not kind:
            supported = f"{', '.join(_KINDS)}, and JSON with .gz or .zst"
            raise PromptError(f"{file}: unsupported file type {file.suffix!r}; supported: {supported}")
        if inner == ".parquet" and kind != inner:
            raise PromptError(f"{file}: Parquet is compressed within; unpack the {file.suffix}")
    if len(by_kind) > 1:
        found = ", ".join(f"{kind} ({by_kind[kind].name})" for kind in sorted(by_kind))
        raise PromptError(
            f"{files[0].parent} has records of several kinds: {found}. They may be the same ones twice: name one kind "
            f"by a pattern, such as {files[0].parent}/*{min(by_kind)}, or each in model.data.sources"
        )
    return chain.from_iterable(map(_read_file, files))


def _read_file(path: Path) -> Records:
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS))
        if start == _LFS:
            raise PromptError(f"{path} is a Git LFS pointer, not the data: run git lfs pull in its folder")
        kind = next((kind for magic, kind in _BY_START.items() if start.startswith(magic)), "")
        if kind and _suffix(path) in _KINDS[:3]:
            name = f"{path.name}{'.gz' if kind == 'gzip' else '.zst'}"
            what = f"Parquet: name it {path.stem}.parquet" if kind == "Parquet" else f"packed by {kind}: name it {name}"
            raise PromptError(f"{path} is {what}")
        if _suffix(path) == ".parquet":
            yield from _read_parquet(path)
            return
        with _opened(path) as file:
            yield from _read_json(file, path)
    except (OSError, EOFError, zlib.error) as error:
        raise PromptError(f"{path} cannot be read: {error}") from error


def _opened(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix.lower() in _PACKED:
        import pyarrow

        return cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")))
    return path.open("rb")


def _read_json(file: BinaryIO, path: Path) -> Records:
    """JSON lines, or an array if the first character is its bracket."""
    blank = 0
    for number, line in enumerate(file, start=1):
        if not line.strip(b"\xef\xbb\xbf \t\r\n"):
            blank += 1
        elif blank == number - 1 and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
            yield from _array(_decoded(line + file.read(), str(path)), path, number)
            return
        else:
            where = f"{path}, line {number}"
            text = _decoded(line, where)
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                hint = "" if blank < number - 1 else "; give one record per line, or one array of records"
                shown = text.strip()[:80]
                raise PromptError(f"{where}: not JSON ({error.msg} at column {error.colno}): {shown}{hint}") from error
            except (RecursionError, ValueError) as error:
                raise _unreadable(where, error) from error
            yield _object(record, where, "a line"), where


def _array(text: str, path: Path, first_line: int) -> Records:
    """The entries of one JSON array that starts in line ``first_line``."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    place, number = text.index("[") + 1, 0
    while True:
        place = cast(re.Match[str], between.match(text, place)).end()
        if text.startswith("]", place):
            break
        number += 1
        where = f"{path}, record {number}"
        try:
            record, place = decode(text, place)
        except json.JSONDecodeError as error:
            line, shown = error.lineno + first_line - 1, text[place : place + 80]
            raise PromptError(f"{where}: not JSON ({error.msg} in line {line}): {shown}") from error
        except (RecursionError, ValueError) as error:
            raise _unreadable(where, error) from error
        yield _object(record, where, "an entry"), where
    if rest := text[place + 1 :].strip():
        raise PromptError(f"{path}: more follows the end of its array (record {number}): {rest[:80]}")


def _unreadable(where: str, error: Exception) -> PromptError:
    """Of JSON that is nested too deeply, or has a number of thousands of digits."""
    why = "nested too deeply" if isinstance(error, RecursionError) else error
    return PromptError(f"{where}: not JSON that can be read: {why}")


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{where}: not UTF-8 ({error})") from error


def _object(record: Any, where: str, what: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise PromptError(f"{where}: {what} must be a JSON object, got {type(record).__name__}")
    return record


def _read_parquet(path: Path) -> Records:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _rows(file.iter_batches(batch_size=_ROWS), str(path))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise PromptError(f"{path} is not a readable Parquet file: {error}") from error


def _open_folder(path: Path, config: str, split: str) -> tuple[Records, str]:
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _read_saved_dataset(path, split), ""
    from datasets.data_files import resolve_pattern

    base, patterns = _split_patterns(path, config)
    if patterns and split not in patterns:
        raise PromptError(f"{path} has no split {split!r}; it has {', '.join(map(str, patterns))}")
    matches: set[str] = set()
    for pattern in patterns.get(split, ()):
        with suppress(FileNotFoundError):  # it is one of the forms that a split's name may have
            matches.update(resolve_pattern(pattern, base_path=glob.escape(str(base))))
    files = [file for file in map(Path, sorted(matches)) if _suffix(file)]
    if not files:
        held = sorted(f.name for f in path.iterdir())
        raise PromptError(
            f"{path} is a folder, but not a data set written by datasets.save_to_disk, a clone of a hub data set or a "
            f"folder of {', '.join(_KINDS)} files; it holds {', '.join(held[:5]) or 'nothing'}"
            + (f" and {len(held) - 5} more" if len(held) > 5 else "")
        )
    every = [f for f in path.rglob("*") if _suffix(f) and f.is_file() and "/." not in f"/{f.relative_to(path)}"]
    of = f" of {len(every)}" if len(every) > len(files) else ""
    return _read_files(files), f"{len(files)}{of} files of {path}, split {split!r}"


def _split_patterns(path: Path, config: str) -> tuple[Path, dict[str, list[str]]]:
    """Patterns of each split's files and the folder they are relative to, by README.md's configs, else by names, as the
    hub's own reader finds them."""
    from datasets.data_files import EmptyDatasetError, get_data_patterns, sanitize_patterns
    from huggingface_hub import metadata_load

    readme = path / "README.md"
    try:
        found = (metadata_load(readme) or {}).get("configs") if readme.is_file() else None
        configs = {str(entry["config_name"]): entry for entry in found or ()}
        if not configs and not config:
            return path, get_data_patterns(glob.escape(str(path)))
        defaults = [name for name, c in configs.items() if len(configs) == 1 or name == "default" or c.get("default")]
        name = config or (defaults[0] if defaults else "")
        if name in configs:
            base, files = path / (configs[name].get("data_dir") or ""), configs[name].get("data_files")
            return base, sanitize_patterns(files) if files else get_data_patterns(glob.escape(str(base)))
    except EmptyDatasetError:
        return path, {}
    except Exception as error:  # YAML that is none, or not what a data set's card has
        raise PromptError(f"{readme}: its configs cannot be read ({type(error).__name__}: {error})") from error
    which = f"no config {config!r}; it has {', '.join(configs) or 'none'}" if config else f"{len(configs)} configs"
    raise PromptError(f"{path} has {which}: choose one of them, such as {path}:{next(iter(configs), 'NAME')}")


def _read_saved_dataset(path: Path, split: str) -> Records:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # of files that are missing, or are none of its own
        raise PromptError(f"{path} is not a complete data set of datasets.save_to_disk ({error})") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise PromptError(f"{path} has no split {split!r}; it has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    return _rows(loaded.with_format("arrow").iter(_ROWS), str(path))


def _read_hub_dataset(name: str, split: str) -> Records:
    import datasets

    repository, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:  # the hub client raises its own, network and file-system errors alike
        raise PromptError(
            f"{name!r} is not a local file, and could not be loaded as a data set (split {split!r}): "
            f"{type(error).__name__}: {error}. Check the path, or save the data set with datasets.save_to_disk"
        ) from error
    return _rows(loaded.with_format("arrow").iter(_ROWS), name)


def _rows(tables: Iterable[Any], name: str) -> Records:
    """The rows of Arrow tables or record batches."""
    for row, record in enumerate(chain.from_iterable(table.to_pylist() for table in tables), start=1):
        yield record, f"{name}, row {row}"
