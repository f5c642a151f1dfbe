"""One step's loss and gradients, against an implementation from the formulas alone.

The reference uses plain torch, the networks themselves, and nothing of the recipe's maths. Both compute in fp64 where the
recipe leaves the precision to the networks, so that a difference is one of formulas, not of rounding.
"""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.func import functional_call

from dataset_and_utils import TokenMap
from preprocess import PreprocessConfig, prepare_dataset
from sdxl.model.components import Components, load_components
from sdxl.training.batches import Batches
from sdxl.training.config import TrainingConfig
from sdxl.training.examples import cache_examples
from sdxl.training.loss import DenoisingLoss
from sdxl.training.optimizers import Group, Optimizers
from sdxl.training.step import TrainingStep
from sdxl.training.token_rows import NewTokens
from sdxl.training.trainable import as_base, full_unet, lora
from tests.conftest import png, write_zip
from tests.test_training import CONFIG

SEED, BATCH, SIDE = 1, 3, 64
SIZES = [(80, 96), (120, 64), (70, 70)]
"""(height, width) of the originals."""
CAPTIONS = ["a photo of TOK", "a red TOK on the left", "TOK"]
BETAS = (0.00085, 0.012)
"""First and last β of SDXL's schedule."""


def schedule(steps: int, *, zero_snr: bool) -> Tensor:
    """ᾱ [steps]: √β rises linearly. With zero terminal SNR, √ᾱ is shifted to end at 0 and scaled to keep its start
    (arXiv:2305.08891, algorithm 1)."""
    betas = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, steps) ** 2  # fp32, as every trainer holds ᾱ
    root = (1 - betas).cumprod(0).sqrt()
    if zero_snr:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root.double() ** 2


def prompts(encoders: list[Any], ids: tuple[Tensor, Tensor], end: int) -> tuple[Tensor, Tensor]:
    """The last but one hidden states of both encoders, and the projection of the second one's last at the text's end."""
    hidden, pooled = [], None
    for encoder, rows in zip(encoders, ids, strict=True):
        out = encoder(input_ids=rows, output_hidden_states=True)
        hidden.append(out.hidden_states[-2])
        if hasattr(encoder, "text_projection"):
            first_end = (rows == end).int().argmax(1)
            last = out.last_hidden_state[torch.arange(len(rows)), first_end]
            pooled = last @ encoder.text_projection.weight.T
    assert pooled is not None
    return torch.cat(hidden, -1), pooled


@dataclasses.dataclass(kw_only=True)
class Case:
    """Settings of the config, and the schedule."""

    prediction: str = "epsilon"
    zero_snr: bool = False
    steps: int = 1000
    masks: bool = False
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    "epsilon": Case(),
    "epsilon, unweighted": Case(settings={"snr_gamma": 1e6}),
    "epsilon, zero SNR": Case(zero_snr=True, steps=4),
    "v": Case(prediction="v_prediction"),
    "v, zero SNR": Case(prediction="v_prediction", zero_snr=True, steps=4),
    "offset noise": Case(settings={"noise_offset": 0.1}),
    "dropped captions": Case(settings={"caption_dropout": 0.5}),
    "masks, floor": Case(masks=True, settings={"mask_base_target": False, "mask_floor": 0.3}),
    "masks, base outside": Case(masks=True, settings={"mask_floor": 0.2}),
    "masks, v": Case(masks=True, prediction="v_prediction", zero_snr=True, steps=4),
    "LoRA": Case(settings={"is_lora": True, "lora_alpha": 8, "lora_targets": "all"}),
    "LoRA, masks, offset, v": Case(
        prediction="v_prediction",
        masks=True,
        settings={"is_lora": True, "lora_alpha": 2, "noise_offset": 0.05, "snr_gamma": 1.0},
    ),
    "DoRA": Case(settings={"is_lora": True, "use_dora": True}),
}


@pytest.fixture(scope="module")
def base(narrow_base: Path) -> Components:
    made = load_components(narrow_base, is_lora=False, device=torch.device("cpu"))
    for module in (made.unet, *made.text_encoders):
        module.double()
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Prepared pictures of three shapes, with (True) and without masks."""
    made = {}
    for masks in (True, False):
        folder = tmp_path_factory.mktemp("maths")
        files: dict[str, bytes | str] = {}
        for i, (height, width) in enumerate(SIZES):
            files[f"{i}.png"] = png(i, (width, height))
            if masks:
                mask = Image.new("L", (width, height), 255 if i == 2 else 0)
                mask.paste(255, (10, 15, 45, 60))
                mask.save(folder / "mask.png")
                files[f"{i}.mask.png"] = (folder / "mask.png").read_bytes()
        rows = "".join(f"{i}.png,{text}\n" for i, text in enumerate(CAPTIONS))
        archive = write_zip(folder / "a.zip", {**files, "captions.csv": "image_file,caption\n" + rows})
        config = PreprocessConfig(target_size=SIDE, crop_based_on_salience=False)
        made[masks] = prepare_dataset(archive, folder / "dataset", config=config)
    return made


def true_time_ids() -> Tensor:
    """Original size, crop and target size [n, 6] of pictures that are scaled to cover a square and cropped in the middle."""
    ids = []
    for height, width in SIZES:
        scale = max(SIDE / height, SIDE / width)
        top, left = (round(height * scale) - SIDE) // 2, (round(width * scale) - SIDE) // 2
        ids.append([height, width, top, left, SIDE, SIDE])
    return torch.tensor(ids, dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_what_the_formulas_say(base: Components, folders: dict[bool, Path], name: str):
    case = CASES[name]
    config = dataclasses.replace(CONFIG, train_batch_size=BATCH, **case.settings)
    parts = dataclasses.replace(
        base,
        unet=copy.deepcopy(base.unet),
        text_encoders=copy.deepcopy(base.text_encoders),
        tokenizers=copy.deepcopy(base.tokenizers),
        noise_scheduler=DDPMScheduler(
            num_train_timesteps=case.steps,
            beta_start=BETAS[0],
            beta_end=BETAS[1],
            beta_schedule="scaled_linear",
            prediction_type=case.prediction,
            rescale_betas_zero_snr=case.zero_snr,
        ),
    )
    data = cache_examples(folders[case.masks], parts, TokenMap.parse("TOK:2"), seed=0)

    # Theirs: the recipe's own step.
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    outside = as_base(parts.unet, config) if case.masks and config.mask_base_target else None
    tokens = NewTokens(parts, TokenMap.parse("TOK:2"), "", generator)
    trainable = (lora if config.is_lora else full_unet)(parts.unet, config)
    for weight in trainable.weights.params if config.is_lora else ():
        torch.nn.init.normal_(
            weight, std=0.05
        )  # the second matrices start at 0: nothing would reach the first
    optimizers = Optimizers(
        "adamw",
        weights=trainable.weights,
        rows=Group(params=tokens.parameters, lr=1e-3),
        device=parts.device,
    )
    parts.unet.double()  # full training chooses fp32
    for weight in trainable.weights.params:
        weight.grad_dtype = torch.float64
    start = {key: value.detach().clone() for key, value in parts.unet.named_parameters()}
    rows = [value.detach().clone() for value in tokens.parameters]
    batches = Batches(data, BATCH, seed=0)
    loss = DenoisingLoss(
        components=parts,
        config=config,
        generator=generator,
        base_outside_masks=outside,
    )
    step = TrainingStep(
        loss, [batches], optimizers, tokens, config, generator, mixed_precision=trainable.mixed_precision
    )
    drawn = batches.draw()
    random = generator.get_state()
    value, _ = step.gradients((drawn,))

    # Ours.
    shown = batches.buckets[0].examples.take(batches.buckets[0].chosen[0])
    which = batches.buckets[0].chosen[0]
    assert torch.equal(shown.time_ids.double(), true_time_ids()[which])
    expected, of_weights, of_rows = reference(
        case, config, base, start, rows, random, shown.latents, shown.mask, shown.token_ids, which
    )
    assert value == pytest.approx(expected, rel=1e-5)
    trained = {key: p.grad for key, p in parts.unet.named_parameters() if p.requires_grad}
    assert trained.keys() == of_weights.keys()
    whole = torch.stack([grad.norm() for grad in of_weights.values()]).norm()
    for key, grad in of_weights.items():
        mine = trained[key]
        assert mine is not None, key
        assert (mine - grad).norm() <= 1e-5 * (grad.norm() + 1e-3 * whole), key
    for mine, grad in zip(tokens.parameters, of_rows, strict=True):
        assert mine.grad is not None and grad.norm() > 0
        assert (mine.grad - grad).norm() <= 1e-5 * grad.norm()


def reference(
    case: Case,
    config: TrainingConfig,
    base: Components,
    start: dict[str, Tensor],
    rows: list[Tensor],
    random: Tensor,
    latents: Tensor,
    mask: Tensor,
    ids: tuple[Tensor, Tensor],
    which: Tensor,
) -> tuple[float, dict[str, Tensor], list[Tensor]]:
    """The loss, and the clipped gradients of the UNet's weights and of the token rows.

    start: the values that train, and those that do not. random: the generator's state before the step.
    """
    generator = torch.Generator()
    generator.set_state(random)
    weights = {key: value.double().requires_grad_() for key, value in start.items()}
    tables, encoders = [], copy.deepcopy(list(base.text_encoders))
    for encoder, row in zip(encoders, rows, strict=True):
        old: Any = encoder.get_input_embeddings()
        table = torch.cat([old.weight.detach(), row.double()]).requires_grad_()
        embedding = torch.nn.Embedding(*table.shape)
        del embedding.weight
        embedding.weight = table  # type: ignore[assignment]
        encoder.set_input_embeddings(embedding)
        tables.append(table)

    # Random numbers, in the order in which the recipe draws them.
    kept = torch.ones(BATCH)
    if config.caption_dropout:
        kept = (torch.rand(BATCH, generator=generator) >= config.caption_dropout).double()
        assert 0 < kept.sum() < BATCH
    noise = torch.randn(latents.shape, generator=generator)
    if config.noise_offset:
        noise = noise + config.noise_offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
    times = torch.randint(case.steps, (BATCH,), generator=generator)
    if case.zero_snr:
        assert (times == case.steps - 1).any()  # pure noise is among them

    # x_t = √ᾱ x + √(1 − ᾱ) ε, and v = √ᾱ ε − √(1 − ᾱ) x.
    alpha = schedule(case.steps, zero_snr=case.zero_snr)[times].view(-1, 1, 1, 1)
    clean, noise = latents.double(), noise.double()
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    v = case.prediction == "v_prediction"
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean if v else noise

    hidden, pooled = prompts(encoders, ids, base.tokenizers[0].eos_token_id)  # type: ignore[arg-type]
    hidden, pooled = hidden * kept.view(-1, 1, 1), pooled * kept.view(-1, 1)
    told = {"text_embeds": pooled, "time_ids": true_time_ids()[which]}

    def call(with_weights: dict[str, Tensor]) -> Tensor:
        given = {"encoder_hidden_states": hidden, "added_cond_kwargs": told}
        return functional_call(base.unet, with_weights, (noisy, times), given).sample

    prediction = call(merged(weights, base.unet, config) if config.is_lora else weights)
    if case.masks and config.mask_base_target:
        with torch.no_grad():
            target = mask * target + (1 - mask) * call({})

    # Mean over each picture with weights from the mask, then min-SNR, then the mean over pictures.
    share = config.mask_floor + (1 - config.mask_floor) * mask.double()
    squares = ((prediction - target) ** 2).mean(1, keepdim=True)
    of_picture = (squares * share).sum((1, 2, 3)) / share.sum((1, 2, 3))
    snr = (alpha / (1 - alpha)).flatten()
    if v:
        weight = torch.minimum(snr, torch.tensor(config.snr_gamma)) / (snr + 1)
    else:
        weight = torch.where(snr > config.snr_gamma, config.snr_gamma / snr, torch.ones_like(snr))
    total = (of_picture * weight).mean()
    total.backward()

    learned = {key: value for key, value in weights.items() if not config.is_lora or "lora_" in key}
    of_weights = {key: value.grad for key, value in learned.items() if value.grad is not None}
    count = [len(row) for row in rows]
    of_rows = [table.grad[-n:] for table, n in zip(tables, count, strict=True) if table.grad is not None]
    return total.item(), clipped(of_weights), list(clipped(dict(enumerate(of_rows))).values())


def clipped(gradients: dict[Any, Tensor]) -> dict[Any, Tensor]:
    """Gradients, scaled so that their common norm is at most 1."""
    norm = torch.stack([grad.norm() for grad in gradients.values()]).norm()
    return {key: grad * min(1.0, float(1 / (norm + 1e-6))) for key, grad in gradients.items()}


def merged(
    weights: dict[str, Tensor], unet: UNet2DConditionModel, config: TrainingConfig
) -> dict[str, Tensor]:
    """The UNet's weights with W + (α / r) · B A in place of each layer with matrices; with DoRA,
    m · (W + (α / r) · B A) / ‖W + (α / r) · B A‖ by output, where the norm counts as a constant (arXiv:2402.09353)."""
    scale = (config.lora_alpha or config.lora_rank) / config.lora_rank
    made: dict[str, Tensor] = {}
    product: Callable[[Tensor, Tensor], Tensor] = lambda up, down: torch.einsum(  # noqa: E731
        "or,ri...->oi...", up.flatten(1), down
    )
    for key, value in weights.items():
        if ".base_layer." not in key:
            made |= {} if "lora_" in key else {key: value}
            continue
        plain = key.replace(".base_layer", "")
        layer = plain.removesuffix(".weight")
        if not plain.endswith(".weight") or f"{layer}.lora_A.default.weight" not in weights:
            made[plain] = value
            continue
        changed = value + scale * product(
            weights[f"{layer}.lora_B.default.weight"], weights[f"{layer}.lora_A.default.weight"]
        )
        if config.use_dora:
            length = weights[f"{layer}.lora_magnitude_vector.default.weight"].flatten()
            norm = changed.flatten(1).norm(dim=1).detach()
            changed = changed * (length / norm).view(-1, *[1] * (changed.ndim - 1))
        made[plain] = changed
    assert made.keys() == dict(unet.named_parameters()).keys()
    return made
