"""Opens the images that a metric compares: an npz, a folder or zip of pictures, a sampling job, or a packed folder.

The images are read as they are needed, in a fixed order, and never changed but by `resize`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fastdiff.errors import UserError, quoted
from fastdiff.evaluation.array_sets import NpzSet, PackedSet
from fastdiff.evaluation.image_set import ImageSet
from fastdiff.evaluation.picture_sets import Pictures, PictureSet, ZippedPictures, pictures_in
from fastdiff.images.cache.format import is_packed, open_packed_at_its_size
from fastdiff.images.open import one_device
from fastdiff.images.other_data import describe_file, kind_of_file
from fastdiff.sampling.job.results import images_of_job, is_job

_GIVE = "give an .npz of images, a folder or a zip of pictures, a sampling job's folder or a packed folder"


def open_image_set(
    source: str,
    *,
    device: torch.device | str,
    resize: tuple[int, int] | None = None,
    limit: int | None = None,
    loader: str = "auto",
    num_workers: int = 2,
) -> ImageSet:
    """Open the images that `source` names. Raises UserError if there are none, or not of one size.

    resize   Height and width to which the images are resized and cropped as for training; None keeps their size.
    limit    Use only the first images of the set.
    loader   What decodes pictures: auto (the pixels of Pillow, through DALI where it is installed and decodes the same
             pixels), pillow or dali.
    """
    if limit is not None and limit < 1:
        raise UserError(f"at least one image must be read, not {limit}")
    path, one = Path(source), one_device(torch.device(device))
    try:
        place = _place(source)
        is_folder = place.is_dir()
        if not is_folder and not place.is_file():
            raise UserError(f"{path} is neither a file nor a folder; {_GIVE}")
        kind = "" if is_folder else kind_of_file(place)
    except OSError as error:
        raise UserError(f"{quoted(source)} can't be opened ({error.strerror})") from error
    if is_packed(place):
        return PackedSet(path, open_packed_at_its_size(place), one, resize, limit, num_workers)
    if kind == "npz" or (not is_folder and kind in ("", "zip") and place.suffix.lower() == ".npz"):
        return NpzSet(path, place, one, resize, limit, num_workers)
    if kind == "npy":
        raise UserError(
            f"{path} is a single array; if it holds uint8 images, np.savez(FILE, np.load({str(path)!r})) "
            "makes an .npz of it, and give that"
        )
    if kind == "pickle":
        raise UserError(
            f"{path} is a pickle, which is not read because it could run code; give an .npz: of images as "
            "np.savez(FILE, images) writes it, or for --reference of a mean and covariance, as "
            "np.savez(FILE, mu=mu, sigma=sigma) writes it"
        )
    if not is_folder and kind != "zip":
        raise UserError(f"{path} is {describe_file(place)}")
    pictures: Pictures = pictures_in(place, limit) if is_folder else ZippedPictures(place, limit)
    return PictureSet(path, pictures, one, resize, limit, loader, num_workers)


def _place(source: str) -> Path:
    """The file or folder of the images that `source` names, which may be within a sampling job's folder."""
    if not source:
        raise UserError(f"no images are given; {_GIVE}")
    path = Path(source)
    if not path.exists():
        raise UserError(f"{path} does not exist; {_GIVE}")
    if not is_job(path):
        return path
    if found := images_of_job(path, ".npz", ".zip"):
        return found
    raise UserError(
        f"{path} is the folder of a sampling job that has no npz, zip or pictures; give --save_as npz to sample.py"
    )
