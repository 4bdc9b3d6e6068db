"""What tells one checkpoint from another, wherever it lies."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from nemo_tropd.convert.config_json import ConversionError
from nemo_tropd.convert.hf_files import check_finite
from nemo_tropd.convert.weight_files import weight_files
from nemo_tropd.files import write_json

_CONFIG_FILES = ("config.json", "generation_config.json")


def checkpoint_fingerprint(model_dir: str | Path, memory: Path | None = None) -> str:
    """A digest of a checkpoint's config files and weights, wherever it lies. FileNotFoundError without weights,
    ConversionError for a tensor with NaN or infinite values, since every byte is read. ``memory`` (a JSON file) keeps a
    weight file's digest, which counts until the file's size, inode or times change."""
    folder = Path(model_dir)
    try:
        files = weight_files(folder)
    except ConversionError as error:
        raise FileNotFoundError(f"{folder} holds no safetensors checkpoint to tell from others: {error}") from error
    known: dict[str, list[Any]] = {}
    if memory is not None:
        with suppress(OSError, msgspec.MsgspecError):  # not there yet, or damaged: the weights are read again
            known = msgspec.json.decode(memory.read_bytes(), type=dict[str, list[Any]])
    digest, marks = hashlib.sha256(), {}
    for name in _CONFIG_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    for file in files:
        stat, place = file.stat(), str(file.resolve())
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        if known.get(place, [])[:-1] != mark:
            with file.open("rb") as weights:
                marks[place] = [*mark, hashlib.file_digest(weights, "sha256").hexdigest()]
            check_finite(file)  # of pages that have just been read
        digest.update(f"{file.name}:{(known | marks)[place][-1]}".encode())
    if memory is not None and marks:
        with suppress(OSError):  # no room: the weights are read again the next time
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, known | marks)
    return digest.hexdigest()
