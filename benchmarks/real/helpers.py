"""Checks of the helper models on the photograph: captioner, segmenter, upscaler and the judges of pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops, ImageOps

from benchmarks.real.findings import Notes, check
from benchmarks.real.setup import Setup
from sdxl import settings
from sdxl.data import captioner as captioners
from sdxl.data import segmenter as segmenters
from sdxl.data import upscaler as upscalers
from sdxl.data.picture_encoders import as_tensor, picture_encoders
from sdxl.files.hub import CAPTIONER, CLIP, DINO, SEGMENTER, UPSCALER, Helper
from sdxl.serving.safety import CHECKER, OPEN_NSFW_THRESHOLD, Judge, OpenNsfwJudge, load_checker

PREFIX = "a photo of TOK, "
SHORT_SIDE = 384
"""Pixels: pictures for the upscaler are made from a photograph of this size, so that a CPU can enlarge them too."""


@check("Does the captioner write something about a photograph, after the given beginning?")
def captioner(setup: Setup, notes: Notes) -> None:
    """A caption begins as asked, goes on, and names what is in the picture."""
    _tell(notes, CAPTIONER)
    with captioners.captioner() as model:
        caption = model.caption(setup.photo.image, PREFIX)
        again = model.caption(setup.photo.image, PREFIX)
    written = caption.removeprefix(PREFIX.strip(" ,")).strip(" ,")
    notes.expect("the caption begins as asked", PREFIX, caption, caption.startswith(PREFIX.strip(" ,")))
    notes.expect("words after that", "1 or more", len(written.split()), len(written.split()) >= 1)
    notes.equal("TOK is named once", 1, caption.split().count("TOK,") + caption.split().count("TOK"))
    notes.equal("a second caption is the same", True, caption == again)
    if setup.photo.word:
        holds = setup.photo.word in written.lower()
        notes.expect(
            "the caption names what is there",
            setup.photo.word,
            written,
            holds,
            applies=_is_default(CAPTIONER),
        )
    notes.picture(setup.photo.image, caption)


@check("Does the segmenter find the subject of a photograph?")
def segmenter(setup: Setup, notes: Notes) -> None:
    """The mask covers the subject's middle, leaves something out, and a thing that is not there has no mask."""
    _tell(notes, SEGMENTER)
    photo = setup.photo
    with segmenters.segmenter() as model:
        mask = model.mask(photo.image, [photo.subject], 1.0)
        absent = model.mask(photo.image, ["a submarine"], 1.0)
    notes.expect(f'"{photo.subject}" is found', "yes", "yes" if mask is not None else "no", mask is not None)
    notes.expect(
        '"a submarine" is not found',
        "no",
        "yes" if absent is not None else "no",
        absent is None,
        applies=_is_default(SEGMENTER),
    )
    if mask is None:
        return
    height, width = mask.shape
    across, down = int(photo.centre[0] * (width - 1)), int(photo.centre[1] * (height - 1))
    notes.between("mask at the subject's middle", 0.5, 1, float(mask[down, across]))
    notes.at_most("share of the picture under the mask", 0.95, float((mask >= 0.5).mean()))
    shade = Image.fromarray((mask * 255).astype(np.uint8)).resize(photo.image.size)
    notes.picture(
        ImageChops.multiply(photo.image.convert("RGB"), shade.convert("RGB")), f"mask of {photo.subject}"
    )


@check("Does the upscaler draw sharper than plain enlargement, without changing the picture?")
def upscaler(setup: Setup, notes: Notes) -> None:
    """A photograph is made small and enlarged again, by the upscaler and by bicubic interpolation."""
    _tell(notes, UPSCALER)
    with upscalers.upscaler() as model:
        scale = model.scale
        side = SHORT_SIDE // (8 * scale) * 8 * scale if setup.size is None else setup.size
        original = setup.photo.square(side)
        small = original.resize((side // scale, side // scale), Image.Resampling.BOX)
        enlarged = model.enlarge(small)
    plain = small.resize(original.size, Image.Resampling.BICUBIC)
    notes.equal("factor", 4, scale, applies=_is_default(UPSCALER))
    notes.equal("size of the result", original.size, enlarged.size)
    notes.between(
        "sharpness, as a share of bicubic's", 1.05, 20, _sharpness(enlarged) / max(_sharpness(plain), 1e-9)
    )
    # It may invent detail, but the picture must stay where and what it was.
    notes.between("nearness to bicubic", 22, 80, _nearness(enlarged, plain), unit=" dB")
    for picture, caption in ((enlarged, "upscaler"), (plain, "bicubic"), (original, "original")):
        notes.picture(picture, caption)


@check("Do DINOv2 and CLIP tell what a photograph shows?")
def scorer(setup: Setup, notes: Notes) -> None:
    """What scores the previews of a training: a mirrored photograph is like itself, and its own text fits best."""
    _tell(notes, DINO)
    _tell(notes, CLIP)
    photo = setup.photo.image
    pictures = [
        as_tensor(one) for one in (photo, ImageOps.mirror(photo), Image.new("RGB", photo.size, "gray"))
    ]
    encoders = picture_encoders()
    with encoders.on(setup.device):
        own, mirrored, other = encoders.likeness(pictures)
        shown = encoders.shown(pictures[:1])[0]
        right, wrong = encoders.texts([f"a photo of {setup.photo.subject}", "a photo of a submarine"])
    near, far = float(own @ mirrored), float(own @ other)
    fits, misses = float(shown @ right), float(shown @ wrong)
    notes.expect(
        "likeness of the mirrored photograph",
        f"above {far:.3f}, of a grey picture",
        f"{near:.3f}",
        near > far,
    )
    notes.between("the same", 0.7, 1, near, applies=_is_default(DINO))
    notes.between("likeness of a grey picture", -0.2, 0.5, far, applies=_is_default(DINO))
    notes.expect("fit of its own text", f"above {misses:.3f}, of a submarine", f"{fits:.3f}", fits > misses)
    notes.between("the same for its text", 0.2, 0.45, fits, applies=_is_default(CLIP))


@check("Does Stable Diffusion's safety checker load, and pass a harmless photograph?")
def safety_checker(setup: Setup, notes: Notes) -> None:
    """The judge of pictures on a real base."""
    name = settings.variable("SDXL_SAFETY_CHECKER") or CHECKER
    judge = load_checker(name, setup.device)
    notes.fact("judge", judge.name)
    concepts = tuple(
        len(part) for part in (judge._checker.concept_embeds, judge._checker.special_care_embeds)
    )
    notes.equal("unsafe concepts, and those that need special care", (17, 3), concepts)
    _judged(setup, notes, judge)


@check("Does open_nsfw, which judges without a download, pass a harmless photograph?")
def open_nsfw(setup: Setup, notes: Notes) -> None:
    """The judge on a miniature, and where the safety checker cannot be fetched."""
    judge = OpenNsfwJudge()
    score = judge._classifier.classify(setup.photo.image).nsfw
    notes.at_most(f"score of the photograph; {OPEN_NSFW_THRESHOLD:g} and more is withheld", 0.5, float(score))
    _judged(setup, notes, judge)


def _judged(setup: Setup, notes: Notes, judge: Judge) -> None:
    """Note the judgement of the photograph, and of pictures that show nothing."""
    pictures = {setup.photo.name: setup.photo.image.convert("RGB")}
    pictures |= {
        f"a {colour} picture": Image.new("RGB", (256, 256), colour) for colour in ("black", "white", "gray")
    }
    for name, picture in pictures.items():
        notes.equal(f"{name} is withheld", False, judge.is_unsafe(picture))


def _tell(notes: Notes, helper: Helper) -> None:
    notes.fact("model", settings.variable(helper.setting) or helper.hub_name)


def _is_default(helper: Helper) -> bool:
    return settings.variable(helper.setting) is None


def _sharpness(picture: Image.Image) -> float:
    """Mean square of the differences between neighbouring pixels, twice: what a blurred picture lacks."""
    grey = np.asarray(picture.convert("L"), dtype=float)
    second = [np.diff(grey, n=2, axis=axis) for axis in (0, 1)]
    return float(sum((part**2).mean() for part in second))


def _nearness(one: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB."""
    first, second = (np.asarray(picture.convert("RGB"), dtype=float) for picture in (one, other))
    return 10 * float(np.log10(255**2 / max(((first - second) ** 2).mean(), 1e-9)))
