"""The trainer's stream of Hugging Face tensors: checked against the engine's model, and cut into buckets."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_tropd.convert.config_json import ConversionError
from nemo_tropd.convert.weight_files import ROTARY, weight_files
from nemo_tropd.rollout.engine import EngineError, WeightStreamError

_NAMED_AT_MOST = 8


def checkpoint_shapes(model_dir: Path) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """Shapes of the tensors of a Hugging Face checkpoint by name, and the names a stream may leave out: the head of a
    tied model, and rotary frequencies. Raises EngineError when there is no readable safetensors file."""
    try:
        files = weight_files(model_dir)
    except ConversionError as error:
        raise EngineError(str(error)) from error
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise EngineError(
                f"{file} is not a complete safetensors file ({error}); download or convert it again"
            ) from error
    optional = {name for name in shapes if ROTARY.search(name)}
    if json.loads((model_dir / "config.json").read_text()).get("tie_word_embeddings", False):
        optional.add("lm_head.weight")
        shapes.setdefault("lm_head.weight", shapes.get("model.embed_tokens.weight", ()))
    return shapes, frozenset(optional)


def checked_stream(
    stream: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]], optional: frozenset[str]
) -> Iterator[tuple[str, Tensor]]:
    """Pass ``stream`` on; raise WeightStreamError when it does not have exactly the tensors of ``shapes``."""
    seen: set[str] = set()
    for name, tensor in stream:
        if name not in shapes:
            raise WeightStreamError(f"the stream has {name}, which the engine's model does not have")
        if name in seen:
            raise WeightStreamError(f"the stream has {name} twice")
        if tuple(tensor.shape) != shapes[name]:
            raise WeightStreamError(
                f"{name} comes as {list(tensor.shape)} but the engine's model has {list(shapes[name])}"
            )
        seen.add(name)
        yield name, tensor
    missing = [name for name in shapes if name not in seen | optional]
    if missing:
        named = ", ".join(missing[:_NAMED_AT_MOST]) + (", ..." if len(missing) > _NAMED_AT_MOST else "")
        raise WeightStreamError(f"the stream ended without {len(missing)} of the model's tensors: {named}")


def buckets(
    stream: Iterable[tuple[str, Tensor]], *, bucket_bytes: int, dtype: torch.dtype
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Group tensors, cast to ``dtype``, into buckets of at most ``bucket_bytes`` (or one tensor, if it is larger).

    Yields (tensors by name, bytes); they stay on their device. A tensor of the stream, which may be a view, must stay
    as it is until its bucket has been consumed.
    """
    held: dict[str, Tensor] = {}
    held_bytes = 0
    for name, tensor in stream:
        size = tensor.numel() * dtype.itemsize
        if held and held_bytes + size > bucket_bytes:
            yield held, held_bytes
            held, held_bytes = {}, 0
        held[name] = tensor.detach().to(dtype)
        held_bytes += size
    if held:
        yield held, held_bytes
