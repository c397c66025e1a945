"""The stages of `.ci/run`, each with a cap on its time, in a clean clone and a fresh environment.

A stage that fails does not hide the next ones: those that need nothing from it still run. The closing table
shows every stage with its time; the exit status is 0 only if all passed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from build import SIDE_BY_SIDE
from console import duration, say
from environment import ROOT, Environment, ensure_browser, ensure_emulators, ensure_latex

PYTHON = str(Environment().python)
MAKE = ["make", "--no-print-directory", f"PYTHON={sys.executable}"]
LONGEST = 400  # seconds of processor time that the day's slow test may take, by its record
CHECK_WHEEL = """
import sys, textbook_code
file = textbook_code.__file__
assert "site-packages" in file and file.startswith(sys.prefix), f"the checkout was imported: {file}"
print(file)
"""


@dataclass
class Stage:
    """One stage: a command, or a function that returns its commands once it is its turn.

    `minutes` is its cap; `needs` are the stages without which it makes no sense.
    """

    name: str
    minutes: float
    commands: Callable[[], list[list[str]]]
    needs: tuple[str, ...] = ()
    outcome: str = "not run"
    seconds: float = 0.0
    closing: list[str] = field(default_factory=list)


def install() -> list[str]:
    return [sys.executable, "book/_tools/build.py", "environment"]  # there is no other Python yet


def build(*arguments: str) -> list[str]:
    return [PYTHON, "book/_tools/build.py", *arguments]


def system() -> list[list[str]]:
    """LaTeX, a browser, QEMU and the Arm compiler come from the system; here they may be installed."""
    wanted = {
        "LaTeX": ensure_latex,
        "Chromium": ensure_browser,
        "QEMU or the Arm compiler": ensure_emulators,
    }
    missing = [name for name, ensure in wanted.items() if not ensure()]
    return [[sys.executable, "-c", f"import sys; sys.exit({f'missing: {missing}'!r})"]] if missing else []


def is_short(test: str) -> bool:
    """Whether a slow test fits into its stage: repeating an experiment takes what the record says it took."""
    found = re.search(r"test_the_whole_experiment_repeats\[(\w+)\]", test)
    record = ROOT / "experiments" / f"{found[1] if found else ''}.json"
    return not record.is_file() or json.loads(record.read_text("utf-8"))["cpu_seconds"] < LONGEST


def one_slow_test() -> list[list[str]]:
    """One slow test a day, each in its turn; the longest are left to `make test-slow`."""
    command = [PYTHON, "-m", "pytest", "-m", "slow", "--collect-only", "-q"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    lines = (line for line in listed.stdout.splitlines() if "::" in line and not line.startswith(" "))
    tests = sorted(filter(is_short, lines))
    if not tests:
        return [[sys.executable, "-c", f"import sys; sys.exit({listed.stdout!r} + 'no slow test found')"]]
    chosen = tests[datetime.now(UTC).timetuple().tm_yday % len(tests)]
    say(f"today's of {len(tests)}: {chosen}", step="slow test")
    return [[PYTHON, "-m", "pytest", "-m", "slow", chosen]]


STAGES = [
    Stage("system", 7, system),
    Stage("install", 9, lambda: [install(), [PYTHON, "-c", CHECK_WHEEL]]),
    Stage("lint", 3, lambda: [build("lint")], needs=("install",)),
    Stage("fetch", 5, lambda: [build("fetch")], needs=("install",)),
    Stage("tests", 14, lambda: [[*MAKE, "test"]], needs=("install", "fetch")),
    Stage("ledger", 1, lambda: [[PYTHON, "book/_ext/ledger.py"]], needs=("tests",)),
    Stage("pages", 17, lambda: [build("pages")], needs=("install", "fetch")),
    Stage("book", 11, lambda: [[*MAKE, "book"]], needs=("pages", "system")),
    Stage(
        "browser",
        18,
        lambda: [[PYTHON, "-m", "pytest", "-m", "browser", *SIDE_BY_SIDE]],
        needs=("book", "system"),
    ),
    Stage("slow test", 12, one_slow_test, needs=("install", "fetch")),
]


def run(stage: Stage) -> None:
    """Run a stage under its cap, showing its output."""
    start = time.monotonic()
    stage.outcome = "passed"
    for command in stage.commands():
        say(" ".join(command)[:160], step=stage.name)
        left = stage.minutes * 60 - (time.monotonic() - start)
        status = _capped(command, left, stage.closing)
        if status is None:
            stage.outcome = f"over {stage.minutes:g} min"
        elif status:
            stage.outcome = f"failed ({status})"
        if status != 0:
            break
    stage.seconds = time.monotonic() - start


def _capped(command: list[str], seconds: float, closing: list[str]) -> int | None:
    """The exit status, or None where the time was up; whatever the command started ends with it."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def time_is_up(number: int, frame: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, time_is_up)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("=") and " in " in line:
                closing.append(line.strip())  # pytest's own closing line
        return process.wait()
    except TimeoutError:
        return None
    finally:  # over its time, interrupted or done: nothing of it goes on
        signal.setitimer(signal.ITIMER_REAL, 0)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    started = time.monotonic()
    passed: set[str] = set()
    for stage in STAGES:
        print(f"\n──── {stage.name} (at most {stage.minutes:g} min)", flush=True)
        if missing := [name for name in stage.needs if name not in passed]:
            stage.outcome = f"needs {', '.join(missing)}"
            say(stage.outcome, step=stage.name)
            continue
        run(stage)
        if stage.outcome == "passed":
            passed.add(stage.name)
        say(f"{stage.outcome} in {duration(stage.seconds)}", step=stage.name)

    print("\n──── summary")
    for stage in STAGES:
        print(
            f"{stage.name:>12} | {stage.outcome:<24} {duration(stage.seconds):>14}  of {stage.minutes:g} min"
        )
        for line in stage.closing:
            print(f"{'':>12} | {line}")
    print(f"{'total':>12} | {duration(time.monotonic() - started)}")
    return 0 if len(passed) == len(STAGES) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
