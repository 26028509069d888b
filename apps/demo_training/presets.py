"""The presets: sizes and schedules of each model that can be trained, and the names of the icons it sees."""

from __future__ import annotations

from dataclasses import dataclass, replace

CLEAR_NAMES = tuple(
    name.strip()
    for name in """
    abacus, accordion, alarm clock, ambulance, ant, baby bottle, backpack, bagel, balloon, banana, banjo, baseball,
    basketball, bear, beaver, beer mug, beetle, bell pepper, bird, bison, broccoli, broom, bucket, burrito, bus,
    butterfly, camel, camera, candle, canoe, castle, cat, chair, chicken, church, cocktail glass, computer mouse, crab,
    crocodile, cucumber, dog, door, drum, eagle, elephant, ferris wheel, fish, flamingo, flute, fox, frog, goose,
    gorilla, green apple, guitar, hammer, hippopotamus, hot dog, ice cream, jellyfish, koala, lady beetle, laptop,
    lemon, leopard, lion, lipstick, lobster, microphone, military helmet, mosque, mouse, mushroom, owl, panda,
    parachute, peacock, penguin, pig, pineapple, pizza, polar bear, poodle, pretzel, purse, rabbit, ram, running shoe,
    scorpion, shark, shield, ship, sloth, snail, snake, soccer ball, socks, speedboat, spider, stopwatch, strawberry,
    sunglasses, swan, teapot, teddy bear, telephone, television, tent, tiger, top hat, tractor, tropical fish, turtle,
    umbrella, violin, volcano, watch, whale, wine glass, wolf, zebra
    """.split(",")
)
"""The 121 names of the second UNet phase: icons that show an ImageNet class clearly, in a shape of their own."""

OTHER_NAMES = tuple(
    name.strip()
    for name in """
    badger, balance scale, barber pole, bathtub, bell, bikini, boar, bullet train, carpentry saw, circus tent, coat,
    cockroach, compass, cricket, delivery truck, desktop computer, envelope, fire engine, fly, fountain, fountain pen,
    hamster, hiking boot, hot pepper, jeans, joystick, keyboard, kick scooter, kimono, lizard, llama, locomotive,
    minibus, motor scooter, orangutan, otter, ox, paintbrush, pick, pickup truck, police car, printer, racing car,
    radio, rice ball, safety pin, screwdriver, shopping cart, skunk, spider web, stethoscope, syringe, telescope,
    train, trolleybus, volleyball, water buffalo
    """.split(",")
)
"""57 more names of ImageNet classes, less clear as icons: for the autoencoder and the first UNet phase only."""


@dataclass(frozen=True)
class UnetPhase:
    """One stretch of UNet training with a learning-rate schedule of its own.

    Attributes:
        steps: optimiser steps.
        names: captions whose images it sees.
        styles: icon sets it sees; None for all that the data stage was given.
        key_stride: the full-resolution self-attention sees one random key of each key_stride × key_stride cell, which
            makes a step cheaper; None for all keys.
        lr: peak learning rate, where it is not the preset's.
        sharpen: the phase begins with self-attention at full resolution set to average tokens that look alike, the
            median query over this share of the keys; queries and keys then stay so, but for their scale.
        calibration_steps: in a phase that sharpens, after so many steps that scale is set to the same share again.
    """

    steps: int
    names: tuple[str, ...]
    styles: tuple[str, ...] | None
    key_stride: int | None = None
    lr: float | None = None
    sharpen: float | None = None
    calibration_steps: int = 100


@dataclass(frozen=True)
class Preset:
    """Sizes and schedules of one model. A larger one is a further entry of PRESETS.

    Attributes:
        icon_size: pixels per side at which an icon is rasterised.
        image_size: pixels per side of the model's images; its latents have an eighth of that.
        margin: around the icon, as a fraction of the image's side.
        autoencoder_*: see diffusers' AutoencoderTiny; crop in pixels.
        unet_channels, unet_heads: one entry per level, highest resolution first.
        phases: the UNet's training; the autoencoder is trained on the images of all of them.
        grid_steps: optimiser steps between two grids of samples.
        checkpoint_seconds: least time between two checkpoints.
        sample_steps, guidance: of the sample grids and the contact sheet.
        grounds: images of each icon, on so many random light colours; None for one image on white.
        grows: from a model given with --grow-from, whose autoencoder, text encoder and tokenizer are taken over and
            whose UNet the new one grows out of.
        unet_attends_at_top_only: self-attention at full resolution and nowhere else; the lower levels attend to the
            text twice. Stable Diffusion's kind of middle block always has self-attention, so it is a plain one here.
        grid_samples: images in a grid of samples.
    """

    icon_size: int
    image_size: int
    margin: float

    autoencoder_channels: int
    autoencoder_encoder_blocks: tuple[int, ...]
    autoencoder_decoder_blocks: tuple[int, ...]
    autoencoder_crop: int
    autoencoder_batch: int
    autoencoder_steps: int
    autoencoder_lr: float
    latent_noise: float

    text_width: int
    text_layers: int
    text_heads: int
    text_hidden: int
    unet_channels: tuple[int, ...]
    unet_heads: tuple[int, ...]
    unet_groups: int
    unet_batch: int
    unet_lr: float
    ema_decay: float
    phases: tuple[UnetPhase, ...]

    warmup_steps: int
    precision: str
    grid_steps: int
    checkpoint_seconds: float
    sample_steps: int
    guidance: float

    grounds: int | None = None
    grows: bool = False
    unet_attends_at_top_only: bool = False
    grid_samples: int = 8


SMOKE_NAMES = ("basketball", "door", "lemon", "tent")

PRESETS = {
    "first": Preset(
        icon_size=512,
        image_size=256,
        margin=0.04,
        autoencoder_channels=48,
        autoencoder_encoder_blocks=(0, 1, 2, 3),
        autoencoder_decoder_blocks=(3, 3, 2, 0),
        autoencoder_crop=128,
        autoencoder_batch=8,
        autoencoder_steps=2200,
        autoencoder_lr=1e-3,
        latent_noise=0.08,
        text_width=128,
        text_layers=2,
        text_heads=4,
        text_hidden=384,
        unet_channels=(48, 96, 192),
        unet_heads=(1, 2, 4),
        unet_groups=16,
        unet_batch=16,
        unet_lr=5e-4,
        ema_decay=0.998,
        phases=(
            UnetPhase(steps=1600, names=CLEAR_NAMES + OTHER_NAMES, styles=("fluent-emoji", "noto")),
            # Fewer images seen more often: here blobs become objects.
            UnetPhase(steps=2538, names=CLEAR_NAMES, styles=("fluent-emoji",)),
        ),
        warmup_steps=50,
        precision="bf16",
        grid_steps=400,
        checkpoint_seconds=60,
        sample_steps=25,
        guidance=5.0,
    ),
    "smoke": Preset(
        icon_size=64,
        image_size=64,
        margin=0.04,
        autoencoder_channels=16,
        autoencoder_encoder_blocks=(0, 1, 1, 1),
        autoencoder_decoder_blocks=(1, 1, 1, 0),
        autoencoder_crop=32,
        autoencoder_batch=4,
        autoencoder_steps=20,
        autoencoder_lr=2e-3,
        latent_noise=0.08,
        text_width=32,
        text_layers=1,
        text_heads=2,
        text_hidden=64,
        unet_channels=(16, 32),
        unet_heads=(1, 2),
        unet_groups=8,
        unet_batch=4,
        unet_lr=2e-3,
        ema_decay=0.9,
        phases=(UnetPhase(10, SMOKE_NAMES, None), UnetPhase(20, SMOKE_NAMES[:3], None)),
        warmup_steps=4,
        precision="bf16",
        grid_steps=15,
        checkpoint_seconds=1,
        sample_steps=4,
        guidance=2.0,
    ),
}
PRESETS["cpu"] = replace(
    PRESETS["first"],
    image_size=512,
    margin=0.07,
    autoencoder_steps=0,  # the first model's is good enough
    unet_channels=(48, 48, 96, 192),
    unet_heads=(1, 1, 2, 4),
    unet_batch=8,
    phases=(
        UnetPhase(steps=1800, names=CLEAR_NAMES, styles=("fluent-emoji",), key_stride=2),
        UnetPhase(steps=200, names=CLEAR_NAMES, styles=("fluent-emoji",), lr=1e-4),
        UnetPhase(steps=3000, names=CLEAR_NAMES, styles=("fluent-emoji",), key_stride=2, sharpen=1 / 16),
    ),
    ema_decay=0.996,
    grid_steps=300,
    sample_steps=15,
    grounds=3,
    grows=True,
    unet_attends_at_top_only=True,
    grid_samples=4,
)
PRESETS["smoke-grown"] = replace(
    PRESETS["smoke"],
    autoencoder_steps=0,
    unet_channels=(16, 16, 32),
    unet_heads=(1, 1, 2),
    phases=(
        UnetPhase(12, SMOKE_NAMES, None, key_stride=2),
        UnetPhase(6, SMOKE_NAMES, None, lr=1e-4, sharpen=1 / 4, calibration_steps=4),
    ),
    grid_steps=12,
    grounds=2,
    grows=True,
    unet_attends_at_top_only=True,
    grid_samples=2,
)
