"""What the compiler makes of the head's kernels for a GPU that need not be there: registers, spills, width of accesses.

Triton's package carries the assembler and the disassembler. The bytes a row follow from the loads and stores that stand
in the streaming loops; ``examples.benchmarks.roofline`` states what they should be.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nemo_tropd.loss import kernels, kernels_exact, kernels_top_k

CAPABILITIES = {"h100": 90, "h200": 90, "b200": 100}
ROW_LENGTHS = ("stride", "student_stride", "teacher_stride", "limit", "end")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_WIDTH = re.compile(r"\b(LDG|STG)\.E\S*")


@dataclass(frozen=True)
class Case:
    """A kernel with the constants of one use of it."""

    name: str
    kernel: Any
    dtype: str  # of the logits: bf16, fp16 or fp32
    constants: dict[str, Any]
    warps: int
    loads: int  # bytes the streaming loop should load of the logits, a column
    stores: int


@dataclass(frozen=True)
class Report:
    """One compiled kernel."""

    case: Case
    capability: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    spills: int  # local loads and stores in the code
    wide_loads: int  # 128-bit global loads in the streaming loop
    wide_stores: int
    loop_load_bytes: float  # global loads of the streaming loop, bytes a column
    loop_store_bytes: float

    @property
    def programs_per_multiprocessor(self) -> int:
        """How many programs the register file holds at once."""
        return min(2048 // (32 * self.case.warps), 65536 // (32 * self.case.warps * max(self.registers, 1)))


def cases() -> list[Case]:
    """Every streaming kernel at the sizes of a 151,936-token vocabulary and k = 64, for bf16 and fp32."""
    found = []
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        stream = {"SUB": 256, "PER": kernels.TILE // 256}
        student = {**stream, "COUNT": 128, "ENTROPY": False, "MAXIMA": False}
        teacher = {**stream, "COUNT": 1, "ENTROPY": False, "MAXIMA": True}
        collect = {"LIST": 128, "CAP": 128, "SUB": 256, "GROUP": kernels_top_k.COLLECT_TILE // 256}
        collect |= {"TILE": kernels_top_k.COLLECT_TILE, "LOW_BIT": 16 if dtype == "bf16" else 0}
        w = kernels.WARPS
        found += [
            Case("student log-sum-exp and columns", kernels._stream_kernel, dtype, student, w, size, 0),
            Case("the same with entropy", kernels._stream_kernel, dtype, student | {"ENTROPY": True}, w, size, 0),
            Case("teacher log-sum-exp and maxima", kernels._stream_kernel, dtype, teacher, w, size, 0),
            Case("student gradient in place", kernels._gradient_kernel, dtype,
                 {"COUNT": 128, "TILE": kernels.GRADIENT_TILE}, w, size, size),
            Case("top k: collect", kernels_top_k._collect_kernel, dtype, collect, 4, size, 0),
        ]  # fmt: skip
        for name, formula in kernels_exact.FORMULAS.items():
            if dtype == "fp32" and name != "trust":  # the one with the most registers
                continue
            full = {"FORMULA": formula, "FULL": name == "trust", "TILE": kernels_exact.TILE}
            count, w = kernels_exact.SUMS[formula], kernels_exact.WARPS
            found += [
                Case(f"{name}: sums over both", kernels_exact._sums_kernel, dtype, {**full, "COUNT": count}, w,
                     2 * size, 0),
                Case(f"{name}: gradient from both", kernels_exact._exact_gradient_kernel, dtype,
                     {**full, "SUMS": count, "COUNT": 128}, w, 2 * size, size),
            ]  # fmt: skip
    return found


def compile_case(case: Case, capability: int) -> Report:
    """Compile for ``capability`` (90 Hopper, 100 Blackwell) and read the result."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else _type(name, case.dtype) for name in names}
    # What the launcher tells the compiler of real calls: pointers and row lengths are multiples of 16.
    divisible = [n for n in names if signature[n].startswith("*") or n in ROW_LENGTHS]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    source = ASTSource(case.kernel, signature=signature, constexprs=case.constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": case.warps})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        resources = _run("cuobjdump", "--dump-resource-usage", str(cubin))
        code = _run("nvdisasm", str(cubin))
    loop = _streaming_loop(code)
    tile = case.constants.get("TILE") or case.constants["SUB"] * case.constants["PER"]
    threads = 32 * case.warps
    return Report(
        case=case,
        capability=capability,
        registers=_resource(resources, "REG"),
        shared_bytes=_resource(resources, "SHARED"),
        stack_bytes=_resource(resources, "STACK"),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        wide_loads=len(re.findall(r"\bLDG\.E\.128", loop)),
        wide_stores=len(re.findall(r"\bSTG\.E\.128", loop)),
        loop_load_bytes=_bytes(loop, "LDG") * threads / tile,
        loop_store_bytes=_bytes(loop, "STG", wide_only=True) * threads / tile,
    )


def _type(name: str, dtype: str) -> str:
    """Triton's type of an argument, by its name."""
    if name in ("logits", "student", "teacher"):
        return f"*{dtype}"
    pointers = {
        "ids": "*i64", "lists": "*i32", "list_counts": "*i32", "ids_out": "*i32", "counts_out": "*i32",
        "thresholds": "*u32", "keys_out": "*u32",
    }  # fmt: skip
    if name in pointers:
        return pointers[name]
    if name in ("factor", "log_share", "log_rest", "share"):
        return "fp32"
    return "i32" if name in ("rows", "width", "count", "blocks", "k", *ROW_LENGTHS) else "*fp32"


def _streaming_loop(code: str) -> str:
    """The innermost loop with the widest loads that streams a row: between a label and the branch back to it."""
    lines = code.splitlines()
    labels = {m.group(1): i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    bodies = []
    for i, line in enumerate(lines):
        jump = re.search(r"\bBRA\S*.*?(\.L_x_\d+)", line)
        if jump and labels.get(jump.group(1), i + 1) <= i:
            bodies.append("\n".join(lines[labels[jump.group(1)] : i + 1]))
    streaming = [body for body in bodies if "LDG.E.128" in body]
    return min(streaming, key=len) if streaming else ""


def _bytes(code: str, operation: str, wide_only: bool = False) -> int:
    """Bytes a thread moves by the global accesses in ``code``."""
    total = 0
    for match in _WIDTH.finditer(code):
        if match.group(1) == operation:
            bits = next((n for n in (128, 64) if f".{n}" in match.group(0)), 32)
            if not wide_only or bits == 128:
                total += bits // 8
    return total


def _resource(text: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", text)
    return int(found.group(1)) if found else 0


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout
