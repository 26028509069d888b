"""eval/fid/images.py: images of every kind are read as a viewer shows them, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.common.protocol import BenchError
from eval.fid.images import read_image, reference_files, said_of_transparent, save_grid
from eval.fid.similarity import similarity_of_pairs


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
        with pytest.raises(BenchError, match=f"100.tif.*its pixels are {said} of unknown range: save it with 8 bits"):
            call()
    path.unlink()
    assert reference_files(tmp_path / "a") == files


@pytest.mark.parametrize("suffix", [".png", ".pgm", ".tif"])
def test_16_bit_formats_are_read_as_training_reads_them(tmp_path, suffix):
    from dreambooth.data import read_image as read_for_training

    levels = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(levels).save(path)
    trained = read_for_training(path, 64, "instance_data_dir").pixels
    ours = np.asarray(read_image(path))
    assert np.array_equal(ours.transpose(2, 0, 1), np.round((trained.numpy() + 1) * 127.5)) and ours.max() > 250


def test_12_bit_data_in_16_bit_files_is_refused_and_not_scored_as_black(tmp_path):
    files = make_images(tmp_path / "a", 12)
    path = tmp_path / "a" / "100.png"
    Image.fromarray(np.full((8, 8), 4000, dtype=np.uint16)).save(path)
    for call in (lambda: read_image(path), lambda: reference_files(tmp_path / "a")):
        with pytest.raises(BenchError, match="100.png.*its 16-bit pixels reach 4000 of 65535, so that it is black"):
            call()
    path.unlink()
    assert reference_files(tmp_path / "a") == files


def transparent(mode: str, hidden: int) -> Image.Image:
    """A black square on a transparent ground under which a grey value lies that nobody sees."""
    alpha = Image.new("L", (16, 16))
    alpha.paste(255, (4, 4, 12, 12))
    grey = Image.composite(Image.new("L", (16, 16), 0), Image.new("L", (16, 16), hidden), alpha)
    image = Image.merge("LA", (grey, alpha))
    if mode in ("RGBA", "LA"):
        return image.convert(mode)
    if mode == "I;16":
        image = Image.fromarray(np.where(np.asarray(alpha) == 255, 65535, hidden * 257).astype(np.uint16))
        image.info["transparency"] = hidden * 257
        return image
    plain = grey.convert(mode)  # one colour of which is declared transparent
    plain.info["transparency"] = {"L": hidden, "RGB": (hidden,) * 3, "P": plain.getpixel((0, 0))}[mode]
    return plain


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "RGB", "P", "I;16"])
def test_pixels_that_nobody_sees_are_not_scored(tmp_path, mode):
    """Two sets that look alike once had an FD of 257 and a PSNR of 5.3 dB."""
    found = []
    for hidden in (40, 200):
        image = transparent(mode, hidden)
        image.save(tmp_path / f"{hidden}.png", transparency=image.info.get("transparency"))
        found.append(read_image(tmp_path / f"{hidden}.png"))
    assert np.array_equal(*map(np.asarray, found))
    assert found[0].getpixel((0, 0)) == (255, 255, 255)
    square = (255,) * 3 if mode == "I;16" else (0,) * 3
    assert found[0].getpixel((8, 8)) == square
    assert similarity_of_pairs([tmp_path / "40.png"], [tmp_path / "200.png"])[0, 0] == 100
    files = sorted(tmp_path.iterdir())
    assert said_of_transparent(files) == "2 of 2 images have transparency and are laid on white"


def test_of_opaque_images_nothing_is_said(tmp_path):
    assert said_of_transparent(make_images(tmp_path / "a", 3)) == ""


def test_a_full_disk_leaves_the_old_grid(tmp_path, monkeypatch):
    save_grid(Image.new("RGB", (8, 8), "red"), tmp_path / "grid.webp")
    before = (tmp_path / "grid.webp").read_bytes()

    def fill(self, file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill)
    with pytest.raises(OSError, match="No space"):
        save_grid(Image.new("RGB", (8, 8), "blue"), tmp_path / "grid.webp")
    assert (tmp_path / "grid.webp").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


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
