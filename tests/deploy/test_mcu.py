"""Firmware: a project as a reader gets it, and what it does on three cores under QEMU."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from textbook_code import checkpoints
from textbook_code.deploy import compilers, graph, mcu

ALL_CORES = tuple(board.cpu for board in mcu.BOARDS.values())


def needs(*programs: str) -> None:
    """Skip, by name, what this machine cannot run."""
    packages = {
        "qemu-system-arm": "qemu-system-arm",
        "arm-none-eabi-gcc": "gcc-arm-none-eabi",
        "make": "make",
        "arm-none-eabi-size": "binutils-arm-none-eabi",
    }
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: apt-get install {packages[program]}")


def pictures(n: int, seed: int = 0) -> np.ndarray:
    """Noise, a smooth ramp, black, white and the two extremes side by side: between them every byte."""
    images = np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), np.uint8)
    ramp = np.arange(3072, dtype=np.uint32).reshape(32, 32, 3) * 255 // 3071
    board = np.indices((32, 32)).sum(0)[..., None] % 2 * np.full(3, 255)
    special = [ramp, np.zeros((32, 32, 3)), np.full((32, 32, 3), 255), board]
    for place, image in enumerate(special[:n]):
        images[place] = image
    return images


@pytest.fixture(scope="module")
def model() -> Path:
    return checkpoints.path("person-vit") / "model_int8.tflite"


@pytest.fixture(scope="module")
def expected(model: Path) -> np.ndarray:
    """What the same C says on this machine."""
    return compilers.CNet(model).logits(pictures(6))


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> mcu.Project:
    return mcu.project(model, tmp_path_factory.mktemp("firmware") / "person", kernels="plain")


@pytest.fixture
def copy(made: mcu.Project, tmp_path: Path) -> Callable[..., mcu.Project]:
    """The project again, with some text of one file replaced."""

    def replaced(file: str, old: str, new: str) -> mcu.Project:
        folder = tmp_path / "changed"
        shutil.copytree(made.folder, folder, ignore=shutil.ignore_patterns("build"))
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))
        return mcu.Project.open(folder)

    return replaced


def test_the_project_is_whole(made: mcu.Project, model: Path) -> None:
    names = {path.relative_to(made.folder).as_posix() for path in made.folder.rglob("*") if path.is_file()}
    assert {"Makefile", "README.md", "flash.ld", "main.c", "startup.c", "memory.c", "io_uart.c"} <= names
    assert {"net/net.h", "net/net.c", "tflite_micro/model_data.cc", "tflite_micro/op_resolver.h"} <= names
    assert not [name for name in names if re.search(r"@[A-Z_]+@", (made.folder / name).read_text())]
    assert mcu.Project.open(made.folder) == made
    assert list(made.folder.parent.iterdir()) == [made.folder], "nothing half-written lies beside it"


def test_the_model_for_tflite_micro_is_the_file(made: mcu.Project, model: Path) -> None:
    text = (made.folder / "tflite_micro/model_data.cc").read_text()
    assert bytes(int(byte, 16) for byte in re.findall(r"0x([0-9a-f]{2})", text)) == model.read_bytes()
    assert f"g_person_model_size = {model.stat().st_size};" in text
    assert "alignas(16)" in text
    resolver = (made.folder / "tflite_micro/op_resolver.h").read_text()
    kinds = {op.kind for op in graph.read(model).ops}
    added = re.findall(r"ops\.(Add\w+)\(\)", resolver)
    assert f"MicroMutableOpResolver<{len(kinds)}>" in resolver
    assert len(added) == len(set(added)) == len(kinds)
    assert {name.removeprefix("Add").upper() for name in added} == {kind.replace("_", "") for kind in kinds}


@pytest.fixture(scope="module")
def fast(model: Path, tmp_path_factory: pytest.TempPathFactory) -> mcu.Project:
    return mcu.project(model, tmp_path_factory.mktemp("fast") / "person", kernels="fast")


@pytest.mark.parametrize("cpu", ALL_CORES)
def test_each_core_gives_the_bits_of_the_host(fast: mcu.Project, expected: np.ndarray, cpu: str) -> None:
    needs("arm-none-eabi-gcc", "qemu-system-arm")
    ran = mcu.run(fast, pictures(6), cpu=cpu)
    assert ran.cpu == cpu
    assert np.array_equal(ran.logits, expected)
    assert ran.logits.dtype == np.int8
    assert len(set(expected.tolist())) > 2, "pictures that all give the same would show nothing"
    assert ran.instructions == ran.per_image.max() > 1_000_000
    assert ran.per_image.min() > 0.9 * ran.per_image.max()
    assert 64 < ran.stack_bytes < fast.stack
    assert ran.static_ram_bytes <= 48 * 1024
    assert ran.flash_bytes <= fast.flash
    header = (fast.folder / "net/net.h").read_text()
    macs = int(re.findall(r"([\d,]+) multiply", header)[0].replace(",", ""))
    if cpu != "cortex-m3":  # which has no dual multiply-accumulate
        assert ran.instructions <= 3.5 * macs


def test_the_plain_kernels_give_the_same_bits_for_more(
    made: mcu.Project, fast: mcu.Project, expected: np.ndarray
) -> None:
    needs("arm-none-eabi-gcc", "qemu-system-arm")
    plain = mcu.run(made, pictures(6))
    assert np.array_equal(plain.logits, expected)
    assert plain.instructions > 2 * mcu.run(fast, pictures(1)).instructions


def test_instructions_are_counted_again_the_same(fast: mcu.Project) -> None:
    needs("arm-none-eabi-gcc", "qemu-system-arm")
    first, again = (mcu.run(fast, pictures(2)).per_image for _ in range(2))
    assert np.array_equal(first, again)


def test_the_serial_port_gives_the_same(fast: mcu.Project, expected: np.ndarray) -> None:
    needs("arm-none-eabi-gcc", "qemu-system-arm")
    over_the_wire = mcu.run(fast, pictures(2), io="uart", timeout=120)
    assert np.array_equal(over_the_wire.logits, expected[:2])
    assert over_the_wire.per_image == pytest.approx(mcu.run(fast, pictures(2)).per_image, rel=1e-4)
    with pytest.raises(ValueError, match="profile: expected io"):
        mcu.run(fast, pictures(1), io="uart", profile=True)


def test_the_steps_add_up(made: mcu.Project, expected: np.ndarray) -> None:
    needs("arm-none-eabi-gcc", "qemu-system-arm")
    plain, profiled = (mcu.run(made, pictures(2), profile=profile) for profile in (False, True))
    assert plain.steps == {}
    assert np.array_equal(profiled.logits, expected[:2])
    total = sum(cost.instructions for cost in profiled.steps.values())
    assert total == pytest.approx(plain.per_image.mean(), rel=0.01)
    macs = sum(cost.macs for cost in profiled.steps.values())
    assert f"{macs:,} multiply-accumulates" in (made.folder / "net/net.h").read_text()
    assert max(profiled.steps, key=lambda kind: profiled.steps[kind].instructions) == "FULLY_CONNECTED"


def test_make_builds_the_same_program(made: mcu.Project, expected: np.ndarray, tmp_path: Path) -> None:
    needs("arm-none-eabi-gcc", "qemu-system-arm", "make")
    program = mcu.build(made).read_bytes()
    shutil.copytree(made.folder, tmp_path / "by-hand", ignore=shutil.ignore_patterns("build"))
    (tmp_path / "by-hand/images.rgb").write_bytes(pictures(2).tobytes())
    by_hand = tmp_path / "by-hand/build/firmware-cortex-m7.elf"
    done = subprocess.run(
        ["make", "run"], cwd=tmp_path / "by-hand", capture_output=True, text=True, check=True
    )
    assert by_hand.read_bytes() == program
    assert "warning" not in done.stderr
    said = [int(q) for q in re.findall(r"logit (-?\d+)", done.stdout + done.stderr)]
    assert said == expected[:2].tolist()
    given = tmp_path / "by-hand/images.rgb"
    for damage, message in (
        (lambda: given.write_bytes(bytes(5)), "not whole"),
        (given.unlink, "no such file"),
    ):
        damage()
        done = subprocess.run(["make", "run"], cwd=given.parent, capture_output=True, text=True)
        assert done.returncode != 0
        assert message in done.stdout + done.stderr


def test_sizes_are_those_of_the_binutils(made: mcu.Project) -> None:
    needs("arm-none-eabi-gcc", "arm-none-eabi-size")
    program = mcu.build(made)
    done = subprocess.run(["arm-none-eabi-size", program], capture_output=True, text=True, check=True)
    text, data, bss = map(int, done.stdout.splitlines()[1].split()[:3])
    assert mcu.elf_sizes(program) == (text + data, data + bss)


@pytest.mark.slow
def test_zig_makes_firmware_too(model: Path, tmp_path: Path, expected: np.ndarray) -> None:
    needs("qemu-system-arm")
    zig = mcu.project(model, tmp_path / "zig", toolchain="zig", kernels="plain")
    for cpu in ALL_CORES:
        assert np.array_equal(mcu.run(zig, pictures(6), cpu=cpu).logits, expected), cpu


def test_a_wrong_bit_is_seen(
    made: mcu.Project, copy: Callable[..., mcu.Project], expected: np.ndarray
) -> None:
    """The comparison above can fail: a sign too many in the image changes the logits."""
    needs("arm-none-eabi-gcc", "qemu-system-arm")
    wrong = copy("main.c", "const int8_t logit = person", "rgb[0] ^= 0x80, rgb[1500] ^= 0xff;\n"
                 "        const int8_t logit = person")  # fmt: skip
    got = mcu.run(wrong, pictures(6)).logits
    assert not np.array_equal(got, expected)


def test_a_stack_that_is_too_small_is_a_fault(made: mcu.Project, copy: Callable[..., mcu.Project]) -> None:
    needs("arm-none-eabi-gcc", "qemu-system-arm")
    small = copy("flash.ld", f". += {made.stack};", ". += 160;")
    with pytest.raises(mcu.FirmwareError, match="stack that is too small"):
        mcu.run(small, pictures(1))


def test_a_forgotten_bss_or_data_is_seen(copy: Callable[..., mcu.Project], made: mcu.Project) -> None:
    """Start-up code that does not copy the variables with a value breaks a program; so the copying works."""
    needs("arm-none-eabi-gcc", "qemu-system-arm")
    spoilt = copy("startup.c", "*to++ = *from++;", "to++, from++;")
    with pytest.raises(mcu.FirmwareError):
        mcu.run(spoilt, pictures(1), timeout=60)


def test_a_program_that_does_not_fit_says_by_how_much(model: Path, tmp_path: Path) -> None:
    needs("arm-none-eabi-gcc")
    small = mcu.project(model, tmp_path / "flash", flash=65536, kernels="plain")
    with pytest.raises(
        mcu.FirmwareError, match=r"FLASH: the program needs [\d,]+ bytes more than the 65,536"
    ):
        mcu.build(small)
    assert not list((small.folder / "build").iterdir())
    small = mcu.project(model, tmp_path / "ram", ram=8192, kernels="plain")
    with pytest.raises(mcu.FirmwareError, match=r"RAM: the program needs [\d,]+ bytes more than the 8,192"):
        mcu.build(small)


def test_a_program_that_does_not_compile_or_end(copy: Callable[..., mcu.Project]) -> None:
    needs("arm-none-eabi-gcc", "qemu-system-arm")
    endless = copy("main.c", "return 0;", "for (;;) {\n    }")
    with pytest.raises(mcu.FirmwareError, match=r"did not come to an end within 3 s"):
        mcu.run(endless, pictures(1), timeout=3)
    (endless.folder / "main.c").write_text("no C at all")
    with pytest.raises(mcu.FirmwareError, match=r"did not build.*main\.c"):
        mcu.build(endless)


def test_what_is_in_the_way_stays(model: Path, made: mcu.Project, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="force=True"):
        mcu.project(model, made.folder)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="exists"):
        mcu.project(model, tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis/chapter.tex").read_text() == "years of work"
    old = mcu.project(model, tmp_path / "again", kernels="plain")
    (old.folder / "mine.txt").write_text("x")
    new = mcu.project(model, tmp_path / "again", kernels="plain", board="mps2-an385", force=True)
    assert not (new.folder / "mine.txt").exists()
    assert mcu.Project.open(new.folder).board == "mps2-an385"


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    for name, content in (("empty.tflite", b""), ("text.tflite", b"not a model at all, but a text")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(graph.GraphError, match=name.replace(".", r"\.")):
            mcu.project(tmp_path / name, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        mcu.project(tmp_path / "none.tflite", tmp_path / "out")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mcu, "_write_tflite_micro", stop)
    with pytest.raises(KeyboardInterrupt):
        mcu.project(model, tmp_path / "out", kernels="plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.tflite", "text.tflite"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"board": "uno"}, "board: expected one of mps2-an500, mps2-an386, mps2-an385, got 'uno'"),
        ({"toolchain": "msvc"}, "toolchain: expected one of gcc, zig, got 'msvc'"),
        ({"kernels": "best"}, "kernels: expected one of"),
        ({"stack": 100}, "stack: expected a multiple of 8"),
        ({"stack": 65536}, "stack: expected less than the ram of 65,536 bytes, got 65,536"),
        ({"flash": 100}, "flash: expected a multiple of 8 bytes, at least 1,024, got 100"),
    ],
)
def test_bad_arguments_are_named(model: Path, tmp_path: Path, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        mcu.project(model, tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((2, 32, 32, 3), np.float32), TypeError, "images: expected uint8, got float32"),
        (np.zeros((32, 32, 3), np.uint8), ValueError, r"images: expected shape \(n, 32, 32, 3\)"),
        (np.zeros((1, 3, 32, 32), np.uint8), ValueError, r"got \(1, 3, 32, 32\)"),
        (np.zeros((0, 32, 32, 3), np.uint8), ValueError, "with n ≥ 1"),
    ],
)
def test_bad_images_are_named(made: mcu.Project, images: np.ndarray, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        mcu.run(made, images)


def test_missing_programs_are_named(
    made: mcu.Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(mcu.EmulatorMissingError, match="apt-get install qemu-system-arm"):
        mcu.run(made, pictures(1))
    with pytest.raises(compilers.CompilerMissingError, match="apt-get install gcc-arm-none-eabi"):
        mcu.build(made)
    with pytest.raises(mcu.FirmwareError, match="holds no firmware project"):
        mcu.Project.open(tmp_path)
    with pytest.raises(ValueError, match="cpu: expected one of cortex-m7, cortex-m4, cortex-m3"):
        mcu.build(made, cpu="cortex-m99")


def test_what_is_no_program_has_no_sizes(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"not an ELF file")
    with pytest.raises(mcu.FirmwareError, match="no 32-bit little-endian ELF"):
        mcu.elf_sizes(tmp_path / "text")
    header = b"\x7fELF\x01\x01" + bytes(26) + (1000).to_bytes(4, "little") + bytes(10)
    (tmp_path / "cut").write_bytes(header + (40).to_bytes(2, "little") + (3).to_bytes(2, "little"))
    with pytest.raises(mcu.FirmwareError, match="cut short"):
        mcu.elf_sizes(tmp_path / "cut")
