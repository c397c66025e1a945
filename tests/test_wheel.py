"""What is published works without the repository: the wheel installs into a fresh environment and runs."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "LICENSE-TEXT", "CITATION.cff", "CHANGELOG.md")
USE = """
import importlib.util, sys
from pathlib import Path

import torch

import textbook_code
from textbook_code.layers.attention import Attention
from textbook_code.models.text.bert import Bert, BertConfig, mean_pool

root = Path(textbook_code.__file__).parent
assert root.is_relative_to(sys.prefix), root
assert (root / "py.typed").is_file()
torch.manual_seed(0)
model = Bert(BertConfig(vocab_size=97, d_model=12, num_layers=2, num_heads=3, d_ff=29, max_seq_len=17)).eval()
tokens = torch.randint(97, (2, 11))
token_mask = torch.arange(11) < torch.tensor([[11], [7]])
pooled = mean_pool(model(tokens, token_mask=token_mask), token_mask)
model.save_pretrained("saved")
again = Bert.from_pretrained("saved")
assert torch.equal(pooled, mean_pool(again(tokens, token_mask=token_mask), token_mask))
print(tuple(pooled.shape), textbook_code.__version__)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy that holds nothing else than the sources."""
    work = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        shutil.copy(ROOT / name, work / name)
    shutil.copy(ROOT / "constraints.txt", work)
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("textbook_code", "experiments", "tests"):
        shutil.copytree(ROOT / name, work / name, ignore=skip)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work / "dist"), "."]
    made = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return work / "dist"


def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


def test_the_wheel_holds_what_is_no_python(built: Path) -> None:
    names = set(zipfile.ZipFile(wheel(built)).namelist())
    for folder in (
        "deploy/c_codegen/kernels",
        "deploy/mcu/firmware",
        "data/pedestrians",
        "checkpoints/person-vit",
    ):
        here = {p.name for p in (ROOT / "textbook_code" / folder).iterdir() if p.is_file()}
        assert here and {f"textbook_code/{folder}/{name}" for name in here} <= names
    assert "textbook_code/deploy/wasm.c" in names


def test_the_wheel_holds_the_package_and_the_records(built: Path) -> None:
    names = set(zipfile.ZipFile(wheel(built)).namelist())
    assert {"textbook_code/__init__.py", "textbook_code/py.typed"} <= names
    for record in (ROOT / "experiments").glob("*.json"):
        assert f"textbook_code/_experiments/{record.name}" in names
    for file in (ROOT / "textbook_code" / "checkpoints").glob("**/*.*"):
        if "__pycache__" not in file.parts:
            assert file.relative_to(ROOT).as_posix() in names
    in_tree = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "textbook_code").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert in_tree <= names
    strangers = {name.split("/")[0] for name in names} - {"textbook_code"}
    assert len(strangers) == 1, "only the package and its metadata"


def test_the_metadata_say_what_pyproject_says(built: Path) -> None:
    archive = zipfile.ZipFile(wheel(built))
    name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert metadata["Version"] == project["version"]
    assert metadata["Requires-Python"] == project["requires-python"]
    assert set(metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    assert metadata["Author"] == "The textbook_code authors"


def test_the_sdist_holds_what_is_needed_to_build_and_test(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {*SOURCES, "constraints.txt", "textbook_code/__init__.py", "tests/conftest.py"} <= inside


def run(python: Path, folder: Path, *arguments: str) -> str:
    """Run outside the repository, with nothing of this process's Python in the environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_"))}
    done = subprocess.run([str(python), *arguments], cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def use(python: Path, folder: Path) -> None:
    folder.mkdir()
    assert run(python, folder, "-c", USE).startswith("(2, 12) ")
    assert "0.1.0" in run(python.with_name("textbook-code"), folder, "version")


def test_a_model_runs_from_the_installed_wheel(built: Path, tmp_path: Path) -> None:
    """In a fresh environment that sees the libraries of this one, but not its copy of the package."""
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*pip, str(wheel(built))], check=True, capture_output=True)
    site = run(python, tmp_path, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    libraries = [folder for folder in sys.path if folder.endswith("site-packages")]
    (Path(site) / "libraries.pth").write_text("\n".join(libraries) + "\n")
    use(python, tmp_path / "elsewhere")


@pytest.mark.slow
def test_a_model_runs_from_an_empty_environment(built: Path, tmp_path: Path) -> None:
    """pip alone brings everything: minutes and gigabytes."""
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    command = ["-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel(built))]
    run(python, tmp_path, *command)
    use(python, tmp_path / "elsewhere")
