"""Every word of the world: colours, kinds, places, textures, and the wording of captions.

Captions use only words of `caption_words()`. The tokenizer's vocabulary also has `EXTRA_WORDS`, which people may use in
prompts. Of these the pretraining shows only `TOYS`.
"""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.11, 0.13),
    "orange": (0.97, 0.52, 0.07),
    "yellow": (0.98, 0.86, 0.16),
    "green": (0.15, 0.62, 0.22),
    "blue": (0.13, 0.32, 0.84),
    "purple": (0.50, 0.17, 0.66),
    "pink": (0.98, 0.56, 0.74),
    "brown": (0.46, 0.27, 0.13),
    "black": (0.07, 0.07, 0.08),
    "white": (0.97, 0.97, 0.96),
    "gray": (0.54, 0.54, 0.56),
    "cyan": (0.20, 0.82, 0.86),
}
"""Colour name -> RGB in 0..1."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "ring", "cross")
THINGS = ("house", "fish", "tree", "boat", "flower", "mushroom", "car", "cup")
KINDS = SHAPES + THINGS

TOYS = ("toy", "creature", "figure", "doll", "character", "monster", "robot", "animal")
"""Nouns for a random figure. They say nothing about its looks."""

SIZES = ("small", "medium", "large")

POSITIONS: dict[str, tuple[int, int]] = {
    "top left": (-1, -1),
    "top": (0, -1),
    "top right": (1, -1),
    "left": (-1, 0),
    "middle": (0, 0),
    "right": (1, 0),
    "bottom left": (-1, 1),
    "bottom": (0, 1),
    "bottom right": (1, 1),
}
"""Position name -> (column, row), each -1, 0 or 1; rows grow downwards."""

TEXTURES = ("plain", "striped", "dotted", "checkered", "gradient")

RELATIONS: dict[str, tuple[str, ...]] = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "on top of": ("on top of",),
    "below": ("below", "under"),
    "next to": ("next to", "beside"),
    "in front of": ("in front of",),
}
"""Relation -> the phrases for it."""

LEADS = ("a photo of", "a picture of", "a drawing of", "an image of")

TEXTURE_NOUNS = {"striped": "stripes", "dotted": "dots", "checkered": "checks"}

BACKGROUND_LINKS = ("on", "on", "on", "with", "against", "in front of")

EXTRA_WORDS = [
    "creature",
    "creatures",
    "toy",
    "toys",
    "monster",
    "monsters",
    "animal",
    "robot",
    "doll",
    "dog",
    "cat",
    "bird",
    "bear",
    "person",
    "man",
    "woman",
    "character",
    "figure",
    "photo",
    "painting",
    "sketch",
    "cartoon",
    "style",
    "of",
    "in",
    "the",
    "style",
    "standing",
    "sitting",
    "waving",
    "jumping",
    "holding",
    "wearing",
    "riding",
    "behind",
    "between",
    "near",
    "two",
    "three",
    "one",
    "this",
    "that",
    "it",
    "is",
    "are",
    "very",
    "big",
    "little",
    "tiny",
    "cute",
    "nice",
    "bright",
    "dark",
    "light",
    "colour",
    "color",
    "corner",
    "side",
    "edge",
    "pattern",
    "patterned",
    "shape",
    "thing",
    "object",
    "subject",
    "and",
    "or",
    "not",
    "no",
    "by",
    "for",
    "at",
    "from",
    "to",
    "into",
    "up",
    "down",
    "stripe",
    "dot",
    "check",
    "circles",
    "squares",
    "triangles",
    "stars",
    "hearts",
    "diamonds",
    "rings",
    "crosses",
    "houses",
    "trees",
    "boats",
    "flowers",
    "mushrooms",
    "cars",
    "cups",
    "grey",
    "violet",
    "gold",
    "silver",
    "hat",
    "scarf",
    "bow",
    "eyes",
    "smile",
    "face",
    "background",
    "backgrounds",
    "scene",
    "my",
    "your",
    "his",
    "her",
    "their",
    "our",
    "with",
    "without",
    ",",
    ".",
    "!",
    "?",
    "'",
    "-",
    "_",
    "0",
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
    "7",
    "8",
    "9",
]


def places(position: str) -> tuple[str, ...]:
    """The phrases for a position of `POSITIONS`."""
    if position == "middle":
        return ("in the middle", "in the center", "in the middle")
    if position in ("top", "bottom"):
        return (f"at the {position}", f"at the {position}", f"near the {position}")
    if position in ("left", "right"):
        return (f"on the {position}", f"on the {position} side", f"at the {position}")
    return (
        f"in the {position}",
        f"in the {position} corner",
        f"at the {position}",
        f"at the {position} corner",
    )


def caption_words() -> tuple[str, ...]:
    """The words of captions, sorted, with the comma."""
    phrases = [*COLOURS, *KINDS, *SIZES, *TEXTURES, *LEADS, *BACKGROUND_LINKS, *TEXTURE_NOUNS.values()]
    phrases += [p for position in POSITIONS for p in places(position)]
    phrases += [p for group in RELATIONS.values() for p in group]
    phrases += ["a an and background with empty , of plain"]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


def vocabulary_words() -> tuple[str, ...]:
    """The words that are single tokens, sorted."""
    return tuple(sorted({*caption_words(), *EXTRA_WORDS}))
