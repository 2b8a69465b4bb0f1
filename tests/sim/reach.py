"""Lines of the engine that the simulation never comes by: `make reach`.

Runs so many seeds, the fixed workloads and a crash at every failpoint under `coverage`; prints the
functions of `pool/` with lines that nothing reached. What is left must have a reason in
`docs/testing.md`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import coverage

ROOT = Path(__file__).resolve().parents[2]
#: Code that the simulation has no use for, each with other tests; see `docs/testing.md`.
ELSEWHERE = ("pool/worker.py", "pool/words.py", "pool/create.py", "pool/status.py", "pool/check/")


def run(seeds: int) -> None:
    """Everything that is to be reached; faults found on the way are for `make sim`."""
    from pool.failpoints import FAILPOINTS
    from tests.sim.scenarios import crash_at, crash_at_failpoint
    from tests.sim.seeds import run_seed

    for seed in range(seeds):
        run_seed(seed)
        print(f"\rseed {seed + 1} of {seeds}", end="", file=sys.stderr, flush=True)
    for name in FAILPOINTS:
        crash_at_failpoint(name, 1, power=True)
    for name, nth in (("brief", 5_000), ("eventful", 5_000)):
        crash_at(name, nth)


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """(qualified name, first line, last line) of every function, inner ones first."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from functions(node, f"{prefix}{node.name}.")
            yield f"{prefix}{node.name}", node.lineno, node.end_lineno or node.lineno


def unreached(data: coverage.Coverage, path: Path) -> tuple[int, dict[str, list[int]]]:
    """How many statements a file has, and those that nothing reached, by function."""
    _, statements, _, missing, _ = data.analysis2(str(path))
    spans = list(functions(ast.parse(path.read_text())))
    found: dict[str, list[int]] = {}
    for line in missing:
        names = [name for name, first, last in spans if first <= line <= last]
        found.setdefault(names[0] if names else "(module)", []).append(line)
    return len(statements), found


def main() -> int:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 150
    measured = coverage.Coverage(source=[str(ROOT / "pool")], data_file=None)
    measured.start()
    run(seeds)
    measured.stop()
    total = left = 0
    print(f"\nafter {seeds} seeds, every failpoint and the fixed workloads:")
    for path in sorted((ROOT / "pool").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if name.startswith(ELSEWHERE):
            continue
        statements, found = unreached(measured, path)
        total += statements
        left += sum(map(len, found.values()))
        for function, lines in found.items():
            print(f"{name}  {function}  {', '.join(map(str, lines))}")
    print(f"{total - left} of {total} statements reached ({100 * (total - left) / total:.1f} %)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
