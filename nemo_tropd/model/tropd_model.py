"""The model class of a run, with the life cycle NeMo-Aligner's models had."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from megatron.core.models.gpt import GPTModel
from nemo.core import ModelPT
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nemo_tropd.batch import Rollout, Sampling, TeacherScores, TeacherStates, TokenBatch, TokenScores
from nemo_tropd.config import ModelConfig, about_teacher, loaded_as, teacher_named
from nemo_tropd.config_teacher import DEFAULT_TEACHER, TeacherConfig
from nemo_tropd.convert.families import read_shape
from nemo_tropd.convert.hf_export import device_stream, hf_stream, leader_stream
from nemo_tropd.convert.hf_import import load_hf
from nemo_tropd.gpt.build import build_gpt, head_weight
from nemo_tropd.gpt.ddp import data_parallel, recompute_fields
from nemo_tropd.gpt.forward import pipeline_forward
from nemo_tropd.loss.head import score_tokens
from nemo_tropd.loss.inputs import HeadLayout
from nemo_tropd.model.student_pass import StudentPass
from nemo_tropd.objectives import Objective
from nemo_tropd.parallel.metric_sums import DeviceSums, MetricSums
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.rollout.collective import FinishedTogether, Rollouts
from nemo_tropd.rollout.engine import RolloutRequest
from nemo_tropd.served.teacher import ServedTeacher
from nemo_tropd.teacher.admission import admit
from nemo_tropd.teacher.fp8 import Fp8Settings
from nemo_tropd.teacher.scorer import TeacherScorer
from nemo_tropd.teacher.sharing import TeacherSharing

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StudentSource:
    """Where the student's weights come from, and what they are."""

    path: Path  # a Hugging Face checkpoint
    precision: str  # "32" or "bf16"
    vocab_size: int  # the tokenizer's true size: student, teacher and engine share it
    # Writes the parameters of student and teacher in place: their directories then need no weights, only config.json.
    fill: Callable[[GPTModel], None] | None = None


class MegatronTrOPDModel(ModelPT):
    """Student, teacher and objective over one topology, and the rollout engine that has the student's weights.

    Life cycle, called by the trainer alone: ``attach_rollouts``, ``prepare_for_training`` and ``send_weights`` once;
    ``prepare_for_inference``, ``infer``, ``finish_inference`` for rollouts; per step ``prepare_for_training_step``,
    ``get_loss_and_metrics``, ``finish_training_step``; ``prepare_for_validation_step``, ``get_divergences``,
    ``finish_validation_step``; ``finish_training`` at the end.

    Args:
        cfg: the ``model`` section of a run's configuration.
        trainer: a Lightning trainer that carries loggers, or None; it never runs a loop.
        calibration: the same batches on every data-parallel rank, on which FP8 teachers are admitted, each on its own.
        teachers: the names of those that are used: of model.teachers, or default.
        served: those of them that are behind servers, instead of on the ranks.

    Raises ConfigError if an FP8 teacher is too far from bf16, and ValueError if there are no batches to measure it on.
    """

    def __init__(
        self,
        cfg: DictConfig,
        trainer: Trainer | None = None,
        *,
        topology: Topology,
        objective: Objective,
        student: StudentSource,
        calibration: Sequence[TokenBatch] = (),
        teachers: Sequence[str] = (DEFAULT_TEACHER,),
        served: Mapping[str, ServedTeacher] | None = None,
    ) -> None:
        super().__init__(cfg=cfg, trainer=trainer)
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), _ours(cfg)))
        assert isinstance(settings, ModelConfig)
        self.settings = settings
        self.topology, self.objective, self.vocab_size = topology, objective, student.vocab_size
        self.dtype_of_run = DTYPES[student.precision]
        self.shape = read_shape(student.path)
        self.student = build_gpt(
            self.shape, topology, dtype=self.dtype_of_run, trainable=True, **recompute_fields(self.settings.recompute)
        )
        if student.fill is not None:
            student.fill(self.student)
        else:
            load_hf(self.student, student.path, self.shape, topology)
        self.ddp = data_parallel(self.student, topology, distributed_optimizer=self.settings.optim.distributed)
        scorer = partial(TeacherScorer, vocab_size=student.vocab_size, fill=student.fill)
        on_ranks = [name for name in teachers if name not in (served or {})]
        self.on_ranks = self._build_teachers(on_ranks, scorer, student.precision, calibration)
        self.teachers: dict[str, TeacherSharing | ServedTeacher] = {**self.on_ranks, **(served or {})}
        self.teacher_heads = self._teacher_heads()
        # G-OPD measures its reward from the student as it was before training.
        own = DTYPES[self.settings.teacher.precision or student.precision]
        self.reference = scorer(student.path, topology=topology, dtype=own) if objective.needs_reference else None
        self._rollouts: Rollouts | None = None
        self.weights_version = 0

    def _build_teachers(
        self,
        names: Sequence[str],
        scorer: Callable[..., TeacherScorer],
        precision: str,
        calibration: Sequence[TokenBatch],
    ) -> dict[str, TeacherSharing]:
        """The teachers by name; one for several names whose sections come to the same (collective)."""
        alike: dict[tuple[object, ...], list[str]] = {}
        for name in names:
            alike.setdefault(loaded_as(self.settings, name, precision), []).append(name)
        places: dict[int | None, Topology] = {}
        found: dict[str, TeacherSharing] = {}
        for together in alike.values():
            t = teacher_named(self.settings, together[0])
            degree = t.tensor_model_parallel_size
            place = places[degree] = places.get(degree) or self.topology.with_teacher(degree)
            make = partial(
                scorer,
                Path(t.path),
                topology=place.for_teacher(),
                dtype=DTYPES[t.precision or precision],
                offload=t.offload,
            )
            with about_teacher(together[0]):
                own = [batch for batch in calibration if batch.teacher in together]
                found |= dict.fromkeys(together, TeacherSharing(self._admitted(t, make, own), place))
        return {name: found[name] for name in names}

    def _teacher_heads(self) -> dict[str, Tensor]:
        """With an objective that sees distributions, on the last stage."""
        if not self.objective.needs_distributions or not self.topology.is_last_stage:
            return {}
        columns = head_weight(self.student).size(0)
        heads = {one: one.head_like(columns) for one in dict.fromkeys(self.on_ranks.values())}
        return {name: heads[one] for name, one in self.on_ranks.items()}

    @property
    def following(self) -> TeacherScorer | None:
        """The teacher that becomes the student every ``model.teacher.follow_steps`` steps."""
        follows = self.settings.teacher.follow_steps is not None and DEFAULT_TEACHER in self.on_ranks
        return self.on_ranks[DEFAULT_TEACHER].teacher if follows else None

    def follow(self, step: int) -> None:
        """Before the teacher scores step number ``step`` (collective)."""
        every, teacher = self.settings.teacher.follow_steps, self.following
        if teacher is not None and every and step and step % every == 0:
            teacher.become(self.student)
            self.teacher_changed()

    def teacher_changed(self) -> None:
        """After the weights of a teacher that follows were written to (collective)."""
        if self.following is not None:
            self.teacher_heads = self._teacher_heads()  # copies, if it is offloaded or split otherwise

    @property
    def teacher(self) -> TeacherScorer:
        """The only teacher on the ranks, or the first."""
        return next(iter(self.on_ranks.values())).teacher

    def _admitted(
        self, settings: TeacherConfig, make: Callable[..., TeacherScorer], calibration: Sequence[TokenBatch]
    ) -> TeacherScorer:
        """The teacher of the settings; one in FP8 only if it keeps the admission bounds (ConfigError; collective)."""
        fp8 = Fp8Settings.of(settings)
        if fp8 is None or not settings.admission.prompts:
            return make(fp8=fp8)
        if not calibration:
            remedy = "set model.teacher.admission.prompts=0 to skip the check"
            raise ValueError(f"an FP8 teacher needs calibration batches; {remedy}")
        teacher, found = admit(
            lambda recipe: make(fp8=recipe), fp8, calibration,
            lambda batches, scores: list(self._student_scores(batches, scores)), settings.admission,
            chunk_tokens=self.settings.tropd.chunk_tokens, temperature=self.settings.rollout.temperature,
            counts=self.topology.tensor_rank == 0 and self.topology.data_rank == 0,
        )  # fmt: skip
        if self.topology.is_leader:
            print(found.line(), flush=True)
        return teacher

    @torch.no_grad()
    def _student_scores(
        self,
        batches: Sequence[TokenBatch],
        scores: Sequence[TeacherScores | TeacherStates | None],
        reference: Sequence[Tensor | None] | None = None,
        *,
        entropy: bool = False,
    ) -> Iterator[TokenScores | None]:
        """The student beside the teacher's ``scores`` of each batch; None except on the last stage."""
        hidden = pipeline_forward(self.student, batches, self.topology)
        reference = reference or [None] * len(batches)
        for batch, teacher, ref, states in zip(batches, scores, reference, hidden, strict=True):
            if states is None or not isinstance(teacher, TeacherScores):
                yield None
                continue
            tokens, weight, layout = batch.loss_tokens(), head_weight(self.student), self._layout()
            yield score_tokens(
                states, weight, tokens, teacher, layout, entropy=entropy, reference_log_probs=ref, carry_bad=True
            )

    def attach_rollouts(self, rollouts: Rollouts) -> None:
        """Give the model its rollout engine; whoever made it closes it."""
        self._rollouts = rollouts

    @property
    def rollouts(self) -> Rollouts:
        """The rollout engine; RuntimeError before ``attach_rollouts``."""
        if self._rollouts is None:
            raise RuntimeError("the model has no rollout engine: call attach_rollouts() first")
        return self._rollouts

    def send_weights(self, version: int) -> None:
        """Number the student's weights ``version`` and send them to the engine (collective; EngineError)."""
        self.weights_version = version
        self.rollouts.refresh(version)

    def export_stream(self) -> Iterator[tuple[str, Tensor]]:
        """The student's weights under Hugging Face names; every rank must exhaust it, rank 0 gets the tensors."""
        return hf_stream(self.student, self.shape, self.topology)

    def leader_stream(self) -> Iterator[tuple[str, Tensor]]:
        """The student's weights, left on their device, on rank 0, for engines elsewhere; every rank must exhaust it."""
        return leader_stream(self.student, self.shape, self.topology)

    def device_stream(self) -> Iterator[tuple[str, Tensor]]:
        """The student's weights, left on their device, on every rank, for an engine in this process (see convert)."""
        return device_stream(self.student, self.shape, self.topology)

    def prepare_for_inference(self) -> None:
        """Before rollouts."""
        self.student.eval()

    def infer(
        self, requests: Sequence[RolloutRequest] | None, finished: FinishedTogether | None = None
    ) -> list[Rollout]:
        """Rollouts of ``requests`` (rank 0's; None elsewhere) by the student's current weights, on every rank, that are
        given to ``finished`` before (see ``Rollouts.generate``). Collective. Raises EngineError if the engine fails, or
        has other weights than the last ones sent."""
        return self.rollouts.generate(requests, self.weights_version, finished)

    def finish_inference(self) -> None:
        """After rollouts: the engine leaves the device's memory to teacher and student."""
        self.rollouts.sleep()
        self.student.train()

    def prepare_for_training(self) -> None:
        """Once, before the first step."""
        self.student.train()

    def prepare_for_training_step(self) -> None:
        """Before the passes of a step. Clearing gradients is left to the optimizer (``StudentOptimizer.zero_grad``)."""
        self.student.train()

    def finish_training_step(self, version: int) -> None:
        """After the optimizer's step: :meth:`send_weights`."""
        self.send_weights(version)

    def finish_training(self) -> None:
        """Once, after the last step."""
        self.student.eval()

    def score(self, batches: Sequence[TokenBatch]) -> Sequence[TeacherScores | TeacherStates | None]:
        """The teacher's scores of every micro-batch (None except on the last pipeline stage), at the temperature of the
        rollouts: with equal logits, student and teacher are equal. Its hidden states, if the objective sees
        distributions: its head then goes along with the student's."""
        found: list[TeacherScores | TeacherStates | None] = [None] * len(batches)
        for teacher, places in self.by_teacher(batches):
            for i, scores in zip(places, self.score_by(teacher, [batches[i] for i in places]), strict=True):
                found[i] = scores
        return found

    def score_by(
        self, teacher: TeacherSharing | ServedTeacher, batches: Sequence[TokenBatch]
    ) -> Sequence[TeacherScores | TeacherStates | None]:
        """As :meth:`score`, of one of the teachers."""
        if self.objective.needs_distributions:
            assert isinstance(teacher, TeacherSharing)  # the plan has seen to it
            return teacher.states(batches, on_host=self.settings.teacher.offload_states)
        tropd, entropy = self.settings.tropd, self.objective.needs_teacher_entropy
        return teacher.score(
            batches, top_k=tropd.top_k, entropy=entropy, chunk_tokens=tropd.chunk_tokens,
            temperature=self.settings.rollout.temperature,
        )  # fmt: skip

    def by_teacher(self, batches: Sequence[TokenBatch]) -> Iterator[tuple[TeacherSharing | ServedTeacher, list[int]]]:
        """Each teacher that has any of the micro-batches, and which: on every rank the same number."""
        for teacher in dict.fromkeys(self.teachers.values()):
            if places := [i for i, batch in enumerate(batches) if self.teachers[batch.teacher] is teacher]:
                yield teacher, places

    def get_loss_and_metrics(
        self,
        batches: Sequence[TokenBatch],
        scores: Sequence[TeacherScores | TeacherStates | None],
        *,
        step: int,
        loss_tokens: int,
        sequences: int,
        keep_tokens: bool = False,
    ) -> tuple[float, MetricSums]:
        """Forward and backward passes of all micro-batches, see ``StudentPass`` for the options.

        ``batches`` are the same number on every rank, possibly empty ones; ``scores`` come from :meth:`score`. Returns
        this rank's share of the loss, and its sums of the objective's metrics (0 and empty except on the last stage).
        """
        objective = self.objective.at_step(step)
        reference = self._reference_scores(batches)
        if objective.needs_first_pass:
            objective = objective.bind(self._statistics(objective, batches, scores, reference), loss_tokens)
        layout = self._layout()
        top_k = self.settings.tropd.top_k if getattr(objective, "needs_top_k", False) else 1
        kept = self.settings.validation.kept_rollouts if keep_tokens else 0
        step_pass = StudentPass(
            self.ddp, self.topology, objective, loss_tokens, sequences, layout, kept, self.teacher_heads, top_k
        )
        sums = step_pass.run(batches, scores, reference)
        return sums.sums.get("loss", 0.0), sums

    def _layout(self) -> HeadLayout:
        topology, chunk_tokens, r = self.topology, self.settings.tropd.chunk_tokens, self.settings.rollout
        sampling = Sampling(r.temperature, r.top_p, r.top_k)
        return HeadLayout(self.vocab_size, topology.tensor_group, topology.sequence_parallel, chunk_tokens, sampling)

    def _reference_scores(self, batches: Sequence[TokenBatch]) -> list[Tensor | None]:
        if self.reference is None:
            return [None] * len(batches)
        chunk_tokens, temperature = self.settings.tropd.chunk_tokens, self.settings.rollout.temperature
        scored = self.reference.score(
            batches, top_k=1, entropy=False, chunk_tokens=chunk_tokens, temperature=temperature
        )
        return [s.log_probs if s is not None else None for s in scored]

    def _statistics(
        self,
        objective: Objective,
        batches: Sequence[TokenBatch],
        scores: Sequence[TeacherScores | TeacherStates | None],
        reference: Sequence[Tensor | None],
    ) -> Tensor:
        """The objective's statistic of the global batch's loss tokens to which it applies, the same on every rank."""
        seen = self._student_scores(batches, scores, reference, entropy=objective.needs_student_entropy)
        own = [objective.statistic(s)[objective.applies(s)].cpu() for s in seen if s is not None]
        mine = torch.cat(own) if own and self.topology.tensor_rank == 0 else torch.empty(0)
        return torch.cat(self.topology.gather_objects(mine)).to(self.topology.device)

    def prepare_for_validation_step(self) -> None:
        """Before :meth:`get_divergences`."""
        self.student.eval()

    def finish_validation_step(self) -> None:
        """After :meth:`get_divergences`."""
        self.student.train()

    @torch.no_grad()
    def get_divergences(self, batches: Sequence[TokenBatch]) -> MetricSums:
        """Sums over loss tokens of the exact divergences of student and teacher over the full true vocabulary. They
        compare models, not samples: at temperature 1, whatever the rollouts have."""
        sums, hidden = DeviceSums(), pipeline_forward(self.student, batches, self.topology)
        head = head_weight(self.student) if self.topology.is_last_stage else None
        for teacher, places in self.by_teacher(batches):
            own = [batches[i] for i in places]
            found = teacher.divergences(own, [hidden[i] for i in places], head, self._layout())
            for batch, values in zip(own, found, strict=True):
                if values is not None and self.topology.tensor_rank == 0:
                    sums.add({**{k: v.double().sum() for k, v in values.items()}, "tokens": batch.loss_mask.sum()})
                    sums.by_group(batch, {**values, "tokens": torch.ones_like(values["top1_agreement"])})
        return sums.collect()

    def setup_training_data(self, train_data_config: DictConfig | dict) -> None:
        """Data comes from rollouts of nemo_tropd.data; there is no data loader to set up."""

    def setup_validation_data(self, val_data_config: DictConfig | dict) -> None:
        """See :meth:`setup_training_data`."""

    @classmethod
    def list_available_models(cls) -> list[Any]:
        """No pretrained archives: students come from Hugging Face checkpoints."""
        return []


def _ours(cfg: DictConfig) -> dict[str, Any]:
    """The section without the two keys that ModelPT adds."""
    section = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(section, dict)
    return {str(k): v for k, v in section.items() if k not in ("target", "nemo_version")}
