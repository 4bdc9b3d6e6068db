"""The code in a response: blocks between fences as models write them, and functions without fences amid prose."""

import re
from typing import NamedTuple

# three or more backticks or tildes, and what follows on the line
_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([^`]*)$")
_LANGUAGE = re.compile(r"(?i)py(?:thon)?3?\b")


class Block(NamedTuple):
    """``closed``: it has its second fence. ``first``: nothing is said before it."""

    text: str
    closed: bool
    first: bool


def blocks(response: str) -> list[Block]:
    """All blocks of a response, in order, each without the indentation of its fence.

    A block also ends at a fence right behind its last line of code, or with a remark behind it; and one that was not
    closed at the fence of the next Python block, or at the end.
    """
    found: list[Block] = []
    lines: list[str] | None = None  # of the block that is open
    indent, fence, first, said = 0, "", False, False
    for line in response.replace("\r\n", "\n").split("\n"):
        match = _FENCE.match(line)
        if lines is not None:
            behind = line.rstrip()
            ends = match is not None and match.group(2).startswith(fence)
            if match and ends and _LANGUAGE.match(match.group(3)):
                found.append(_block(lines, indent, False, first))
                lines = None
            elif (match and ends and (not match.group(3) or " " in match.group(3))) or behind.endswith(fence):
                found.append(_block([*lines, *([] if ends else [behind[: -len(fence)]])], indent, True, first))
                lines, match = None, None
            else:
                lines.append(line)
        if lines is None and match:
            lines, indent, fence, first = [], len(match.group(1)), match.group(2), not said
        said = said or bool(line.strip())
    return found if lines is None else [*found, _block(lines, indent, False, first)]


def _block(lines: list[str], indent: int, closed: bool, first: bool) -> Block:
    margin = re.compile(rf"[ \t]{{0,{indent}}}")
    return Block("".join(margin.sub("", line, count=1) + "\n" for line in lines), closed, first)


def without_prose(text: str, name: str) -> str:
    """The lines of ``text`` that are Python, from its first imports or helpers on to as far behind the function
    ``name`` as they compile; all of ``text`` if none do. It compiles what strangers wrote, which can end the process:
    a program's sandbox runs it, from this source and without this module's names."""
    import ast
    import re

    lines = text.split("\n")
    define = re.compile(rf"(?:async )?def {re.escape(name)}\b")
    code = re.compile(r"(?:import|from|async def|def|class) \w|@\w|\w+ *=")
    at = next((i for i, line in enumerate(lines) if define.match(line)), len(lines))
    for start in (0, *[i for i in range(at) if code.match(lines[i])][:50], at):
        end = len(lines)
        for _ in range(100):
            if end <= at:
                break
            kept = "\n".join(lines[start:end]) + "\n"
            try:
                compile(kept, "solution.py", "exec")
            except SyntaxError as error:  # the line at fault, or the one of what it leaves open
                end = min(end - 1, start + (error.lineno or 1) - 1)
                continue
            # a line with a word of prose is a name
            body = ast.parse(kept).body
            words = [s.lineno for s in body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Name)]
            if not words:
                return kept
            end = start + words[0] - 1
    return text
