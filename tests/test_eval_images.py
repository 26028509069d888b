"""eval/fid/images.py: images of every kind are read as a viewer shows them, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.common.protocol import BenchError
from eval.fid.images import read_image, reference_files


def make_images(folder: Path, count: int, suffix: str = ".png") -> list[Path]:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.effect_noise((8, 8), 50).convert("RGB").save(folder / f"{i:03d}{suffix}")
    return sorted(folder.iterdir())


def test_16_bit_images_are_scaled_and_not_clipped(tmp_path):
    """They were once all white, and the distance between a folder and itself in 16 bits was 153.7."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "a.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "a.tif")
    for name in ("a.png", "a.tif"):
        assert np.array_equal(np.asarray(read_image(tmp_path / name)), np.stack([grey] * 3, axis=2)), name


@pytest.mark.parametrize("kind, said", [(np.float32, "floats"), (np.int32, "32-bit integers")])
def test_pixels_of_unknown_range_are_refused_also_in_a_folder(tmp_path, kind, said):
    files = make_images(tmp_path / "a", 12)
    path = tmp_path / "a" / "100.tif"
    Image.fromarray(np.ones((8, 8), dtype=kind)).save(path)
    for call in (lambda: read_image(path), lambda: reference_files(tmp_path / "a")):
        with pytest.raises(BenchError, match=f"100.tif.*its pixels are {said}: save it with 8 bits"):
            call()
    path.unlink()
    assert reference_files(tmp_path / "a") == files


def test_an_image_is_rotated_as_its_exif_data_says(tmp_path):
    upright = Image.new("RGB", (8, 16), "red")
    upright.paste("blue", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    upright.rotate(90, expand=True).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), np.asarray(upright))


def test_other_suffixes_and_colour_modes(tmp_path):
    image = Image.effect_noise((8, 8), 50).convert("RGB")
    image.save(tmp_path / "a.jfif", "JPEG")
    image.save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    image.convert("P").save(tmp_path / "b.png")
    image.convert("CMYK").save(tmp_path / "c.jpg")
    for path in tmp_path.iterdir():
        found = read_image(path)
        assert found.mode == "RGB" and np.asarray(found).std() > 5, path
    (tmp_path / "d.png").write_text("no image")
    with pytest.raises(BenchError, match="d.png cannot be read as an image .*: repair or remove it"):
        read_image(tmp_path / "d.png")


def test_a_folder_of_any_suffixes_is_read_whole(tmp_path):
    make_images(tmp_path / "a", 6)
    for i, suffix in enumerate((".gif", ".jfif", ".JPEG", ".webp")):
        kind = "JPEG" if suffix == ".jfif" else None
        Image.effect_noise((8, 8), 50).convert("RGB").save(tmp_path / "a" / f"x{i}{suffix}", kind)
    (tmp_path / "a" / "labels.txt").write_text("no image")
    assert len(reference_files(tmp_path / "a")) == 10


def test_a_folder_per_class(tmp_path):
    for name, count in (("n01", 7), ("n02/deeper", 9)):
        make_images(tmp_path / "classes" / name, count)
    (tmp_path / "classes" / "empty").mkdir()
    assert len(reference_files(tmp_path / "classes")) == 16
    first = reference_files(tmp_path / "classes", per_class=5)
    assert [path.name for path in first] == [f"{i:03d}.png" for i in range(5)] * 2
    make_images(tmp_path / "classes" / "more", 1)[0].rename(tmp_path / "classes" / "stray.png")
    with pytest.raises(BenchError, match=r"images both in itself \(stray.png …\) and in folders \(n01 …\): put all"):
        reference_files(tmp_path / "classes")


def test_references_are_checked_beforehand(tmp_path):
    make_images(tmp_path / "few", 3)
    files = make_images(tmp_path / "flat", 12)
    (tmp_path / "empty").mkdir()
    for folder, per_class, message in [
        ("few", None, "has 3 images"),
        ("empty", None, "has 0 images"),
        ("flat", 5, "put each class into a folder of its own"),
        ("none", None, "there is no such folder"),
    ]:
        with pytest.raises(BenchError, match=message):
            reference_files(tmp_path / folder, per_class)
    files[3].write_bytes(files[3].read_bytes()[:100])
    with pytest.raises(BenchError, match="003.png: cannot be read as an image"):
        reference_files(tmp_path / "flat")
