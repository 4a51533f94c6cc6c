"""Opens the image loader that the settings select."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from fastdiff.errors import UserError, blaming
from fastdiff.images.cache.format import Packed, is_packed, open_packed
from fastdiff.images.cache.loader import PackedLoader
from fastdiff.images.cache.sharing import default_place, open_or_pack
from fastdiff.images.dali import DaliLoader
from fastdiff.images.labels import index_images
from fastdiff.images.listing import Listing
from fastdiff.images.loader import Loader, PillowLoader
from fastdiff.images.order import Order
from fastdiff.images.pixels import MODES
from fastdiff.images.reader import Reader
from fastdiff.images.settings import DataSettings
from fastdiff.runtime.machine import allowed_cores

logger = logging.getLogger(__name__)


def open_images(
    settings: DataSettings,
    *,
    size_hw: tuple[int, int],
    channels: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    class_cond: bool = False,
    class_names: Sequence[str] | None = None,
    limit: int | None = None,
    build_cache: bool = True,
) -> Loader:
    """Open the images of settings.data_dir as batches for one rank. Raises UserError if the settings don't allow it.

    batch_size   The global batch size, over all ranks.
    class_cond   Whether the images need classes, by settings.labels; without, all labels are 0.
    class_names  The classes of an earlier run, which determine the class numbers.
    limit        Use only the first images of the listing. Classes are still numbered over all images.
    build_cache  False: an existing cache is used, but none is built. The same holds with a limit.
    """
    if channels not in MODES:
        raise UserError(f"images have 1 (gray), 3 (RGB) or 4 (RGBA) channels, not {channels}")
    if batch_size < 1 or batch_size % world_size:
        raise UserError(f"the global batch size {batch_size} can't be shared out evenly over {world_size} ranks")
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} is not one of the {world_size} ranks, which count from 0")
    if limit is not None and limit < 1:
        raise UserError(f"at least one image must be read, not {limit}")
    if class_cond and settings.labels == "none":
        raise UserError(
            "--labels none gives no classes, which a class-conditional model and a classifier need; leave it out"
        )
    rule = settings.labels if class_cond else "none"
    listing, packed = _find(settings, size_hw, channels, rule, class_names, rank, build_cache and limit is None)
    whole = None if packed is not None and packed.folder == Path(settings.data_dir) else listing
    if limit is not None:
        listing = listing.first(limit)
    order = Order(len(listing.names), batch_size, seed, settings.shuffle, settings.drop_last)
    make: Callable[..., Loader] = (
        partial(PackedLoader, packed=packed, resident=settings.cache == "gpu")
        if packed is not None
        else loader_class("pillow" if settings.random_crop else settings.loader)
    )
    return make(
        Reader(listing, size_hw, channels, whole),
        order,
        random_flip=settings.random_flip,
        random_crop=settings.random_crop,
        num_workers=settings.num_workers,
        rank=rank,
        world_size=world_size,
        device=one_device(torch.device(device)),
    )


def _find(
    settings: DataSettings,
    size_hw: tuple[int, int],
    channels: int,
    rule: str,
    class_names: Sequence[str] | None,
    rank: int,
    build_cache: bool,
) -> tuple[Listing, Packed | None]:
    """The listing of the images, and the packed folder that holds their pixels if there is one."""
    packs = is_packed(settings.data_dir)
    if settings.random_crop and (packs or settings.cache != "none" or settings.loader == "dali"):
        held = f"cache {settings.cache}" if settings.cache != "none" else f"loader {settings.loader}"
        raise UserError(
            f"--random_crop True needs images that Pillow decodes anew at each sight, not those of "
            f"{f'the packed folder {settings.data_dir}' if packs else held}; give --random_crop False"
        )
    if settings.cache_dir and settings.cache == "none" and not packs:
        raise UserError(f"--cache_dir {settings.cache_dir} needs --cache disk or --cache gpu; without one leave it out")
    if settings.loader == "dali" and (packs or settings.cache != "none"):
        raise UserError(
            "--loader dali contradicts decoded images, which are Pillow's; leave it out, or give --cache none"
        )
    if packs:
        with blaming("--data_dir"):
            packed = open_packed(Path(settings.data_dir), size_hw, channels)
        return packed.listing(rule, class_names), packed
    listing = index_images(settings.data_dir, rule, class_names)
    if settings.cache == "none":
        return listing, None
    with blaming("--cache_dir"):
        if is_packed(settings.cache_dir):
            raise UserError(
                f"{settings.cache_dir} is a packed folder itself; give it as --data_dir, without --cache_dir"
            )
        place = default_place(settings.data_dir, size_hw, channels, settings.cache_dir)
        if not build_cache and not is_packed(place):
            return listing, None
        return listing, open_or_pack(listing, size_hw, channels, place, workers=allowed_cores(), rank=rank)


def one_device(device: torch.device) -> torch.device:
    """Add the index of this thread's current GPU to the device 'cuda'; in other threads another may be current."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def loader_class(name: str) -> type[Loader]:
    """The loader for a value of `DataSettings.loader`. UserError for dali where DALI can't be imported."""
    if name == "pillow":
        return PillowLoader
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries is missing
        if name == "dali":
            raise UserError(
                f"--loader dali needs DALI, which can't be imported ({error}): "
                "run `pip install nvidia-dali-cuda130`, or use --loader pillow"
            ) from error
        logger.info("DALI can't be imported (%s): images are decoded with Pillow", error)
        return PillowLoader
    return DaliLoader
