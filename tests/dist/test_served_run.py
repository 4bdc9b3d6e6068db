"""Runs whose teacher is behind a server: the same steps as with the teacher on the ranks, and other weights noticed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_tropd.batch import Rollout, TokenBatch
from nemo_tropd.config import ConfigError
from nemo_tropd.config_teacher import ServerConfig
from nemo_tropd.data import load_tokenizer
from nemo_tropd.served.answers import Vocabulary
from nemo_tropd.served.client import VARIABLE, ServerError, Servers
from nemo_tropd.training.plan import make_plan, print_plan
from nemo_tropd.training.run import EXPECTED, train
from tests.dist.run_distributed import run_distributed
from tests.doubles import replay_engines
from tests.e2e.compose import compose_config
from tests.e2e.tiny_run import TinyRun, train_lines
from tests.fake_vllm import FakeVllm, of_checkpoint, serving, toy

ROWS, TOKEN = 131, "sesame-0b51"


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    return [x for x in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if x["kind"] == kind]


@pytest.mark.timeout(300)
def test_a_run_with_its_teacher_behind_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Losses, validation, resume, and a server that comes back with other weights."""
    tiny = TinyRun.make(tmp_path)
    fake = FakeVllm(of_checkpoint(tiny.teacher), ROWS, tokenizer_of(tiny.teacher), max_model_len=97)
    fake.name, fake.api_key = str(tiny.teacher), TOKEN
    monkeypatch.setenv(VARIABLE, TOKEN)
    same: dict[str, object] = {"model.tropd.guidance.enabled": False}

    def run(name: str, steps: int, **keys: object) -> Any:
        keys |= {"trainer.tropd.max_steps": steps, "model.teacher.server.give_up_s": 3}
        return train(compose_config(tiny.overrides(tmp_path / name, **same, **keys)), replay_engines(ROWS))

    with serving(fake) as url, serving(fake) as other:
        run("own", 3)
        run("served", 2, **{"model.teacher.url": f"{url}/v1/"})
        run("served", 3, **{"model.teacher.url": f"[{other},{url}]"})  # where it is may change
        own, served = train_lines(tmp_path / "own"), train_lines(tmp_path / "served")
        for key in ("loss", "grad_norm", "trust_fraction", "log_ratio_mean", "outlier_forward_kl"):
            assert [x[key] for x in served] == pytest.approx([x[key] for x in own], abs=1e-4), key
        exact, sampled = ({x["step"]: x for x in lines(tmp_path / name, "validation")} for name in ("own", "served"))
        assert sampled.keys() == {0, 2, 3} and not {"reverse_kl", "teacher_entropy"} & sampled[0].keys()
        assert sampled[0]["student_entropy"] == pytest.approx(exact[0]["student_entropy"], abs=1e-4)
        assert all(0 <= sampled[0][name] for name in ("one_minus_tv_sampled", "top1_agreement"))
        assert "reverse KL (sampled)" in (said := capfd.readouterr().out) and "teacher's server" in said
        assert "Reverse KL, sampled" in (tmp_path / "served" / "report.html").read_text(encoding="utf-8")

        fake.model = toy(ROWS)
        with pytest.raises(ConfigError, match=r"from those of the teacher that this run began with") as refused:
            run("served", 4, **{"model.teacher.url": url})
        assert refused.value.key == "model.teacher.url"
        with pytest.raises(ConfigError, match=r"model.teacher.path.*the run's checkpoint was made with .*of a server"):
            run("served", 4)
        run("served", 4, **{"model.teacher.url": url, "trainer.tropd.accept_changes": "[model.teacher.path]"})

        asked = len(fake.asked)

        def change_at_step_2(path: str, body: dict[str, Any], answer: Any) -> Any:
            if len(fake.asked) > asked + 45:
                fake.model = toy(ROWS, 1)
            return answer

        fake.fault = change_at_step_2
        with pytest.raises(EXPECTED, match="has another teacher than before step 1") as ended:
            run("served", 40, **{"model.teacher.url": url})
        assert isinstance(ended.value, ServerError)
        fake.fault, fake.model = (lambda path, body, answer: answer), toy(ROWS)
        before = len(train_lines(tmp_path / "served"))
        assert 4 < before < 40
        run("served", before + 1, **{"model.teacher.url": url})
    text = "".join(p.read_text(errors="replace") for p in (tmp_path / "served").rglob("*") if p.is_file())
    assert TOKEN not in text + str(ended.value) + capfd.readouterr().out


@pytest.mark.timeout(300)
def test_one_teacher_behind_a_server_and_one_on_the_ranks(tmp_path: Path) -> None:
    """By name and by prompt, the same losses as with both on the ranks; weights of the one behind it need not be here."""
    tiny = TinyRun.make(tmp_path)
    records = [json.loads(line) for line in tiny.prompts.read_text().splitlines()]
    named = [{**r, "of": ("default", "code")[i % 2]} for i, r in enumerate(records)]
    tiny.prompts.write_text("".join(json.dumps(r) + "\n" for r in named))
    alone = tmp_path / "config_alone" / "student"
    shutil.copytree(tiny.student, alone, ignore=shutil.ignore_patterns("*.safetensors"))
    fake = FakeVllm(of_checkpoint(tiny.student), ROWS, tokenizer_of(tiny.student), max_model_len=97)
    fake.name = str(tiny.student)

    def run(name: str, path: Path, **code: object) -> list[dict[str, Any]]:
        keys: dict[str, object] = {
            "model.tropd.guidance.enabled": False,
            "model.data.teacher_key": "of",
            "model.data.held_out": 12,
            "model.global_batch_size": 8,
            "trainer.tropd.max_steps": 2,
            "model.teacher.server.give_up_s": 60,
            "+model.teachers.code.path": path,
            **{f"+model.teachers.code.{key}": value for key, value in code.items()},
        }
        train(compose_config(tiny.overrides(tmp_path / name, **keys)), replay_engines(ROWS))
        return train_lines(tmp_path / name)

    with serving(fake) as url:
        own, served = run("own", tiny.student), run("served", alone, url=f"'{url}'")
    for key in ("loss", "teacher/code/log_ratio_mean", "teacher/default/log_ratio_mean"):
        assert [x[key] for x in served] == pytest.approx([x[key] for x in own], abs=1e-4), key
    exact, both = lines(tmp_path / "own", "validation")[0], lines(tmp_path / "served", "validation")[0]
    assert both["teacher/default/reverse_kl"] == pytest.approx(exact["teacher/default/reverse_kl"], abs=1e-5)
    assert both["reverse_kl"] == pytest.approx(exact["teacher/default/reverse_kl"], abs=1e-5)
    assert both["teacher/code/reverse_kl_sampled"] == pytest.approx(both["reverse_kl_sampled"], abs=1e-6)
    assert both["reverse_kl_sampled"] == pytest.approx(0, abs=1e-4)  # the student's own weights
    assert "teacher/code/reverse_kl" not in both and both["student_entropy"] == pytest.approx(exact["student_entropy"])


def test_the_plan_of_a_teacher_behind_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It takes no memory, needs no weights here, and is not contacted; what servers cannot give is refused."""
    tiny = TinyRun.make(tmp_path)
    for weights in tiny.teacher.glob("*.safetensors"):
        weights.unlink()

    def settings(**keys: object) -> Any:
        asked: dict[str, object] = {"model.teacher.url": "http://nowhere:1", "model.teacher.server.give_up_s": 60}
        return compose_config(tiny.overrides(tmp_path / "run", **asked, **keys))

    plan = make_plan(settings())
    assert "teacher" not in plan.memory.resident and plan.memory.phases["teacher scores"].keys() == {
        "servers' answers",
        "scores that move",
    }
    assert [t.engines for t in plan.teachers] == [None] and plan.teachers[0].wanted
    print_plan(settings(), plan)
    assert "on http://nowhere:1: tried before step 1, not by check_only" in re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    for objective in ("tropd_exact", "eopd"):
        with pytest.raises(ConfigError, match="servers give candidates alone: choose a sampled objective"):
            make_plan(settings(**{"model.tropd.objective": objective}))


def tokenizer_of(folder: Path) -> Any:
    tokenizer = load_tokenizer(folder, "teacher")
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def score_on_shards(rank: int, world_size: int, url: str) -> tuple[Any, ...]:
    """Scores of batches on a tensor-parallel rank; then of a server that refuses."""
    from nemo_tropd.parallel.topology import Topology
    from nemo_tropd.served.teacher import ServedTeacher

    topology = Topology.start(tensor_parallel=world_size)
    servers = Servers([url], ServerConfig(give_up_s=1))
    servers.model = "teacher"
    teacher = ServedTeacher(servers, topology, Vocabulary(ROWS - 3, ROWS), "")
    rollouts = [Rollout([1, 2 + i], [5] * i, [6, 7, 8 + i], [-1.0] * 3, 0, i, i, True) for i in range(5)]
    parts = [TokenBatch.pack(rollouts[:2], pad_id=0, seed=0, step=0), TokenBatch.pack([], pad_id=0, seed=0, step=0)]
    parts.append(TokenBatch.concatenate(rollouts[2:], pad_id=0, seed=0, step=0))
    scores = teacher.score(parts, top_k=4)
    servers.model = "absent"
    try:
        teacher.score(parts, top_k=4)
    except ServerError as error:
        return scores, str(error)
    raise AssertionError("a refusal on one rank is raised on every rank")


@pytest.mark.timeout(200)
def test_one_rank_asks_and_all_of_its_group_have_the_scores() -> None:
    fake = FakeVllm(toy(ROWS), ROWS, lambda text: [1])
    with serving(fake) as url:
        (first, refused), (second, too) = run_distributed(score_on_shards, 2, url)
    assert len(fake.asked) == 5 and refused == too and "`absent` does not exist" in refused
    assert [s.log_probs.tolist() for s in first] == [s.log_probs.tolist() for s in second]
    assert [list(s.top_k_ids.shape) for s in second] == [[7, 4], [0, 4], [18, 4]]
    ids = [1, 3, 5, 6, 7, 9]
    expected = fake.model(ids)[1:-1]
    chosen = [row[token] for row, token in zip(expected, ids[2:], strict=True)]
    found = second[0].log_probs.tolist()[-4:]
    assert found == pytest.approx(chosen, abs=0.3) and second[0].top_k_ids.max() < ROWS - 3
