"""The command ``textbook-code``: see what is installed, fetch data, check an answer, deploy the person model.

Exit status: 0 when all is well, 1 when something asked for failed, 2 when the question itself was wrong.

Book: setup
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

import textbook_code

if TYPE_CHECKING:
    from textbook_code.deploy.runtimes import Decision
    from textbook_code.exercises import Exercise

app = typer.Typer(
    name="textbook-code",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
# A command writes to its streams, even one that is called from a notebook.
_out = Console(highlight=False, soft_wrap=True, force_jupyter=False)
_err = Console(stderr=True, highlight=False, soft_wrap=True, force_jupyter=False)


def _fail(message: object, status: int = 1) -> NoReturn:
    _err.print(f"textbook-code: {message}", markup=False, style="red")
    raise typer.Exit(status)


@app.callback()
def main() -> None:
    """Companion of the book Transformers, from Pixel to Logit.
    \f
    Book: setup
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal without our marks and stars gets "?" for them
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@app.command()
def version() -> None:
    """Print the version of the package.
    \f
    Book: how-to-cite
    """
    typer.echo(f"textbook_code {textbook_code.__version__}")


@app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Sources to fetch; --list shows them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Fetch every source.")] = False,
    show: Annotated[
        bool, typer.Option("--list", help="List the sources, and which are in the cache.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check the hashes of cached files again.")] = False,
) -> None:
    """Fetch real data and real weights into the cache, verified, and print their folders.
    \f
    Book: data-and-licences
    """
    from textbook_code.data import errors, sources

    if show:
        _list_sources()
        return
    if everything == bool(names):
        _fail("name the sources to fetch, or pass --all; --list shows them.", 2)
    for name in sources.SOURCES if everything else names or []:
        try:
            typer.echo(sources.fetch(name, verify=verify))
        except errors.UnknownSourceError as error:
            _fail(error, 2)
        except errors.SourceError as error:
            _fail(error)


def _list_sources() -> None:
    from textbook_code.data.sources import SOURCES, cached

    rows = [
        (name, f"{source.size / 1e6:.1f} MB", "cached" if cached(name) else "not fetched", source.title)
        for name, source in SOURCES.items()
    ]
    _print_columns(("source", "unpacked", "", "what"), rows)


@app.command()
def check(
    name: Annotated[str | None, typer.Argument(help="The exercise, as page/name.")] = None,
    file: Annotated[Path | None, typer.Argument(help="Your answer, a Python file.")] = None,
) -> None:
    """Check your answer to an exercise.

    Without a file the exercise's starter is printed, ready to be saved and filled in; without a name the
    exercises are listed. The file is run: check only files that you trust.
    \f
    Book: exercises-how
    """
    from textbook_code import exercises

    if name is None:
        rows = [(e.name, "★" * e.stars, e.title) for e in exercises.exercises()]
        _print_columns(("exercise", "", "what"), rows)
        return
    try:
        exercise = exercises.find(name)
    except KeyError as error:
        _fail(error.args[0], 2)
    if file is None:
        typer.echo(exercise.starter)
        return
    verdict = exercises.check(name, _answer(exercise, file))
    typer.echo(verdict)
    if not verdict:
        raise typer.Exit(1)


def _answer(exercise: Exercise, file: Path) -> Any:
    """The object that the exercise asks for, from the reader's file; what the file does wrong is one line."""
    from textbook_code.exercises import evaluate

    try:
        source = file.read_text(encoding="utf-8")
    except OSError as error:
        _fail(f"file={str(file)!r} cannot be read: {error.strerror}.", 2)
    except UnicodeDecodeError:
        _fail(f"file={str(file)!r} is not UTF-8 text, expected a Python file.", 2)
    sys.path.insert(0, str(file.resolve().parent))  # it may import what lies beside it
    try:
        return evaluate(exercise, source)
    except SyntaxError as error:
        _fail(f"{file}, line {error.lineno}: {error.msg}.")
    except (Exception, SystemExit) as error:
        _fail(f"{file}{_line_in_answer(exercise, error)} raised {type(error).__name__}: {error}")


def _line_in_answer(exercise: Exercise, error: BaseException) -> str:
    import traceback

    here = f"<{exercise.name}>"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == here]
    return f", line {lines[-1]}," if lines else ""


@app.command()
def export(
    kind: Annotated[str, typer.Argument(help="What for: onnx, tflite, c, mcu or wasm.")],
    folder: Annotated[Path, typer.Argument(help="Where to, a new or empty folder.")],
    model: Annotated[str, typer.Option(help="A checkpoint, a folder, or a .tflite file.")] = "person-vit",
    kernels: Annotated[str, typer.Option(help="Of the C: fast or plain.")] = "fast",
    board: Annotated[str, typer.Option(help="Of the microcontroller.")] = "mps2-an500",
    max_flash: Annotated[int | None, typer.Option(help="Refuse more bytes of constants.")] = None,
    max_ram: Annotated[int | None, typer.Option(help="Refuse a larger arena, in bytes.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write the person model for another runtime, and print the files.
    \f
    Book: deploy-cli
    """
    from textbook_code.deploy.export import export as write

    with _deploying() as say:
        files = write(
            kind, model, folder, kernels=kernels, board=board,
            max_flash=max_flash, max_ram=max_ram, force=force, say=say,
        )  # fmt: skip
    _print_columns(("file", "bytes"), [(str(file), f"{file.stat().st_size:,}") for file in files])


@app.command()
def predict(
    pictures: Annotated[list[Path], typer.Argument(help="Picture files.", show_default=False)],
    runtime: Annotated[str, typer.Option(help="Where it runs, such as torch, onnx, tflm, c; or all.")] = "c",
    model: Annotated[str, typer.Option(help="A checkpoint, a folder, or a .tflite file.")] = "person-vit",
    frame: Annotated[int | None, typer.Option(help="Which picture of an animation, from 0.")] = None,
) -> None:
    """Say of each picture whether a person is in it.

    The middle square is brought to 32 × 32 pixels. With --runtime all, every runtime is asked, and one table
    says where they agree. What cannot be read is named, and the others are still looked at.
    \f
    Book: deploy-cli
    """
    import numpy as np

    from textbook_code.deploy import images, runtimes

    with _deploying() as say:
        runtime == "all" or runtimes.find(runtime)
        say("reading the pictures")
        seen: dict[Path, np.ndarray] = {}
        unread: list[str] = []
        for picture in pictures:
            try:
                seen[picture] = images.load(picture, frame=frame)
            except images.PictureError as error:
                unread.append(str(error))
        if seen:
            say("running the model")
            stack = np.stack(list(seen.values()))
            opened = runtimes.Model(model)
            if runtime == "all":
                table = runtimes.compare(opened, stack)
            else:
                said = runtimes.decide(opened, stack, runtime)
    if seen and runtime == "all":
        _out.print(table)
    elif seen:
        _print_columns(("picture", "verdict", "logit", "steps"), _verdicts(seen, said))
    for message in unread:
        _err.print(f"textbook-code: {message}", markup=False, style="red")
    if unread:
        raise typer.Exit(2)


def _verdicts(seen: Iterable[Path], said: Iterable[Decision]) -> list[tuple[str, ...]]:
    return [
        (
            str(picture),
            "a person" if each.person else "no person",
            f"{each.logit:+.2f}",
            "" if each.steps is None else f"{each.steps:+d}",
        )
        for picture, each in zip(seen, said, strict=True)
    ]


@contextmanager
def _deploying() -> Iterator[Callable[[str], None]]:
    """Show what is being done; what goes wrong is one line, and status 2 if it was asked wrongly."""
    from textbook_code.deploy.runtimes import refusals

    try:
        with _err.status("…") if sys.stderr.isatty() else nullcontext() as status:
            yield lambda step: status.update(f"{step} …") if status else None
    except (ValueError, OSError) as error:
        _fail(error, 2)
    except refusals() as error:
        _fail(error)


@app.command()
def doctor() -> None:
    """Say what is installed, what is missing and how to get it.

    The status is 1 when something that the package cannot do without is missing or of a wrong version.
    \f
    Book: setup
    """
    from textbook_code.doctor import examine

    marks = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[yellow]–[/]"}
    sections = examine()
    for title, findings in sections.items():
        _out.print(f"[bold]{title}[/]")
        for finding in findings:
            cure = f"  →  {finding.advice}" if finding.advice else ""
            _out.print(f"  {marks[finding.good]} ", end="")
            _out.print(f"{finding.name:<16} {finding.found}{cure}", markup=False)
        _out.print()
    wrong = [finding.name for findings in sections.values() for finding in findings if finding.good is False]
    if wrong:
        _fail(f"to be mended: {', '.join(wrong)}.")
    typer.echo("All that the package needs is here.")


def _print_columns(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Aligned columns, a line each: a wrapped table is hard to read and to search."""
    lines = [heads, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for index, line in enumerate(lines):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        _out.print(text.rstrip(), markup=False, style="bold" if index == 0 else None)


if __name__ == "__main__":
    app()
