"""Converters and runtimes that talk less.

Book: deploy-tflite
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import IO


class Heard:
    """What was said while it was `quiet`.

    Book: deploy-tflite
    """

    text: str = ""


@contextlib.contextmanager
def quiet() -> Iterator[Heard]:
    """Keep from the terminal and the notebook what the code inside prints, logs and warns about.

    C++ writes to the process's own outputs, past Python, so these are turned away too, for all threads. What
    it wrote there stands in the yielded object's `text` afterwards, and the end of it in the notes of an
    exception that the code inside raises.

    Book: deploy-tflite
    """
    disabled, said = logging.root.manager.disable, Heard()
    with tempfile.TemporaryFile() as heard, contextlib.ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError, OSError):
                stream.flush()
        for number in (1, 2):
            try:
                kept = os.dup(number)
            except OSError:  # a process that was started without it
                continue
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, number)
            os.dup2(heard.fileno(), number)
        if (inside := _notebook()) is not None:  # where some libraries show their progress past every stream
            stack.enter_context(inside)
        try:
            with open(os.devnull, "w") as nothing, warnings.catch_warnings():  # noqa: PTH123
                warnings.simplefilter("ignore")
                logging.disable(logging.CRITICAL)
                with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
                    yield said
        except Exception as error:
            if noted := _text(heard):
                error.add_note(noted[-1000:])
            raise
        finally:
            logging.disable(disabled)
            said.text = _text(heard)


def _notebook() -> AbstractContextManager[object] | None:
    """What keeps from a notebook the things that are displayed in it, where there is one."""
    if "IPython" not in sys.modules or sys.modules["IPython"].get_ipython() is None:
        return None
    from IPython.utils.capture import capture_output

    return capture_output(stdout=False, stderr=False, display=True)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace").strip()
