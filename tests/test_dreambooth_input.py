"""apps/dreambooth.py: wrong input is told in one sentence before anything is written; images of every kind are read."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import SD_BETAS, make_pipeline
from dreambooth import models, output
from dreambooth.data import find_images, read_image
from dreambooth.run import run
from dreambooth.settings import DreamBoothSettings, UsageError
from dreambooth.training import Trainer
from peft import LoraConfig
from PIL import Image

ROOT = Path(__file__).parents[1]

# The script and the package beside it have the same name, and an import gives the package.
_spec = importlib.util.spec_from_file_location("dreambooth_script", ROOT / "apps" / "dreambooth.py")
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)

SIDE = 64


def write_image(path: Path, size=(SIDE, SIDE), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Models, images, and the folder of a finished run; no test may change them."""
    folder = tmp_path_factory.mktemp("input")
    make_pipeline().save_pretrained(folder / "model")
    make_pipeline(in_channels=9).save_pretrained(folder / "inpainting")
    make_pipeline(scheduler=diffusers.DDIMScheduler(**SD_BETAS, prediction_type="sample")).save_pretrained(
        folder / "x0"
    )
    make_pipeline(scheduler=diffusers.EDMEulerScheduler()).save_pretrained(folder / "edm")
    for i in range(2):
        write_image(folder / "subject" / f"{i}.png")
    write_image(folder / "nested" / "dogs" / "old" / "0.png")
    write_image(folder / "linked" / "good.png")
    (folder / "linked" / "gone.png").symlink_to(folder / "moved.png")
    write_image(folder / "pixel" / "good.png")
    write_image(folder / "pixel" / "one.png", (1, 1))
    write_image(folder / "strip" / "strip.png", (4 * SIDE, 3))
    (folder / "empty").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "notes.txt").write_text("no image")
    write_image(folder / "broken" / "good.png")
    (folder / "broken" / "bad.png").write_bytes(b"no image")
    whole = write_image(folder / "cut" / "cut.jpg").read_bytes()
    (folder / "cut" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "other").mkdir()
    (folder / "other" / "thesis.tex").write_text("precious")
    (folder / "a file").write_text("")
    for name, steps in (("finished", 2), ("begun", 4)):
        chosen = DreamBoothSettings(
            model=folder / "model", instance_data_dir=folder / "subject", instance_prompt="a zebra", resolution=SIDE,
            max_train_steps=steps, checkpointing_steps=2, device="cpu", output_dir=folder / name,
        )  # fmt: skip
        run(chosen)
    record = json.loads((folder / "begun" / "training.json").read_text())
    output.write_record(folder / "begun", **{**record, "finished": False, "steps": 0})
    shutil.copytree(folder / "begun", folder / "damaged")
    (folder / "damaged" / "checkpoints" / "step-4" / "optimizer.pt").write_bytes(b"\0" * 99)
    return folder


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


LONG = "a zebra " * 60

BAD = {
    "a missing folder": ("--instance-data-dir {base}/nowhere", "there is no such folder"),
    "a file for a folder": ("--instance-data-dir '{base}/a file'", "is a file; give the folder"),
    "an empty folder": ("--instance-data-dir {base}/empty", "has no image; put three or more"),
    "a folder without images": ("--instance-data-dir {base}/notes", "has no image among its 1 files"),
    "images in sub-folders alone": (
        "--instance-data-dir {base}/nested",
        "has no image (left out, as they are sub-folders, whose images are not used: dogs (1 images)); put",
    ),
    "a link to nothing": ("--instance-data-dir {base}/linked", "gone.png is a link to {base}/moved.png, which is not"),
    "a class image that is a link to nothing": (
        "--with-prior-preservation --class-prompt dog --class-data-dir {base}/linked",
        "--class-data-dir: {base}/linked/gone.png is a link to",
    ),
    "an unreadable image": ("--instance-data-dir {base}/broken", "bad.png cannot be read as an image"),
    "half an image": ("--instance-data-dir {base}/cut", "cut.jpg cannot be read as an image"),
    "one pixel": ("--instance-data-dir {base}/pixel", "one.png has 1 × 1 pixels; at --resolution 64 each side must"),
    "a strip": ("--instance-data-dir {base}/strip", "strip.png has 256 × 3 pixels"),
    "a broken class image": (
        "--with-prior-preservation --class-prompt dog --class-data-dir {base}/broken",
        "--class-data-dir: {base}/broken/bad.png cannot be read",
    ),
    "a long prompt": (f"--instance-prompt '{LONG}'", "--instance-prompt: has 122 tokens"),
    "a long validation prompt": (f"--validation-prompt '{LONG}'", "--validation-prompt: has 122 tokens"),
    "an empty prompt": ("--instance-prompt ' '", "--instance-prompt ' ': must have at least one word"),
    "prior without prompt": (
        "--with-prior-preservation --class-data-dir {base}/subject",
        "--with-prior-preservation needs --class-prompt: add --class-prompt",
    ),
    "prior without folder": ("--with_prior_preservation --class_prompt dog", "needs --class-data-dir"),
    "class is instance": (
        "--with-prior-preservation --class-prompt dog --class-data-dir {base}/subject",
        "is --instance-data-dir too",
    ),
    "class without prior": ("--class-prompt dog", "--class-prompt dog: has no effect without --with-prior"),
    "a missing model": ("--model ./nowhere", "--model ./nowhere: there is no folder"),
    "no pipeline": ("--model {base}/empty", "without model_index.json"),
    "an inpainting model": ("--model {base}/inpainting", "its UNet takes 9 channels"),
    "another prediction": ("--model {base}/x0", "prediction_type='sample'"),
    "another kind of noise": ("--model {base}/edm", "its scheduler counts noise levels (EDMEulerScheduler"),
    "resolution": ("--resolution 100", "--resolution 100: must be a multiple of 8 for this model; use 96"),
    "resolution 0": ("--resolution 0", "--resolution 0: must be an integer, at least 8"),
    "no steps": ("--max_train_steps=0", "--max-train-steps 0: must be an integer, at least 1"),
    "rate": ("--learning-rate 0", "--learning-rate 0.0: must be a number, above 0 and at most 1"),
    "not a number": ("--learning-rate nan", "--learning-rate nan: must be a number"),
    "not a count": ("--train-batch-size many", "argument --train-batch-size: invalid int value: 'many'"),
    "an unknown word": ("--agents all", "argument --agents: invalid choice: 'all'"),
    "an unknown option": ("--instance-folder x", "unrecognized arguments: --instance-folder"),
    "a misspelt option": ("--lerning-rate 1", "--lerning-rate 1 (did you mean --learning-rate?)"),
    "a limit that is a word": ("--checkpoints-total-limit few", "--checkpoints-total-limit few: must be an integer"),
    "warm-up": ("--lr-warmup-steps 5", "--lr-warmup-steps 5: has no effect with --lr-scheduler constant"),
    "polynomial, warm-up as long as the training": (
        "--lr-scheduler polynomial --lr-warmup-steps 3 --max-train-steps 3",
        "--lr-warmup-steps 3: must be less than --max-train-steps 3",
    ),
    "a rate where polynomial ends": (
        "--lr-scheduler polynomial --learning-rate 1e-7",
        "--learning-rate 1e-07: must be above 1e-07 with --lr-scheduler polynomial",
    ),
    "a warm-up longer than the training": (
        "--lr-scheduler constant_with_warmup --lr-warmup-steps 500 --max-train-steps 2",
        "--lr-warmup-steps 500: must be less than --max-train-steps 2",
    ),
    "restarts for fewer than two steps each": (
        "--lr-scheduler cosine_with_restarts --lr-num-cycles 4 --lr-warmup-steps 1 --max-train-steps 8",
        "--lr-num-cycles 4: must be at most 3, so that each has two of the 7 steps",
    ),
    "restarts of another schedule": (
        "--lr-scheduler cosine --lr-num-cycles 2",
        "--lr-num-cycles 2: has no effect with --lr-scheduler cosine; use cosine_with_restarts",
    ),
    "a power of another schedule": ("--lr-power 2", "--lr-power 2.0: has no effect with --lr-scheduler constant"),
    "a warm-up of pieces": (
        "--lr-scheduler piecewise_constant --lr-step-rules 1 --lr-warmup-steps 1",
        "--lr-warmup-steps 1: has no effect with --lr-scheduler piecewise_constant; use constant_with_warmup",
    ),
    "pieces without rules": ("--lr-scheduler piecewise_constant", "piecewise_constant needs --lr-step-rules: give"),
    "rules without pieces": ("--lr-step-rules 1:2,0.1", "--lr-step-rules 1:2,0.1: has no effect"),
    **{
        f"rules {rules}": (f"--lr-scheduler piecewise_constant --max-train-steps 9 --lr-step-rules {rules}", message)
        for rules, message in (
            ("fast", "'fast' is no rule; give FACTOR:STEP"),
            ("1:2", "the last has none"),
            ("1,0.1", "all factors but the last need a step"),
            ("1:5,0.1:5,0", "its steps must rise from 1 on"),
            ("1:0,0.1", "its steps must rise from 1 on"),
            ("1:2,nan", "the factor nan must be at least 0"),
            ("1:2,-1", "the factor -1 must be at least 0"),
            ("1:9,0.1", "step 9 does not come in --max-train-steps 9"),
            ("0", "gives the learning rate 0 at every step"),
            ("1:2,9999999", "not one in 0 … 1"),
        )
    },
    "a field out of range": ("--agents both --ratio 0.99", "ratio=0.99"),
    "a field of another type": ("--agents both --late 3", "late=3: must be"),
    "fields without agents": ("--ratio 0.3", "no effect with --agents none"),
    "fp16 on a CPU": ("--mixed-precision fp16", "--mixed-precision fp16: needs a GPU"),
    "8-bit Adam on a CPU": ("--use-8bit-adam", "--use-8bit-adam: needs a CUDA GPU"),
    "other files": ("--output-dir {base}/other", "has other files in it, which would be overwritten"),
    "the subject's folder": ("--output-dir {base}/subject", "has other files in it"),
    "a file": ("--output-dir '{base}/a file'", "is a file; give the name of a folder"),
    "another run": (
        "--output-dir {base}/finished --max-train-steps 2 --learning-rate 0.1 --resume-from-checkpoint latest",
        "has a run with another learning_rate (1e-06, not 0.1)",
    ),
    "another schedule": (
        "--output-dir {base}/finished --max-train-steps 2 --lr-scheduler cosine --resume-from-checkpoint latest",
        "has a run with another lr_scheduler",
    ),
    "the same run": ("--output-dir {base}/finished --max-train-steps 2", "has this very run already; add --resume"),
    "the same run, begun": ("--output-dir {base}/begun --max-train-steps 4", "has this very run already; add --resume"),
    "nothing to resume by that name": ("--resume-from-checkpoint step-3", "has no run to go on with"),
    "no such checkpoint": (
        "--output-dir {base}/begun --max-train-steps 4 --resume-from-checkpoint step-3",
        "has no such checkpoint, only step-4; give one of these",
    ),
    "a damaged checkpoint": (
        "--output-dir {base}/damaged --max-train-steps 4 --resume-from-checkpoint latest",
        "step-4 cannot be read",
    ),
    "fewer steps": (
        "--output-dir {base}/begun --max-train-steps 3 --resume-from-checkpoint latest",
        "--max-train-steps 3: {base}/begun/checkpoints/step-4 has 4 steps already",
    ),
    "other images": (
        "--output-dir {base}/begun --instance-data-dir {base}/other-subject --max-train-steps 4 "
        "--resume-from-checkpoint latest",
        "was begun with other images",
    ),
}  # fmt: skip


def call(arguments: str, base: Path, out: Path) -> int:
    import shlex

    given = shlex.split(arguments.replace("{base}", str(base)))
    defaults = {
        "--model": base / "model", "--instance-data-dir": base / "subject", "--instance-prompt": "a zebra",
        "--output-dir": out, "--resolution": SIDE, "--device": "cpu",
    }  # fmt: skip
    for option, value in defaults.items():
        if option not in given:
            given += [option, str(value)]
    try:
        return script.main(given)
    except SystemExit as error:  # argparse's own
        return error.code


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_before_anything_is_written(name, base, tmp_path, capsys):
    write_image(base / "other-subject" / "0.png", (SIDE + 3, SIDE))
    arguments, message = BAD[name]
    before = snapshot(base)
    assert call(arguments, base, tmp_path / "out") == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("dreambooth: error: ") and message.replace("{base}", str(base)) in told
    assert snapshot(base) == before
    assert not (tmp_path / "out").exists()


def test_no_room_is_told_before_anything_is_written(base, tmp_path, capsys, monkeypatch):
    usage = type("usage", (), {"free": 1_000_000})
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage)
    assert call("", base, tmp_path / "out") == 2
    assert "its disk has 0.00 GB free, and the model with its checkpoints takes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_may_not_be_written_to(base, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(output, "write_record", refuse)
        assert call("", base, tmp_path / "out") == 2
    assert "cannot be written to (Permission denied); give a folder" in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_told(base, tmp_path, capsys, monkeypatch):
    def encode_then_spoil(trainer):
        encode(trainer)
        trainer.images["instance"].latents.fill_(float("inf"))

    encode = Trainer.encode
    monkeypatch.setattr(Trainer, "encode", encode_then_spoil)
    assert call("", base, tmp_path / "out") == 2
    assert "the loss is nan at step 1; --learning-rate 1e-06 may be too high" in capsys.readouterr().err


def test_a_model_with_lora_is_refused(base, tmp_path, capsys, monkeypatch):
    """As agentsd.load_pipeline gives for a folder that a training with --lora-rank wrote."""
    pipe = make_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    monkeypatch.setattr(models, "load_pipeline", lambda *_, **__: pipe)
    assert call("", base, tmp_path / "out") == 2
    assert "has LoRA matrices on it; call pipe.fuse_lora()" in capsys.readouterr().err


def test_out_of_memory_is_told(base, tmp_path, capsys, monkeypatch):
    def fail(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "load", fail)
    assert call("", base, tmp_path / "out") == 1
    assert "out of memory; --gradient-checkpointing" in capsys.readouterr().err


def test_all_options_of_the_command(base, tmp_path):
    """Each reaches the settings under its own name, with hyphens or underscores."""
    arguments = (
        "--with_prior_preservation --class-data-dir c --class_prompt=a_dog --num-class-images 7 --prior_loss_weight 0 "
        "--train-text-encoder --train_batch_size 2 --gradient-accumulation-steps 3 --gradient_checkpointing "
        "--max-train-steps 9 --learning_rate 2e-6 --lr-scheduler cosine --lr_warmup_steps 1 --use-8bit-adam "
        "--mixed-precision bf16 --lora-rank 4 --checkpointing_steps 5 --resume-from-checkpoint latest "
        "--validation-prompt a_zebra --seed 3 --agents both --ratio 0.3 --alpha 0.1 --agent_stride 4x2 --no-rand "
        "--patch-seed 8 --upcast --checkpoints-total-limit none "
        "--model demo --instance-data-dir s --instance-prompt sks_cat --output-dir o"
    )
    found = script.read_settings(arguments.split())
    assert found.class_prompt == "a_dog" and found.instance_prompt == "sks_cat" and found.validation_prompt == "a_zebra"
    assert (found.train_batch_size, found.gradient_accumulation_steps, found.max_train_steps) == (2, 3, 9)
    assert found.gradient_checkpointing and found.train_text_encoder and found.use_8bit_adam
    assert (found.seed, found.config.seed, found.config.use_rand, found.config.agent_stride) == (3, 8, False, (4, 2))
    assert found.config.upcast is True and found.checkpoints_total_limit is None
    assert (found.config.ratio, found.config.alpha, found.config.early) == (0.3, 0.1, 1.0)
    plain = script.read_settings("--instance-data-dir s --instance-prompt p --output-dir o".split())
    assert (plain.learning_rate, plain.max_train_steps, plain.agents, plain.resolution) == (1e-6, 800, "none", 512)
    with pytest.raises(SystemExit):
        script.read_settings(["--help"])


# --- stopped and started again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["check", "load", "encode", "step"])
def test_stopped_before_the_first_checkpoint_the_advice_works(base, tmp_path, capsys, monkeypatch, where):
    """Ctrl-C while it checks, loads, encodes, or in the first step (a second one, which does not wait for its end)."""

    def stop(trainer):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, where, stop)
        assert call("--max-train-steps 2", base, out) == 130
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("stopped; give the same command, which begins anew") and "resume" not in told
    assert call("--max-train-steps 2", base, out) == 0
    assert json.loads((out / "training.json").read_text())["finished"]


def test_stopped_after_a_checkpoint_the_advice_works(base, tmp_path, capsys, monkeypatch):
    def stop(trainer):
        if trainer.done == 3:
            raise KeyboardInterrupt
        return step(trainer)

    out, step = tmp_path / "out", Trainer.step
    arguments = "--max-train-steps 4 --checkpointing-steps 2"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stop)
        assert call(arguments, base, out) == 130
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told == "stopped; go on with --resume-from-checkpoint latest, after step 2"
    (out / "checkpoints" / "step-9-copy").mkdir()  # no checkpoint
    assert call(f"{arguments} --resume-from-checkpoint latest", base, out) == 0
    assert "going on after step 2" in capsys.readouterr().out


@pytest.mark.parametrize("before", ["no folder", "an empty folder", "a killed claim", "a run without checkpoint"])
def test_latest_with_nothing_to_resume_says_so_and_begins_anew(base, tmp_path, capsys, monkeypatch, before):
    out = tmp_path / "out"
    if before in ("an empty folder", "a killed claim"):
        out.mkdir()
    if before == "a killed claim":
        (out / ".agentsd-12345678.tmp").write_text("{")  # of the record that was being written
    if before == "a run without checkpoint":
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "encode", lambda trainer: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                call("--max-train-steps 2", base, out)
        assert (out / "training.json").exists()
    assert call("--max-train-steps 2 --resume-from-checkpoint latest", base, out) == 0
    said = capsys.readouterr().out
    assert f"there is no checkpoint in {out} yet, so the run begins anew" in said and "the model is in" in said
    assert call("--max-train-steps 2 --resume-from-checkpoint latest", base, out) == 0  # the job is started once more
    assert "is finished already, after 2 steps" in capsys.readouterr().out


# --- images -----------------------------------------------------------------------------------------------------------


def halves(top, bottom, size=(40, 60), mode="RGB") -> Image.Image:
    image = Image.new(mode, size, top)
    image.paste(bottom, (0, size[1] // 2, *size))
    return image


def colours(path: Path, side: int = 32) -> tuple[list[int], list[int]]:
    """Colours near the upper and the lower edge of the training image, 0 … 255."""
    pixels = (read_image(path, side, "instance_data_dir").pixels + 1) * 127.5
    return pixels[:, 2, side // 2].round().int().tolist(), pixels[:, -3, side // 2].round().int().tolist()


def test_exif_orientation(tmp_path):
    image = halves("red", "blue", size=(40, 40)).rotate(90)  # a camera held sideways; the tag turns it back
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert colours(tmp_path / "turned.png") == ([255, 0, 0], [0, 0, 255])


def test_modes_become_rgb_on_white(tmp_path):
    halves((255, 0, 0, 255), (0, 0, 0, 0), mode="RGBA").save(tmp_path / "alpha.png")
    assert colours(tmp_path / "alpha.png") == ([255, 0, 0], [255, 255, 255])
    palette = halves("red", "blue").quantize(4)
    palette.save(tmp_path / "palette.gif", transparency=palette.getpixel((0, 59)))
    assert colours(tmp_path / "palette.gif") == ([254, 0, 0], [255, 255, 255]) or colours(tmp_path / "palette.gif") == (
        [255, 0, 0],
        [255, 255, 255],
    )
    halves(40, 200, mode="L").save(tmp_path / "grey.png")
    assert colours(tmp_path / "grey.png") == ([40] * 3, [200] * 3)
    deep = np.full((60, 40), 200 * 257, np.uint16)
    deep[:30] = 40 * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert colours(tmp_path / "deep.png") == ([40] * 3, [200] * 3)
    halves((0, 255, 255, 0), (255, 255, 0, 0), mode="CMYK").save(tmp_path / "print.tiff")
    assert colours(tmp_path / "print.tiff") == ([255, 0, 0], [0, 0, 255])


@pytest.mark.parametrize(("size", "corner"), [((96, 32), (0, 32)), ((16, 40), (24, 0)), ((33, 32), (0, 0))])
def test_the_middle_is_kept(tmp_path, size, corner):
    """A wide, a tall (enlarged twice) and a nearly square one, against Pillow's own fit."""
    path = write_image(tmp_path / "image.png", size)
    image = read_image(path, 32, "instance_data_dir")
    assert image.pixels.shape == (3, 32, 32) and image.pixels.abs().max() <= 1
    assert image.size == size[::-1] and image.corner == corner
    scale = 32 / min(size)
    with Image.open(path) as file:
        whole = np.asarray(file.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.LANCZOS))
    top, left = corner
    expected = torch.from_numpy(whole[top : top + 32, left : left + 32].copy()).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(image.pixels, expected)


def test_all_that_is_no_image_is_told_and_hidden_files_without_a_meaning_are_not(tmp_path):
    for name in ("b.png", "a.JPG", ".hidden.png"):
        write_image(tmp_path / name)
    (tmp_path / ".DS_Store").write_bytes(b"")
    (tmp_path / "caption.txt").write_text("a zebra")
    (tmp_path / "folder.png").mkdir()
    found = find_images(tmp_path, "instance_data_dir")
    assert [path.name for path in found.images] == ["a.JPG", "b.png"]
    assert found.left_out == {
        "hidden": [".hidden.png"],
        "no images that Pillow reads": ["caption.txt"],
        "sub-folders without images": ["folder.png"],
    }


def test_what_is_left_out_of_both_folders_is_told(base, tmp_path, capsys):
    """Sub-folders, hidden and other files, and more class images than are wanted; not the other folders of the run."""
    subject, classes = tmp_path / "subject", tmp_path / "subject" / "class"
    for name in ("0.png", "more/1.png", "more/deep/2.jpg", "._0.png"):
        write_image(subject / name)
    for name in ("0.png", "1.png", "2.png", "dogs/3.png"):
        write_image(classes / name)
    (subject / "photo.heic").write_bytes(b"")
    (classes / "list.txt").write_text("")
    (classes / "link").symlink_to("nowhere")
    arguments = (
        f"--instance-data-dir {subject} --with-prior-preservation --class-data-dir {classes} --class-prompt dog "
        "--num-class-images 2 --max-train-steps 1"
    )
    assert call(arguments, base, subject / "out") == 0
    said = [line.removeprefix("dreambooth: ") for line in capsys.readouterr().out.splitlines()]
    assert said[:8] == [
        f"1 images of the subject in {subject}",
        f"left out of {subject}, as they are hidden: ._0.png",
        f"left out of {subject}, as they are sub-folders, whose images are not used: more (2 images)",
        f"left out of {subject}, as they are no images that Pillow reads: photo.heic",
        f"2 images of the class in {classes}",
        f"left out of {classes}, as they are sub-folders, whose images are not used: dogs (1 images)",
        f"left out of {classes}, as they are no images that Pillow reads: link, list.txt",
        f"left out of {classes}, as they are more than --num-class-images 2: 2.png",
    ]


def test_generated_class_images_are_announced_beside_what_was_left_out(base, tmp_path, capsys):
    write_image(tmp_path / "class" / "photos" / "0.png")
    arguments = (
        f"--with-prior-preservation --class-data-dir {tmp_path / 'class'} --class-prompt dog --num-class-images 2 "
        "--class-inference-steps 1 --max-train-steps 1"
    )
    assert call(arguments, base, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert f"0 images of the class in {tmp_path / 'class'}; 2 more are generated" in said
    assert "sub-folders, whose images are not used: photos (1 images)" in said


@pytest.mark.parametrize("field", ["instance_data_dir", "class_data_dir"])
def test_floats_and_wide_integers_are_refused_and_sixteen_bits_read(tmp_path, field):
    """As the benchmark does: which value of a float or a 32-bit integer is white, no file says."""
    ramp = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    for name, pixels, kind in (
        ("unit.tiff", ramp.astype(np.float32), "floats"),
        ("bytes.tiff", (255 * ramp).astype(np.float32), "floats"),
        ("int.tiff", (255 * ramp).astype(np.int32), "32-bit integers"),
        ("wide.tiff", (2**31 - 1) * ramp.astype(np.float64).round().astype(np.int32), "32-bit integers"),
    ):
        Image.fromarray(pixels).save(tmp_path / name)
        with pytest.raises(UsageError, match=f"{name} cannot be read as an image .its pixels are {kind} of unknown"):
            read_image(tmp_path / name, 64, field)
    expected = 2 * ramp.astype(np.float32) - 1
    for name in ("deep.tiff", "deep.png", "deep.pgm"):
        Image.fromarray((65535 * ramp).round().astype(np.uint16)).save(tmp_path / name)
        assert np.abs(read_image(tmp_path / name, 64, field).pixels.numpy() - expected).max() < 0.005
    Image.fromarray((255 * ramp).round().astype(np.uint8)).save(tmp_path / "usual.tiff")
    assert np.abs(read_image(tmp_path / "usual.tiff", 64, field).pixels.numpy() - expected).max() < 0.005
    for bits in (10, 12):  # in a file of 16, as cameras and microscopes write them
        Image.fromarray(((2**bits - 1) * ramp).astype(np.uint16)).save(tmp_path / "camera.tiff")
        with pytest.raises(UsageError, match=f"its 16-bit pixels reach {2**bits - 1} of 65535, so that it is black"):
            read_image(tmp_path / "camera.tiff", 64, field)
    big_endian = Image.fromarray((65535 * ramp).round().astype(">u2"), "I;16B")
    big_endian.save(tmp_path / "big.tiff")
    assert np.abs(read_image(tmp_path / "big.tiff", 64, field).pixels.numpy() - expected).max() < 0.005


def test_settings_from_python_are_checked():
    fields = dict(instance_data_dir="s", instance_prompt="p", output_dir="o")
    for wrong in (dict(seed=True), dict(seed=1.5), dict(lora_rank=0), dict(train_batch_size=None), dict(lr_power=-1)):
        with pytest.raises(UsageError, match="must be"):
            DreamBoothSettings(**fields, **wrong)
