"""``{exercise-card} page/name`` states an exercise on a page; ``{solutions}`` is the appendix of solutions.

Both print what ``textbook_code.exercises`` holds. The role {exercise}`page/name` links to a card.
``card`` and ``solution`` return plain Markdown parts, so that a downloaded notebook can show the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

from codeindex import package_folder
from docutils import nodes
from generated import Generated, fence, note_input
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxRole

if TYPE_CHECKING:
    from textbook_code.exercises import Exercise

CARD = re.compile(r"^`{3,}\{exercise-card\}\s+(\S+)", re.MULTILINE)
IMPORT = "from textbook_code.exercises import check"


def slug(name: str) -> str:
    """``attention/by-hand`` as part of a label: ``attention-by-hand``."""
    return name.replace("/", "-").replace("_", "-")


def stars(count: int) -> str:
    """Difficulty as the book prints it."""
    return "★" * count


def heading(exercise: Exercise) -> str:
    return f"{stars(exercise.stars)} {exercise.title}"


def starting_code(exercise: Exercise) -> str:
    """What a reader fills in and runs: the starter, then the call that checks it."""
    return f"{dedent(exercise.starter).strip()}\n\n{exercise.check_line}"


def statement(exercise: Exercise) -> str:
    """The statement as Markdown."""
    return dedent(exercise.statement).strip()


def solution_code(exercise: Exercise) -> str:
    """The reference solution as Python source."""
    return dedent(exercise.solution).strip()


def card(exercise: Exercise, *, solved: bool = True) -> str:
    """The card on the page as MyST Markdown; ``solved`` links the solution."""
    link = [f"{{ref}}`Solution <solution-{slug(exercise.name)}>`", ""] if solved else []
    return "\n".join(
        [
            f"(exercise-{slug(exercise.name)})=",
            f"``````{{admonition}} {heading(exercise)}",
            ":class: exercise-card",
            "",
            statement(exercise),
            "",
            fence(f"{IMPORT}\n\n{starting_code(exercise)}"),
            "",
            "`````{dropdown} A hint",
            exercise.hint.strip(),
            "`````",
            "",
            *link,
            "``````",
        ]
    )


def solutions(items: list[Exercise], stated: set[str]) -> str:
    """The appendix as MyST Markdown; ``stated`` names the exercises that have a card to link."""
    out: list[str] = []
    page = None
    for exercise in items:
        if exercise.page != page:
            page = exercise.page
            out += [f"## {page.replace('-', ' ').capitalize()}", ""]
        label = f"exercise-{slug(exercise.name)}"
        back = f"{{ref}}`Statement <{label}>`" if exercise.name in stated else ""
        out += [
            f"(solution-{slug(exercise.name)})=",
            f"### {heading(exercise)}",
            "",
            *([back, ""] if back else []),
            "`````{dropdown} The solution",
            fence(solution_code(exercise)),
            "`````",
            "",
        ]
    return "\n".join(out)


def stated(book: Path) -> dict[str, Path]:
    """The exercises that have a card in the pages below ``book``, and the page of each."""
    found: dict[str, Path] = {}
    for page in sorted(book.rglob("*.md")):
        for name in CARD.findall(page.read_text("utf-8")):
            found.setdefault(name, page)
    return found


def _find(name: str) -> Exercise:
    from textbook_code.exercises import find

    return find(name)


class ExerciseCard(Generated):
    """``{exercise-card} page/name``"""

    required_arguments = 1

    def reads(self) -> list[Path]:
        return [package_folder() / "exercises"]

    def markdown(self) -> str:
        try:
            return card(_find(self.arguments[0]))
        except KeyError as error:
            raise self.error(f"exercise-card: {error.args[0]}") from error


class Solutions(Generated):
    """``{solutions}``"""

    def reads(self) -> list[Path]:
        return [package_folder() / "exercises", self.root / "book"]

    def markdown(self) -> str:
        from textbook_code.exercises import exercises

        with_card = set(stated(self.root / "book"))
        return solutions(list(exercises()), with_card)


class ExerciseRole(SphinxRole):
    """``{exercise}``: a link to an exercise's card, which shows stars and title."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        note_input(self.env, package_folder() / "exercises")
        try:
            exercise = _find(self.text)
        except KeyError as error:
            message = self.inliner.reporter.error(f"exercise: {error.args[0]}", line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, message)], [message]
        text = f"{heading(exercise)} <exercise-{slug(exercise.name)}>"
        role = self.env.get_domain("std").role("ref")
        assert role is not None
        return role("std:ref", f":ref:`{text}`", text, self.lineno, self.inliner)


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("sphinx_design")
    app.add_directive("exercise-card", ExerciseCard)
    app.add_directive("solutions", Solutions)
    app.add_role("exercise", ExerciseRole())
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
