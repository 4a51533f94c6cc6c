"""Both loaders keep the same contract; each test runs with Pillow and with DALI."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.errors import UserError
from fastdiff.images.labels import index_images
from fastdiff.images.loader import PillowLoader, to_device
from fastdiff.images.open import open_images
from fastdiff.images.pixels import load_image
from fastdiff.images.reader import Reader
from fastdiff.images.settings import DataSettings


def take(loader, count):
    """Return images, labels and positions of the next batches, concatenated."""
    batches = list(itertools.islice(loader, count))
    return tuple(torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels", "positions"))


@pytest.fixture
def many(tmp_path):
    """A folder of 200 tiny pictures whose top left pixel is their index."""
    root = tmp_path / "many"
    root.mkdir()
    for i in range(200):
        pixels = np.full((8, 8, 3), i, dtype=np.uint8)
        pixels[0, -1] = 255 - pixels[0, -1]
        Image.fromarray(pixels).save(root / f"c{i % 7}_{i:03d}.png")
    return root


def indices(root):
    """Return the index of each tiny picture, in the listing's order."""
    return [int(name.split("_")[1][:3]) for name in index_images(root).names]


def test_batches_are_bytes_with_labels_and_positions(loader_name, folder, open_loader):
    loader = open_loader(folder, loader_name, size_hw=(24, 32), batch_size=5, class_cond=True)
    assert loader.loader_name == loader_name
    assert loader.num_images == 12
    assert loader.class_names == ["a", "b", "c"]
    assert loader.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 2, 2]
    batch = next(loader)
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (5, 24, 32, 3)
    assert batch.images.is_contiguous()
    assert batch.labels.dtype == batch.positions.dtype == torch.int64
    assert batch.positions.tolist() == [0, 1, 2, 3, 4]
    assert next(loader).positions.tolist() == [5, 6, 7, 8, 9]
    assert loader.unreadable == []


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_are_the_references(loader_name, folder, open_loader, channels):
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    loader = open_loader(folder, loader_name, channels=channels, batch_size=12, shuffle=False)
    images = next(loader).images.int()
    expected = np.stack([load_image(folder / name, (32, 32), mode) for name in index_images(folder).names])
    apart = (images - torch.from_numpy(expected).int()).abs()
    for name, difference in zip(index_images(folder).names, apart, strict=True):
        resized_by_dali = loader_name == "dali" and channels != 4 and name.startswith(("a_0", "a_1", "a_2", "deep/c"))
        assert difference.max() <= (20 if resized_by_dali else 0), name
        assert difference.float().mean() <= 0.6, name


def test_the_order_is_that_of_the_positions(loader_name, many, open_loader):
    loader = open_loader(many, loader_name, size_hw=(8, 8), batch_size=16, seed=4, random_flip=True)
    images, labels, positions = take(loader, 25)
    assert positions.tolist() == list(range(400))
    where = indices(many)
    for epoch in (0, 1):
        shown = images[200 * epoch : 200 * epoch + 200, 1, 1, 0].tolist()
        assert sorted(shown) == list(range(200))
        assert shown != sorted(shown)
        epoch_labels = labels[200 * epoch : 200 * epoch + 200].tolist()
        assert epoch_labels == [loader.labels[where.index(i)] for i in shown]
    assert images[:200, 1, 1, 0].tolist() != images[200:, 1, 1, 0].tolist()


def test_half_of_the_samples_are_mirrored_and_nothing_else_changes(loader_name, many, open_loader):
    plain, _, _ = take(open_loader(many, loader_name, size_hw=(8, 8), batch_size=50, seed=4), 8)
    flipped, _, positions = take(
        open_loader(many, loader_name, size_hw=(8, 8), batch_size=50, seed=4, random_flip=True), 8
    )
    mirrored = (flipped[:, 0, 0] != plain[:, 0, 0]).any(-1)
    assert 0.4 < mirrored.float().mean() < 0.6
    assert torch.equal(torch.where(mirrored[:, None, None, None], plain.flip(2), plain), flipped)
    again, _, _ = take(open_loader(many, loader_name, size_hw=(8, 8), batch_size=25, seed=4, random_flip=True), 16)
    assert torch.equal(again, flipped)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_are_one_rank(loader_name, many, open_loader, world_size):
    given = {"size_hw": (8, 8), "batch_size": 12, "seed": 2, "random_flip": True}
    images, labels, positions = take(open_loader(many, loader_name, **given), 20)
    for rank in range(world_size):
        mine = take(open_loader(many, loader_name, rank=rank, world_size=world_size, **given), 20)
        assert torch.equal(mine[0], images[rank::world_size])
        assert torch.equal(mine[1], labels[rank::world_size])
        assert torch.equal(mine[2], positions[rank::world_size])


def test_a_run_goes_on_where_it_stopped_with_other_ranks(loader_name, many, open_loader):
    given = {"size_hw": (8, 8), "batch_size": 12, "seed": 2, "random_flip": True}
    whole = take(open_loader(many, loader_name, **given), 20)
    loader = open_loader(many, loader_name, rank=1, world_size=2, **given)
    take(loader, 7)
    state = loader.state_dict()
    assert state["position"] == 84
    ranks = [open_loader(many, loader_name, rank=r, world_size=3, **given) for r in range(3)]
    for rank, resumed in enumerate(ranks):
        next(resumed)  # images that were read before or ahead must not be returned
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        for mine, all_ranks in zip(take(resumed, 13), whole, strict=True):
            assert torch.equal(mine, all_ranks[84:][rank::3])


def test_the_state_counts_what_was_handed_out(loader_name, many, open_loader):
    loader = open_loader(many, loader_name, size_hw=(8, 8), batch_size=10)
    assert loader.state_dict()["position"] == 0
    next(loader)
    time.sleep(0.2)
    assert loader.state_dict()["position"] == 10


def test_a_changed_folder_is_reported_at_a_resume(loader_name, many, open_loader, caplog):
    state = open_loader(many, loader_name, size_hw=(8, 8), batch_size=10).state_dict()
    open_loader(many, loader_name, size_hw=(8, 8), batch_size=10).load_state_dict(state)
    assert caplog.text == ""
    (many / "c0_000.png").unlink()
    open_loader(many, loader_name, size_hw=(8, 8), batch_size=10).load_state_dict(state)
    assert "200 then, 199 now" in caplog.text


def test_folders_smaller_than_a_batch_work(loader_name, folder, open_loader):
    for drop_last in (False, True):
        loader = open_loader(folder, loader_name, batch_size=30, shuffle=False, drop_last=drop_last, class_cond=True)
        images, labels, _ = take(loader, 2)
        assert labels.tolist() == (loader.labels.tolist() * 5)[:60]
        assert torch.equal(images[:12], images[48:])


def test_dropping_the_last(loader_name, folder, open_loader):
    loader = open_loader(folder, loader_name, batch_size=5, shuffle=False, drop_last=True, class_cond=True)
    assert take(loader, 4)[1].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 1] * 2


def test_once_shows_every_image_once(loader_name, many, open_loader):
    where = indices(many)
    for world_size in (1, 3):
        seen = []
        for rank in range(world_size):
            loader = open_loader(
                many,
                loader_name,
                size_hw=(8, 8),
                batch_size=48,
                rank=rank,
                world_size=world_size,
                random_flip=True,
                class_cond=True,
            )
            next(loader)
            batches = list(loader.once())
            assert loader.state_dict()["position"] == 48
            assert [len(b.images) for b in batches[:-1]] == [48 // world_size] * (len(batches) - 1)
            positions = torch.cat([b.positions for b in batches]).tolist()
            assert positions == list(range(rank, 200, world_size))
            assert torch.cat([b.images for b in batches])[:, 0, 0, 0].tolist() == [where[p] for p in positions]
            assert torch.cat([b.labels for b in batches]).tolist() == loader.labels[rank::world_size].tolist()
            seen += positions
        assert sorted(seen) == list(range(200))


def test_a_limit_keeps_the_first_images_and_all_classes(loader_name, many, open_loader):
    loader = open_loader(many, loader_name, size_hw=(8, 8), batch_size=4, limit=6, class_cond=True)
    assert loader.num_images == 6
    assert len(loader.class_names) == 7
    assert [len(b.images) for b in loader.once()] == [4, 2]


@pytest.mark.parametrize("damage", ["cut png", "cut jpeg", "text", "empty", "gone"])
def test_unreadable_images_are_named_and_replaced_by_the_next(loader_name, many, open_loader, caplog, damage):
    names = index_images(many).names
    for i in (20, 21):
        path = many / names[i]
        if damage == "cut jpeg":
            Image.open(path).resize((100, 100)).save(path, "JPEG")
        if damage == "gone":
            path.unlink()
            path.symlink_to(many / "nowhere")
        else:
            path.write_bytes({"text": b"hello", "empty": b""}.get(damage, path.read_bytes()[:-30]))
    loader = open_loader(many, loader_name, size_hw=(8, 8), batch_size=50, shuffle=False)
    with caplog.at_level(logging.WARNING):
        images, labels, _ = take(loader, 8)
    where = indices(many)
    expected = [where[22] if i in (20, 21) else where[i] for i in range(200)]
    assert images[:, 0, 0, 0].tolist() == expected * 2
    assert labels[:200].tolist() == [loader.labels[22 if i in (20, 21) else i] for i in range(200)]
    assert loader.unreadable == [many / names[20], many / names[21]]
    warnings = [r.getMessage() for r in caplog.records]
    assert len(warnings) == 2
    assert sum(names[20] in w for w in warnings) == sum(names[21] in w for w in warnings) == 1


def test_the_last_image_is_replaced_by_the_first(loader_name, many, open_loader):
    (many / index_images(many).names[-1]).write_bytes(b"")
    loader = open_loader(many, loader_name, size_hw=(8, 8), batch_size=40, shuffle=False)
    assert take(loader, 5)[0][-1, 0, 0, 0] == indices(many)[0]


def test_too_many_unreadable_images_stop_the_run(loader_name, many, open_loader):
    names = index_images(many).names
    for i in (3, 80, 150):
        (many / names[i]).write_bytes(b"not a picture")
    loader = open_loader(many, loader_name, size_hw=(8, 8), batch_size=50, shuffle=False)
    with pytest.raises(UserError, match=f"3 of 200 images can't be read.*{names[3]}.*{names[80]}.*{names[150]}"):
        take(loader, 4)


def test_one_bad_image_never_stops_a_small_folder_but_two_do(loader_name, folder, open_loader):
    (folder / "a_1.png").write_bytes(b"")
    loader = open_loader(folder, loader_name, batch_size=12)
    take(loader, 2)
    assert loader.unreadable == [folder / "a_1.png"]
    (folder / "b_0.png").write_bytes(b"")
    with pytest.raises(UserError, match="2 of 12"):
        take(open_loader(folder, loader_name, batch_size=12), 2)


def test_a_folder_without_one_readable_image_stops(loader_name, tmp_path, open_loader):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 of 1 images can't be read"):
        next(open_loader(tmp_path, loader_name, batch_size=2))


def test_after_an_error_the_same_batch_is_tried_again(loader_name, folder, open_loader):
    good = {name: (folder / name).read_bytes() for name in ("a_0.jpg", "b_0.png")}
    loader = open_loader(folder, loader_name, batch_size=12, shuffle=False)
    for name in good:
        (folder / name).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match="2 of 12"):
            next(loader)
        assert loader.state_dict()["position"] == 0


def test_decoding_runs_ahead_of_the_caller(many, open_loader, monkeypatch):
    read = []
    reference = Reader.reference
    monkeypatch.setattr(Reader, "reference", lambda self, i, data: read.append(i) or reference(self, i, data))
    loader = open_loader(many, "pillow", size_hw=(8, 8), batch_size=10, shuffle=False)
    next(loader)
    deadline = time.monotonic() + 10
    while len(read) < 30 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(read) == list(range(30))  # the one handed out and two more


def test_close_ends_the_threads(loader_name, folder, open_loader):
    before = set(threading.enumerate())
    with open_loader(folder, loader_name, batch_size=4) as loader:
        next(loader)
        assert set(threading.enumerate()) - before
    assert not set(threading.enumerate()) - before


def test_other_classes_of_the_same_images_are_warned_about(folder, tmp_path, open_loader, caplog):
    names = index_images(folder).names
    states = []
    for classes in ("ab", "ab", "ba"):
        (tmp_path / "classes.csv").write_text("".join(f"{name},{classes[i % 2]}\n" for i, name in enumerate(names)))
        loader = open_loader(folder, labels=str(tmp_path / "classes.csv"), class_cond=True, batch_size=4)
        caplog.clear()
        for state in states:
            loader.load_state_dict(state)
        states.append(loader.state_dict())
        assert ("have other classes" in caplog.text) == (classes == "ba")
    loader.load_state_dict({name: value for name, value in states[0].items() if name != "labels"})  # of version 0.1


def test_requests_that_can_not_be_met_are_refused(folder):
    settings = DataSettings(data_dir=str(folder), loader="pillow")
    good = {"size_hw": (32, 32), "channels": 3, "batch_size": 4}
    for wrong, words in [
        ({"channels": 2}, "1 .gray., 3 .RGB. or 4 .RGBA. channels, not 2"),
        ({"batch_size": 5, "world_size": 2}, "batch size 5 can't be shared out evenly over 2 ranks"),
        ({"batch_size": 0}, "batch size 0"),
        ({"rank": 1}, "rank 1"),
        ({"limit": 0}, "at least one image"),
        ({"class_names": ["a", "b"], "class_cond": True}, "'c'.*none of the 2 classes"),
    ]:
        with pytest.raises(UserError, match=words):
            open_images(settings, **(good | wrong))
    with pytest.raises(UserError, match="--labels none gives no classes"):
        open_images(settings.model_copy(update={"labels": "none"}), class_cond=True, **good)
    with pytest.raises(UserError, match="no image folder is given"):
        open_images(DataSettings(), **good)


def test_without_dali_auto_takes_pillow_and_dali_is_refused(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    given = {"size_hw": (32, 32), "channels": 3, "batch_size": 4}
    with open_images(DataSettings(data_dir=str(folder)), **given) as loader:
        assert isinstance(loader, PillowLoader)
    with pytest.raises(UserError, match="pip install nvidia-dali-cuda130.*--loader pillow"):
        open_images(DataSettings(data_dir=str(folder), loader="dali"), **given)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_rotation_is_ignored_by_both_loaders(loader_name, kind, tmp_path, photo, open_loader):
    """Pictures with any of the eight orientations of EXIF are read as they are stored."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        photo(32, 48).save(tmp_path / f"a_{orientation}.{kind.lower()}", kind, exif=exif)
    photo(32, 48).save(tmp_path / f"b.{kind.lower()}", kind)
    images = next(open_loader(tmp_path, loader_name, batch_size=9, shuffle=False)).images.int()
    expected = torch.from_numpy(load_image(tmp_path / f"b.{kind.lower()}", (32, 32), "RGB")).int()
    assert (images - expected).abs().max() <= (2 if loader_name == "dali" and kind == "JPEG" else 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_the_same_to_both_loaders(loader_name, channels, tmp_path, open_loader):
    """Of 16-bit gray the high byte is read, which keeps the whole scale."""
    wide = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64 + 63
    Image.fromarray(wide).save(tmp_path / "a.png")
    images = next(open_loader(tmp_path, loader_name, channels=channels, batch_size=1)).images
    np.testing.assert_array_equal(images[0].numpy(), np.broadcast_to(wide[..., None] >> 8, (32, 32, channels)))


def test_what_is_on_the_gpu_is_not_pinned():
    """Only memory of the CPU can be pinned; PyTorch refuses to pin a tensor that a loader made on the GPU."""
    gpu = torch.device("cuda")
    there = Mock(torch.Tensor, is_cuda=True, pin_memory=Mock(side_effect=RuntimeError("cannot pin")))
    there.is_pinned.return_value = False
    assert to_device(there, gpu) is there.to.return_value
    there.to.assert_called_once_with(gpu)
    here = Mock(torch.Tensor, is_cuda=False)
    here.is_pinned.return_value = False
    to_device(here, gpu)
    here.pin_memory.return_value.to.assert_called_once_with(gpu, non_blocking=True)
