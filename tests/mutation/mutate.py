"""Which lines of the source can be broken without a test failing? `make mutate` breaks some seventy, one at a time.

Each mutation of mutations.py is made in a copy of the source, and the tests of the part concerned run on that copy; the
working tree is not touched. Prints a line for each and the survivors at the end, and exits with status 1 if there are
more than three. A mutation whose old text does not stand in its file exactly once is refused before anything runs.

    python tests/mutation/mutate.py [--only losses.py expert.py] [--first 12] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
ALLOWED_SURVIVORS = 3
LIMIT_S = 300
"""Of the tests of one mutation; a mutation that makes them hang is caught."""


def refuse_stale(mutations: list[Mutation]) -> None:
    """Ends with a sentence for a mutation whose text is not in its file exactly once, or without its tests."""
    for mutation in mutations:
        count = (ROOT / "src" / "metacontroller" / mutation.file).read_text(encoding="utf-8").count(mutation.old)
        if count != 1 or mutation.old == mutation.new:
            sys.exit(f"{mutation.file} has {count} times {mutation.old!r}; expected once: mend mutations.py.")
        for test in mutation.tests.split():
            if not (ROOT / "tests" / test).is_file():
                sys.exit(f"tests/{test} is not there; mend tests/mutation/mutations.py.")


def caught(mutation: Mutation, copy: Path) -> bool:
    """Whether the tests fail on the copy of the source with one mutation, which is taken back."""
    path = copy / "metacontroller" / mutation.file
    sound = path.read_text(encoding="utf-8")
    path.write_text(sound.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        return not passes(mutation.tests, copy)
    finally:
        path.write_text(sound, encoding="utf-8")


def passes(tests: str, copy: Path) -> bool:
    """Whether tests pass on a copy of the source; False too where they hang. Exits if there is nothing to run."""
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider"]
    words += [f"tests/{test}" for test in tests.split()]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1, 2):  # 2: the tests cannot be imported any more
        sys.exit(f"pytest ended with status {done.returncode} on {tests}: {done.stdout[-500:]}{done.stderr[-500:]}")
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, help="ends of the names of files to break")
    parser.add_argument("--first", type=int, default=None, help="break so many at most")
    parser.add_argument("--output", type=Path, default=None, help="write the results as JSON")
    options = parser.parse_args()
    refuse_stale(MUTATIONS)
    chosen = [part for part in MUTATIONS if options.only is None or part.file.endswith(tuple(options.only))]
    chosen = chosen[: options.first]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        copy = Path(folder)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "src" / "metacontroller", copy / "metacontroller", ignore=ignored)
        for tests in sorted({part.tests for part in chosen}):
            if not passes(tests, copy):
                sys.exit(f"{tests} fail without a mutation; mend that first.")
        for number, mutation in enumerate(chosen, 1):
            start = time.monotonic()
            found = caught(mutation, copy)
            rows.append({**mutation._asdict(), "caught": found, "seconds": round(time.monotonic() - start, 1)})
            word = "caught" if found else "SURVIVED"
            print(f"{number:2}/{len(chosen)} {word:8} {mutation.file}: {mutation.new.strip()}", flush=True)
    survivors = [row for row in rows if not row["caught"]]
    print(f"{len(rows) - len(survivors)} of {len(rows)} caught")
    for row in survivors:
        print(f"survived: {row['file']}: {row['old'].strip()!r} -> {row['new'].strip()!r}, tests {row['tests']}")
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(len(survivors) > ALLOWED_SURVIVORS)


if __name__ == "__main__":
    sys.exit(main())
