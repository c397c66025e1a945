"""The commands `export` and `predict`, and the folder that appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from textbook_code.cli import app
from textbook_code.deploy import export as exporting
from textbook_code.deploy import runtimes
from textbook_code.deploy.export import KINDS, FolderError, export
from textbook_code.models.vision.tiny_vit import TinyViT, TinyViTConfig

Image = pytest.importorskip("PIL.Image")
Run = Callable[..., tuple[int, str, str]]

CONFIG = TinyViTConfig(patch_size=8, d_model=8, num_layers=1, num_heads=2, d_ff=16)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in an empty folder; returns status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with its integer file beside it."""
    pytest.importorskip("litert_torch")
    pytest.importorskip("ai_edge_quantizer")
    torch.manual_seed(0)
    network = TinyViT(CONFIG).eval()
    seen = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), np.uint8)
    with torch.no_grad():  # so that it says yes as often as no
        network.head.weight.mul_(20)
        x = torch.from_numpy(seen).permute(0, 3, 1, 2)
        network.head.bias.sub_(network((x.float() - 128) / 128).median())
    where = tmp_path_factory.mktemp("model")
    network.save_pretrained(where)
    model = runtimes.Model(where, calibration=seen)
    for made in (model.int8, model.tflite):
        (where / made.name).write_bytes(made.read_bytes())
    return where


def picture(path: Path, *, height: int = 40, width: int = 50, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def last_line(error: str) -> str:
    lines = [line for line in error.splitlines() if line.startswith("textbook-code: ")]
    assert len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


def nothing_left(folder: Path) -> bool:
    return sorted(path.name for path in folder.iterdir()) == []


# ---------------------------------------------------------------- export

WRITTEN = {
    "onnx": {"model.onnx", "model_int8.onnx"},
    "tflite": {"model.tflite", "model_int8.tflite"},
    "c": {"net.h", "net.c", "weights.h", "weights.c", "kernels.h", "kernels.c"},
    "mcu": {"Makefile", "README.md", "main.c", "startup.c", "flash.ld", "project.json"},
    "wasm": {"person.wasm"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_written_and_listed(kind: str, run: Run, folder: Path, tmp_path: Path) -> None:
    calibrated = runtimes.Model(folder, calibration=np.zeros((4, 32, 32, 3), np.uint8))
    if kind == "onnx":  # its int8 is made anew, which needs pictures; no data is fetched here
        files = export(kind, calibrated, tmp_path / "out")
        assert {path.name for path in files} == WRITTEN[kind]
        return
    status, out, err = run("export", kind, "out", "--model", folder, "--kernels", "plain")
    assert status == 0, err
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names >= WRITTEN[kind]
    lines = out.splitlines()
    assert lines[0].split() == ["file", "bytes"] and len(lines) == len(names) + 1
    assert all((tmp_path / line.split()[0]).stat().st_size == int(line.split()[1].replace(",", ""))
               for line in lines[1:])  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # and nothing half-written
    if kind == "tflite":  # the integer file as it is, and the float one it was made from
        for name in (runtimes.INT8_FILE, "model.tflite"):
            assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_a_folder_in_use_is_left_alone(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    status, _, err = run("export", "wasm", "out", "--model", folder)
    assert status == 2
    assert "folder: out is not empty; name another, or pass --force" in last_line(err)
    status, _, err = run("export", "wasm", "out", "--model", folder, "--force")
    assert status == 2 and "folder: out holds mine.txt, which this export does not write" in last_line(err)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "out/mine.txt").rename(tmp_path / "out/person.wasm")
    assert run("export", "wasm", "out", "--model", folder, "--force")[0] == 0
    assert (tmp_path / "out/person.wasm").read_bytes()[:4] == b"\0asm"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    (tmp_path / "file").write_text("")
    status, _, err = run("export", "wasm", "file", "--model", folder)
    assert status == 2 and "folder: file is a file" in last_line(err)


def test_a_failure_leaves_no_folder(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from textbook_code.deploy import wasm

    def fails(model: Path, output: Path, **options: object) -> Path:
        output.write_bytes(b"half")
        raise wasm.WasmError("the compiler [gave] up")

    monkeypatch.setattr(wasm, "build", fails)
    status, _, err = run("export", "wasm", "a/b", "--model", folder)
    assert (status, last_line(err)) == (1, "textbook-code: the compiler [gave] up")
    assert nothing_left(tmp_path / "a")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/person.wasm").write_bytes(b"older")
    assert run("export", "wasm", "old", "--model", folder, "--force")[0] == 1
    assert (tmp_path / "old/person.wasm").read_bytes() == b"older"


def test_a_missing_tool_is_named(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from textbook_code.deploy import compilers

    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    status, _, err = run("export", "wasm", "out", "--model", folder)
    assert status == 1
    assert 'ziglang is missing: pip install "textbook_code[deploy]"' in last_line(err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("cobol", "out"), "kind: got 'cobol', expected one of onnx, tflite, c, mcu, wasm"),
        (("c", "out", "--kernels", "slow"), "kernels: got 'slow', expected fast or plain"),
        (("mcu", "out", "--board", "arduino"), "board: expected one of mps2-an500"),
        (("c", "out", "--model", "nowhere"), "model: got 'nowhere', expected"),
        (("c", "out", "--max-flash", "100"), "100"),
    ],
)
def test_questions_asked_wrongly(
    arguments: tuple[str, ...], said: str, run: Run, folder: Path, tmp_path: Path
) -> None:
    model = () if "--model" in arguments else ("--model", folder)
    status, out, err = run("export", *arguments, *model)
    assert (status, out) == (2, "")
    assert said in last_line(err)
    assert nothing_left(tmp_path)


def test_a_model_over_budget_says_by_how_much(run: Run, folder: Path) -> None:
    from textbook_code.deploy.c_codegen import generate

    fits = generate(folder / "model_int8.tflite", Path.cwd() / "fits")
    for kind in ("c", "mcu"):
        flash = ("--max-flash", fits.flash_bytes - 5, "--kernels", "plain", "--model", folder)
        status, _, err = run("export", kind, "out", *flash)
        assert status == 2 and f"{fits.flash_bytes:,}" in last_line(err) and " 5 " in last_line(err)
        ram = ("--max-ram", fits.arena_bytes - 7, "--kernels", "plain", "--model", folder)
        status, _, err = run("export", kind, "out", *ram)
        assert status == 2 and f"{fits.arena_bytes:,}" in last_line(err) and " 7 " in last_line(err)
    exact = ("--max-ram", fits.arena_bytes, "--max-flash", fits.flash_bytes)
    assert run("export", "c", "out", *exact, "--kernels", "plain", "--model", folder)[0] == 0


def test_an_operation_that_cannot_be_generated_is_named_with_its_layer(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    """The softmax of the graph is given another number in the table of operations: that of LOG_SOFTMAX."""
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    flatbuffers = pytest.importorskip("flatbuffers")
    model = schema.ModelT.InitFromPackedBuf((folder / "model_int8.tflite").read_bytes(), 0)
    for code in model.operatorCodes:
        if code.builtinCode == schema.BuiltinOperator.SOFTMAX:
            code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.LOG_SOFTMAX
    for op in model.subgraphs[0].operators:
        if isinstance(op.builtinOptions, schema.SoftmaxOptionsT):
            op.builtinOptionsType = schema.BuiltinOptions.LogSoftmaxOptions
            op.builtinOptions = schema.LogSoftmaxOptionsT()
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    (tmp_path / "odd.tflite").write_bytes(builder.Output())
    for kind in ("c", "mcu", "wasm"):
        status, _, err = run("export", kind, "out", "--model", "odd.tflite", "--kernels", "plain")
        assert status in (1, 2) and not (tmp_path / "out").exists()
        said = last_line(err)
        assert ("LOG_SOFTMAX" in said and "attn" in said) or "found no SOFTMAX" in said
    picture(tmp_path / "x.png")
    status, out, err = run("predict", "x.png", "--model", "odd.tflite", "--runtime", "c")
    assert (status, out) == (2, "") and "LOG_SOFTMAX" in last_line(err)


def test_a_float_file_is_no_integer_model(run: Run, folder: Path, tmp_path: Path) -> None:
    for kind in ("c", "mcu", "wasm"):
        status, _, err = run("export", kind, "out", "--model", folder / "model.tflite")
        assert status == 2 and "expected one int8 output, got float32" in last_line(err)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty, 0 bytes"), (b"not a model at all", "expected a .tflite model")],
)
def test_files_that_are_no_model(content: bytes, said: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.tflite").write_bytes(content)
    picture(tmp_path / "x.png")
    for arguments in (("export", "c", "out"), ("predict", "x.png")):
        status, out, err = run(*arguments, "--model", "bad.tflite")
        assert (status, out) == (2, "") and said in last_line(err) and "bad.tflite" in last_line(err)
    assert not (tmp_path / "out").exists()


def test_a_model_cut_short_is_refused(run: Run, folder: Path, tmp_path: Path) -> None:
    whole = (folder / "model_int8.tflite").read_bytes()
    for share in (0.1, 0.5, 0.9):
        (tmp_path / "cut.tflite").write_bytes(whole[: int(share * len(whole))])
        status, _, err = run("export", "c", "out", "--model", "cut.tflite", "--kernels", "plain")
        assert status == 2 and "cut.tflite" in last_line(err)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_place_that_cannot_be_written_to(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    status, _, err = run("export", "wasm", "locked/out", "--model", folder)
    assert status == 2 and "cannot be made" in last_line(err)


def test_folder_errors_are_value_errors() -> None:
    assert issubclass(FolderError, ValueError) and set(exporting.KINDS) == set(WRITTEN)


# ---------------------------------------------------------------- predict


def test_predict_says_verdict_logit_and_steps(run: Run, folder: Path, tmp_path: Path) -> None:
    from textbook_code.deploy import images

    files = [picture(tmp_path / f"{i}.png", seed=i) for i in range(3)]
    status, out, err = run("predict", *[file.name for file in files], "--model", folder)
    assert status == 0 and "textbook-code:" not in err
    said = runtimes.decide(folder, np.stack([images.load(file) for file in files]), "c")
    lines = out.splitlines()
    assert lines[0].split() == ["picture", "verdict", "logit", "steps"]
    for line, file, each in zip(lines[1:], files, said, strict=True):
        verdict = "a person" if each.person else "no person"
        assert line.split() == [file.name, *verdict.split(), f"{each.logit:+.2f}", f"{each.steps:+d}"]


@pytest.mark.parametrize("runtime", ["torch", "litert", "tflm", "numpy", "c", "wasm"])
def test_predict_in_each_runtime(runtime: str, run: Run, folder: Path, tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    status, out, err = run("predict", "x.png", "--model", folder, "--runtime", runtime)
    assert status == 0, err
    *_, logit = out.splitlines()[1].removesuffix(" ").split()[:4]
    want = runtimes.decide(folder, images_of(tmp_path / "x.png"), "torch")[0].logit
    assert abs(float(logit) - want) < 0.2


def images_of(*paths: Path) -> np.ndarray:
    from textbook_code.deploy import images

    return np.stack([images.load(path) for path in paths])


def test_predict_with_all_runtimes_gives_the_table(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: runtimes.RUNTIMES[name] for name in ("torch", "numpy", "c", "cortex-m7")}
    monkeypatch.setattr(runtimes, "RUNTIMES", few)
    monkeypatch.setenv("PATH", str(Path("/usr/bin")))
    from textbook_code.deploy import mcu

    def missing() -> str:
        raise mcu.EmulatorMissingError("qemu-system-arm is not installed: apt-get install qemu-system-arm")

    monkeypatch.setattr(mcu, "_qemu", missing)
    picture(tmp_path / "x.png")
    status, out, _ = run("predict", "x.png", "--model", folder, "--runtime", "all")
    assert status == 0
    assert "verdicts" in out and "numpy" in out
    assert "cortex-m7: not run: " in out


def test_an_upright_picture_and_a_turned_one_get_one_answer(run: Run, folder: Path, tmp_path: Path) -> None:
    upright = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(upright).save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "b.png", exif=exif)
    _, out, _ = run("predict", "a.png", "b.png", "--model", folder)
    first, second = (line.split()[1:] for line in out.splitlines()[1:])
    assert first == second


def test_pictures_that_cannot_be_read_are_named_and_the_others_answered(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    good = picture(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    frames = [Image.new("RGB", (40, 40), (v, 0, 0)) for v in (0, 250)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    bad = ["text.png", "empty.png", "cut.png", "moving.gif", "gone.png"]
    status, out, err = run("predict", *bad, "good.png", "--model", folder)
    assert status == 2
    assert [line.split()[0] for line in out.splitlines()] == ["picture", "good.png"]
    lines = [line for line in err.splitlines() if line.startswith("textbook-code: ")]
    assert len(lines) == len(bad) and all(name in line for name, line in zip(bad, lines, strict=True))
    assert "holds 2 pictures; say which one" in lines[3]
    status, out, _ = run("predict", "moving.gif", "--frame", 1, "--model", folder)
    assert status == 0 and "moving.gif" in out
    status, out, err = run("predict", *bad, "--model", folder)
    assert (status, out) == (2, "")


def test_pictures_of_every_mode_and_size(run: Run, folder: Path, tmp_path: Path) -> None:
    names = []
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16"):
        for width, height in ((1, 1), (31, 33), (200, 7)):
            plain = Image.new("RGB", (width, height), (200, 120, 40))
            names.append(f"{mode.replace(';', '')}-{width}.{'tiff' if mode == 'CMYK' else 'png'}")
            plain.convert("L" if mode == "I;16" else mode).convert(mode).save(tmp_path / names[-1])
    status, out, err = run("predict", *names, "--model", folder)
    assert status == 0, err
    assert [line.split()[0] for line in out.splitlines()[1:]] == names


def test_predict_with_an_unknown_runtime(run: Run, folder: Path, tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    status, out, err = run("predict", "x.png", "--model", folder, "--runtime", "cobol")
    assert (status, out) == (2, "")
    assert "runtime: got 'cobol', expected one of torch, onnx" in last_line(err)
    status, out, err = run("predict", "x.png", "--model", folder / "model_int8.tflite", "--runtime", "torch")
    assert (status, out) == (2, "") and "holds no float model" in last_line(err)
    status, _, err = run("predict", "x.png", "--model", folder, "--frame", -1)
    assert status == 2 and "frame: expected a number from 0, got -1" in last_line(err)
