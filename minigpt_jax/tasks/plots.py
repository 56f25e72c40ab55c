"""Plots of what classifiers do. They need matplotlib (extra plot)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from minigpt_jax.runs.plots import import_matplotlib, readable

MAX_NUMBERED = 20  # classes; with more, the counts would be too small to read


def draw_confusion(counts_CC: np.ndarray, classes: Sequence[str]) -> Any:
    """A figure of `Classifier.confusion`. The colour is the share of the true class: rare classes show as well as others."""
    Figure, font_manager = import_matplotlib()
    num_classes = len(classes)
    figure = Figure(figsize=(2.5 + 0.45 * num_classes, 2 + 0.45 * num_classes), layout="constrained")
    axes = figure.subplots()
    share_CC = counts_CC / np.maximum(counts_CC.sum(axis=1, keepdims=True), 1)
    colours = axes.imshow(np.sqrt(share_CC), cmap="Blues", vmin=0, vmax=1)  # the root makes one mistake visible
    if num_classes <= MAX_NUMBERED:
        for (row, column), count in np.ndenumerate(counts_CC):
            if count:
                colour = "white" if share_CC[row, column] > 0.3 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=9)
    names, style = readable(classes, font_manager)
    axes.set_xticks(range(num_classes), names, rotation=90 if max(map(len, names)) > 2 else 0, **style)
    axes.set_yticks(range(num_classes), names, **style)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    total = counts_CC.sum()
    title = f"{counts_CC.trace()} of {total} right ({counts_CC.trace() / max(total, 1):.1%})"
    axes.set_title(title, loc="left", fontsize=11)
    bar = figure.colorbar(colours, ax=axes, label="share of the true class", shrink=0.8)
    bar.set_ticks([0, 0.1**0.5, 0.5, 1], labels=["0", "0.1", "0.25", "1"])
    return figure


def draw_attention(image_HWC: np.ndarray, weights_LHN: np.ndarray, title: str) -> Any:
    """A figure of `ImageClassifier.attention`: the image, then for each layer how much attention of the class token, in the
    mean over heads, each patch gets. All layers have the same scale."""
    Figure, font_manager = import_matplotlib()
    num_layers, _, num_patches = weights_LHN.shape
    side = round(num_patches**0.5)
    weights_LN = weights_LHN.mean(axis=1)
    figure = Figure(figsize=(2.4 * (num_layers + 1) + 0.6, 2.9), layout="constrained")
    first, *others = figure.subplots(1, num_layers + 1)
    size = image_HWC.shape[0]
    pixels = image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC
    grey = image_HWC.mean(axis=-1)
    first.imshow(pixels, cmap="gray", vmin=0, vmax=255)
    [title], style = readable([title], font_manager)
    first.set_title(title, fontsize=10, **style)
    for layer, axes in enumerate(others):
        axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
        shown = axes.imshow(
            weights_LN[layer].reshape(side, side), cmap="inferno", alpha=0.75, vmin=0, vmax=weights_LN.max(),
            extent=(-0.5, size - 0.5, size - 0.5, -0.5), interpolation="nearest",
        )  # fmt: skip
        axes.set_title(f"layer {layer + 1}: {weights_LN[layer].sum():.0%} on patches", fontsize=10)
    for axes in (first, *others):
        axes.set_axis_off()
    figure.colorbar(shown, ax=others, label="attention", shrink=0.8)
    return figure
