"""What the built-in demo model knows: its 121 names, prompts for them, and the nearest ones to another prompt."""

from __future__ import annotations

import difflib
import re

DEMO_NAMES = tuple(
    name.strip()
    for name in """
    abacus, accordion, alarm clock, ambulance, ant, baby bottle, backpack, bagel, balloon, banana, banjo, baseball,
    basketball, bear, beaver, beer mug, beetle, bell pepper, bird, bison, broccoli, broom, bucket, burrito, bus,
    butterfly, camel, camera, candle, canoe, castle, cat, chair, chicken, church, cocktail glass, computer mouse,
    crab, crocodile, cucumber, dog, door, drum, eagle, elephant, ferris wheel, fish, flamingo, flute, fox, frog,
    goose, gorilla, green apple, guitar, hammer, hippopotamus, hot dog, ice cream, jellyfish, koala, lady beetle,
    laptop, lemon, leopard, lion, lipstick, lobster, microphone, military helmet, mosque, mouse, mushroom, owl,
    panda, parachute, peacock, penguin, pig, pineapple, pizza, polar bear, poodle, pretzel, purse, rabbit, ram,
    running shoe, scorpion, shark, shield, ship, sloth, snail, snake, soccer ball, socks, speedboat, spider,
    stopwatch, strawberry, sunglasses, swan, teapot, teddy bear, telephone, television, tent, tiger, top hat,
    tractor, tropical fish, turtle, umbrella, violin, volcano, watch, whale, wine glass, wolf, zebra
    """.split(",")
)
"""The things that the demo model was trained on; it knows no others."""

# Words of usual prompts that say nothing about the thing shown, but look like a part of some name.
_FILLERS = frozenset(
    "a an and at by for from high in is its of on one or photo photograph quality that the to with".split()
)


def demo_prompts() -> list[str]:
    """One prompt for each name, in the form in which most of the demo model's captions were."""
    return [f"a high quality photograph of a {name}." for name in DEMO_NAMES]


def nearest_names(prompt: str, count: int = 3) -> list[str]:
    """The names that share a word with a prompt, then those spelled most like one of its words."""
    words = [word for word in _words(prompt) if word not in _FILLERS]

    def likeness(name: str) -> float:
        parts = name.split()
        close = max(
            (difflib.SequenceMatcher(None, word, part).ratio() for word in words for part in parts), default=0.0
        )
        return len(set(words) & set(parts)) + close

    return sorted(DEMO_NAMES, key=likeness, reverse=True)[:count]


def unknown_subject(prompt: str) -> str | None:
    """Say that a prompt names nothing which the demo model knows; None where it names something.

    Returns:
        One sentence for the user: what the model knows, the nearest names, and how to list them.
    """
    text = f" {' '.join(_words(prompt))} "
    if any(f" {name} " in text for name in DEMO_NAMES):
        return None
    return (
        f"the demo model knows {len(DEMO_NAMES)} things and none of them is in this prompt, so its image will be of "
        f"something else; nearest in spelling: {', '.join(nearest_names(prompt))}; `agentsd prompts` lists them all, "
        "and --model takes other models"
    )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
