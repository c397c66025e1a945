"""Exercises with checks a reader runs: `check("attention/scale", score_scale)`.

Book: exercises-how
"""

from textbook_code.exercises.framework import Exercise, Verdict, check, evaluate, exercises, find

__all__ = ["Exercise", "Verdict", "check", "evaluate", "exercises", "find"]
