"""DALI's pixels are close to the reference's, and its failures cost no image that Pillow can read."""

from __future__ import annotations

import io
import itertools
import logging

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from fastdiff.images.image_files import plain_size
from fastdiff.images.pixels import load_image

pytest.importorskip("nvidia.dali")


def save_all(root, pictures, **options):
    root.mkdir()
    for name, picture in pictures.items():
        picture.save(root / name, **options)
    return root


def against_reference(loader, root, size_hw, mode="RGB"):
    """Return the absolute differences in levels, float64 [N, H, W, C], of the folder's images in order."""
    batches = list(loader.once())
    images = torch.cat([batch.images for batch in batches]).numpy().astype(float)
    names = sorted(path.name for path in root.iterdir())
    return np.abs(images - np.stack([load_image(root / name, size_hw, mode) for name in names]))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_at_the_target_is_exact(tmp_path, photo, open_loader, channels):
    pictures = {f"{i:02d}.png": photo(32, 32, i).convert("L" if i % 3 == 0 else "RGB") for i in range(12)}
    pictures |= {f"{i}_long.png": photo(32, 47, i) for i in range(3)}  # only cropped
    root = save_all(tmp_path / "at_size", pictures)
    loader = open_loader(root, "dali", channels=channels, batch_size=4)
    assert against_reference(loader, root, (32, 32), "L" if channels == 1 else "RGB").max() == 0


def test_png_with_colour_profiles_is_exact(tmp_path, photo, open_loader):
    root = tmp_path / "profiles"
    root.mkdir()
    for kind, content in [
        (b"gAMA", (100000).to_bytes(4, "big")),
        (b"sRGB", b"\0"),
        (b"pHYs", bytes(9)),
        (b"cHRM", bytes([0, 0, 122, 38, 0, 0, 128, 132, 0, 0, 250, 0, 0, 0, 128, 232] * 2)),
        (b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),  # turned
    ]:
        chunks = PngImagePlugin.PngInfo()
        chunks.add(kind, content)
        photo(32, 32).save(root / f"{kind.decode()}.png", pnginfo=chunks)
        assert plain_size((root / f"{kind.decode()}.png").read_bytes()) == (32, 32)
    assert against_reference(open_loader(root, "dali", batch_size=5), root, (32, 32)).max() == 0


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}])
def test_jpeg_at_the_target_differs_by_two_levels_at_most(tmp_path, photo, open_loader, options):
    pictures = {f"{i}.jpg": photo(32, 32, i).convert("L" if i == 0 else "RGB") for i in range(6)}
    root = save_all(tmp_path / "jpeg", pictures, quality=85, **options)
    # measured: 0; other builds of libjpeg-turbo may round otherwise
    assert against_reference(open_loader(root, "dali", batch_size=6), root, (32, 32)).max() <= 2


@pytest.mark.parametrize("size_hw", [(64, 64), (48, 80)])
def test_resized_jpegs_stay_near_the_reference(tmp_path, photo, open_loader, size_hw):
    sizes = [(375, 500), (500, 333), (120, 119), (96, 128), (256, 256), (60, 50), (1100, 131), (130, 1037)]
    root = save_all(tmp_path / "jpeg", {f"{i}.jpg": photo(h, w, i) for i, (h, w) in enumerate(sizes)})
    difference = against_reference(open_loader(root, "dali", size_hw=size_hw, batch_size=8), root, size_hw)
    assert difference.mean() < 0.5
    assert difference.mean((1, 2, 3)).max() < 0.8
    assert np.quantile(difference, 0.999) <= 4


def test_only_plain_files_go_to_dali(photo):
    def encode(picture, kind, **options):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        return buffer.getvalue()

    picture = photo(20, 30)
    for plain in (
        encode(picture, "JPEG"),
        encode(picture, "JPEG", progressive=True),
        encode(picture.convert("L"), "JPEG"),
        encode(picture, "PNG"),
        encode(picture.convert("L"), "PNG"),
    ):
        assert plain_size(plain) == (20, 30)
        for cut in range(0, 200, 7):
            plain_size(plain[:cut])  # never an error
    for other in (
        encode(picture.convert("CMYK"), "JPEG"),
        encode(picture, "JPEG", keep_rgb=True),
        encode(picture, "JPEG")[:-2],
        encode(picture.convert("P"), "PNG"),
        encode(picture.convert("RGBA"), "PNG"),
        encode(picture.convert("LA"), "PNG"),
        encode(picture.convert("1"), "PNG"),
        encode(picture, "PNG", transparency=(1, 2, 3)),
        encode(Image.fromarray(np.zeros((4, 4), np.uint16)), "PNG"),
        encode(picture, "GIF"),
        encode(picture, "WEBP"),
        encode(picture, "BMP"),
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
    ):
        assert plain_size(other) is None


def test_pictures_past_pillows_limit_are_left_to_pillow(photo, monkeypatch):
    buffer = io.BytesIO()
    photo(20, 30).save(buffer, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    assert plain_size(buffer.getvalue()) is None


def broken_inside(picture):
    """Make a JPEG without quantisation tables but with a complete header and end, which DALI and Pillow refuse."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    data = buffer.getvalue()
    broken = data.replace(b"\xff\xdb", b"\xff\xfe")  # their segments become comments
    assert plain_size(broken) == picture.size[::-1]
    return broken


def test_a_file_that_dali_refuses_does_not_affect_its_batch(tmp_path, photo, open_loader):
    root = save_all(tmp_path / "one_bad", {f"{i}_.jpg": photo(60, 40 + i, i) for i in range(9)})
    whole = torch.cat([b.images for b in open_loader(root, "dali", batch_size=9, shuffle=False).once()])
    (root / "4_.jpg").write_bytes(broken_inside(photo(60, 40)))
    loader = open_loader(root, "dali", batch_size=6, shuffle=False, class_cond=True)
    batches = list(itertools.islice(loader, 6))
    expected = whole[[0, 1, 2, 3, 5, 5, 6, 7, 8]]
    assert torch.equal(torch.cat([b.images for b in batches]), torch.cat([expected] * 4))
    assert torch.cat([b.labels for b in batches]).tolist() == [0, 1, 2, 3, 5, 5, 6, 7, 8] * 4
    assert torch.cat([b.positions for b in batches]).tolist() == list(range(36))
    assert loader.unreadable == [root / "4_.jpg"]


def test_a_file_that_only_pillow_can_decode_comes_from_pillow(tmp_path, photo, open_loader, monkeypatch, caplog):
    root = save_all(tmp_path / "choosy", {f"{i}_.png": photo(40, 40 + i, i) for i in range(5)})
    loader = open_loader(root, "dali", batch_size=5, shuffle=False)
    run = loader._run

    def refuse_44_wide(encoded):
        if any(item.size == (40, 44) for item in encoded):
            raise RuntimeError("not that one")
        return run(encoded)

    monkeypatch.setattr(loader, "_run", refuse_44_wide)
    with caplog.at_level(logging.WARNING):
        images = torch.cat([batch.images for batch in itertools.islice(loader, 3)])
    np.testing.assert_array_equal(images[4].numpy(), load_image(root / "4_.png", (32, 32), "RGB"))
    assert torch.equal(images[:5], images[5:10])
    assert loader.unreadable == []
    assert [r.getMessage() for r in caplog.records] == [
        f"DALI can't decode {root / '4_.png'}, Pillow does: not that one"
    ]


def test_both_loaders_show_the_same_samples(folder, open_loader):
    given = {"size_hw": (32, 32), "batch_size": 10, "seed": 8, "random_flip": True}
    pairs = zip(open_loader(folder, "dali", **given), open_loader(folder, "pillow", **given), strict=False)
    for dali, pillow in itertools.islice(pairs, 6):
        assert torch.equal(dali.labels, pillow.labels)
        assert torch.equal(dali.positions, pillow.positions)
        assert (dali.images.int() - pillow.images.int()).abs().float().mean((1, 2, 3)).max() < 0.6


def test_pixels_do_not_depend_on_the_batch(folder, open_loader):
    alone = torch.cat([b.images for b in open_loader(folder, "dali", batch_size=1).once()])
    together = torch.cat([b.images for b in open_loader(folder, "dali", batch_size=12).once()])
    assert torch.equal(alone, together)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("loader_name", ["dali", "pillow"])
def test_batches_on_a_gpu_are_those_of_the_cpu(folder, open_loader, loader_name):
    given = {"size_hw": (32, 32), "batch_size": 10, "seed": 8, "random_flip": True}
    pairs = zip(
        open_loader(folder, loader_name, device="cuda", **given), open_loader(folder, "pillow", **given), strict=False
    )
    for on_gpu, on_cpu in itertools.islice(pairs, 8):
        assert on_gpu.images.device.type == on_gpu.labels.device.type == "cuda"
        assert torch.equal(on_gpu.labels.cpu(), on_cpu.labels)
        assert torch.equal(on_gpu.positions, on_cpu.positions)
        difference = (on_gpu.images.cpu().int() - on_cpu.images.int()).abs().float().mean((1, 2, 3))
        assert difference.max() < (1.5 if loader_name == "dali" else 1e-6)  # nvJPEG rounds in its own way


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_png_at_the_target_is_exact_on_a_gpu(tmp_path, photo, open_loader):
    root = save_all(tmp_path / "at_size", {f"{i:02d}.png": photo(32, 32, i) for i in range(12)})
    loader = open_loader(root, "dali", device="cuda", batch_size=4)
    images = torch.cat([batch.images for batch in loader.once()]).cpu().numpy()
    expected = [load_image(root / f"{i:02d}.png", (32, 32), "RGB") for i in range(12)]
    np.testing.assert_array_equal(images, np.stack(expected))
