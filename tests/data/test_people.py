"""Pictures of people: splits without leaks, augmentation that keeps what it must, readers, bad input."""

from __future__ import annotations

import importlib
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from textbook_code.data.people import (
    EDGE,
    SOURCES,
    SPLITS,
    Pictures,
    augment,
    backgrounds,
    cifar100_people,
    combine,
    examination,
    from_folder,
    load,
    model_input,
    pedestrian_scene,
    visual_wake_words,
)
from textbook_code.data.people import sources as rules
from textbook_code.data.people.pedestrians import Find, _overlap, _split, _tracked, make
from textbook_code.data.sources import fetch
from textbook_code.training.binary_metrics import balanced_accuracy

EXTRACT = Path(rules.__file__).parent.parent / "pedestrians"
VIDEOS = (
    Path("/usr/share/doc/opencv-doc/examples/data/vtest.avi"),
    Path("/usr/share/opencv4/samples/data/vtest.avi"),
)


def some(n: int = 6, *, alpha: int | None = None, seed: int = 0) -> Pictures:
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 4, EDGE, EDGE), generator=g, dtype=torch.uint8)
    if alpha is not None:
        pixels[:, 3] = alpha
    return Pictures(pixels, torch.arange(n) % 2 == 0, [f"g{i}" for i in range(n)], "made")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The sources and their splits


@pytest.mark.parametrize("source", ["emoji", "pedestrians", "faces"])
def test_no_group_and_no_picture_crosses_a_split(source: str) -> None:
    parts = {split: load(source, split) for split in SPLITS}
    for a in SPLITS:
        assert len(parts[a]) and parts[a].source == source
        assert 0.2 < parts[a].labels.float().mean() < 0.8
        for b in SPLITS:
            if a < b:
                assert not set(parts[a].groups) & set(parts[b].groups)
                prints = [{p.numpy().tobytes() for p in parts[x].pixels} for x in (a, b)]
                assert not prints[0] & prints[1]


def test_the_test_split_of_emoji_is_large_and_holds_about_a_fifth() -> None:
    sizes = [len(load("emoji", split)) for split in SPLITS]
    assert sizes[2] >= 1000
    assert 0.12 < sizes[2] / sum(sizes) < 0.3


def test_skin_tones_genders_directions_and_fonts_of_an_emoji_are_one_concept() -> None:
    entries = json.loads((fetch("emoji-google") / "emoji.json").read_text("utf-8"))
    by_name = {e["short_name"]: e for e in entries}
    for same in (
        ("woman-running", "man-running", "runner", "woman_running_facing_right"),
        ("male-artist", "female-artist", "artist"),
        ("man_and_woman_holding_hands", "woman-kiss-man", "couple_with_heart"),
        ("clock1", "clock1230"),
        ("man", "woman", "older_woman", "baby", "adult", "person_with_blond_hair", "red_haired_man"),
    ):
        assert len({rules.concept(by_name[name]) for name in same}) == 1, same
    different = ("runner", "walking", "artist", "dog", "cat", "pizza", "man", "princess")
    assert len({rules.concept(by_name[name]) for name in different}) == len(different)
    persons = {name: rules.is_person(by_name[name]) for name in ("surfer", "dancer", "dog", "cat", "house")}
    assert persons == {"surfer": True, "dancer": True, "dog": False, "cat": False, "house": False}
    for name in ("smile", "ear", "wave", "dolls", "statue_of_liberty", "flag-at", "footprints", "man-boy"):
        assert rules.is_person(by_name[name]) is None, name


def test_emoji_lie_whole_in_the_middle_and_photographs_fill_everything() -> None:
    opacity = load("emoji", "test").pixels[:, 3]
    assert not opacity[:, :2].any() and not opacity[:, :, -2:].any()
    assert (opacity[:, 2:-2, 2:-2].amax((1, 2)) > 200).all()
    for source in ("pedestrians", "faces", "photographs"):
        assert (load(source, "test").pixels[:, 3] == 255).all()


def test_ready_made_emoji_are_those_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from a file that is damaged."""
    want = load("emoji", "validation")
    drawn = (want.pixels.permute(0, 2, 3, 1).numpy(), want.labels.numpy(), want.groups)
    monkeypatch.setattr(rules, "_draw_emoji", lambda: drawn)
    monkeypatch.setattr(rules.store, "cache_root", lambda: tmp_path / "cache")
    for _ in range(3):
        rules._emoji.cache_clear()
        pictures, _ = rules._emoji()
        assert torch.equal(pictures.pixels, want.pixels) and pictures.groups == want.groups
        (kept,) = (tmp_path / "cache").iterdir()
        kept.write_bytes(kept.read_bytes()[:1000])
    rules._emoji.cache_clear()


def test_faces_are_grey_and_photographs_are_for_examination_alone() -> None:
    faces = load("faces", "test")
    assert len(faces) == 60 and int(faces.labels.sum()) == 30
    assert torch.equal(faces.pixels[:, 0], faces.pixels[:, 1])
    photographs = load("photographs", "test")
    assert set(photographs.groups) == {"astronaut", "camera", "chelsea", "coffee", "rocket"}
    for group, label in zip(photographs.groups, photographs.labels.tolist(), strict=True):
        assert label == (group in ("astronaut", "camera"))
    with pytest.raises(ValueError, match="too few to train on; expected 'test', got 'train'"):
        load("photographs", "train")


def test_backgrounds_come_from_photographs_that_no_test_has() -> None:
    assert not {name.split(".")[0] for name in rules._GROUNDS} & set(load("photographs", "test").groups)
    grounds = backgrounds()
    assert grounds.dtype == torch.uint8 and grounds.shape[1:] == (3, 48, 48) and len(grounds) > 100


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("cats", "train", "source: expected one of emoji, pedestrians, faces, photographs, got 'cats'"),
        ("emoji", "dev", "split: expected one of train, validation, test, got 'dev'"),
    ],
)
def test_unknown_names(source: str, split: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(source, split)
    assert SOURCES[0] == "emoji"


# Pedestrians


def rows() -> list[dict[str, Any]]:
    return json.loads((EXTRACT / "pedestrians.json").read_text("utf-8"))["crops"]


def test_every_pedestrian_has_its_own_place_without_anyone() -> None:
    persons = [row for row in rows() if row["person"]]
    places = [row for row in rows() if not row["person"]]
    assert [p["box"] for p in persons] == [p["box"] for p in places]
    assert [p["split"] for p in persons] == [p["split"] for p in places]
    assert all(a["frame"] != b["frame"] for a, b in zip(persons, places, strict=True))


def test_training_and_test_of_pedestrians_share_neither_place_nor_time() -> None:
    def squares(split: str) -> list[tuple[float, ...]]:
        return [Find(r["frame"], *r["box"], score=1.0).square for r in rows() if r["split"] == split]

    def times(split: str) -> list[int]:
        return [r["frame"] for r in rows() if r["split"] == split]

    assert max(s[2] for s in squares("test")) < min(s[0] for s in squares("train"))
    assert max(s[2] for s in squares("test")) < min(s[0] for s in squares("validation"))
    assert max(times("train")) + 40 <= min(times("test") + times("validation"))


def test_the_extract_is_small_and_says_where_it_is_from() -> None:
    assert sum(file.stat().st_size for file in EXTRACT.iterdir()) < 1.5e6
    about = json.loads((EXTRACT / "pedestrians.json").read_text("utf-8"))
    assert "Apache-2.0" in about["licence"] and about["found"] == 657
    people = sum(row["person"] for row in about["crops"])
    assert about["found"] == people + sum(about["lost"].values())
    assert "Apache-2.0" in (EXTRACT / "README.md").read_text("utf-8")


def test_the_mean_colour_tells_pedestrians_from_random_grass_better_than_from_their_own_place() -> None:
    """What the same squares are for: the ground alone gives little away."""
    test = load("pedestrians", "test")
    mean = model_input(examination(test)).mean((2, 3))
    green = mean[:, 1] - (mean[:, 0] + mean[:, 2]) / 2
    assert abs(balanced_accuracy(green - green.median(), test.labels) - 0.5) < 0.12


def test_the_scene_is_the_places_own() -> None:
    """Each negative resembles its square of the median frame, and a pedestrian does not."""
    scene, crops = pedestrian_scene()
    assert scene.shape == (3, 288, 384) and crops == rows()
    far: dict[bool, list[float]] = {True: [], False: []}
    for split in SPLITS:
        pictures = load("pedestrians", split)
        here = [row for row in crops if row["split"] == split]
        for picture_, row in zip(pictures.pixels, here, strict=True):
            left, top, right, bottom = (round(v / 2) for v in Find(0, *row["box"], score=1.0).square)
            square = scene[None, :, top:bottom, left:right].float()
            square = torch.nn.functional.interpolate(square, (EDGE, EDGE), mode="bilinear")
            far[row["person"]].append((square[0] - picture_[:3]).abs()[:, 6:-6, 12:-12].mean().item())
    assert max(far[False]) < 14
    assert np.median(far[True]) > 25


def test_walks_go_on_over_a_gap_and_two_people_stay_two() -> None:
    def find(frame: int, x: int) -> Find:
        return Find(frame, x, 100, 50, 100, 1.0)

    walk = [find(0, 100), find(0, 300), find(5, 120), find(5, 290), find(15, 160), find(40, 200)]
    assert [f.track for f in _tracked(walk)] == [0, 1, 0, 1, 0, 2]
    assert _overlap(find(0, 100), find(0, 125)) == 0.5
    assert _overlap(find(0, 100), find(0, 400)) == 0


def test_borders_drop_what_lies_across_and_walks_stay_in_one_split() -> None:
    def find(frame: int, x: int, track: int) -> Find:
        return Find(frame, x, 100, 50, 100, 1.0, track)

    finds = [
        find(0, 600, 0),  # early and right: training
        find(0, 200, 1),  # early and left: nowhere
        find(600, 445, 2),  # across the border
        find(600, 200, 3),  # late and left: test
        find(600, 600, 3),  # the same walk, on the other side
        find(605, 210, 3),
        find(520, 600, 4),  # between the times
        find(0, 0, 5),  # out of the frame
    ]
    kept, lost = _split(finds, 768, 576)
    assert [(f.track, f.x, split) for f, split in kept] == [
        (0, 600, "train"), (3, 200, "test"), (3, 210, "test"),
    ]  # fmt: skip
    assert lost == Counter(
        {
            "to the borders in place and time": 3,
            "because their walk is in another split": 1,
            "at the edge of the frame": 1,
        }
    )


def test_a_missing_or_unreadable_video_is_named(tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'opencv-python-headless<5'")
    with pytest.raises(FileNotFoundError, match=r"video: .*none\.avi is not there"):
        make(tmp_path / "none.avi", tmp_path / "out")
    (tmp_path / "bad.avi").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"OpenCV reads no frame of .*bad\.avi"):
        make(tmp_path / "bad.avi", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    command = importlib.import_module("textbook_code.data.people.__main__")
    assert command.main(["pedestrians", str(tmp_path / "none.avi"), str(tmp_path / "out")]) == 1


@pytest.mark.slow
def test_the_pedestrians_can_be_made_again_from_the_video(tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'opencv-python-headless<5'")
    video = next((path for path in VIDEOS if path.is_file()), None)
    if video is None:
        pytest.skip("vtest.avi is not there: apt-get install opencv-doc, and unpack it where it is packed")
    about = make(video, tmp_path)
    committed = json.loads((EXTRACT / "pedestrians.json").read_text("utf-8"))
    if about["opencv"] == committed["opencv"]:
        assert about == committed
    boxes = [{(r["frame"], *r["box"]) for r in x["crops"]} for x in (about, committed)]
    assert len(boxes[0] & boxes[1]) > 0.9 * len(boxes[1])


# Examination and augmentation


def test_the_examination_is_composed_in_integers_on_a_ground_of_the_pictures_own() -> None:
    pictures = some()
    got = examination(pictures)
    for picture, image in zip(pictures.pixels, got, strict=True):
        ground = zlib.crc32(picture.numpy().tobytes()).to_bytes(4, "big")[:3]
        y, x = 7, 30
        for c in range(3):
            p, a = int(picture[c, y + 2, x + 2]), int(picture[3, y + 2, x + 2])
            assert int(image[y, x, c]) == (a * p + (255 - a) * ground[c] + 127) // 255
    assert torch.equal(examination(pictures[[4, 1]]), got[[4, 1]])
    assert got.dtype == torch.uint8 and got.shape == (6, 32, 32, 3) and got.is_contiguous()


def test_the_examination_of_a_photograph_is_its_middle() -> None:
    pictures = some(alpha=255)
    want = pictures.pixels[:, :3, 2:-2, 2:-2].permute(0, 2, 3, 1)
    assert torch.equal(examination(pictures), want)


def test_the_examined_bytes_of_the_book_do_not_change() -> None:
    """The sum over the test pictures; every runtime is compared on them."""
    assert zlib.crc32(examination(load("pedestrians", "test")).numpy().tobytes()) == PEDESTRIANS


PEDESTRIANS = 2386902619


def test_model_input_is_exact_and_reaches_both_ends() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8).repeat(12).view(1, 32, 32, 3)
    x = model_input(bytes_)
    assert x.shape == (1, 3, 32, 32) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 127 / 128
    signed = (bytes_ ^ 0x80).view(torch.int8).permute(0, 3, 1, 2)
    assert torch.equal(x * 128, signed.float())


def test_without_strength_augmentation_is_the_examination_of_a_photograph() -> None:
    pictures = some(alpha=255)
    got = augment(pictures, seeded(), strength=0.0)
    assert (got - model_input(examination(pictures))).abs().max() < 1e-5


def test_augmentation_is_repeatable_within_range_and_never_the_same_twice() -> None:
    pictures = some(40)
    a, b = augment(pictures, seeded(1)), augment(pictures, seeded(1))
    assert torch.equal(a, b) and a.shape == (40, 3, 32, 32)
    assert a.min() >= -1 and a.max() <= 127 / 128
    g = seeded(2)
    assert not torch.equal(augment(pictures, g), augment(pictures, g))
    state = torch.get_rng_state()
    augment(pictures, seeded())
    assert torch.equal(state, torch.get_rng_state())


def centre_of_mass(images: Tensor) -> Tensor:
    weight = images.sum(1) + 3
    weight = weight / weight.sum((1, 2), keepdim=True)
    at = torch.arange(32.0)
    return torch.stack([(weight.sum(1) * at).sum(1), (weight.sum(2) * at).sum(1)], 1)


def test_augmentation_moves_mirrors_and_relights() -> None:
    """A white spot at the right, on black: where it goes, and what it looks like then."""
    pixels = torch.zeros(1, 4, EDGE, EDGE, dtype=torch.uint8)
    pixels[:, 3] = 255
    pixels[:, :3, 16:20, 24:28] = 255
    pictures = Pictures(pixels, torch.tensor([True]), ["spot"], "made")[[0] * 400]
    got = augment(pictures, seeded())
    brightest = got.mean(1).flatten(1).argmax(1)
    column, row = brightest % 32, brightest // 32
    mirrored = (column < 16).float().mean()
    assert 0.4 < mirrored < 0.6
    far = torch.where(column < 16, 31 - column, column).float()
    assert 1.2 < far.std() < 4 and 1.2 < row.float().std() < 4
    assert got.mean((1, 2, 3)).std() > 0.08  # brightness
    grey = (got.amax(1) - got.amin(1)).mean((1, 2)) < 0.005
    assert not grey.all()


def test_a_transparent_picture_is_its_ground_and_an_opaque_one_hides_it() -> None:
    clear, opaque = some(60, alpha=0), some(60, alpha=255)
    grounds = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    grounds[:, 0] = 255
    red = torch.tensor([127 / 128, -1.0, -1.0]).view(3, 1, 1)
    got = augment(clear, seeded(), backgrounds=grounds, strength=0.0)
    shown = ((got - red).abs().amax((1, 2, 3)) < 1e-5).float().mean()
    assert 0.15 < shown < 0.55  # a third
    spread = got.flatten(2).std(-1).amax(1)
    assert 0.4 < (spread < 1e-5).float().mean() < 0.95  # plain or the red one
    without = augment(opaque, seeded(3), strength=0.0)
    assert (without - augment(opaque, seeded(3), backgrounds=grounds, strength=0.0)).abs().max() < 1e-6


def test_beyond_its_edge_a_photograph_is_mirrored_and_not_black() -> None:
    pictures = some(200, alpha=255)
    pictures.pixels[:, :3] = 200
    got = augment(pictures, seeded(), strength=1.0)
    inside = got.flatten(2)
    assert (inside.amin(-1) > -0.6).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strength": -1.0}, "strength: expected at least 0, got -1.0"),
        ({"strength": float("nan")}, "strength: expected at least 0, got nan"),
        ({"backgrounds": torch.zeros(2, 3, 40, 40)}, "expected uint8"),
        ({"backgrounds": torch.zeros(2, 3, 40, 31, dtype=torch.uint8)}, "h, w ≥ 32"),
        ({"backgrounds": torch.zeros(0, 3, 40, 40, dtype=torch.uint8)}, "m ≥ 1"),
    ],
)
def test_bad_augmentation(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        augment(some(), seeded(), **wrong)


# Pictures themselves


def test_pictures_are_picked_by_slice_by_place_and_by_mask() -> None:
    pictures = some(5)
    assert pictures[1:4].groups == ["g1", "g2", "g3"]
    assert pictures[[3, 0]].groups == ["g3", "g0"]
    assert torch.equal(pictures[torch.tensor([3, 0])].pixels, pictures.pixels[[3, 0]])
    assert pictures[pictures.labels].groups == ["g0", "g2", "g4"]
    assert len(pictures[torch.zeros(5, dtype=torch.bool)]) == 0
    with pytest.raises(ValueError, match="expected 5 booleans"):
        pictures[torch.ones(4, dtype=torch.bool)]


def test_combined_pictures_keep_their_groups_apart() -> None:
    both = combine(some(2), some(3, seed=1))
    assert both.source == "made+made" and len(both) == 5 and both.groups[0] == "made/g0"
    assert combine(some(2)).groups == ["g0", "g1"]
    with pytest.raises(ValueError, match="expected at least one"):
        combine()


def test_bad_pictures() -> None:
    good = some(2)
    with pytest.raises(TypeError, match=r"pixels: expected a tensor of torch\.uint8, got torch\.float32"):
        Pictures(good.pixels.float(), good.labels, good.groups, "x")
    with pytest.raises(TypeError, match=r"labels: expected a tensor of torch\.bool, got list"):
        Pictures(good.pixels, [True, False], good.groups, "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pixels: expected shape \(n, 4, 36, 36\), got \(2, 3, 36, 36\)"):
        Pictures(good.pixels[:, :3], good.labels, good.groups, "x")
    with pytest.raises(ValueError, match="a label and a group for each of 2 pictures"):
        Pictures(good.pixels, good.labels, ["one"], "x")
    with pytest.raises(TypeError, match=r"images: expected a tensor of torch\.uint8"):
        model_input(torch.zeros(1, 32, 32, 3))
    with pytest.raises(ValueError, match="got \\(1, 3, 32, 32\\)"):
        model_input(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


# Other people's pictures


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (48, 40)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_a_folder_of_two_folders(tmp_path: Path) -> None:
    for name in ("person", "other"):
        (tmp_path / name).mkdir()
    picture((255, 0, 0), (200, 50)).save(tmp_path / "person" / "a.png")
    turned = Image.new("RGB", (60, 40))
    turned.paste((0, 0, 255), (0, 0, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right: left becomes top
    turned.save(tmp_path / "person" / "b.jpg", exif=exif, quality=95)
    picture((0, 255, 0), (5, 7)).convert("P").save(tmp_path / "other" / "c.gif")
    (tmp_path / "other" / "notes.txt").write_text("no picture")
    got = from_folder(tmp_path)
    assert got.labels.tolist() == [True, True, False] and got.source == "folder"
    assert got.groups == ["person/a.png", "person/b.jpg", "other/c.gif"]
    assert got.pixels[0, :, 0, 0].tolist() == [255, 0, 0, 255]
    assert got.pixels[1, 2, 4, 18] > 200 > 60 > got.pixels[1, 2, 31, 18]
    assert got.pixels[2, :, 20, 20].tolist() == [0, 255, 0, 255]
    named = from_folder(tmp_path, person="other", other="person")
    assert named.labels.tolist() == [True, False, False]


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected the folders person and other"):
        from_folder(tmp_path)
    for name in ("person", "other"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="person holds no picture"):
        from_folder(tmp_path)
    (tmp_path / "person" / "a.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(ValueError, match=r"a\.png is no picture that can be read"):
        from_folder(tmp_path)


@pytest.fixture(scope="module")
def datasets() -> Any:
    return pytest.importorskip(
        "datasets", reason='datasets is not installed: pip install "textbook_code[train]"'
    )


def cifar(datasets: Any, folder: Path, *, named: bool = True, **columns: Any) -> Path:
    """Parquet files as the hub has them; 12 training and 5 test pictures, among them the five of people."""
    names = ["apple", "baby", "bear", "boy", "girl", "man", "rocket", "woman"]
    codes = [1, 3, 4, 5, 7] if named else [2, 11, 35, 46, 98]
    noise = np.random.default_rng(0).integers(0, 256, (17, 32, 32, 3), dtype=np.uint8)
    label = datasets.ClassLabel(names=names) if named else datasets.Value("int64")
    features = datasets.Features({"img": datasets.Image(), "fine_label": label})
    for split, places, labels in (
        ("train", range(12), [0, 1, 2, 6, 0, 2, 6, 0, 2, 6, 0, 2]),
        ("test", range(12, 17), codes),
    ):
        table = datasets.Dataset.from_dict(
            {"img": [Image.fromarray(noise[i]) for i in places], "fine_label": labels}, features
        )
        for old, new in columns.items():
            table = table.rename_column(old, new)
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


def test_cifar_100_by_names_and_by_numbers(datasets: Any, tmp_path: Path) -> None:
    got = cifar100_people(cifar(datasets, tmp_path), "test")
    assert got.labels.all() and len(got) == 5 and got.source == "cifar100"
    noise = np.random.default_rng(0).integers(0, 256, (17, 32, 32, 3), dtype=np.uint8)
    assert torch.equal(examination(got), torch.from_numpy(noise[12:]))  # untouched
    assert torch.equal(got.pixels[:, :3, 1, 2:-2], got.pixels[:, :3, 2, 2:-2])  # a mirrored margin
    train, validation = (cifar100_people(tmp_path, split) for split in ("train", "validation"))
    assert len(train) == 11 and validation.groups == ["validation-9"]
    assert train.labels.tolist() == [i == 1 for i in range(12) if i != 9]
    (tmp_path / "numbers").mkdir()
    assert cifar100_people(cifar(datasets, tmp_path / "numbers", named=False), "test").labels.all()


def test_bad_cifar(datasets: Any, tmp_path: Path) -> None:
    cifar(datasets, tmp_path, fine_label="coarse")
    with pytest.raises(ValueError, match="expected a column fine_label, found img, coarse"):
        cifar100_people(tmp_path)
    with pytest.raises(ValueError, match="split: expected train, validation or test, got 'dev'"):
        cifar100_people(tmp_path, "dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no test\*\.parquet"):
        cifar100_people(tmp_path / "empty")


def wake_words(datasets: Any, folder: Path, *, names: list[str] | None) -> Path:
    category = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "objects": datasets.Sequence(
                {"bbox": datasets.Sequence(datasets.Value("float32"), length=4), "category": category}
            ),
        }
    )
    objects = [  # the picture has 100 × 80 = 8,000 pixels, so that 40 are the least
        {"bbox": [[0, 0, 8, 5]], "category": [0]},
        {"bbox": [[0, 0, 8, 4.9]], "category": [0]},
        {"bbox": [[0, 0, 90, 70]], "category": [1]},
        {"bbox": [], "category": []},
        {"bbox": [[0, 0, 6, 6], [0, 0, 4, 4], [5, 5, 50, 50]], "category": [0, 0, 1]},
        {"bbox": [[0, 0, 50, 50], [5, 5, 10, 10]], "category": [1, 0]},
    ]
    images = [picture((40 * i, 0, 0), (100, 80)) for i in range(6)]
    datasets.Dataset.from_dict({"image": images, "objects": objects}, features).to_parquet(
        str(folder / "test.parquet")
    )
    return folder


def test_visual_wake_words_from_boxes(datasets: Any, tmp_path: Path) -> None:
    got = visual_wake_words(wake_words(datasets, tmp_path, names=["person", "dog"]))
    assert got.labels.tolist() == [True, False, False, False, False, True]
    assert got.pixels[:, 0, 18, 18].tolist() == [0, 40, 80, 120, 160, 200]
    assert len(visual_wake_words(tmp_path, limit=2)) == 2
    assert visual_wake_words(tmp_path, person="dog").labels.tolist() == [
        False, False, True, False, True, True,
    ]  # fmt: skip
    (tmp_path / "n").mkdir()
    wake_words(datasets, tmp_path / "n", names=None)
    assert visual_wake_words(tmp_path / "n", person=0).labels.tolist() == got.labels.tolist()
    with pytest.raises(ValueError, match=r"category has no name 'person'; give the category's number"):
        visual_wake_words(tmp_path / "n")


def test_visual_wake_words_from_ready_made_labels(datasets: Any, tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["none", "person"])}
    )
    table = datasets.Dataset.from_dict({"image": [picture((9, 9, 9))] * 3, "label": [1, 0, 1]}, features)
    table.to_parquet(str(tmp_path / "test.parquet"))
    assert visual_wake_words(tmp_path).labels.tolist() == [True, False, True]
    table.remove_columns("label").to_parquet(str(tmp_path / "test.parquet"))
    with pytest.raises(ValueError, match="expected a column label or objects, found image"):
        visual_wake_words(tmp_path)
