"""Give hostile and damaged files to every reader, and count what should never happen.

    python benchmarks/robustness.py [PART ...] [--seed 0] [--only TEXT]

A part is a module of this folder with a function ``cases(seed)``. Prints a table: cases, how many ran code that
a file named or held, how many ended in a traceback, a signal or a timeout, and how many were accepted that had to be
refused; then the cases that did.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time

from cases import Outcome, play, play_all

PARTS = ("hostile",)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default: 0)")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--verbose", action="store_true", help="print what each case said")
    options = parser.parse_args(arguments)
    rows, wrong = [], []
    for part in options.parts or PARTS:
        start = time.perf_counter()
        cases = [case for case in importlib.import_module(part).cases(options.seed) if options.only in case.name]
        base = play(importlib.import_module(part).nothing()).peak
        done: list[Outcome] = []
        for outcome in play_all(cases):
            done.append(outcome)
            if options.verbose:
                print(f"{outcome.case.name}: {'refused' if outcome.refused else 'accepted'} | {_last(outcome)}")
        wrong += [outcome for outcome in done if outcome.wrong]
        executed, traces = sum(o.executed for o in done), sum(o.trace for o in done)
        accepted = sum(o.case.refused and not o.refused for o in done)
        peak = max((o.peak for o in done), default=base) - base
        taken = time.perf_counter() - start
        rows.append(f"| {part} | {len(done)} | {executed} | {traces} | {accepted} | {peak / 2**20:.0f} | {taken:.0f} |")
    print("| part | cases | code executed | tracebacks | wrongly accepted | peak memory, MiB above idle | s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))
    for outcome in wrong:
        print(f"\n{outcome.case.name}: executed {outcome.executed}, refused {outcome.refused}\n{outcome.said[-3000:]}")
    return int(bool(wrong))


def _last(outcome: Outcome) -> str:
    return (outcome.said.strip().splitlines() or [""])[-1][:300]


if __name__ == "__main__":
    sys.exit(main())
