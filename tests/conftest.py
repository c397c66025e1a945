"""What every test shares: one thread, repeatable hypothesis runs, and the parity ledger's plumbing.

A parity test declares its row with ``@parity_row(...)`` and fills it through the fixture ``parity``.
What it saw travels on the test's report, so it arrives whether the tests ran here or on
pytest-xdist's workers, and one process writes ``_build/parity.json``.
``pytest --update-ledger --collect-only tests`` rewrites the committed ledger.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, ClassVar

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tests run side by side

import hypothesis
import pytest
from parity import (
    LEDGER,
    ROWS,
    Parity,
    build_file,
    declared_rows,
    file_of,
    read_json,
    was_asked_for,
    write_json,
)

PARITY = pytest.StashKey[Parity]()

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-ledger",
        action="store_true",
        help="rewrite book/appendix/parity-ledger.json from the rows that the collected tests declare",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "parity_row(row): the row of the parity ledger that this test fills")
    if not hasattr(config, "workerinput"):  # the one process that sees every report
        config.pluginmanager.register(Recorder(), "parity-recorder")


@pytest.hookimpl(tryfirst=True)  # before -m and -k deselect: a slow test's row counts too
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[ROWS] = declared_rows(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    if not config.getoption("--update-ledger") or ROWS not in config.stash:
        return
    if getattr(config, "workerinput", {"workerid": "gw0"})["workerid"] != "gw0":
        return
    rows = {row["id"]: row for row in config.stash[ROWS]}
    kept = [row for row in read_json(LEDGER) or [] if not was_asked_for(config, file_of(row))]
    rows = {**{row["id"]: row for row in kept}, **rows}
    write_json(LEDGER, [rows[key] for key in sorted(rows)])


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Parity:
    """Compares at the tolerances of the test's ``@parity_row`` and records the errors."""
    marker = request.node.get_closest_marker("parity_row")
    if marker is None:
        pytest.fail("the fixture `parity` needs a row: decorate the test with @parity_row(...)")
    request.node.stash[PARITY] = Parity(marker.args[0])
    return request.node.stash[PARITY]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Hand the errors on; a test that skips the row it declares, or compares nothing, fails."""
    marker = item.get_closest_marker("parity_row")
    if marker is None:
        return (yield)
    try:
        result = yield
    except pytest.skip.Exception as skipped:
        pytest.fail(f"the parity row {marker.args[0].id} may not be skipped: {skipped}")
    finally:
        checker = item.stash.get(PARITY, None)
        if checker and checker.seen:
            item.user_properties.append(("parity", {checker.row.id: checker.result()}))
    if not (checker and checker.seen):
        pytest.fail(f"the test declares the parity row {marker.args[0].id} and compares nothing")
    return result


class Recorder:
    """Gathers what the reports carry and writes it once, at the end of the run."""

    files: ClassVar = {"parity": "parity.json", "mutation": "parity-mutations.json"}

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, Any]] = {kind: {} for kind in self.files}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            for kind, value in report.user_properties:
                if kind in self.files:
                    self.seen[kind].update(value)

    def pytest_sessionfinish(self) -> None:
        for kind, name in self.files.items():
            if self.seen[kind]:
                merged = {**(read_json(build_file(name)) or {}), **self.seen[kind]}
                if kind == "parity":  # forget rows that are gone
                    known = {row["id"] for row in read_json(LEDGER) or []} | self.seen[kind].keys()
                    merged = {key: value for key, value in merged.items() if key in known}
                write_json(build_file(name), dict(sorted(merged.items())))
