"""Optional dependencies: imported where they are used, and named by their extra where they lack.

Book: setup
"""

from importlib import import_module
from typing import Any


def require(module: str, *, extra: str) -> Any:
    """Import an optional dependency.

    Args:
        module: its import name.
        extra: the extra of this package that brings it.

    Raises:
        ImportError: it is missing; one line says which extra to install.

    Book: setup
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # something that the dependency itself needs
        raise ImportError(f'{module} is missing: pip install "textbook_code[{extra}]"') from error
