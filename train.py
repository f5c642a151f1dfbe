"""The training door: captioned pictures in, `trained_model.tar` out.

Knows the public inputs and the order of the stages; does not know how a stage works.

    python train.py -i input_images=@example_datasets/crowny.zip -i token_map=TOK:2 -o out/
"""

import logging
import pathlib
import shutil
import sys
from dataclasses import fields
from typing import Any, Optional

from cog import Input, Path, current_scope

from dataset_and_utils import ExampleDataset, TokenMap, read_captions_csv
from preprocess import PreprocessConfig, prepare_dataset
from sdxl import settings
from sdxl.command_line import run_command_line
from sdxl.files import hub
from sdxl.files.fetching import fetch
from sdxl.model import fine_tune_files
from sdxl.model.components import Components, default_device, load_components, native_resolution
from sdxl.model.fine_tune_files import TrainedFineTune
from sdxl.process import configure_logging, keep_compiled_kernels, repeat_on_cpu, workspace_of_run
from sdxl.settings import resolve_seed
from sdxl.training import data_parallel
from sdxl.training.config import TrainingConfig, canonical_inputs, resolve_steps
from sdxl.training.examples import cache_examples
from sdxl.training.prior import PriorConfig, prior_dataset
from sdxl.training.recipe import StepReport, fine_tune

log = logging.getLogger(__name__)


def train(
    input_images: Optional[Path] = Input(
        default=None,
        description="Your pictures: a .zip, .tar, .tar.gz or .tgz of jpg, png, webp, bmp or heic files, with captions in a csv (columns image_file and caption) or in one .txt beside each picture. Required.",
    ),
    token_map: str = Input(
        default="TOK:2",
        description='The new words in your captions and how many embedding rows each one gets, such as "TOK:2" or "CLOCK_TOK:2,MT_TOK:3". Letters and underscore only. More rows hold more detail; 2 is right for most subjects.',
    ),
    token_init: str = Input(
        default="",
        description='A word that the base knows for what each token shows, such as "TOK:dog" or "CLOCK_TOK:clock,MT_TOK:monster": its training starts there instead of from noise.',
    ),
    global_caption: Optional[str] = Input(
        default=None,
        description='One caption for all pictures, such as "a photo of TOK"; used where the archive brings no captions.',
    ),
    caption_prefix: str = Input(
        default="a photo of TOK, ",
        description="How the captions begin where you give none at all; a captioner goes on from it. Must name a token of token_map.",
    ),
    resolution: Optional[int] = Input(
        default=None,
        description="Side of the square training pictures, in pixels, a multiple of 8. Default: the size the base was made for, 1024 for SDXL 1.0.",
    ),
    bucketing: bool = Input(
        default=False,
        description="Cut each picture to the nearest of several shapes of about resolution times resolution pixels instead of to a square: less is cut off.",
    ),
    num_train_epochs: Optional[int] = Input(
        default=None,
        description="How often every picture is shown. Only used when max_train_steps is not given.",
        ge=1,
    ),
    max_train_steps: Optional[int] = Input(
        default=None,
        description="How many training steps to run. Default: 1000, or what num_train_epochs asks for.",
        ge=1,
    ),
    train_batch_size: int = Input(default=4, description="Pictures in each training step.", ge=1),
    unet_learning_rate: float = Input(
        default=1e-6,
        description="Learning rate of the whole UNet; 1e-6 to 1e-5 is usual for SDXL 1.0. Not used with is_lora.",
    ),
    ti_lr: float = Input(default=3e-4, description="Learning rate of the new tokens' embedding rows."),
    is_lora: bool = Input(
        default=False,
        description="Train a small LoRA instead of the whole UNet: less memory and a file of megabytes, a little less likeness.",
    ),
    lora_rank: int = Input(
        default=32, description="Rank of the LoRA: higher holds more detail.", ge=1, le=1024
    ),
    lora_alpha: Optional[int] = Input(
        default=None,
        description="Strength of the LoRA while it trains, as a multiple of 1 / lora_rank. Default: lora_rank, for a strength of 1.",
        ge=1,
    ),
    use_dora: bool = Input(
        default=False,
        description="Train a DoRA in the place of a LoRA: a little closer to full training, slower.",
    ),
    lora_targets: str = Input(
        default="transformer",
        description="Which layers of the UNet the LoRA changes: its attention, its whole transformer blocks, or all of them with the convolutions. More layers hold more of an unusual subject, in a larger file.",
        choices=["attention", "transformer", "all"],
    ),
    lora_lr: float = Input(default=1e-4, description="Learning rate of the LoRA. Only used with is_lora."),
    optimizer: str = Input(
        default="adamw",
        description="What trains the UNet or LoRA. adamw_8bit and adafactor need less memory; prodigy finds its own learning rate, so give 1 as unet_learning_rate or lora_lr.",
        choices=["adamw", "adamw_8bit", "adafactor", "prodigy"],
    ),
    precision: str = Input(
        default="auto",
        description="How full training holds the UNet's weights. auto: fp32 where it fits into memory, else bf16 with stochastic rounding.",
        choices=["auto", "fp32", "bf16"],
    ),
    pivot_fraction: float = Input(
        default=0.5,
        description="Share of the steps in which the new tokens train; from then on they are frozen and only the UNet or LoRA does.",
        ge=0,
        le=1,
    ),
    lr_scheduler: str = Input(
        default="constant",
        description="Course of the learning rates over the run.",
        choices=["constant", "linear", "cosine"],
    ),
    lr_warmup_steps: int = Input(
        default=0, description="Steps over which the learning rates rise from 0 to their values.", ge=0
    ),
    gradient_accumulation_steps: int = Input(
        default=1,
        description="Batches whose gradients are averaged in each step: a larger batch in the same memory.",
        ge=1,
    ),
    gradient_checkpointing: Optional[bool] = Input(
        default=None,
        description="Save GPU memory by computing a part of each step twice; a third slower. Default: where memory asks for it.",
    ),
    random_views: int = Input(
        default=15,
        description="Parts of each picture, enlarged by up to 1.3 and cut at random, that are learnt beside the whole: they teach sizes and places that your pictures do not show. 0: none.",
        ge=0,
        le=63,
    ),
    horizontal_flip: bool = Input(
        default=False,
        description="Learn each picture mirrored too. Only for subjects without a left and a right, and captions that name neither.",
    ),
    snr_gamma: float = Input(
        default=5.0,
        description="Gamma of the min-SNR weighting of the loss; a large value such as 1e6 weighs all noise levels alike.",
    ),
    noise_offset: float = Input(
        default=0.0,
        description="Offset noise: about 0.05 lets the fine-tune draw very dark and very bright pictures.",
        ge=0,
        le=1,
    ),
    caption_dropout: float = Input(
        default=0.0,
        description="Share of pictures that are learnt without their caption: 0.1 or so makes a style or subject appear unasked.",
        ge=0,
        le=1,
    ),
    mask_floor: float = Input(
        default=0.2,
        description="Weight in the loss of what masks leave out, where what they show has 1. Only used where there are masks.",
        ge=0,
        le=1,
    ),
    mask_base_target: bool = Input(
        default=True,
        description="Outside the masks, learn to go on drawing as the base would instead of what your pictures show there. A third slower, and full training keeps a second UNet in memory.",
    ),
    prior_prompts: str = Input(
        default="",
        description='Prompts, separated by |, whose pictures should stay as the base draws them, such as "a photo of a dog|a photo of a person": the base draws them first, and they are learnt beside yours.',
    ),
    prior_images: int = Input(
        default=100,
        description="How many pictures the base draws for prior_prompts. They are kept for later runs.",
        ge=1,
    ),
    prior_weight: float = Input(
        default=1.0, description="Weight of those pictures in the loss, beside 1 for yours.", ge=0
    ),
    mask_target_prompts: Optional[str] = Input(
        default=None,
        description='Words for what matters in the pictures, such as "a dog" or "a dog, a red ball"; the rest is masked and not learned. Masks that come with the pictures stay.',
    ),
    crop_based_on_salience: bool = Input(
        default=True,
        description="Cut around what the masks show instead of around the centre; without masks the centre it is.",
    ),
    use_face_detection_instead: bool = Input(
        default=False,
        description="Mask all faces instead of mask_target_prompts; faces are not cut where they fit.",
    ),
    clipseg_temperature: float = Input(
        default=1.0, description="How soft the masks' edges are: 0.5 is hard, 2 is soft."
    ),
    seed: Optional[int] = Input(
        default=None,
        description="Makes the run repeatable; 0 is a seed too. Default: a random one, told in the log.",
        ge=0,
    ),
    checkpointing_steps: int = Input(
        default=0,
        description="Keep the fine-tune as it is after every so many steps, under checkpoints/ in the tar. 0: never.",
        ge=0,
    ),
    input_data_tar_or_zip: Optional[Path] = Input(
        default=None, description="Old name of input_images.", deprecated=True
    ),
    ti_learning_rate_multiplier: Optional[float] = Input(
        default=None,
        description="Old form of ti_lr: ti_lr becomes this times unet_learning_rate.",
        deprecated=True,
    ),
    token_string: Optional[str] = Input(
        default=None, description='Old form of token_map: "TOK" means "TOK:2".', deprecated=True
    ),
    temp: Optional[float] = Input(
        default=None, description="Old name of clipseg_temperature.", deprecated=True
    ),
) -> Path:
    """Fine-tune SDXL on your pictures; returns trained_model.tar."""
    inputs = canonical_inputs(locals())
    repeat_on_cpu()
    configure_logging()
    with workspace_of_run("train", keep=f"training_out/{fine_tune_files.CHECKPOINTS}") as workspace:
        return Path(run(inputs, workspace))


def run(inputs: dict[str, Any], workspace: pathlib.Path) -> pathlib.Path:
    """The stages of a training, one line each; everything of the run lies in `workspace`. Returns the tar."""
    token_map = TokenMap.parse(inputs["token_map"])
    base = hub.local_folder(settings.base_name())
    resolution = native_resolution(base) if inputs["resolution"] is None else inputs["resolution"]

    archive = fetch(str(inputs["input_images"]), workspace / "fetched")
    preprocess_config = PreprocessConfig(
        target_size=resolution,
        global_caption=inputs["global_caption"],
        caption_prefix=inputs["caption_prefix"],
        token_map=token_map,
        bucketing=inputs["bucketing"],
        mask_target_prompts=inputs["mask_target_prompts"],
        crop_based_on_salience=inputs["crop_based_on_salience"],
        use_face_detection_instead=inputs["use_face_detection_instead"],
        mask_temperature=inputs["clipseg_temperature"],
    )
    dataset_folder = prepare_dataset(archive, workspace / "dataset", config=preprocess_config)
    shutil.rmtree(workspace / "fetched", ignore_errors=True)
    config = _config(inputs, resolution, images=len(read_captions_csv(dataset_folder / "captions.csv")))
    record = fine_tune_files.run_record(config.as_json() | preprocess_config.as_json(), dataset_folder)
    _announce(config)

    keep_compiled_kernels()
    components = load_components(base, is_lora=config.is_lora, device=default_device())
    examples = cache_examples(
        dataset_folder,
        components,
        token_map,
        seed=config.seed,
        views=config.random_views,
        flip=config.horizontal_flip,
    )
    prior = _prior(config, components) if config.prior_prompts else None
    output = workspace / "training_out"

    def save_checkpoint(step: int, model: TrainedFineTune) -> None:
        fine_tune_files.write_atomically(
            model, output / fine_tune_files.CHECKPOINTS / f"step-{step:06d}", record
        )

    trained = fine_tune(
        components, examples, config, prior=prior, on_step=_record_metrics, on_checkpoint=save_checkpoint
    )
    fine_tune_files.write(trained, output, record)
    fine_tune_files.pack(output, workspace / "trained_model.tar")
    shutil.rmtree(dataset_folder)
    shutil.rmtree(output)
    log.info("Done: trained_model.tar holds the fine-tune.")
    return workspace / "trained_model.tar"


def _config(inputs: dict[str, Any], resolution: int, *, images: int) -> TrainingConfig:
    steps = resolve_steps(
        max_train_steps=inputs["max_train_steps"],
        epochs=inputs["num_train_epochs"],
        images=images,
        batch_size=inputs["train_batch_size"]
        * inputs["gradient_accumulation_steps"]
        * data_parallel.world_size(),
    )
    same = {field.name for field in fields(TrainingConfig)} & inputs.keys()
    return TrainingConfig(
        **{name: inputs[name] for name in same}
        | {
            "base": settings.base_name(),
            "resolution": resolution,
            "max_train_steps": steps,
            "seed": data_parallel.agreed(resolve_seed(inputs["seed"])),
            "cuda_graph": settings.speed() != "eager",
            "compile_blocks": settings.speed() in ("compiled", "fp8"),
        }
    )


def _prior(config: TrainingConfig, components: Components) -> ExampleDataset:
    """The prior's pictures, encoded; the base in `components` draws them unless they are kept from an earlier run."""
    wanted = PriorConfig.parse(
        config.prior_prompts, base=config.base, images=config.prior_images, resolution=config.resolution
    )
    return cache_examples(prior_dataset(wanted, components), components, TokenMap({}), seed=0)


def _announce(config: TrainingConfig) -> None:
    what = f"a LoRA of rank {config.lora_rank}" if config.is_lora else "the whole UNet"
    log.info(
        "Training %s and the tokens of %s for %d steps of %d pictures at %d×%d pixels on %s, seed %d; "
        "the tokens freeze after step %d.",
        *(what, config.token_map, config.max_train_steps, config.train_batch_size, config.resolution),
        *(config.resolution, default_device(), config.seed, config.pivot_step),
    )


def _record_metrics(report: StepReport) -> None:
    """Hand the figures of a step to Cog, where it runs the training."""
    scope: Any = current_scope()
    if scope is not None:
        scope.record_metric("step", report.step)
        scope.record_metric("loss", float(report.loss))
        scope.record_metric("learning_rate", float(report.learning_rate))
        scope.record_metric("ti_learning_rate", float(report.ti_learning_rate))
        scope.record_metric("steps_per_second", float(report.steps_per_second))


if __name__ == "__main__":
    about = (__doc__ or "").splitlines()[0]
    sys.exit(data_parallel.run_in_each(lambda argv: run_command_line(train, description=about, argv=argv)))
