"""Draw what a fine-tune is asked for, and judge the pictures by the scorer.

Knows prompts, the scorer and a pipeline; does not know how a fine-tune was made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import prompts as P
from sdxl.data.picture_encoders import cosine_of_different
from sdxl.serving.tuned_pipeline import TunedPipeline
from tiny_world.following import following, shares
from tiny_world.parts import pad
from tiny_world.raster import render
from tiny_world.scorer import Scorer
from tiny_world.subjects import random_shot, shot_parts, subject

GUIDANCE = 3.0
REAL_SHOTS = 16


def real_pictures(seed: int, n: int = REAL_SHOTS) -> Tensor:
    """Pictures [n, 3, 256, 256] in 0..1 of a subject that are not in its training pictures."""
    rng = np.random.default_rng((seed, 616))
    cast = {P.NAME: subject(seed)}
    scenes = [random_shot(P.NAME, rng) for _ in range(n)]
    return render(pad([shot_parts(s, cast, 900_000 + i) for i, s in enumerate(scenes)])).images


def judge(
    seed: int,
    tuned: TunedPipeline,
    *,
    called: str = P.NAME,
    is_base: bool = False,
    seeds: int,
    sampling_steps: int,
    side: int,
    device: str,
) -> tuple[dict[str, float], Tensor]:
    """The figures of what `tuned` draws of subject `seed` now, and its pictures of the first of `seeds` seeds.

    called: the subject's name in prompts. is_base: also judge what the base makes of a thing that it knows.
    """
    scorer = Scorer(device=device)
    asked = P.subject_prompts(called) * seeds
    controls = {"prior": P.prior_prompts()} | ({"known": P.known_prompts()} if is_base else {})
    prompts = [prompt for prompt, _ in asked]
    prompts += [prompt for pairs in controls.values() for prompt, _ in pairs]
    prompts += [P.DIVERSITY_PROMPT] * 6
    # On a GPU draw all in one batch: for small pictures the launches take the time, not the arithmetic.
    everything = draw(
        tuned, prompts, 100, side=side, steps=sampling_steps, at_once=len(prompts) if device != "cpu" else 10
    )
    pictures, rest = everything[: len(asked)], everything[len(asked) :]

    real = scorer.identity(real_pictures(seed))
    others = scorer.identity(real_pictures(seed + 2, 8))
    embedded = scorer.identity(pictures)
    numbers = {
        "similarity": float((embedded @ real.T).mean()),
        "real_similarity": cosine_of_different(real, real),
        "other_similarity": float((real @ others.T).mean()),
    }
    for i, value in enumerate((embedded @ real.T).mean(1).view(seeds, -1).mean(0).tolist()):
        numbers[f"similarity_prompt_{i}"] = round(value, 3)
    met = following(scorer.attributes(pictures), [scene for _, scene in asked])
    numbers |= {f"prompt_{name}": value for name, value in shares(met).items()}
    for name, pairs in controls.items():
        images, rest = rest[: len(pairs)], rest[len(pairs) :]
        met = following(scorer.attributes(images), [scene for _, scene in pairs])
        numbers |= {f"{name}_{key}": value for key, value in shares(met).items()}
    numbers["diversity"] = spread(pictures.unflatten(0, (seeds, -1)).transpose(0, 1))
    numbers["prior_diversity"] = spread(rest.unsqueeze(0))
    return numbers, (pictures[: len(asked) // seeds] * 255).round().to(torch.uint8).contiguous()


def spread(pictures: Tensor) -> float:
    """How much pictures of one prompt differ, from 0 to 1; pictures: [prompts, n, 3, h, w].

    The root mean square difference of 32×32 thumbnails, averaged over all pairs; 0 for n = 1.
    """
    small = torch.nn.functional.interpolate(pictures.flatten(0, 1), size=(32, 32), mode="area")
    small = small.unflatten(0, pictures.shape[:2]).flatten(2)
    n = small.shape[1]
    if n == 1:
        return 0.0
    distances = torch.cdist(small, small) / small.shape[2] ** 0.5
    return round(float(distances.sum((1, 2)).mean() / (n * (n - 1))), 4)


@torch.inference_mode()
def draw(
    tuned: TunedPipeline, prompts: list[str], seed: int, *, side: int, steps: int, at_once: int = 10
) -> Tensor:
    """Draw one picture for each prompt: [n, 3, side, side] in 0..1, on the CPU.

    Picture i comes from the seed `seed` + i. `at_once` pictures share a batch.
    """
    images = []
    for start in range(0, len(prompts), at_once):
        batch = prompts[start : start + at_once]
        output: Any = tuned.pipeline(
            prompt=[tuned.token_map.substitute(prompt) for prompt in batch],
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            height=side,
            width=side,
            generator=[torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(batch))],
            output_type="latent",
        )
        vae = tuned.pipeline.vae
        decoded = vae.decode(output.images.to(vae.dtype) / vae.config.scaling_factor).sample
        images.append((decoded * 0.5 + 0.5).clamp(0, 1).float().cpu())
    return torch.cat(images)
