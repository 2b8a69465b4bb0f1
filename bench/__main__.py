"""The command line of the measurements: `python -m bench [compare | memory | full]`."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from bench import compare, full, memory, report
from bench.deployment import CommandFailed
from bench.fio import FioFailed
from bench.servers import missing_tools

DEFAULT_OUTPUT = Path(".work/bench")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the devices lie (default: temporary)")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder of the JSON")
    actions = parser.add_subparsers(dest="action", required=False)
    side = actions.add_parser("compare", help="side by side with qemu-nbd and nbdkit (default)")
    for target in (parser, side):
        target.add_argument("--rounds", type=int, default=argparse.SUPPRESS, help="default 5")
        target.add_argument("--seconds", type=float, default=argparse.SUPPRESS, help="default 3")
        target.add_argument("--quick", type=int, metavar="N", help="N rounds of one second")
        target.add_argument("--only", default=argparse.SUPPRESS, help="jobs whose name has this")
    big = actions.add_parser("memory", help="memory and opening time under a large volume")
    big.add_argument("--gib", type=int, default=8, help="GiB per step (default 8)")
    packed = actions.add_parser("full", help="overwrite a pool that is 70 %% full")
    packed.add_argument("--device", default="256M", help="size of each of six devices")
    packed.add_argument("--times", type=int, default=20, help="capacities to write")
    parser.set_defaults(action="compare", rounds=5, seconds=3.0, only="")
    return parser


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _measure(options: argparse.Namespace, folder: Path) -> None:
    result: object
    if options.action == "memory":
        figures = memory.measure(folder, options.gib, _say)
        result, text = figures, memory.markdown(figures)
    elif options.action == "full":
        tail = full.measure(folder, options.device, options.times, _say)
        result, text = tail, full.markdown(tail)
    else:
        rounds, seconds = options.rounds, options.seconds
        if options.quick:
            rounds, seconds = options.quick, 1.0
        rows = compare.compare(folder, rounds, seconds, _say, options.only)
        result, text = report.plain(rows), report.markdown(rows)
    print(text)
    report.store(options.output / f"{options.action}.json", options.action, result)


def main() -> int:
    """Measure; the exit status."""
    options = _parser().parse_args()
    if lacking := missing_tools():
        print(f"bench: install {', '.join(lacking)}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    folder = Path(tempfile.mkdtemp(prefix="stripewell-bench-", dir=options.folder))
    try:
        _measure(options, folder)
    except (CommandFailed, FioFailed, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
