"""Files, folders and data sets as people have them: each gives its records, or says by name why not."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nemo_tropd.data import PromptError, read_records

pytestmark = pytest.mark.random

Record = dict[str, Any]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n"


def zstd(data: bytes) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


def lines(records: Sequence[Record]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def array(records: Sequence[Record]) -> bytes:
    return json.dumps(records, indent=random.choice([None, 2]), ensure_ascii=False).encode()


def parquet(records: Sequence[Record], path: Path) -> None:
    import pyarrow
    from pyarrow import parquet as format_

    format_.write_table(pyarrow.Table.from_pylist(records), path)


WRITERS: dict[str, Callable[[Sequence[Record], Path], object]] = {
    ".jsonl": lambda r, p: p.write_bytes(lines(r)),
    ".ndjson": lambda r, p: p.write_bytes(b"\xef\xbb\xbf\n" + lines(r).replace(b"\n", b"\r\n\r\n")),
    ".json": lambda r, p: p.write_bytes(random.choice([lines, array])(r)),
    ".jsonl.gz": lambda r, p: p.write_bytes(gzip.compress(lines(r[:1])) + gzip.compress(lines(r[1:]))),
    ".json.gz": lambda r, p: p.write_bytes(gzip.compress(array(r))),
    ".jsonl.zst": lambda r, p: p.write_bytes(zstd(lines(r))),
    ".JSON.zstd": lambda r, p: p.write_bytes(zstd(b"\xef\xbb\xbf \n" + array(r))),
    ".parquet": parquet,
}


def made(count: int) -> list[Record]:
    return [{"prompt": f"what is {random.getrandbits(40)}?\n“é” ] [ }} 你", "id": str(i)} for i in range(count)]


def read(path: object, **settings: str) -> list[Record]:
    return [record for record, _ in read_records(str(path), **settings)]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_set_split_over_any_files_gives_the_same_records_in_order(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = made(random.randrange(3, 30))
    WRITERS[kind](records, tmp_path / f"all{kind}")
    assert read(tmp_path / f"all{kind}") == records
    cuts = sorted(random.sample(range(1, len(records)), 2))
    folder = tmp_path / ".cache" / "clone [v1]"
    for i, part in enumerate((records[: cuts[0]], records[cuts[0] : cuts[1]], records[cuts[1] :])):
        folder.mkdir(parents=True, exist_ok=True)
        WRITERS[kind](part, folder / f"part-{i}{kind}")
    (folder / ".git").mkdir()
    (folder / ".git" / "x.json").write_text("{}")
    for name in ("README.md", "LICENSE", "_SUCCESS", "notes.py"):
        (folder / name).write_text("---\nlicense: mit\n---\n")
    assert read(folder) == records
    assert read(f"{tmp_path}/.cache/clone [[]v1]/part-*{kind}") == records
    monkeypatch.chdir(folder)
    assert read(f"./*{kind}") == read(".") == read("../clone [v1]") == records


def test_each_record_says_where_it_is_from(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n\n{"a": 2}\n')
    (tmp_path / "b.json").write_text('[\n {"a": 3},\n {"a": 4},\n]\n')
    assert [w for _, w in read_records(tmp_path / "a.jsonl")] == [f"{tmp_path}/a.jsonl, line {n}" for n in (2, 4)]
    assert [w for _, w in read_records(tmp_path / "b.json")] == [f"{tmp_path}/b.json, record {n}" for n in (1, 2)]
    parquet([{"a": 5}], tmp_path / "c.parquet")
    assert [w for _, w in read_records(tmp_path / "c.parquet")] == [f"{tmp_path}/c.parquet, row 1"]


def clone(folder: Path, files: dict[str, list[Record]], readme: str = "") -> Path:
    for name, records in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS["." + name.partition(".")[2]](records, path)
    if readme:
        (folder / "README.md").write_text(f"---\n{readme}\n---\n# A data set\n")
    return folder


def test_a_clone_of_a_hub_data_set_is_read_by_its_splits(tmp_path: Path) -> None:
    a, b, c = made(4), made(3), made(2)
    numbered = clone(
        tmp_path / "numbered",
        {
            "data/train-00001-of-00002.parquet": b,
            "data/train-00000-of-00002.parquet": a,
            "data/test-00000-of-00001.parquet": c,
        },
    )
    assert read(numbered) == a + b and read(numbered, split="test") == c
    named = clone(tmp_path / "named", {"train.jsonl": a, "valid.jsonl": b, "sub/test_1.jsonl": c})
    assert (read(named), read(named, split="validation"), read(named, split="test")) == (a, b, c)
    folders = clone(tmp_path / "folders", {"train/0.jsonl.gz": a, "train/1.jsonl.gz": b, "test/0.jsonl.gz": c})
    assert read(folders) == a + b and read(folders, split="test") == c
    with pytest.raises(PromptError, match=r"has no split 'dev'; it has train, test"):
        read(numbered, split="dev")


def test_a_clones_readme_names_configurations(tmp_path: Path) -> None:
    a, b, c = made(2), made(3), made(4)
    readme = (
        "configs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/*\n  - split: extra\n"
        "    path:\n    - more/x.jsonl\n    - more/y.jsonl\n- config_name: socratic\n  data_dir: socratic\n"
    )
    files = {"main/a.jsonl": a, "more/x.jsonl": b, "more/y.jsonl": c, "socratic/train.jsonl": c}
    folder = clone(tmp_path / "several", files, readme)
    with pytest.raises(PromptError, match=rf"several has 2 configs: choose one of them, such as {folder}:main"):
        read(folder)
    assert read(f"{folder}:main") == a and read(f"{folder}:main", split="extra") == b + c
    assert read(f"{folder}:socratic") == c
    with pytest.raises(PromptError, match=r"no config 'mian'; it has main, socratic"):
        read(f"{folder}:mian")
    one = clone(tmp_path / "one", files, readme.replace("- config_name: soc", "  default: true\n- config_name: soc"))
    assert read(one) == a


def test_a_data_set_saved_by_datasets_keeps_its_own_way(tmp_path: Path) -> None:
    import datasets

    a, b = made(1500), made(2)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(a), "test": datasets.Dataset.from_list(b)}).save_to_disk(
        str(tmp_path / "both")
    )
    assert read(tmp_path / "both") == a and read(tmp_path / "both", split="test") == b


def test_the_files_that_are_read_are_counted(tmp_path: Path) -> None:
    from nemo_tropd.data.sources import open_records

    folder = clone(tmp_path / "c", {"train_1.jsonl": made(1), "train_2.jsonl": made(1), "other.jsonl": made(1)})
    assert open_records(folder)[1] == f"2 of 3 files of {folder}, split 'train'"
    assert open_records(f"{folder}/*.jsonl")[1] == f"3 files of {folder}/*.jsonl"
    assert open_records(folder / "other.jsonl")[1] == ""


DEEP = "[" * 100_000
BAD: dict[str, tuple[str, bytes, str]] = {
    "csv": ("p.csv", b"prompt\nhi\n", r"p\.csv: \.csv files are not read.*pandas\.read_csv\('p\.csv'\)\.to_json\("),
    "tsv": ("p.tsv", b"a\tb\n", r"\.tsv files are not read"),
    "csv, compressed": ("p.csv.gz", gzip.compress(b"a,b\n"), r"\.csv files are not read"),
    "arrow": ("data-00000-of-00001.arrow", b"ARROW1", r"give the folder that datasets\.save_to_disk wrote"),
    "text": ("p.txt", b"hi\n", r"unsupported file type '\.txt'; supported: \.jsonl"),
    "no suffix": ("prompts", b"{}\n", r"unsupported file type ''"),
    "zip": ("p.zip", b"PK", r"unsupported file type '\.zip'"),
    "compressed Parquet": ("p.parquet.gz", gzip.compress(b"PAR1"), r"Parquet is compressed within; unpack the \.gz"),
    "pointer, JSON": ("p.jsonl", POINTER, r"p\.jsonl is a Git LFS pointer.*git lfs pull"),
    "pointer, Parquet": ("p.parquet", POINTER, r"p\.parquet is a Git LFS pointer.*git lfs pull"),
    "pointer, gz": ("p.json.gz", POINTER, r"p\.json\.gz is a Git LFS pointer"),
    "no gzip": ("p.jsonl.gz", b'{"prompt": "a"}\n', r"p\.jsonl\.gz cannot be read: .*gzip"),
    "cut gzip": ("p.jsonl.gz", gzip.compress(lines(made(200)))[:-9], r"p\.jsonl\.gz cannot be read: .*end-of-stream"),
    "no zstd": ("p.jsonl.zst", b'{"prompt": "a"}\n', r"p\.jsonl\.zst cannot be read"),
    "cut zstd": ("p.jsonl.zst", zstd(lines(made(200)))[:-9], r"p\.jsonl\.zst cannot be read"),
    "cut line": ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b', r"p\.jsonl, line 2: not JSON \(.* at column"),
    "pretty object": ("p.json", b'{\n "prompt": "a"\n}\n', r"line 1: not JSON .*one record per line, or one array"),
    "cut array": ("p.json", b'[{"prompt": "a"},\n {"prompt": "b"', r"p\.json, record 2: not JSON \(.* in line 2\)"),
    "open array": ("p.json", b'[{"prompt": "a"},\n', r"record 2: not JSON"),
    "array of strings": ("p.json", b'["a"]', r"record 1: an entry must be a JSON object, got str"),
    "two arrays": ("p.json", b'[{"a": 1}]\n[{"a": 2}]\n', r"more follows the end of its array \(record 1\)"),
    "list in lines": ("p.jsonl", b'{"a": 1}\n[1]\n', r"line 2: a line must be a JSON object, got list"),
    "number": ("p.jsonl", b"5\n", r"line 1: a line must be a JSON object, got int"),
    "latin-1": ("p.jsonl", '{"prompt": "é"}\n'.encode("latin-1"), r"line 1: not UTF-8"),
    "latin-1 array": ("p.json", '[{"prompt": "é"}]'.encode("latin-1"), r"p\.json: not UTF-8"),
    "UTF-16": ("p.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), r"line 1: not UTF-8"),
    "deep": ("p.jsonl", b'{"a": ' + DEEP.encode(), r"line 1: not JSON that can be read"),
    "deep array": ("p.json", DEEP.encode(), r"record 1: not JSON that can be read"),
    "long number": ("p.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n", r"line 1: not JSON that can be read: .*digits"),
    "long number in an array": ("p.json", b"[" + b"9" * 5000 + b"]", r"record 1: not JSON that can be read"),
    "no Parquet": ("p.parquet", b"PAR1 nonsense", r"p\.parquet is not a readable Parquet file"),
    "empty Parquet": ("p.parquet", b"", r"p\.parquet is not a readable Parquet file"),
    "gzip by another name": ("p.jsonl", gzip.compress(b"{}\n"), r"p\.jsonl is packed by gzip: name it p\.jsonl\.gz"),
    "zstd by another name": ("p.json", zstd(b"{}\n"), r"p\.json is packed by zstd: name it p\.json\.zst"),
    "Parquet by another name": ("p.jsonl", b"PAR1 and more", r"p\.jsonl is Parquet: name it p\.parquet"),
    "web page": ("p.jsonl", b"<!DOCTYPE html>\n", r"line 1: not JSON .*<!DOCTYPE html>"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    file, content, message = BAD[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(PromptError, match=message) as caught:
        read(tmp_path / file)
    assert file in str(caught.value) and len(str(caught.value)) < 900


def test_a_bad_folder_is_refused_by_name(tmp_path: Path) -> None:
    def folder(name: str, **files: bytes) -> Path:
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file.replace("__", ".")).write_bytes(content)
        return tmp_path / name

    cases = {
        folder("empty"): r"empty is a folder, but not .*; it holds nothing",
        folder("weights", model__safetensors=b"", config__json=b"{}"): r"it holds config\.json, model\.safetensors",
        folder("many", **{f"f{i}__py": b"" for i in range(9)}): r"it holds f0\.py, .*f4\.py and 4 more",
        folder(
            "mixed", a__jsonl=b"{}", b__parquet=b""
        ): r"several kinds: \.jsonl \(a\.jsonl\), \.parquet \(b\.parquet\)",
        folder("twice", a__jsonl=b"{}", a__jsonl__gz=b""): r"several kinds: .*may be the same ones twice",
        folder("tables", a__csv=b""): r"a\.csv: \.csv files are not read",
        folder("unfinished", state__json=b"{}"): r"not a complete data set of datasets\.save_to_disk",
        folder(
            "card", README__md=b"---\nconfigs: [3]\n---\n", a__jsonl=b"{}"
        ): r"README\.md: its configs cannot be read",
        folder("yaml", README__md=b"---\na: [\n---\n", a__jsonl=b"{}"): r"README\.md: its configs cannot be read",
        folder("pointers", a__parquet=POINTER): r"a\.parquet is a Git LFS pointer",
    }
    cases[folder("tested", test__jsonl=b'{"prompt": "a"}')] = r"tested has no split 'train'; it has test$"
    for path, message in cases.items():
        with pytest.raises(PromptError, match=message):
            read(path)
    with pytest.raises(PromptError, match=r"no config 'x'; it has none"):
        read(f"{tmp_path / 'mixed'}:x")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}/none-*.jsonl", r"none-\*\.jsonl: nothing matches this pattern"),
        ("{}/a.jsonl,{}/b.jsonl", r"several files: a glob, a folder or model\.data\.sources"),
        ("https://example.org/a.jsonl", r"is an address: download it"),
        ("hf://datasets/a/b", r"is an address: download it"),
        ("{}/absent.json.gz", r"no prompt file at"),
        ("a.jsonl", r"no prompt file at"),
        ("{}/absent:main", r"no prompt file at"),
        ("/dev/null", r"no prompt file at"),
        ("{}/broken.jsonl", r"no prompt file at"),
        ("~no-such-user/p.jsonl", r"no prompt file at .*~no-such-user"),
        ("{}/" + "a" * 256 + ".jsonl", r"cannot be looked at \(File name too long\): give a path"),
        ("/" + "abc/" * 1200, r"cannot be looked at \(File name too long\)"),
        ("{}/" + "a" * 256 + "/*.jsonl", r"(cannot be looked at|nothing matches)"),
        ("{}/loop/p.jsonl", r"no prompt file at"),
    ],
)
def test_a_path_to_nothing_is_refused_by_name(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(PromptError, match=message):
        read(path.replace("{}", str(tmp_path)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("{}")
    (tmp_path / "p.jsonl").chmod(0)
    with pytest.raises(PromptError, match=r"p\.jsonl cannot be read: .*Permission"):
        read(tmp_path / "p.jsonl")


def test_a_folder_that_may_not_be_entered_is_named(tmp_path: Path) -> None:
    clone(tmp_path / "closed", {"a.jsonl": made(1)})
    (tmp_path / "closed").chmod(0)
    user = os.geteuid()
    try:
        os.seteuid(65534 if user == 0 else user)
        for path in (tmp_path / "closed", tmp_path / "closed" / "a.jsonl", f"{tmp_path}/closed/*.jsonl"):
            with pytest.raises(
                PromptError, match=r"closed.* (cannot be looked at \(Permission denied\)|nothing matches)"
            ):
                read(path)
    finally:
        os.seteuid(user)
        (tmp_path / "closed").chmod(0o700)
