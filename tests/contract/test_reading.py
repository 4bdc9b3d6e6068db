"""The list of the second reading: each text is where it says, in our file and in the pinned wheel's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract import reading
from tests.contract.wheels import NoIndex

FEWEST = 120
GOOD = """
[[entry]]
ours = "ours.py"
line = "x = 1"
relies = "x is one, else y is wrong"
wheel = "vllm"
file = "vllm/a.py"
text = '''
if a:
    b()
'''
"""


def _wrong(number: Callable[[reading.Entry], int]) -> list[str]:
    found = []
    for entry in reading.everything():
        try:
            number(entry)
        except reading.ReadingError as error:
            found.append(str(error))
    return found


def test_each_of_our_lines_is_where_the_list_says() -> None:
    assert _wrong(reading.Entry.our_line) == []


def test_each_line_of_a_wheel_is_where_the_list_says() -> None:
    try:
        assert _wrong(reading.Entry.wheel_line) == []
        assert "\n".join(reading.page()).count("- line ") == len(reading.everything())
    except NoIndex as reason:
        pytest.skip(str(reason))


def test_the_list_is_long_enough_and_says_nothing_twice() -> None:
    every = reading.everything()
    assert len(every) >= FEWEST
    assert len({(e.ours, e.line, e.file, e.text) for e in every}) == len(every)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("relies", "relies_on", "entry 1: unknown or missing relies, relies_on"),
        ('line = "x = 1"', 'line = " "', "entry 1: no text in line"),
        ('"vllm"', '"numpy"', "wheel = numpy: choose one of megatron-core"),
        ("line = ", 'number = "7"\nline = ', "unknown or missing number"),
    ],
)
def test_an_entry_that_does_not_say_what_it_must_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "list.toml"
    file.write_text(GOOD.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(reading.ReadingError, match=message):
        reading.entries(file)


@pytest.mark.parametrize(
    ("content", "message"), [("y = 2\n", "0 times"), ("x = 1\nx = 1\n", "2 times"), (None, "no such file")]
)
def test_a_text_that_is_not_there_once_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, message: str
) -> None:
    file = tmp_path / "list.toml"
    file.write_text(GOOD, encoding="utf-8")
    monkeypatch.setattr(reading, "ROOT", tmp_path)
    if content is not None:
        (tmp_path / "ours.py").write_text(content, encoding="utf-8")
    with pytest.raises(reading.ReadingError, match=f"ours.py: .*{message}"):
        reading.entries(file)[0].our_line()
    (tmp_path / "ours.py").write_text("\n\nx = 1\n", encoding="utf-8")
    assert reading.entries(file)[0].our_line() == 3
