"""Where a run starts: rank 0 decides, every rank hears it. Nothing in the run directory changes before that."""

import hashlib
import json
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_tropd.config import ConfigError, TropdConfig, about_teacher, schema_fields, teacher_named
from nemo_tropd.config_keys import value_at
from nemo_tropd.convert.config_json import ConversionError
from nemo_tropd.convert.fingerprint import checkpoint_fingerprint
from nemo_tropd.data import PromptError, PromptSplit
from nemo_tropd.files import read_json, remove_stale
from nemo_tropd.objectives import Objective
from nemo_tropd.parallel.addresses import host_name
from nemo_tropd.parallel.agreement import World, on_rank_zero
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.training.checkpoint import newest_readable
from nemo_tropd.training.resume import SERVED, CheckpointError, RunState, check_resumable, first_state, settled
from nemo_tropd.training.run_lock import check_shared, run_lock
from nemo_tropd.training.teacher_responses import responses_dir


@dataclass(frozen=True)
class Start:
    """The checkpoint a run starts from (None: the student as it is), its state, and the settings it goes on with."""

    cfg: TropdConfig
    path: Path | None
    state: RunState
    finished: bool  # the run has its last step, its export, its report and its summary
    notes: tuple[str, ...] = ()


def agreed_fingerprint(prompts: PromptSplit, world: World) -> str:
    """The fingerprint of the training prompts (collective). Every rank reads the data by itself: raises PromptError on
    all of them, naming those whose training or held-out prompts are not rank 0's."""
    mine = {
        name: (len(part), part.fingerprint())
        for name, part in (("training", prompts.train), ("held-out", prompts.held_out))
    }
    everyone = world.gather_objects((host_name(), mine))
    for name in mine:
        expected = everyone[0][1][name]
        if others := [rank for rank, (_, found) in enumerate(everyone) if found[name] != expected]:
            host, found = everyone[others[0]]
            counts = f"{found[name][0]} of them, rank 0 on {everyone[0][0]} {expected[0]}"
            ranks = f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others))}"
            raise PromptError(
                f"model.data.path: the {name} prompts of {ranks} are not those of rank 0: rank {others[0]} on {host} "
                f"reads {counts}. Give every host the same files, which nothing changes meanwhile"
            )
    return mine["training"][1]


@contextmanager
def opened(cfg: TropdConfig, run_dir: Path, objective: Objective, prompts: str, topology: Topology) -> Iterator[Start]:
    """Where the run starts (collective). Rank 0 holds the directory inside the block, unless the run is finished.
    ``prompts`` is the fingerprint of the training prompts. Raises ConfigError or CheckpointError on every rank: what
    has changed since the checkpoint may not, another process runs in the directory, a rank does not see it, or none of
    its checkpoints can be read."""
    key = "exp_manager.explicit_log_dir" if cfg.exp_manager.explicit_log_dir else "exp_manager.exp_dir"
    contents: dict[str, object] = {}

    def find() -> Start:
        contents.update(contents or _contents(cfg, prompts))
        return _find(cfg, run_dir, objective, contents)

    start = on_rank_zero(topology, find, unexpected=CheckpointError)
    if start.finished:
        yield start
        return
    with ExitStack() as held:

        def prepare() -> Start:
            start = find()  # once more: another process may have come further, or finished
            if not start.finished:
                for folder in (run_dir, run_dir / "checkpoints", run_dir / "validation", run_dir / "skipped"):
                    remove_stale(folder, ours=True)
            for line in start.notes:
                print(line, flush=True)
            return start

        on_rank_zero(topology, lambda: held.enter_context(run_lock(run_dir, key)), unexpected=CheckpointError)
        check_shared(run_dir, key, topology)
        yield on_rank_zero(topology, prepare, unexpected=CheckpointError)


def _find(cfg: TropdConfig, run_dir: Path, objective: Objective, contents: dict[str, object]) -> Start:
    """Where a run in ``run_dir`` starts; reads only."""
    path, saved, damage = newest_readable(run_dir / "checkpoints")
    notes = [f"{line}; using the checkpoint before it" for line in damage]
    cfg = settled(cfg, saved)
    now = first_state(cfg, objective, contents, saved.run_id if saved else secrets.token_hex(8))
    if saved is None:
        return Start(cfg, None, now, False, tuple(notes))
    notes += check_resumable(saved, now, cfg.trainer.tropd.accept_changes)
    done = saved.step == cfg.trainer.tropd.max_steps and _is_complete(run_dir, saved)
    now = replace(now, step=saved.step, served=saved.served)
    state = replace(now, skipped_steps=saved.skipped_steps, skipped_in_a_row=saved.skipped_in_a_row)
    return Start(cfg, path, state, done, tuple(notes))


def _is_complete(run_dir: Path, state: RunState) -> bool:
    """Whether export and report are those of ``state``: the summary is written after them."""
    summary = read_json(run_dir / "summary.json") or {}
    same = summary.get("steps") == state.step and summary.get("run_id") == state.run_id
    parts = (run_dir / "report.html", run_dir / "hf" / "config.json")
    return same and all(part.is_file() for part in parts) and any((run_dir / "hf").glob("*.safetensors"))


def _contents(cfg: TropdConfig, prompts: str) -> dict[str, object]:
    data = cfg.model.data
    path = data.path or ", ".join(source["path"] for source in data.sources)
    checked = [key for key, f in schema_fields() if "check" in f.metadata and key != "model.data.path"]
    keys = {key: value_at(cfg, key) for key in checked if key.startswith("model.data.")}
    found: dict[str, object] = {"model.data.path": {"digest": prompts, "path": path, "keys": keys}}
    for key, path in (
        ("model.teacher.path", cfg.model.teacher.path),
        ("pretrained_checkpoint.restore_from_path", cfg.pretrained_checkpoint.restore_from_path),
    ):
        if key == "model.teacher.path" and cfg.model.teacher.url:
            found[key] = {"digest": SERVED, "path": ", ".join(cfg.model.teacher.urls)}  # the self-test says what it is
            continue
        found[key] = {"digest": _weights(cfg, key, path), "path": str(Path(path).absolute())}
    found["model.teachers"] = _further_teachers(cfg)
    return found


def _weights(cfg: TropdConfig, key: str, path: str) -> str:
    """The fingerprint of a checkpoint, which is read once for all runs that share its memory."""
    try:
        return checkpoint_fingerprint(path, responses_dir(cfg) / "fingerprints.json")
    except (OSError, ConversionError) as error:
        raise ConfigError(key, path, f"cannot be read: {error}") from error


def _further_teachers(cfg: TropdConfig) -> dict[str, object]:
    """What they are, as far as it alters draws or loss."""
    said = []
    for name in sorted(cfg.model.teachers):
        t = teacher_named(cfg.model, name)
        with about_teacher(name):
            weights = SERVED if t.url else _weights(cfg, "model.teacher.path", t.path)
        as_what = t.precision or cfg.trainer.precision, t.response_tokens or cfg.model.rollout.max_new_tokens
        said.append([name, weights, *as_what, t.fp8, t.fp8 and t.fp8_param, t.fp8 and t.fp8_first_last_bf16])
    names = ", ".join(f"{name}: {section['path']}" for name, section in sorted(cfg.model.teachers.items())) or None
    return {"digest": hashlib.sha256(json.dumps(said).encode()).hexdigest(), "path": names}
