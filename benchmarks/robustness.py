"""Give hostile and damaged files to every reader, and count what should never happen.

    python benchmarks/robustness.py [PART ...] [--seed 0] [--only TEXT]

``hostile`` prints a table: cases, how many ran code that a file named or held, how many ended in a traceback, a signal
or a timeout, and how many were accepted that had to be refused; then the cases that did. ``damaged``, ``bombs`` and
``hostile_text`` print their counts: tracebacks, loads whose content differs without a word, memory per byte of input.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time

import robustness_files
import torch
from cases import Outcome, play, play_all

PARTS = ("hostile", *robustness_files.PARTS)
WRONG = ("tracebacks", "slow", "died", "loads that differ", "not restored", "run by a spreadsheet", "markup")
"""Counts that should be 0."""


def main(arguments: list[str] | None = None) -> int:
    """Run the parts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default: 0)")
    parser.add_argument("--count", type=int, default=1200, help="damaged files (default: 1200)")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--verbose", action="store_true", help="print what each case said")
    options = parser.parse_args(arguments)
    rows, wrong, is_wrong = [], [], False
    for part in options.parts or PARTS:
        if part in robustness_files.PARTS:
            is_wrong |= _print_counts(part, options)
            continue
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
    if rows:
        print("| part | cases | code executed | tracebacks | wrongly accepted | peak memory, MiB above idle | s |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))
    for outcome in wrong:
        print(f"\n{outcome.case.name}: executed {outcome.executed}, refused {outcome.refused}\n{outcome.said[-3000:]}")
    return int(bool(wrong) or is_wrong)


def _print_counts(part: str, options: argparse.Namespace) -> bool:
    """Run a part on files, print what it counts, and return whether anything of it is wrong."""
    torch.set_num_threads(1)
    more = {"count": options.count} if part == "damaged" else {}
    found = robustness_files.PARTS[part](seed=options.seed, **more)
    for example in found.pop("examples")[:20]:
        print(f"  {example}")
    print(f"{part}: {', '.join(f'{key} {value}' for key, value in found.items())}", flush=True)
    return any(found.get(key) for key in WRONG)


def _last(outcome: Outcome) -> str:
    return (outcome.said.strip().splitlines() or [""])[-1][:300]


if __name__ == "__main__":
    sys.exit(main())
