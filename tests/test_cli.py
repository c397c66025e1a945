"""The command: what it prints, and with which status it ends."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import textbook_code
from textbook_code import doctor, exercises
from textbook_code.cli import app
from textbook_code.data import sources, store
from textbook_code.data.errors import NetworkError
from textbook_code.data.sources import SOURCES


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the command with an empty cache; returns status, standard output and standard error."""
    monkeypatch.setenv("TEXTBOOK_CODE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TEXTBOOK_CODE_OFFLINE", "1")

    def run(*arguments: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return run


def one_line(error: str) -> str:
    """The error, which must be a single line that names the command."""
    lines = error.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("textbook-code: "), error
    return lines[0]


def test_version(run) -> None:
    assert run("version") == (0, f"textbook_code {textbook_code.__version__}\n", "")


def test_without_arguments_the_commands_are_listed(run) -> None:
    _, out, err = run()
    commands = ("doctor", "fetch", "check", "version", "export", "predict")
    assert all(command in out + err for command in commands)


@pytest.mark.parametrize("command", ["version", "fetch", "check", "doctor", "export", "predict"])
def test_help_speaks_to_the_reader_alone(run, command: str) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0 and "Usage:" in out and "Book:" not in out


def test_an_unknown_option_is_a_question_asked_wrongly(run) -> None:
    status, out, err = run("fetch", "--colour")
    assert status == 2 and out == "" and "--colour" in err and "Traceback" not in err


# fetch


def test_fetch_prints_the_folder_and_nothing_else(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def fetch(name: str, *, verify: bool = False) -> Path:
        asked.append((name, verify))
        return tmp_path / name

    monkeypatch.setattr(sources, "fetch", fetch)
    assert run("fetch", "minilm", "shakespeare") == (0, f"{tmp_path}/minilm\n{tmp_path}/shakespeare\n", "")
    assert asked == [("minilm", False), ("shakespeare", False)]
    asked.clear()
    assert run("fetch", "--all", "--verify")[0] == 0
    assert asked == [(name, True) for name in sources.SOURCES]


def test_fetch_without_or_with_too_many_wishes_is_refused(run) -> None:
    for arguments in ((), ("minilm", "--all")):
        status, out, err = run("fetch", *arguments)
        assert (status, out) == (2, "")
        assert "name the sources to fetch, or pass --all" in one_line(err)


def test_fetch_of_an_unknown_source(run) -> None:
    status, _, err = run("fetch", "miniln")
    assert status == 2
    assert f"name='miniln' is no source; expected one of {', '.join(sorted(SOURCES))}" in one_line(err)


def test_fetch_that_fails_says_why(run, monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, err = run("fetch", "minilm")
    assert status == 1
    assert "minilm is not in the cache and TEXTBOOK_CODE_OFFLINE is set" in one_line(err)

    def unreachable(name: str, *, verify: bool = False) -> Path:
        raise NetworkError("the [registry] is down")

    monkeypatch.setattr(sources, "fetch", unreachable)
    status, _, err = run("fetch", "minilm")
    assert (status, one_line(err)) == (1, "textbook-code: the [registry] is down")


def test_fetch_lists_what_is_cached(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "cached", lambda name: Path("there") if name == "minilm" else None)
    status, out, _ = run("fetch", "--list")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert status == 0 and set(lines) == {"source", *sources.SOURCES}
    assert "91.3 MB" in lines["minilm"] and "not fetched" not in lines["minilm"]
    assert "not fetched" in lines["bbc-news"]


# check

EXERCISE = "attention/by-hand"


def test_check_lists_every_exercise(run) -> None:
    status, out, _ = run("check")
    assert status == 0
    assert [name for line in out.splitlines() if "/" in (name := line.split()[0])] == [
        exercise.name for exercise in exercises.exercises()
    ]


def test_check_prints_the_starter_and_the_starter_is_not_right(run, tmp_path: Path) -> None:
    status, out, _ = run("check", EXERCISE)
    assert status == 0 and out.rstrip("\n") == exercises.find(EXERCISE).starter
    answer = tmp_path / "answer.py"
    answer.write_text(out, encoding="utf-8")
    status, out, err = run("check", EXERCISE, str(answer))
    assert status == 1 and out.startswith(f"✗ {EXERCISE}: ") and "Hint: " in out and err == ""


def test_check_says_right(run, tmp_path: Path) -> None:
    answer = tmp_path / "answer.py"
    answer.write_text(exercises.find(EXERCISE).solution, encoding="utf-8")
    assert run("check", EXERCISE, str(answer)) == (0, f"✓ {EXERCISE}: right.\n", "")


def test_an_answer_may_import_what_lies_beside_it(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    solution = exercises.find(EXERCISE).solution
    (tmp_path / "my_numbers_beside.py").write_text(solution, encoding="utf-8")
    answer = tmp_path / "answer.py"
    answer.write_text("from my_numbers_beside import *\n", encoding="utf-8")
    assert run("check", EXERCISE, str(answer))[0] == 0


def test_an_unknown_exercise_is_refused_with_the_close_names(run) -> None:
    status, _, err = run("check", "attention/by-hands", "answer.py")
    assert status == 2 and EXERCISE in one_line(err)


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        (None, 2, "cannot be read: No such file"),
        (b"\xff\xfe", 2, "is not UTF-8 text"),
        (b"x = 1\nanswer = (1,\n", 1, "line 2: '(' was never closed"),
        (b"x = 1\ny = x / 0\n", 1, "answer.py, line 2, raised ZeroDivisionError: division by zero"),
        (b"import sys\nsys.exit('enough')\n", 1, "answer.py, line 2, raised SystemExit: enough"),
        (b"x = 1\n", 1, "it defines no 'answer'"),
    ],
)
def test_a_bad_answer_file_is_one_clear_line(
    run, tmp_path: Path, content: bytes | None, status: int, says: str
) -> None:
    answer = tmp_path / "answer.py"
    if content is not None:
        answer.write_bytes(content)
    got, out, err = run("check", EXERCISE, str(answer))
    assert (got, out) == (status, "")
    assert says in one_line(err)


# doctor


def test_doctor_finds_this_installation_sound(run, tmp_path: Path) -> None:
    status, out, err = run("doctor")
    assert (status, err) == (0, "")
    assert out.endswith("All that the package needs is here.\n")
    for found in (
        textbook_code.__version__,
        sys.executable,
        metadata.version("torch"),
        str(tmp_path / "cache"),
    ):
        assert found in out
    assert "textbook-code fetch minilm" in out  # the cache is empty
    assert "forbidden by TEXTBOOK_CODE_OFFLINE" in out


def test_doctor_names_what_is_missing_and_its_cure(run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("tokenizers", "onnx"):
            raise metadata.PackageNotFoundError(name)
        return "2.13.0" if name == "torch" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    status, out, err = run("doctor")
    assert status == 1
    assert one_line(err) == "textbook-code: to be mended: tokenizers, torch."
    lines = [line for line in out.splitlines() if " " in line.strip()]
    found = {line.split()[1]: line for line in lines}
    assert "not installed" in found["tokenizers"] and 'pip install "tokenizers' in found["tokenizers"]
    assert "2.13.0, expected !=2.13.*" in found["torch"]
    assert "lacks onnx (not installed)" in found["deploy"]
    assert found["deploy"].endswith('→  pip install "textbook_code[deploy]"')
    assert "all" not in found  # it would only repeat the others
    assert "apt-get install latexmk" in found["lualatex"]
    assert "apt-get install chromium" in found["chromium"]


def test_doctor_survives_a_broken_torch(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    status, out, err = run("doctor")
    assert status == 1 and "PyTorch" in one_line(err)
    assert "cannot be imported" in out


def test_doctor_without_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "metadata", SimpleNamespace(**vars(metadata)))
    for function in ("requires", "metadata"):
        monkeypatch.setattr(doctor.metadata, function, absent)
    sections = doctor.examine()
    assert [finding.good for finding in sections["Needed"]] == [False]
    assert "pip install ." in sections["Needed"][0].advice
    assert sections["Extras"] == []


def test_doctor_counts_the_cache(run, tmp_path: Path) -> None:
    (store.cache_root() / "deep" / "er").mkdir(parents=True)
    (store.cache_root() / "deep" / "er" / "file").write_bytes(bytes(2_500_000))
    assert f"{store.cache_root()}, 2.5 MB" in run("doctor")[1]


# The installed command


def test_the_installed_command_runs_without_loading_torch() -> None:
    code = (
        "import sys; from textbook_code.cli import app; sys.argv = ['textbook-code', 'version']\n"
        "try: app()\n"
        "finally: print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == f"textbook_code {textbook_code.__version__}\nFalse\n"
    entry = next(point for point in metadata.entry_points(name="textbook-code"))
    assert entry.value == "textbook_code.cli:app"


def test_marks_do_not_break_a_terminal_that_lacks_them(tmp_path: Path) -> None:
    answer = tmp_path / "answer.py"
    answer.write_text(exercises.find(EXERCISE).solution, encoding="utf-8")
    command = [sys.executable, "-m", "textbook_code.cli", "check", EXERCISE, str(answer)]
    environment = {"PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stdout) == (0, f"? {EXERCISE}: right.\n")
