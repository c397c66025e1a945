"""The environment the book is built in: a virtual environment, and programs of the system.

Two variables change it, for the checks that run on a clean machine:

    BOOK_VENV=FOLDER       where the environment is (default: .venv)
    BOOK_INSTALL=wheel     install a built wheel of the package (default: editable, the source tree itself)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from console import StepError, ask, say
from stamps import Stamp, digest

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = "book,notebook,test"

LATEX = [
    *("latexmk", "make", "texlive-luatex", "texlive-latex-recommended", "texlive-latex-extra"),
    *("texlive-fonts-recommended", "fonts-texgyre", "fonts-texgyre-math", "fonts-dejavu-core"),
    *("fonts-freefont-otf", "librsvg2-bin", "poppler-utils"),
]
LATEX_PROGRAMS = ("latexmk", "lualatex", "rsvg-convert", "pdftoppm")
LATEX_FILES = ("tcolorbox.sty", "titlesec.sty", "texgyrepagella-math.otf", "DejaVuSansMono.ttf")
EMULATORS = {  # program: its Debian package
    "qemu-system-arm": "qemu-system-arm",
    "qemu-aarch64-static": "qemu-user-static",
    "arm-none-eabi-gcc": "gcc-arm-none-eabi",
    "arm-none-eabi-size": "binutils-arm-none-eabi",
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


class Environment:
    """The virtual environment and how the package gets into it."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.folder = Path(os.environ.get("BOOK_VENV") or root / ".venv").absolute()
        self.wheel = os.environ.get("BOOK_INSTALL", "editable") == "wheel"
        self.python = self.folder / "bin" / "python"
        self.stamp = Stamp(self.folder / "textbook-installed.json")

    @property
    def inputs(self) -> str:
        """What is installed: it is the same environment as long as this is the same."""
        names = ["pyproject.toml", "constraints.txt"]
        if self.wheel:  # a copy: it is old once the source has changed
            names += ["textbook_code", "experiments", "README.md", "LICENSE"]
        mode = "wheel" if self.wheel else "editable"
        return digest(self.root, names, extra=[EXTRAS, mode, sys.version])

    def is_ready(self) -> bool:
        return self.python.exists() and self.stamp.holds(self.inputs)

    def make(self, tell: Callable[[str], None]) -> None:
        """Create the environment and install into it; what is there already stays."""
        inputs = self.inputs
        if not self._works():
            tell(f"creating {self.folder} with Python {sys.version.split()[0]}")
            self._create()
        with tempfile.TemporaryDirectory(prefix="wheel-") as work:
            what = f"{self._built_wheel(Path(work), tell)}[{EXTRAS}]" if self.wheel else f".[{EXTRAS}]"
            tell(
                f"installing the package with its extras {EXTRAS} (the first time: a few gigabytes, minutes)"
            )
            self._pip("install", *([what] if self.wheel else ["-e", what]), "-c", "constraints.txt")
        self.stamp.write(inputs)

    def _works(self) -> bool:
        if not self.python.exists():
            return False
        command = [str(self.python), "-c", "import sys, pip; print(sys.version)"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        return answer.returncode == 0 and answer.stdout.strip() == sys.version

    def _create(self) -> None:
        command = [sys.executable, "-m", "venv", "--clear", str(self.folder)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode and shutil.which("apt-get"):  # Debian keeps this part of Python in a package
            package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
            if install_with_apt([package], "Python's own venv module"):
                made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            raise StepError(f"python -m venv failed:\n{made.stdout}{made.stderr}")

    def _built_wheel(self, work: Path, tell: Callable[[str], None]) -> Path:
        tell("building the wheel")
        self._pip("wheel", "--no-deps", "--wheel-dir", str(work), ".")
        return next(work.glob("textbook_code-*.whl"))

    def _pip(self, *arguments: str) -> None:
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments]
        done = subprocess.run(
            command, cwd=self.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            last = "\n".join(done.stdout.splitlines()[-30:])
            raise StepError(
                f"pip failed; the same command goes on from here once the cause is mended:\n{last}"
            )


def missing_latex() -> list[str]:
    """The programs and files of LaTeX that the PDF needs and that are not there."""
    missing = [program for program in LATEX_PROGRAMS if shutil.which(program) is None]
    if "lualatex" in missing or shutil.which("kpsewhich") is None:
        return missing or ["kpsewhich"]
    for name in LATEX_FILES:
        if subprocess.run(["kpsewhich", name], capture_output=True, check=False).returncode:
            missing.append(name)
    return missing


def ensure_latex() -> bool:
    """Install LaTeX where it is missing and may be; whether it is there in the end."""
    missing = missing_latex()
    if not missing:
        return True
    say(f"for the PDF there is no {', '.join(missing)}", step="latex")
    install_with_apt(LATEX, "LaTeX (about 150 MB to download, a few minutes)")
    return not missing_latex()


def browser() -> str | None:
    """The browser that CHROMIUM names, else the first on the path."""
    named = os.environ.get("CHROMIUM")
    return named or next((found for name in BROWSERS if (found := shutil.which(name))), None)


def ensure_browser() -> str | None:
    """Install Chromium where it is missing and may be; its path, if it is there in the end."""
    if browser() is None:
        install_with_apt(["chromium"], "Chromium, for the checks of the built pages")
    return browser()


def ensure_emulators() -> bool:
    """Install QEMU and the Arm compiler where missing, if that may be; whether they are there then."""
    missing = [program for program in EMULATORS if shutil.which(program) is None]
    if missing:
        packages = [EMULATORS[program] for program in missing]
        install_with_apt(packages, "QEMU and the Arm compiler, for the tests of the firmware")
    return all(map(shutil.which, EMULATORS))


def install_with_apt(packages: Sequence[str], what: str) -> bool:
    """Install packages of a Debian-like system as root, asking first on a terminal.

    Where that may not be done it says how to do it by hand.
    """
    line = f"apt-get install -y --no-install-recommends {' '.join(packages)}"
    if shutil.which("apt-get") is None:
        say(f"to have {what}, install what these Debian packages hold: {' '.join(packages)}", step="system")
        return False
    if os.geteuid() != 0:
        say(f"to have {what}, run:\n  sudo {line}", step="system")
        return False
    if not ask(f"Install {what} with\n  {line}\n?"):
        return False
    say(f"installing {what}", step="system")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], line.split()):
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode and command[1] != "update":
            say("\n".join(done.stdout.splitlines()[-15:]), step="system")
            return False
    return True
