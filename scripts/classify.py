"""Names the class of an image or a text with a trained classifier: the three most probable classes, one on a line.

python scripts/train.py --config vit_digits
python scripts/classify.py --workdir runs/vit_digits --image seven.png
python scripts/classify.py --workdir runs/vit_digits --image black_on_white.png --invert
python scripts/classify.py --workdir runs/vit_digits --image seven.png --plot attention.png
python scripts/classify.py --workdir runs/bert_play --text "O, I am slain!"

The image may have any size: it is resized to that of the training images. --plot draws which patches the class token attends
to (extra plot). Reading images needs Pillow (extra images).
"""

import logging
from pathlib import Path

from absl import flags

import minigpt_jax as mg
from minigpt_jax import cli
from minigpt_jax.data.images import read_image
from minigpt_jax.errors import UsageError
from minigpt_jax.files import local_path
from minigpt_jax.runs import plots
from minigpt_jax.tasks.plots import draw_attention

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default: the newest under runs/)")
IMAGE = flags.DEFINE_string("image", None, "PNG or JPEG file")
TEXT = flags.DEFINE_string("text", None, "the text, for a run of text classification")
INVERT = flags.DEFINE_bool("invert", False, "exchange light and dark: the digits of vit_digits are white on black")
PLOT = flags.DEFINE_string("plot", None, "PNG file for the attention of the class token")
KERNELS = cli.define_kernels_flag()

NUM_SHOWN = 3
MAX_DIFFERENCE = 100  # of mean pixels, from 0 to 255; digits of vit_digits differ from their mean by at most 50

log = logging.getLogger("minigpt_jax.classify")


def main() -> None:
    if (IMAGE.value is None) == (TEXT.value is None):
        raise UsageError("give either a PNG or JPEG file with --image, or a text with --text")
    workdir = WORKDIR.value or cli.newest_run()
    if TEXT.value is None:
        classify_image(workdir, IMAGE.value)
        return
    if INVERT.value or PLOT.value:
        raise UsageError(f"--{'invert' if INVERT.value else 'plot'} is for images: omit it")
    show(mg.load_text_classifier(workdir, kernels=KERNELS.value).probabilities(TEXT.value))


def show(probabilities: dict[str, float]) -> None:
    for name, probability in list(probabilities.items())[:NUM_SHOWN]:
        print(f"{probability:7.2%}  {name}")


def classify_image(workdir: Path, image: str) -> None:
    path, png = local_path(image), None if PLOT.value is None else plots.check_png("plot", PLOT.value)
    classifier = mg.load_image_classifier(workdir, kernels=KERNELS.value)
    size = classifier.data.image_size
    image_HWC, (width, height) = read_image(path, size, classifier.data.color)
    if (width, height) != (size, size):
        log.info("%s: resized from %d × %d to %d × %d pixels", path, width, height, size, size)
    image_HWC = 255 - image_HWC if INVERT.value else image_HWC
    if abs((brightness := image_HWC.mean()) - classifier.brightness) > MAX_DIFFERENCE:
        log.warning(
            "The image is %s than the training images (mean pixel %.0f, theirs %.0f), which may mislead the model: try %s.",
            "lighter" if brightness > classifier.brightness else "darker", brightness, classifier.brightness,
            "without --invert" if INVERT.value else "--invert",
        )  # fmt: skip
    probabilities = classifier.probabilities(image_HWC)
    show(probabilities)
    if png is not None:
        best = next(iter(probabilities))
        plots.save(draw_attention(image_HWC, classifier.attention(image_HWC), f"{best} ({probabilities[best]:.0%})"), png)


if __name__ == "__main__":
    cli.run(main, __doc__)
