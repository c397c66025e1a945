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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep from the terminal and the notebook what the code inside prints, logs and warns about.

    C++ writes to the process's own outputs, past Python, so these are turned away too, for all threads. Where
    the code inside raises, the last of what it said to its standard error goes into the exception's notes.

    Book: deploy-tflite
    """
    disabled, said = logging.root.manager.disable, ""
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
        try:
            with open(os.devnull, "w") as nothing, warnings.catch_warnings():  # noqa: PTH123
                warnings.simplefilter("ignore")
                logging.disable(logging.CRITICAL)
                with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
                    yield
        except Exception as error:
            heard.seek(0)
            said = heard.read().decode("utf-8", "replace").strip()
            if said:
                error.add_note(said[-1000:])
            raise
        finally:
            logging.disable(disabled)
