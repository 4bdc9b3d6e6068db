"""The ``.metadata`` of a distributed checkpoint, which is a pickle, read so that nothing in it can run.

torch and Megatron unpickle it, and the objects stored beside the weights, as they come: a checkpoint is then a program.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from enum import EnumType
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from nemo_tropd.convert.families import ConversionError

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_DCP = "torch.distributed.checkpoint"
_ALLOWED = {
    f"{_DCP}.metadata": {"Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorStorageMetadata"}
    | {"BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"},
    f"{_DCP}.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    f"{_DCP}.filesystem": {"_StorageInfo"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}


def _member(kind: Any, name: str) -> Any:
    """Python 3.11.0 to 3.11.3 pickle a member of an enumeration as getattr(kind, name): that, and nothing else."""
    if not isinstance(kind, EnumType) or name not in kind.__members__:
        raise pickle.UnpicklingError(f"it has {name!r} of {kind!r}, which no checkpoint needs and which could run code")
    return kind[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it has {module}.{name}, which no checkpoint needs and which could run code")
        return super().find_class(module, name)


def read_metadata(directory: Path) -> Metadata:
    """The metadata of the checkpoint in ``directory``; ConversionError for content that is no metadata, is damaged or
    could run code, and for names of files outside the directory."""
    path = directory / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        names = {info.relative_path for info in metadata.storage_data.values() if isinstance(info, _StorageInfo)}
        if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
            raise TypeError("it holds no torch.distributed.checkpoint metadata")
        outside = [name for name in names if Path(name).name != name]
        if outside or not names:
            raise ValueError(f"it must name files of its own folder, not {outside or 'none'}")
    except Exception as error:  # a pickle fails with whatever its content makes of it
        raise ConversionError(
            f"{path} cannot be used ({type(error).__name__}: {error}): take a checkpoint from a source that you trust"
        ) from error
    return metadata


@contextmanager
def without_code(directory: Path) -> Iterator[None]:
    """Inside, torch loads the checkpoint in ``directory`` without running any code of it; errors as read_metadata."""
    read_metadata(directory)
    # Megatron's objects beside the weights are loaded by torch.load(weights_only=False), which this overrules.
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        os.environ.pop(_FORCE)
        os.environ.update({} if before is None else {_FORCE: before})
