"""How many small defects our tests notice; `python -m tests.mutation` from the repository root.

In: the rooms of the table below. A mutant is one of our files with one change: a comparison, an
arithmetic or boolean operator, a `not`, a number, a flag or a word in quotes, a returned value, or
a statement that is gone. Out: what a seeded sample of each room survived, its score, a JSON line.
Guarantees: only a copy of the tree is changed, and the unchanged tests pass there first.
Annotations, decorators, f-strings and prose are left alone.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired

ROOMS = {  # room: (its folder, its modules, the tests that should notice)
    "journal": ("central/journal", "journal stored events state/*",
                "tests/unit/central/journal tests/golden/test_journal.py"),
    "gate": ("central/gate", "verdict counts high_water paired_tests", "tests/unit/central/gate"),
    "merging": ("central/merging", "product gram module_sum bounds workers",
                "tests/unit/central/merging"),
    "intake": ("central/intake", "checks", "tests/unit/central/intake -k checks"),
    "outbox": ("edge_node/outbox", "store", "tests/unit/edge_node/outbox"),
}  # fmt: skip
PYTEST = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
OTHER = {  # what an operator becomes
    ast.Eq: ast.NotEq, ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Is: ast.IsNot, ast.In: ast.NotIn,
    ast.NotEq: ast.Eq, ast.LtE: ast.Lt, ast.GtE: ast.Gt, ast.IsNot: ast.Is, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Mult: ast.Div, ast.FloorDiv: ast.Mult, ast.BitOr: ast.BitAnd,
    ast.Sub: ast.Add, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def replacement(node: ast.AST) -> str | None:
    """The code that stands in the place of `node`; None where nothing does."""
    match node:
        case ast.Compare(left, [op, *ops], values):
            return f"({ast.unparse(ast.Compare(left, [OTHER[type(op)](), *ops], values))})"
        case ast.BinOp(left, op, right) if type(op) in OTHER:
            return f"({ast.unparse(ast.BinOp(left, OTHER[type(op)](), right))})"
        case ast.BoolOp(op, values):
            return f"({ast.unparse(ast.BoolOp(OTHER[type(op)](), values))})"
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            return f"({ast.unparse(operand)})"
        case ast.Constant(int(value) | float(value)):
            return repr(not value if isinstance(value, bool) else value + 1)
        case ast.Constant(str(value)) if value and " " not in value:
            return repr(f"XX{value}")
        case ast.Return(ast.AST() as value) if ast.unparse(value) != "None":
            return "return None"
        case ast.Expr(ast.Call()) | ast.Assign([ast.Attribute() | ast.Subscript()]):
            return "pass"
        case ast.Raise() | ast.AugAssign() | ast.Continue() | ast.Break() | ast.Delete():
            return "pass"
    return None


def visited(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and what is below it, without what is never changed."""
    yield node
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            is_text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            kept = is_text or field in ("annotation", "returns", "decorator_list")
            if isinstance(child, ast.AST) and not kept and not isinstance(child, ast.JoinedStr):
                yield from visited(child)


def mutants(files: Iterable[Path]) -> Iterator[tuple[Path, int, str, bytes]]:
    """Every mutant in order: the file, the line, what changes, and the changed file's bytes."""
    for path in sorted(files):
        source = path.read_bytes()
        starts = [0, *accumulate(len(line) for line in source.splitlines(keepends=True))]
        for node in filter(replacement, visited(ast.parse(source))):
            new = replacement(node)
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            change = f"{' '.join(source[begin:end].decode().split())[:90]}  ->  {new[:90]}"
            yield path, node.lineno, change, source[:begin] + new.encode() + source[end:]


def run(tree: Path, arguments: list[str], limit_s: float) -> str:
    """Run Python on the copy: `survived` when it ends well, else `killed` or `timed out`."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    options = {"cwd": tree, "env": environment, "start_new_session": True}
    process = Popen([sys.executable, *arguments], **options, stdout=DEVNULL, stderr=DEVNULL)
    try:
        resource.prlimit(process.pid, resource.RLIMIT_AS, (16 << 30, 16 << 30))  # bytes
        return "killed" if process.wait(limit_s) else "survived"
    except TimeoutExpired:
        return "timed out"
    finally:
        if process.poll() is None:  # also after Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def score(tree: Path, room: str, seed: int, size: int) -> dict[str, float]:
    """Try the sample of one room, and print what is not killed."""
    folder, modules, tests = ROOMS[room]
    arguments = [*PYTEST, "-m", "not slow and not gpu", *tests.split()]
    started = time.monotonic()
    if run(tree, arguments, 600) != "survived":
        raise SystemExit(f"The tests of {room} fail on the unchanged code: {tests}.")
    limit_s = 30 + 5 * (time.monotonic() - started)
    found = list(mutants(f for name in modules.split() for f in (tree / folder).glob(f"{name}.py")))
    count = {"mutants": len(found), "killed": 0, "survived": 0, "timed out": 0}
    for file, line, change, text in random.Random(f"{seed} {room}").sample(found, size):
        original = file.read_bytes()
        file.write_bytes(text)
        count[result := run(tree, arguments, limit_s)] += 1
        file.write_bytes(original)
        if result != "killed":
            print(f"  {result}: {file.relative_to(tree)}:{line}  {change}", flush=True)
    return {**count, "score": round(count["killed"] / max(1, size - count["timed out"]), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=30, help="mutants of each room")
    parser.add_argument("--room", choices=ROOMS, action="append", help="default: every room")
    chosen = parser.parse_args()
    scores = {}
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree, unwanted = Path(folder) / "tree", shutil.ignore_patterns(".*", "*-run*", "build")
        shutil.copytree(".", tree, ignore=unwanted)
        check = f"import central; assert central.__file__.startswith({str(tree)!r})"
        assert run(tree, ["-c", check], 60) == "survived", "the copy is not what is imported"
        for room in chosen.room or ROOMS:
            scores[room] = score(tree, room, chosen.seed, chosen.sample)
            print(f"{room}: {scores[room]}", flush=True)
    print(json.dumps({"seed": chosen.seed, "sample": chosen.sample, "rooms": scores}))


if __name__ == "__main__":
    main()
