"""The table of runtimes: what it counts, what it does where something is missing, and the real ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from textbook_code.deploy import runtimes
from textbook_code.deploy.compilers import CompilerMissingError
from textbook_code.deploy.runtimes import Model, ModelError, Running, Runtime, Table, compare, decide
from textbook_code.models.vision.tiny_vit import TinyViT, TinyViTConfig, TokenBatchNorm

PLANNED = 40


def pictures(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), np.uint8)


def first_byte(images: np.ndarray) -> np.ndarray:
    """An integer runtime whose logit is the first byte of the picture less 128."""
    return (images[:, 0, 0, 0].astype(int) - 128).astype(np.int8)


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Put invented runtimes in the place of the real ones; the output has the step 0.5 and the zero 10."""
    monkeypatch.setattr(Model, "step", (0.5, 10))
    file = tmp_path / "model.tflite"
    file.write_bytes(b"a model")
    monkeypatch.chdir(tmp_path)

    def put(**ways: tuple[str, Callable[[Model], Running]]) -> None:
        made = {name: Runtime(name, name.upper(), numbers, open_) for name, (numbers, open_) in ways.items()}
        monkeypatch.setattr(runtimes, "RUNTIMES", made)

    return put


def opens(logits: Callable[[np.ndarray], np.ndarray], **known: int) -> Callable[[Model], Running]:
    return lambda model: Running(logits, **known)


def refuses(error: Exception) -> Callable[[Model], Running]:
    def open_(model: Model) -> Running:
        raise error

    return open_


# ---------------------------------------------------------------- what is counted


def test_rows_count_verdicts_bits_and_steps(invented: Callable[..., None]) -> None:
    def one_off(images: np.ndarray) -> np.ndarray:
        out = first_byte(images)
        out[0] += 1
        return out

    images = pictures(PLANNED)
    images[0, 0, 0, 0] = 138  # just at the threshold: one step more is another verdict
    images[1, 0, 0, 0] = 148
    exact = (first_byte(images).astype(float) - 10) * 0.5
    invented(
        c=("int8", opens(first_byte, size=100, memory=7, instructions=3)),
        off=("int8", opens(one_off)),
        real=("float32", opens(lambda x: (first_byte(x).astype(np.float32) - 10) * 0.5 + 0.125)),
    )
    table = compare("model.tflite", images)
    assert (table.reference, table.scale, table.zero_point) == ("c", 0.5, 10)
    c, off, real = (table[name] for name in ("c", "off", "real"))
    assert (c.pictures, c.decisions, c.exact, c.lsb) == (PLANNED, PLANNED, PLANNED, 0)
    assert (c.size, c.memory, c.instructions) == (100, 7, 3)
    assert (off.decisions, off.exact, off.lsb) == (PLANNED - 2 + 1, PLANNED - 2, 1)  # two batches of 32
    assert real.exact is None and real.lsb == pytest.approx(0.25)
    assert real.decisions == int(((exact + 0.125 > 0) == (exact > 0)).sum()) < PLANNED
    assert np.array_equal(table.logits["c"], first_byte(images))


def test_a_difference_does_not_wrap_around(invented: Callable[..., None]) -> None:
    invented(
        c=("int8", opens(lambda x: np.full(len(x), -128, np.int8))),
        high=("int8", opens(lambda x: np.full(len(x), 127, np.int8))),
    )
    assert compare("model.tflite", pictures(3))["high"].lsb == 255


def test_accuracy_is_balanced_and_by_source(invented: Callable[..., None]) -> None:
    invented(c=("int8", opens(first_byte)))
    images = pictures(8)
    #            right right right wrong | right wrong wrong right
    images[:, 0, 0, 0] = [200, 200, 200, 200, 0, 0, 200, 200]
    labels = np.array([1, 1, 1, 0, 0, 1, 0, 1], bool)
    table = compare("model.tflite", images, labels, sources=["a"] * 4 + ["b"] * 4)
    assert table["c"].accuracy == {"a": 0.5, "b": 0.5}
    assert compare("model.tflite", images, labels)["c"].accuracy == {
        "all": pytest.approx((4 / 5 + 1 / 3) / 2)
    }
    assert compare("model.tflite", images)["c"].accuracy == {}
    one_class = compare("model.tflite", images, np.ones(8, bool), sources=["a"] * 8)
    assert one_class["c"].accuracy == {}


def test_slow_runtimes_see_a_part_spread_over_all(invented: Callable[..., None]) -> None:
    seen: list[int] = []

    def slow(images: np.ndarray) -> np.ndarray:
        seen.extend(images[:, 0, 0, 1].tolist())
        return first_byte(images)

    images = pictures(50)
    images[:, 0, 0, 1] = np.arange(50)
    labels = images[:, 0, 0, 0] > 138
    invented(c=("int8", opens(first_byte)), slow=("int8", opens(slow)))
    table = compare("model.tflite", images, labels, limits={"slow": 5})
    assert seen == [0, 10, 20, 30, 40]
    row = table["slow"]
    assert (row.pictures, row.decisions, row.exact, row.lsb) == (5, 5, 5, 0)
    assert row.accuracy == {} and table["c"].accuracy == {"all": 1.0}  # not comparable: another set
    with pytest.raises(ValueError, match="limits: expected at least one picture, got 0"):
        compare("model.tflite", images, limits={"slow": 0})


def test_the_reference_runs_even_if_it_is_not_asked_for(invented: Callable[..., None]) -> None:
    invented(other=("int8", opens(first_byte)), c=("int8", opens(first_byte)))
    table = compare("model.tflite", pictures(3), runtimes=["other", "other"])
    assert [row.runtime for row in table.rows] == ["other"] and table.reference == "c"
    assert table["other"].exact == 3
    with pytest.raises(KeyError, match="'c' is not in the table, only other"):
        table["c"]


# ---------------------------------------------------------------- what is missing


def test_what_is_missing_is_a_row_that_says_so(invented: Callable[..., None]) -> None:
    def breaks_late(images: np.ndarray) -> np.ndarray:
        raise CompilerMissingError("qemu is not installed: apt-get install qemu-system-arm")

    invented(
        c=("int8", opens(first_byte)),
        gone=("int8", refuses(ImportError('tool is missing: pip install "textbook_code[deploy]"'))),
        late=("int8", opens(breaks_late)),
        no=("int8", refuses(ValueError("graph: no kernel for GELU in layer 'ffn'\nmore"))),
    )
    table = compare("model.tflite", pictures(2))
    assert table.missing == {
        "gone": 'tool is missing: pip install "textbook_code[deploy]"',
        "late": "qemu is not installed: apt-get install qemu-system-arm",
        "no": "graph: no kernel for GELU in layer 'ffn'",
    }
    row = table["late"]
    assert (row.pictures, row.decisions, row.exact) == (0, None, None)
    text = str(table).splitlines()
    assert text[0].split() == ["runtime", "type", "n", "verdicts", "bits", "LSB"]
    assert text[1].split() == ["c", "int8", "2", "2", "2", "0"]
    assert text[3].split(maxsplit=1) == [
        "late",
        "not run: qemu is not installed: apt-get install qemu-system-arm",
    ]


def test_without_the_reference_another_integer_runtime_takes_its_place(invented: Callable[..., None]) -> None:
    invented(
        real=("float32", opens(lambda x: np.zeros(len(x), np.float32))),
        c=("int8", refuses(ImportError("no compiler"))),
        next=("int8", opens(first_byte)),
    )
    table = compare("model.tflite", pictures(4))
    assert table.reference == "next" and table["next"].exact == 4 and table["c"].missing == "no compiler"


def test_without_any_integer_runtime_nothing_is_compared(invented: Callable[..., None]) -> None:
    invented(
        real=("float32", opens(lambda x: np.zeros(len(x), np.float32))),
        c=("int8", refuses(ImportError("no compiler"))),
    )
    row = compare("model.tflite", pictures(4))["real"]
    assert (row.pictures, row.decisions, row.lsb) == (4, None, None)


def test_an_error_of_ours_is_not_called_missing(invented: Callable[..., None]) -> None:
    invented(c=("int8", refuses(ZeroDivisionError("a bug"))))
    with pytest.raises(ZeroDivisionError):
        compare("model.tflite", pictures(1))


# ---------------------------------------------------------------- the table's looks


def table_of(**known: object) -> Table:
    row = runtimes.Row(
        "c", "C99", "int8", 1000, 1000, 0.0, 1000, {"emoji": 0.93456}, 250_000, None, 12_345_678
    )
    gone = runtimes.Row("cortex-m7", "Cortex-M7", "int8", missing="qemu-system-arm is [not] installed")
    return Table((dataclasses.replace(row, **known), gone), "c", 0.1, 3)


def test_plain_rows_have_one_set_of_keys() -> None:
    rows = table_of().plain()
    assert len({tuple(row) for row in rows}) == 1
    assert rows[0] == {
        "runtime": "c", "type": "int8", "n": "1,000", "verdicts": "1,000", "bits": "1,000",
        "LSB": "0", "emoji": "93.5 %", "bytes": "250,000", "memory": "", "instructions": "12,345,678",
        "missing": "",
    }  # fmt: skip
    assert table_of(lsb=0.126, exact=None).plain()[0]["LSB"] == "0.13"


@pytest.mark.parametrize("width", [72, 80, 200])
def test_no_figure_is_cut_off_in_a_terminal(width: int) -> None:
    from io import StringIO

    from rich.console import Console

    stream = StringIO()
    Console(file=stream, width=width).print(table_of())
    said = stream.getvalue()
    assert all(cell in said for cell in ("12,345,678", "250,000", "93.5 %", "1,000", "c "))
    assert "…" not in said and "[not]" in said
    assert "memory" not in said  # nothing stands in that column


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"images": pictures(2).astype(float)}, TypeError, "images: expected dtype uint8, got float64"),
        ({"images": pictures(2)[:, :31]}, ValueError, r"images: expected shape \(n, 32, 32, 3\), got"),
        ({"images": pictures(0)}, ValueError, r"images: expected shape \(n, 32, 32, 3\), got \(0, 32"),
        ({"labels": np.ones(3, bool)}, ValueError, r"labels: expected shape \(2,\), got \(3,\)"),
        ({"sources": ["a"]}, ValueError, "sources: expected 2 names"),
        ({"runtimes": ["cobol"]}, ValueError, "runtime: got 'cobol', expected one of torch, onnx"),
        ({"runtimes": []}, ValueError, "runtimes: expected at least one"),
        ({"reference": "torch"}, ValueError, "reference: expected a runtime of int8, got 'torch'"),
    ],
)
def test_bad_arguments(changed: dict[str, object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        compare(**({"model": "nowhere", "images": pictures(2), "labels": None} | changed))


def test_models_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"model: got 'no-such-model', expected .* a folder or a \.tflite file"
    ):
        Model("no-such-model")
    with pytest.raises(ModelError, match=r"holds neither model\.safetensors nor model_int8\.tflite"):
        Model(tmp_path)
    (tmp_path / "x.tflite").write_bytes(b"")
    with pytest.raises(ModelError, match=r"x\.tflite is empty, 0 bytes"):
        Model(tmp_path / "x.tflite")
    (tmp_path / "x.onnx").write_bytes(b"abc")
    with pytest.raises(ModelError, match=r"expected a \.tflite file or a folder, got x\.onnx"):
        Model(tmp_path / "x.onnx")
    (tmp_path / "x.tflite").write_bytes(b"abcdefghijkl")
    with pytest.raises(ValueError, match=r"x\.tflite: expected a \.tflite model, with b'TFL3'"):
        Model(tmp_path / "x.tflite").step  # noqa: B018
    with pytest.raises(ModelError, match=r"x\.tflite: holds no float model"):
        Model(tmp_path / "x.tflite").torch  # noqa: B018


def test_what_was_made_goes_with_the_model(tmp_path: Path) -> None:
    (tmp_path / "x.tflite").write_bytes(b"abc")
    model = Model(tmp_path / "x.tflite")
    work = model.work
    assert work.is_dir()
    del model
    assert not work.exists()


# ---------------------------------------------------------------- the real ones


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with loud random weights and statistics, which decides both ways."""
    torch.manual_seed(3)
    config = TinyViTConfig(patch_size=8, d_model=16, num_layers=2, num_heads=2, d_ff=32)
    model = TinyViT(config).eval()
    for module in model.modules():
        if isinstance(module, TokenBatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    x = torch.from_numpy(pictures(64, seed=9)).permute(0, 3, 1, 2)
    with torch.no_grad():
        model.head.weight.mul_(20)
        model.head.bias.sub_(model((x.float() - 128) / 128).median())
    where = tmp_path_factory.mktemp("model")
    model.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    pytest.importorskip("litert_torch")
    pytest.importorskip("ai_edge_quantizer")
    return Model(folder, calibration=pictures(64, seed=9))


@pytest.fixture(scope="module")
def table(model: Model) -> Table:
    names = [name for name in runtimes.RUNTIMES if not name.startswith(("cortex", "aarch64"))]
    return compare(model, pictures(24), runtimes=names)


def test_all_that_comes_from_pypi_runs(table: Table) -> None:
    assert table.missing == {}
    assert {row.pictures for row in table.rows} == {24}


def test_both_verdicts_occur(table: Table) -> None:
    assert 4 < (table.logits["c"] > table.zero_point).sum() < 20


@pytest.mark.parametrize("name", ["numpy", "tflm", "c-fast", "wasm"])
def test_integer_runtimes_give_the_same_bits(table: Table, name: str) -> None:
    assert (table[name].exact, table[name].lsb) == (24, 0)


@pytest.mark.parametrize("name", ["litert", "litert-ref"])
def test_other_kernels_are_within_a_few_steps(table: Table, name: str) -> None:
    """The head of this model is loud, so that a step of its last vector is several of the logit."""
    assert table[name].lsb is not None and table[name].lsb <= 5
    assert table[name].decisions == 24


@pytest.mark.parametrize("name", ["onnx", "litert-float"])
def test_float_runtimes_give_the_floats_of_torch(table: Table, name: str) -> None:
    assert np.abs(table.logits[name] - table.logits["torch"]).max() < 1e-3
    assert table[name].exact is None


def test_what_is_measured_of_the_model(table: Table, model: Model) -> None:
    assert table["torch"].size == 4 * sum(p.numel() for p in model.torch.parameters())
    assert table["tflm"].size == table["litert"].size == model.int8.stat().st_size
    for name in ("tflm", "c", "c-fast", "wasm"):
        assert (table[name].memory or 0) > 1000, name


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("cortex-m4", "cortex-m3")]


@pytest.mark.parametrize("name", ["cortex-m7", "aarch64", *SLOW])
def test_emulated_processors_give_the_same_bits(model: Model, name: str) -> None:
    table = compare(model, pictures(24), runtimes=[name], limits={name: 2})
    row = table[name]
    if row.missing and ("qemu" in row.missing or "gcc" in row.missing):
        pytest.skip(row.missing)
    assert (row.missing, row.pictures, row.exact) == (None, 2, 2)
    if name.startswith("cortex"):
        assert row.instructions and row.size and row.memory


def test_decide_says_person_logit_and_steps(model: Model, table: Table) -> None:
    scale, zero = model.step
    for said, q in zip(decide(model, pictures(24), "c"), table.logits["c"].tolist(), strict=True):
        assert said == runtimes.Decision(q > zero, (q - zero) * scale, q - zero)
    for said, z in zip(decide(model, pictures(24), "torch"), table.logits["torch"].tolist(), strict=True):
        assert said.person == (z > 0) and said.logit == pytest.approx(z, abs=1e-5) and said.steps is None
    with pytest.raises(ValueError, match="runtime: got 'cobol'"):
        decide(model, pictures(1), "cobol")


def test_an_integer_file_alone_has_no_float_rows(model: Model) -> None:
    table = compare(model.int8, pictures(2), runtimes=["torch", "onnx", "numpy", "tflm"], reference="numpy")
    assert set(table.missing) == {"torch", "onnx"}
    assert "holds no float model" in table.missing["torch"]
    assert table["tflm"].exact == 2
