"""64-bit Arm: the static program, and ONNX Runtime's answers beside those of this machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from textbook_code import checkpoints
from textbook_code.deploy import arm, compilers, graph
from textbook_code.deploy.mcu import EmulatorMissingError


def needs_emulator() -> None:
    try:
        arm.emulator()
    except EmulatorMissingError as error:
        pytest.skip(str(error))


def needs_zig() -> None:
    try:
        compilers.zig()
    except compilers.CompilerMissingError as error:
        pytest.skip(str(error))


def pictures(n: int) -> np.ndarray:
    images = np.random.default_rng(1).integers(0, 256, (n, 32, 32, 3), np.uint8)
    images[0] = 0
    return images


@pytest.fixture(scope="module")
def model() -> Path:
    return checkpoints.path("person-vit") / "model_int8.tflite"


@pytest.fixture(scope="module")
def program(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs_zig()
    return arm.build(model, tmp_path_factory.mktemp("arm") / "person", kernels="fast")


@pytest.mark.slow  # the first time, zig builds a C library for the target
def test_the_program_gives_the_bits_of_this_machine(program: Path, model: Path, tmp_path: Path) -> None:
    needs_emulator()
    expected = compilers.CNet(model).logits(pictures(20))
    assert np.array_equal(arm.run(program, pictures(20)), expected)
    assert len(set(expected.tolist())) > 2
    header = program.read_bytes()[:20]
    assert header[:5] == b"\x7fELF\x02"
    assert int.from_bytes(header[18:20], "little") == 183  # AArch64
    assert list(program.parent.iterdir()) == [program]
    again = arm.build(model, tmp_path / "again", kernels="fast")
    assert again.read_bytes() == program.read_bytes(), "nothing of the place where it was built is in it"


@pytest.mark.slow
def test_a_program_that_is_none_or_gets_no_whole_image(program: Path, tmp_path: Path) -> None:
    needs_emulator()
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    with pytest.raises((arm.ArmError, OSError)):
        arm.run(tmp_path / "text", pictures(1))
    with pytest.raises(FileNotFoundError, match="program: there is no"):
        arm.run(tmp_path / "none", pictures(1))
    done = subprocess.run([*arm.emulator(), program], input=bytes(3072 + 5), capture_output=True)
    assert done.returncode == 1
    assert len(done.stdout.split()) == 1
    with pytest.raises(arm.ArmError, match=r"did not come to an end within 0\.001 s"):
        arm.run(program, pictures(20), timeout=0.001)


def test_an_arm_needs_no_emulator_and_others_are_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert arm.emulator() == []
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(EmulatorMissingError, match="apt-get install qemu-user-static"):
        arm.emulator()


def test_a_damaged_model_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.tflite").write_bytes(b"")
    with pytest.raises(graph.GraphError, match=r"empty\.tflite"):
        arm.build(tmp_path / "empty.tflite", tmp_path / "program")
    assert [path.name for path in tmp_path.iterdir()] == ["empty.tflite"]


def test_bad_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="images: expected uint8"):
        arm.run(tmp_path / "program", np.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match=r"got \(1, 3, 32, 32\)"):
        arm.run_onnx(tmp_path, tmp_path / "x.onnx", np.zeros((1, 3, 32, 32), np.uint8))
    with pytest.raises(FileNotFoundError, match="holds no Arm Python; setup makes one"):
        arm.run_onnx(tmp_path, tmp_path / "x.onnx", pictures(1))


def test_setup_says_what_is_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileExistsError, match="exists"):
        arm.setup(tmp_path)
    other = {"VERSION_CODENAME": "noble"}
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: other)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    with pytest.raises(arm.ArmError, match=r"expected Debian 12 \(bookworm\).* got noble"):
        arm.setup(tmp_path / "new")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert arm.main(["setup", str(tmp_path / "new")]) == 2
    assert "apt-get is not installed" in capsys.readouterr().err
    monkeypatch.undo()

    def broken(partial: Path) -> None:
        partial.mkdir()
        raise arm.ArmError("no network")

    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"VERSION_CODENAME": "bookworm"})
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(arm, "_unpack_debian", broken)
    with pytest.raises(arm.ArmError, match="no network"):
        arm.setup(tmp_path / "new")
    assert not list(tmp_path.iterdir()), "nothing half-made is left"


@pytest.mark.slow
def test_onnx_runtime_says_the_same_on_an_arm(model: Path, tmp_path: Path) -> None:
    """int8 to the last bit, float to rounding; needs Debian's and PyPI's servers."""
    needs_emulator()
    if shutil.which("apt-get") is None or not os.environ.get("TEXTBOOK_ARM"):
        pytest.skip("TEXTBOOK_ARM is not set: the test downloads 150 MB from Debian and PyPI")
    onnx = pytest.importorskip("textbook_code.deploy.onnx")
    from textbook_code.models.vision.tiny_vit import TinyViT

    network = TinyViT.from_pretrained("person-vit").float().eval()
    images = pictures(40)
    onnx.export(network, tmp_path / "fp32.onnx")
    onnx.quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", images, name="noise, for the test")
    place = arm.setup(tmp_path / "arm")
    for kind, tolerance in (("int8", 0.0), ("fp32", 1e-5)):
        here = onnx.OnnxRuntime(tmp_path / f"{kind}.onnx").logits(images[:10])
        there = arm.run_onnx(place, tmp_path / f"{kind}.onnx", images[:10])
        assert np.abs(here - there).max() <= tolerance, kind
