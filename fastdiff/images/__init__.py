"""Folders of pictures → batches of uint8 pixels and labels: listed, sharded, prefetched, resumable to the sample."""

from fastdiff.images.listing import label_images, list_images
from fastdiff.images.loader import Batch, Loader
from fastdiff.images.open import open_images
from fastdiff.images.pixels import load_image
from fastdiff.images.settings import DataSettings

__all__ = ["Batch", "DataSettings", "Loader", "label_images", "list_images", "load_image", "open_images"]
