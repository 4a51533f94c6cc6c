"""The commands of `fastdiff` and the scripts that they run. The scripts are imported only when they are used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

SHELLS = ("bash", "zsh", "fish")
"""The shells for which --completion writes a script."""


@dataclass(frozen=True)
class Command:
    """A script: the module whose function `main` reads sys.argv, and one line of help."""

    summary: str
    module: str

    def main(self) -> Callable[[], None]:
        """Import the module, which takes seconds for most, and return its main function."""
        main: Callable[[], None] = import_module(self.module).main
        return main


@dataclass(frozen=True)
class Group:
    """Commands by name, of which the next word chooses one."""

    summary: str
    commands: dict[str, Command | Group]


PREPARE = Group(
    "make a folder of images, or of decoded pixels, to train on",
    {
        "cifar10": Command("from CIFAR-10's archive", "fastdiff.datasets.cifar10"),
        "imagenet64": Command("from ImageNet's archives", "fastdiff.datasets.imagenet64"),
        "lsun": Command("from the LMDB of an LSUN category", "fastdiff.datasets.lsun"),
        "folder": Command("from any folder of images, all resized to one size", "fastdiff.datasets.folder"),
        "digits": Command("from scikit-learn's handwritten digits, to try everything", "fastdiff.datasets.digits"),
        "pack": Command("decode a folder of images into one array of pixels", "fastdiff.datasets.pack"),
    },
)
FASTDIFF = Group(
    "train, sample and score pixel-space diffusion models",
    {
        "train": Command("train a diffusion model on a folder of images", "fastdiff.train"),
        "sample": Command("draw images from a checkpoint", "fastdiff.sample"),
        "nll": Command("score images in bits per dimension", "fastdiff.nll"),
        "evaluate": Command("measure FID, precision, recall and others", "fastdiff.evaluate"),
        "super-res-train": Command("train a model that enlarges images", "fastdiff.super_res_train"),
        "super-res-sample": Command("enlarge images with a checkpoint", "fastdiff.super_res_sample"),
        "classifier-train": Command("train a classifier that guides sampling", "fastdiff.classifier_train"),
        "convert": Command("write a network for another program, or read one of diffusers", "fastdiff.convert"),
        "prepare": PREPARE,
        "info": Command("say what a checkpoint, a run or a folder of images is", "fastdiff.info"),
    },
)
