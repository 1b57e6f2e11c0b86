"""Digits, CIFAR, folders of pictures and a user's own source become tensors; classes become tasks."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from funlora_lab import continual, data
from funlora_lab.data import pictures
from funlora_lab.errors import LabError
from funlora_lab.presets import preset
from funlora_lab.seeds import Shuffle, Streams, seed_of
from funlora_lab.store import Run, read_json, read_tensors

FORMATS = ("png", "jpg", "gif", "bmp", "webp", "tif")
SHAPES = ("circle", "cross", "square")


def drawn(shape: str, i: int) -> Image.Image:
    """A dark shape on a light ground; size, colours and mode vary with ``i``."""
    width, height = 12 + 5 * (i % 7), 12 + 7 * (i % 5)
    mode = ("RGB", "L", "RGBA", "P", "CMYK", "1")[i % 6]
    image = Image.new("RGB", (width, height), (200 + i, 210, 255 - i))
    pen = ImageDraw.Draw(image)
    side = min(width, height) - 4
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    if shape == "circle":
        pen.ellipse(box, fill=(20, 2 * i, 40))
    elif shape == "square":
        pen.rectangle(box, outline=(40, 20, 2 * i), width=3)
    else:
        pen.line(box, fill=(2 * i, 40, 20), width=3)
        pen.line((left, top + side, left + side, top), fill=(2 * i, 40, 20), width=3)
    return image.convert(mode)


def save(image: Image.Image, path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix.removeprefix(".")
    image.convert(image.mode if kind in ("png", "tif") and image.mode != "CMYK" else "RGB").save(path)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """3 classes x 40 pictures of mixed sizes and formats: 30 to train, 10 to test."""
    root = tmp_path_factory.mktemp("shapes")
    for shape in SHAPES:
        for i in range(40):
            part = "train" if i < 30 else "test"
            save(drawn(shape, i), root / part / shape / f"{i:02d}.{FORMATS[i % len(FORMATS)]}")
    return root


def tiny(root, **changes):
    """A folder of one picture a class, small enough to break in every way."""
    for part in ("train", "test"):
        for name in ("a", "b"):
            save(drawn("circle", 0), root / part / name / "0.png")
    return preset("smoke").but(data="folder", data_root=str(root), split="1-1", **changes)


def test_a_folder_of_mixed_sizes_and_formats_goes_through_the_whole_protocol(shapes, tmp_path):
    experiment = preset("smoke").but(data="folder", data_root=str(shapes), split="1-1", channels=3, image_size=16)
    events = []
    result = continual.run(experiment, events.append, home=tmp_path)
    assert events[0]["classes"] == list(SHAPES)
    assert len(result["accuracy"]) == 3
    assert 0 <= result["LA"] <= 1
    assert sum(map(sum, result["confusion"])) == 30
    assert result["provenance"]["data"]["name"] == f"folder {shapes.name}"


def test_a_finished_run_is_not_passed_off_as_one_of_changed_pictures(tmp_path):
    experiment = tiny(tmp_path / "pictures", base_images=32, adapter_images=16, samples_per_class=2, chunk=2)
    first = continual.run(experiment, home=tmp_path)["LA"]
    assert continual.run(experiment, home=tmp_path)["LA"] == first
    added = tmp_path / "pictures" / "train" / "a" / "new.png"
    save(drawn("cross", 1), added)
    with pytest.raises(LabError, match="changed since"):
        continual.run(experiment, home=tmp_path)
    added.parent.parent.parent.rename(tmp_path / "away")
    assert continual.run(experiment, home=tmp_path)["LA"] == first, "results outlive the pictures"


def test_a_second_reading_comes_from_the_cache_and_a_changed_picture_is_noticed(shapes, tmp_path, monkeypatch):
    experiment = preset("smoke").but(data="folder", data_root=str(shapes), split="1-1")
    first = data.load(experiment, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "read_picture", lambda *_: pytest.fail("a picture was read again"))
        assert data.load(experiment, tmp_path).fingerprint == first.fingerprint
    for stored in (tmp_path / "images").glob("*.safetensors"):
        stored.write_bytes(stored.read_bytes()[:-7])
    assert data.load(experiment, tmp_path).fingerprint == first.fingerprint, "a damaged cache is read anew"
    other = tiny(tmp_path / "other")
    before = data.load(other, tmp_path).fingerprint
    save(drawn("square", 3), tmp_path / "other" / "train" / "a" / "0.png")
    assert data.load(other, tmp_path).fingerprint != before


def test_the_folder_is_found_through_the_environment(shapes, tmp_path, monkeypatch):
    experiment = preset("smoke").but(data="folder", split="1-1")
    monkeypatch.setenv("FUNLORA_DATA", str(shapes))
    assert data.load(experiment, tmp_path).classes == SHAPES
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "smoke").symlink_to(shapes)
    monkeypatch.setenv("FUNLORA_DATA", str(tmp_path / "data"))
    assert data.load(experiment, tmp_path).classes == SHAPES


def test_a_picture_of_the_right_size_is_kept_pixel_by_pixel_and_a_wide_one_is_cut_to_its_centre(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "exact.png")
    assert torch.equal(data.read_picture(tmp_path / "exact.png", 8, 3), torch.from_numpy(pixels).permute(2, 0, 1))
    wide = Image.new("L", (40, 8), 0)
    wide.paste(255, (16, 0, 24, 8))
    wide.save(tmp_path / "wide.png")
    assert data.read_picture(tmp_path / "wide.png", 8, 1).min() == 255


def test_transparent_is_white_sixteen_bits_keep_their_range_and_photographs_stand_upright(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert data.read_picture(tmp_path / "clear.png", 8, 3).min() == 255
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert data.read_picture(tmp_path / "deep.png", 8, 1).unique().tolist() == [128]
    lying = Image.new("L", (8, 8), 0)
    lying.paste(255, (0, 0, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: what is left goes up
    lying.save(tmp_path / "lying.png", exif=exif)
    upright = data.read_picture(tmp_path / "lying.png", 8, 1)[0]
    assert upright[:4].min() == 255
    assert upright[4:].max() == 0


def _truncate(root):
    Image.effect_noise((64, 64), 90).save(root / "train" / "a" / "1.jpg")
    whole = (root / "train" / "a" / "1.jpg").read_bytes()
    (root / "train" / "a" / "1.jpg").write_bytes(whole[: len(whole) // 2])


BAD_FOLDERS = {
    "no folder at all": (lambda root: root.rename(root.with_name("gone")), "no folder"),
    "no test part": (lambda root: (root / "test").rename(root / "exam"), "no folder"),
    "a class without test pictures": (lambda root: save(drawn("cross", 0), root / "train" / "c" / "0.png"), "class c"),
    "a class without training": (lambda root: save(drawn("cross", 0), root / "test" / "c" / "0.png"), "class c"),
    "an empty class": (lambda root: (root / "train" / "a" / "0.png").unlink(), "train/a is empty"),
    "a text among pictures": (lambda root: (root / "train" / "a" / "note.txt").write_text("hello"), "note.txt"),
    "half a picture": (_truncate, "train/a/1.jpg"),
    "a folder in a class": (lambda root: (root / "train" / "a" / "more").mkdir(), "more is not a file"),
    "a name that leaves": (lambda root: (root / "train" / "a").rename(root / "train" / "x\\..\\a"), "escape"),
    "a name of two lines": (lambda root: (root / "train" / "a").rename(root / "train" / "a\nb"), "escape"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_every_bad_folder_has_its_sentence(name, tmp_path):
    experiment = tiny(tmp_path / "pictures")
    spoil, said = BAD_FOLDERS[name]
    spoil(tmp_path / "pictures")
    with pytest.raises(LabError, match=said.replace("\\", "\\\\")) as caught:
        continual.run(experiment, home=tmp_path / "home")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "home").glob("smoke-*")), "nothing of the run is written"


@pytest.mark.parametrize(("change", "said"), [({"split": "2-2"}, "2 classes"), ({"channels": 2}, "channels=2")])
def test_a_setting_that_does_not_fit_the_folder_is_named(change, said, tmp_path):
    with pytest.raises(LabError, match=said):
        data.load(tiny(tmp_path).but(**change), tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_missing_cifar_says_where_it_belongs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FUNLORA_DATA", str(tmp_path / "from-environment"))
    with pytest.raises(LabError, match=r"from-environment.*unpack cifar-10.*python.tar.gz"):
        data.load(preset(name))
    with pytest.raises(LabError, match=r"elsewhere.*data_root or FUNLORA_DATA"):
        data.load(preset(name).but(data_root=str(tmp_path / "elsewhere")))


@pytest.mark.parametrize(("name", "labels"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_is_read_as_torchvision_reads_it(name, labels, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if name == "cifar10" else CIFAR100
    classes = int(name.removeprefix("cifar"))
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    batches = {}
    for batch, _ in kind.train_list + kind.test_list:
        batches[batch] = {"data": rng.integers(0, 256, (classes, 3072), dtype=np.uint8), labels: list(range(classes))}
        (folder / batch).write_bytes(pickle.dumps(batches[batch]))
    names = [f"class {i}" for i in range(classes)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    dataset = data.load(preset(name).but(data_root=str(tmp_path)))
    assert dataset.classes == tuple(names)
    assert len(dataset.train) == classes * len(kind.train_list)
    assert torch.equal(dataset.test.labels, torch.arange(classes))
    expected = torch.from_numpy(batches[kind.test_list[0][0]]["data"]).reshape(-1, 3, 32, 32)
    assert torch.equal(dataset.test.pixels, expected)
    small = data.load(preset(name).but(data_root=str(tmp_path), image_size=16)).test.pixels
    assert small.shape == (classes, 3, 16, 16)
    means = torch.nn.functional.avg_pool2d(expected.float(), 2)
    distance = (small.float() - means).abs().mean()
    assert distance < 0.6 * (means - means.mean()).abs().mean(), "smaller images must show the same pictures"


def test_unlabelled_pictures_train_the_base_first_and_it_goes_on_from_there(shapes, tmp_path):
    plain = preset("smoke").but(data="folder", data_root=str(shapes), split="1-1", base_images=64)
    pretrained = plain.but(pretrain_root=str(shapes / "train"), pretrain_images=128)
    events = []
    continual.run(pretrained, events.append, home=tmp_path)
    losses = [event for event in events if event["event"] == "loss" and event["stage"] in ("pretrain", "base")]
    stages = [event["stage"] for event in losses]
    assert stages == sorted(stages, reverse=True)
    assert {event["stage"]: event["steps"] for event in losses} == {"pretrain": 4, "base": 2}
    assert len(data.load(pretrained, tmp_path).unlabelled) == 90

    still = pretrained.but(base_lr=1e-30, score_after="none")  # a base that does not move shows where it starts
    continual.run(still, home=tmp_path / "still")
    weights = {}
    for folder in (tmp_path / "still" / "artefacts").glob("network-*"):
        name = read_json(folder / "inputs.json")["name"]
        weights[name] = read_tensors(folder / "result.safetensors")[0]
    for name, value in weights["base"].items():
        start = weights["pretrain"][name].expand_as(value)
        assert torch.allclose(value, start, rtol=0, atol=1e-20), f"{name} does not start where pre-training ended"


def test_pretraining_leaves_the_names_of_other_runs_alone(tmp_path):
    digits = preset("digits")
    assert not [name for name in digits.identity if name.startswith("pretrain")]
    other = Run.of(digits.but(pretrain_root="pictures"), tmp_path).folder
    assert other != Run.of(digits, tmp_path).folder
    with pytest.raises(LabError, match="pretrain_images"):
        digits.but(pretrain_images=5)


@pytest.mark.parametrize("make", [False, True])
def test_a_missing_or_empty_folder_of_unlabelled_pictures_is_named(make, tmp_path):
    if make:
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "labels.json").write_text("{}")
    experiment = preset("smoke").but(pretrain_root=str(tmp_path / "pictures"))
    with pytest.raises(LabError, match="pretrain_root"):
        continual.run(experiment, home=tmp_path / "home")


def test_a_data_source_of_one_s_own_is_one_function(tmp_path, monkeypatch):
    monkeypatch.setitem(data.SOURCES, "stripes", None)  # taken out again afterwards

    @data.data_source("stripes", "dark and light stripes")
    def stripes(experiment, cache):
        labels = torch.arange(40) % 2
        pixels = (labels * 200).to(torch.uint8)[:, None, None, None].repeat(1, 1, 8, 8)
        pixels[..., ::2] += torch.arange(40, dtype=torch.uint8)[:, None, None, None]
        return ("dark", "light"), data.Images(pixels, labels), data.Images(pixels[:4], labels[:4])

    experiment = preset("smoke").but(data="stripes", split="1-1")
    dataset = data.load(experiment, tmp_path)
    assert (dataset.name, dataset.classes) == ("stripes", ("dark", "light"))
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (34, 6, 4)
    assert data.SOURCES["stripes"].about == "dark and light stripes"
    with pytest.raises(LabError, match=r"image_size=16 .*accepted for data=stripes is image_size=8"):
        data.load(experiment.but(image_size=16), tmp_path)
    with pytest.raises(LabError, match=r"data=strips: accepted is one of digits, .*stripes"):
        data.load(experiment.but(data="strips"), tmp_path)


@pytest.fixture(scope="module")
def digits():
    return data.load(preset("digits"))


def test_digits_are_divided_without_overlap_and_with_every_class_in_every_part(digits):
    parts = (digits.train, digits.valid, digits.test)
    assert sum(len(part) for part in parts) == 1797
    assert len(digits.test) == 360
    for part in parts:
        assert torch.bincount(part.labels, minlength=10).min() > 0
    assert round(len(digits.valid) / 1437, 2) == 0.15


def test_bytes_and_floats_are_inverse(digits):
    pixels = digits.test.pixels
    floats = data.to_floats(pixels)
    assert (floats.min().item(), floats.max().item()) == (-1, 1)
    assert torch.equal(data.to_bytes(floats), pixels)


def test_fingerprint_changes_with_one_pixel(digits):
    pixels = digits.train.pixels.clone()
    pixels[0, 0, 0, 0] += 1
    other = replace(digits, train=data.Images(pixels, digits.train.labels))
    assert other.fingerprint != digits.fingerprint


@given(st.integers(2, 30), st.integers(0, 5))
def test_tasks_cover_every_class_once(classes, seed):
    experiment = preset("digits").but(split="1-1", class_order=f"shuffled-{seed}")
    assert sorted(cls for task in data.tasks(experiment, classes) for cls in task) == list(range(classes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"split": "3-3"}, "split=3-3"), ({"split": "12-2"}, "split=12-2"), ({"class_order": "0,1,1"}, "class_order")],
)
def test_impossible_divisions_are_named(changes, words):
    with pytest.raises(LabError, match=words):
        data.tasks(preset("digits").but(**changes), 10)


@given(st.integers(1, 50), st.integers(1, 70), st.integers(0, 20))
def test_shuffle_visits_every_item_once_a_pass(n, size, seed):
    shuffle = Shuffle(n, seed, "test")
    steps = -(-3 * n // size)
    visited = torch.cat([shuffle.batch(step, size) for step in range(steps)])[: 3 * n]
    for number in range(3):
        assert sorted(visited[number * n : (number + 1) * n].tolist()) == list(range(n))


def test_shuffle_gives_the_same_batch_without_the_ones_before():
    first = Shuffle(13, 0, "test")
    for step in range(40):
        batch = first.batch(step, 7)
    assert torch.equal(batch, Shuffle(13, 0, "test").batch(39, 7))


def test_counted_streams_are_splitmix64_and_depend_on_their_own_seed_alone():
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    streams = Streams(torch.tensor([7, 1234567, -3]), counted=True)
    first, rest = streams.bits(2), streams.bits(3)
    assert [number % 2**64 for number in torch.cat([first, rest], 1)[1].tolist()] == known
    alone = Streams(torch.tensor([-3]), counted=True)
    assert torch.equal(alone.bits(5)[0], torch.cat([first, rest], 1)[2])


def test_counted_numbers_are_spread_as_pytorch_s_are():
    n, seeds = 200_000, torch.tensor([seed_of(0, "spread", i) for i in range(2)])
    for counted in (True, False):
        streams = Streams(seeds, counted)
        u, z, whole = streams.uniform(n), streams.normal(10, n // 10), streams.integers(9, n)
        assert z.shape == (2, 10, n // 10)
        assert u.min() >= 0
        assert u.max() < 1
        assert (torch.histc(u, 20, 0, 1) / u.numel() - 1 / 20).abs().max() < 1.5e-3
        for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
            assert (z**power).mean().item() == pytest.approx(moment, abs=0.06), power
        assert (z.abs() > 3).float().mean().item() == pytest.approx(0.0027, abs=4e-4)
        assert z[0].flatten().dot(z[1].flatten()).abs() / n < 0.01
        assert z.flatten()[1:].dot(z.flatten()[:-1]).abs() / n < 0.02
        assert sorted(whole.unique().tolist()) == list(range(9))
