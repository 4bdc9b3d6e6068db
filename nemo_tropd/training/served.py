"""A run's teachers behind servers: found and tried before anything is built, the same as before when a run resumes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nemo_tropd.config import ConfigError, TropdConfig, about_teacher
from nemo_tropd.config_teacher import DEFAULT_TEACHER
from nemo_tropd.parallel.agreement import on_rank_zero
from nemo_tropd.rollout.engine import EngineError, RolloutEngine
from nemo_tropd.rollout.placement import EngineFactory, sampling_of
from nemo_tropd.served.answers import Vocabulary
from nemo_tropd.served.check import Fingerprint, FixedText, remembered, self_test
from nemo_tropd.served.client import Servers
from nemo_tropd.served.engine import ServedEngine
from nemo_tropd.served.teacher import ServedTeacher
from nemo_tropd.training.plan_models import Teacher
from nemo_tropd.training.setup import Setup
from nemo_tropd.training.teacher_responses import responses_dir


@dataclass(frozen=True)
class WithServed:
    """An engine factory whose teachers with a url are behind servers: ``served``, by name."""

    engines: EngineFactory
    served: Mapping[str, ServedTeacher]
    end_ids: Sequence[int]

    def student(self, cfg: TropdConfig) -> RolloutEngine:
        """The other factory's."""
        return self.engines.student(cfg)

    def teacher(self, cfg: TropdConfig) -> RolloutEngine:
        """The servers, or the other factory's."""
        mine = (s for s in self.served.values() if list(s.servers.urls) == cfg.model.teacher.urls)
        if (served := next(mine, None)) is None:
            return self.engines.teacher(cfg)
        return ServedEngine(served.servers, served.vocabulary, sampling_of(cfg), self.end_ids)


def open_served(setup: Setup) -> dict[str, ServedTeacher]:
    """The teachers of a url, by name, after their self-tests (collective). ConfigError or ServerError on every rank for
    one that will not do, or is not the teacher of the run that is resumed."""
    found = {}
    for teacher in setup.plan.teachers:
        if teacher.cfg.model.teacher.url:
            with about_teacher(teacher.name):
                found[teacher.name] = _open(setup, teacher)
    return found


def _open(setup: Setup, teacher: Teacher) -> ServedTeacher:
    plan, topology, start, t = setup.plan, setup.topology, setup.start, teacher.cfg.model.teacher
    assert start is not None
    servers = Servers(t.urls, t.server, first=topology.data_rank)
    vocabulary = Vocabulary(plan.vocab_size, teacher.shape.vocab_size)
    before = start.state.served.get(teacher.name)

    def find() -> tuple[str, Fingerprint, Fingerprint]:
        m = setup.cfg.model
        now = self_test(servers, t, plan.tokenizer, vocabulary, top_k=m.tropd.top_k, longest=m.encoder_seq_length)
        first = remembered(now, responses_dir(setup.cfg) / "served_teachers.json", t.server.noise)
        return servers.model, now, _as_before(setup.cfg, teacher, before, now) or first

    servers.model, now, first = on_rank_zero(topology, find, unexpected=EngineError, may_stop=True)
    servers.fixed = FixedText.of(now, t.server.noise, vocabulary)
    start.state.served[teacher.name] = asdict(first)
    made = ServedTeacher(servers, topology, vocabulary, first.digest)
    made.reach()
    return made


def _as_before(
    cfg: TropdConfig, teacher: Teacher, before: dict[str, Any] | None, now: Fingerprint
) -> Fingerprint | None:
    """The fingerprint of the run that is resumed; None if there is none, or another teacher is accepted. ConfigError if
    the teacher is another."""
    if before is None:
        return None
    t, key = teacher.cfg.model.teacher, "model.teacher.path" if teacher.name == DEFAULT_TEACHER else "model.teachers"
    was = Fingerprint(tuple(before["ids"]), tuple(before["log_probs"]))
    if (far := was.distance(now)) <= t.server.noise:
        return was
    if key in cfg.trainer.tropd.accept_changes:
        return None
    raise ConfigError(
        "model.teacher.url",
        ", ".join(t.urls),
        f"its log-probabilities of a fixed text are {far:.4g} nats a token from those of the teacher that this run "
        f"began with (model.teacher.server.noise = {t.server.noise:g}): serve that one, set "
        "exp_manager.explicit_log_dir to start another run, or continue this one with the new teacher: "
        f"trainer.tropd.accept_changes='[{key}]'",
    )
