"""The training entry point: captioned pictures in, `trained_model.tar` out.

Knows the public inputs and what is done before and after a run; the stages of a run are in `sdxl/training_run.py`. Imports
torch and diffusers only when a run starts, so that `--help` and wrong inputs are answered at once.

    python train.py -i input_images=@example_datasets/crowny.zip -i token_map=TOK:2 -o out/
"""

import functools
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Optional

from cog import CancelationException, Input, Path, current_scope
from coglet import server

from sdxl import settings
from sdxl.command_line import run_command_line
from sdxl.data.config import PreprocessConfig
from sdxl.declared_inputs import as_declared, declared_inputs, leave_downloads_to_us
from sdxl.files.archives import require_archive
from sdxl.files.fetching import fetch
from sdxl.files.push_targets import require_pushable
from sdxl.files.sources import allowed_fine_tune, allowed_state
from sdxl.history import History
from sdxl.process import (
    configure_logging,
    exit_with,
    leave_at_once,
    repeat_on_cpu,
    share_cores,
    start_logging,
)
from sdxl.report.recorder import Recorder
from sdxl.shutdown import stops_with_server
from sdxl.training.config_file import with_config
from sdxl.training.contradictions import without_effect
from sdxl.training.inputs import TrainInputs, train_inputs
from sdxl.training.torchrun import run_in_each
from sdxl.workspace import OUTPUT, REPORT, workspace_of_run

if TYPE_CHECKING:
    from sdxl.training.recipe import StepReport

log = logging.getLogger(__name__)


def train(
    input_images: Optional[Path] = Input(
        default=None,
        description="Your pictures: a .zip, .tar, .tar.gz or .tgz with jpg, png, webp, bmp or heic files. Captions are optional: a csv file (columns image_file and caption), or one .txt file per picture with the same name. Required.",
    ),
    base: Optional[str] = Input(
        default=None,
        description="The model to fine-tune: a folder in diffusers' layout, a Hugging Face repository, or a single-file checkpoint as a path, a URL or owner/repository/file.safetensors. Default: the base that SDXL_BASE names, else SDXL 1.0.",
    ),
    token_map: str = Input(
        default="TOK:2",
        description='The new tokens in your captions and how many embedding rows each one gets, such as "TOK:2" or "CLOCK_TOK:2,MT_TOK:3". Names consist of letters and underscores. More rows hold more detail; 2 is right for most subjects.',
    ),
    preset: str = Input(
        default="good",
        description="How much time to spend. It decides the steps, and all inputs whose description names a preset; those that you give win over it. quick: 1,200 pictures drawn, at three times the rate. patient: 2.5 times as many pictures drawn as good, and a larger LoRA.",
        choices=["quick", "good", "patient"],
    ),
    token_init: str = Input(
        default="auto",
        description='A word that the base knows for what each token shows, such as "TOK:dog" or "CLOCK_TOK:clock,MT_TOK:monster". The token starts from this word instead of from noise. auto: a word that the captions use for it, if there is one. none: noise.',
    ),
    global_caption: Optional[str] = Input(
        default=None,
        description='One caption for all pictures, such as "a photo of TOK". Used only if the archive contains no captions.',
    ),
    caption_prefix: str = Input(
        default="a photo of TOK, ",
        description="How each caption begins if you give no captions at all; a captioning model writes the rest. Must name a token of token_map.",
    ),
    resolution: Optional[int] = Input(
        default=None,
        description="Side of the square training pictures in pixels, a multiple of 8. Default: the size that the base was made for, 1024 for SDXL 1.0.",
    ),
    bucketing: bool = Input(
        default=False,
        description="Crop each picture to the nearest of several shapes with about resolution × resolution pixels, instead of to a square. This crops less.",
    ),
    num_train_epochs: Optional[int] = Input(
        default=None,
        description="How often to show every picture, instead of max_train_steps.",
        ge=1,
    ),
    max_train_steps: Optional[int] = Input(
        default=None,
        description="How many training steps to run. Default: as many as num_train_epochs needs, else as the preset says. good: each picture is drawn 150 times, 1,200 to 3,000 in all; that is 400 to 1000 steps of 4.",
        ge=1,
    ),
    train_batch_size: int = Input(default=4, description="Pictures in each batch.", ge=1),
    unet_learning_rate: Optional[float] = Input(
        default=None,
        description="Learning rate of the whole UNet, with is_lora=false. 1e-6 to 1e-5 is usual for SDXL 1.0. Default: as the preset says, 3e-6 for good.",
    ),
    ti_lr: Optional[float] = Input(
        default=None,
        description="Learning rate of the new tokens' embedding rows. Default: as the preset says, for good 3e-4, or 1e-3 if any token starts from noise.",
    ),
    is_lora: bool = Input(
        default=True,
        description="Train a LoRA: it needs half the memory, gives a file of megabytes and changes other prompts less. false: train the whole UNet, for a file of 5 GB.",
    ),
    lora_rank: Optional[int] = Input(
        default=None,
        description="Rank of the LoRA. A higher rank holds more detail. Default: as the preset says, 16 for good.",
        ge=1,
        le=1024,
    ),
    lora_alpha: Optional[int] = Input(
        default=None,
        description="Strength of the LoRA during training: its product is multiplied by lora_alpha / lora_rank. Default: lora_rank, for a factor of 1.",
        ge=1,
    ),
    use_dora: bool = Input(
        default=False,
        description="Train a DoRA instead of a LoRA: slightly closer to full training, but slower.",
    ),
    lora_targets: Optional[str] = Input(
        default=None,
        description="Which layers of the UNet the LoRA changes: its attention, its whole transformer blocks, or all layers including the convolutions. More layers capture unusual subjects better, in a larger file. Default: as the preset says, transformer for good.",
        choices=["attention", "transformer", "all"],
    ),
    lora_lr: Optional[float] = Input(
        default=None,
        description="Learning rate of the LoRA. Default: as the preset says, 1e-4 for good.",
    ),
    text_encoder_lora: bool = Input(
        default=False,
        description="Train a LoRA on both text encoders too, as long as the new tokens train. It can change what every word means, not only the new ones. Needs is_lora.",
    ),
    text_encoder_lr: float = Input(
        default=1e-5, description="Learning rate of the text encoders' LoRA. Needs text_encoder_lora."
    ),
    optimizer: str = Input(
        default="adamw",
        description="Optimizer of the UNet or LoRA. adamw_8bit and adafactor need less memory. prodigy finds its own learning rate: unet_learning_rate or lora_lr is then 1 by default.",
        choices=["adamw", "adamw_8bit", "adafactor", "prodigy"],
    ),
    precision: str = Input(
        default="auto",
        description="Precision of the UNet's weights. Full training: fp32 or bf16 with stochastic rounding; auto takes fp32 if it fits in memory. LoRA: int8 holds the base in 8 bits, for half the memory; auto does so only if nothing else fits.",
        choices=["auto", "fp32", "bf16", "int8"],
    ),
    pivot_fraction: float = Input(
        default=0.5,
        description="Share of the steps in which the new tokens train, and the text encoders' LoRA. After that they are frozen, and only the UNet or its LoRA trains.",
        ge=0,
        le=1,
    ),
    lr_scheduler: str = Input(
        default="constant",
        description="How the learning rates change over the run.",
        choices=["constant", "linear", "cosine"],
    ),
    lr_warmup_steps: Optional[int] = Input(
        default=None,
        description="Steps in which the learning rates rise from 0 to their full values. Default: as the preset says, a tenth of the run for good, but at most 100.",
        ge=0,
    ),
    gradient_accumulation_steps: int = Input(
        default=1,
        description="Batches whose gradients are averaged in each step: the effect of a larger batch in the same memory.",
        ge=1,
    ),
    gradient_checkpointing: Optional[bool] = Input(
        default=None,
        description="Save GPU memory by recomputing parts of each step; a third slower. Default: only if memory requires it.",
    ),
    shard: Optional[bool] = Input(
        default=None,
        description="For full training on several GPUs: share the UNet's weights, gradients and optimizer state among them, instead of keeping all on each. Less memory, but slower. Default: only if memory requires it.",
    ),
    random_views: Optional[int] = Input(
        default=None,
        description="How many random crops of each picture to learn in addition to the whole picture. They teach sizes and positions that your pictures do not show. Pictures without pixels to spare have none. 0: none. Default: as many as suit the steps and the number of pictures.",
        ge=0,
        le=63,
    ),
    horizontal_flip: bool = Input(
        default=False,
        description="Learn each picture mirrored too. Use it only for subjects that look the same mirrored, and captions that name neither left nor right.",
    ),
    snr_gamma: float = Input(
        default=5.0,
        description="Gamma of the min-SNR weighting of the loss. A large value such as 1e6 gives all noise levels the same weight.",
    ),
    noise_offset: float = Input(
        default=0.0,
        description="Strength of offset noise. About 0.05 lets the fine-tune draw very dark and very bright pictures.",
        ge=0,
        le=1,
    ),
    caption_dropout: float = Input(
        default=0.0,
        description="Share of pictures to learn without their caption. With about 0.1 the style or subject also appears when a prompt does not ask for it.",
        ge=0,
        le=1,
    ),
    mask_floor: float = Input(
        default=0.2,
        description="Weight of the area outside masks in the loss; the area inside has 1. Used only for pictures with masks.",
        ge=0,
        le=1,
    ),
    mask_base_target: bool = Input(
        default=True,
        description="Outside the masks, learn what the base would draw instead of what your pictures show. A third slower, and full training keeps a second UNet in memory.",
    ),
    prior_prompts: str = Input(
        default="",
        description='Prompts, separated by |, that the fine-tune should still draw as the base does, such as "a photo of a dog|a photo of a person". The base draws pictures of them first, and training learns these together with yours.',
    ),
    prior_images: int = Input(
        default=100,
        description="How many pictures the base draws for prior_prompts. Later runs reuse them. Needs prior_prompts.",
        ge=1,
    ),
    prior_weight: float = Input(
        default=1.0,
        description="Weight of these pictures in the loss. Yours have 1. Needs prior_prompts.",
        ge=0,
    ),
    preservation: float = Input(
        default=1.0,
        description="Keep what the base draws for other prompts: the weight of that in the loss, where your pictures have 1. The base then teaches a quarter of each batch. 0: off.",
        ge=0,
    ),
    preservation_prompts: str = Input(
        default="",
        description="What preservation keeps beside your own captions without the new tokens: prompts, separated by |. Default: common things, places and styles.",
    ),
    mask_target_prompts: Optional[str] = Input(
        default=None,
        description='What matters in the pictures, such as "a dog" or "a dog, a red ball". The rest is masked and counts less. Pictures that come with a mask keep it.',
    ),
    crop_based_on_salience: bool = Input(
        default=True,
        description="Crop around what the masks show instead of around the centre. Pictures without a mask are cropped around the centre.",
    ),
    use_face_detection_instead: bool = Input(
        default=False,
        description="Mask everything except faces, and ignore mask_target_prompts. Crops keep faces whole if they fit.",
    ),
    clipseg_temperature: float = Input(
        default=1.0, description="Softness of the masks' edges: 0.5 is hard, 2 is soft."
    ),
    seed: Optional[int] = Input(
        default=None,
        description="Makes the run repeatable; 0 is a seed too. Default: a random seed, which the log states.",
        ge=0,
    ),
    checkpointing_steps: int = Input(
        default=0,
        description="Save the fine-tune after every so many steps, in the folder checkpoints of the tar. 0: never.",
        ge=0,
    ),
    save_every: int = Input(
        default=250,
        description="Save the state of the run after every so many steps, and when it stops, so that resume can go on from it. The last two are kept until the run has finished. For SDXL each has 0.5 to 2 GB for a LoRA, and 10 to 31 GB for full training, which needs as much memory too. 0: never.",
        ge=0,
    ),
    resume: Optional[str] = Input(
        default=None,
        description="Go on from the state of a run that stopped: auto for one with the same settings and pictures, if there is any, or a state's folder, tar or URL. The result is the same as if the run had not stopped.",
    ),
    init_from: Optional[str] = Input(
        default=None,
        description="Begin with a fine-tune instead of with the base alone: a path, a URL or a name on the hub, in any form that drawing reads. A LoRA can begin with a LoRA, the whole UNet with anything.",
    ),
    config: Optional[Path] = Input(
        default=None,
        description="A file with inputs: training.json of an earlier training, or names and values as JSON or YAML. Inputs that you give and that differ from their defaults win over it.",
    ),
    checks: int = Input(
        default=6,
        description="How often to check the fine-tune on the way: what it has learned, whether prompts are still followed, and how far other prompts have changed. The best of these moments is handed over, and a run that only gets worse stops. 0: never, and the last step is handed over.",
        ge=0,
        le=100,
    ),
    keep_checked: bool = Input(
        default=False,
        description="Keep the fine-tunes of all checked moments, in the folder checkpoints of the tar, not only the best one. Needs checks.",
    ),
    preview_prompts: str = Input(
        default="",
        description='What previews show on the way: prompts, separated by |, such as "a photo of TOK on the moon|a photo of a dog". Default: made from your captions. none: no previews. They are in the folder previews of the tar. Needs checks.',
    ),
    single_file: bool = Input(
        default=False,
        description="Also write the whole fine-tuned SDXL as one checkpoint file for web UIs, in the folder web_ui of the tar. About 7 GB more. Only for full training, is_lora=false.",
    ),
    upload_url: Optional[str] = Input(
        default=None,
        description='Where to put trained_model.tar: a signed URL that takes a PUT, or for an upload in parts JSON such as {"parts": ["https://…", …], "complete": "https://…"}. A server then answers with the address instead of the file. For results that are too large to be handed over, such as a whole UNet.',
    ),
    push_to: Optional[str] = Input(
        default=None,
        description="The repository on the Hugging Face hub to which the fine-tune goes with a model card, as owner/name. A new one is private. The token is that of the machine, HF_TOKEN or a login. A server then answers with the address, and pushes only to the owners that its operator names in SDXL_PUSH_OWNERS.",
    ),
    full_result: str = Input(
        default="whole",
        description="The form of a full fine-tune. whole: all weights of the UNet, 5 GB. difference: how they differ from the base's, half as large and almost exact; only this project reads it, with the same base. lora: the LoRA of rank 64 that comes nearest, for all programs; it draws a little otherwise.",
        choices=["whole", "difference", "lora"],
    ),
    input_data_tar_or_zip: Optional[Path] = Input(
        default=None, description="Old name of input_images.", deprecated=True
    ),
    ti_learning_rate_multiplier: Optional[float] = Input(
        default=None,
        description="Old form of ti_lr: ti_lr becomes unet_learning_rate times this.",
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
    settings.set_behind_server(server.active)
    inputs = checked_inputs(locals())
    if inputs.push_to:
        require_pushable(inputs.push_to, "push_to")
    repeat_on_cpu()
    share_cores()
    if server.active:
        leave_at_once()
    start_logging()
    smaller = "lower train_batch_size or resolution, or train a LoRA"
    with workspace_of_run("train", smaller=smaller) as workspace, stops_with_server(CancelationException):
        return _delivered(run(inputs, workspace), inputs)


leave_downloads_to_us(train)


def checked_inputs(given: Mapping[str, Any]) -> TrainInputs:
    """The inputs of `train` as it gets them, completed by those of `config`, and checked.

    Raises:
        UserInputError: one is wrong, or two contradict each other.
    """
    given = as_declared(train, with_config(given, declared_inputs(train)))
    given["base"] = allowed_fine_tune(given["base"], "base")
    given["resume"] = allowed_state(given["resume"], "resume")
    given["init_from"] = allowed_fine_tune(given["init_from"], "init_from")
    return train_inputs(given)


def _delivered(tar: pathlib.Path, inputs: TrainInputs) -> Path:
    """The tar, or behind a server the address to which it was sent; Cog hands a text over as it is."""
    from sdxl.model.handing_over import hand_over
    from sdxl.training.data_parallel import rank

    address = None if rank() else hand_over(tar, upload_url=inputs.upload_url, push_to=inputs.push_to)
    return address if address and settings.behind_server() else Path(tar)  # type: ignore[return-value]


def run(
    inputs: TrainInputs, workspace: pathlib.Path, on_step: Optional[Callable[["StepReport"], None]] = None
) -> pathlib.Path:
    """Train in the folder `workspace`, where all files of the run are; returns the tar.

    on_step: takes the report of each step; without it, the numbers go to Cog.
    """
    for told in without_effect(inputs.options):
        log.warning("%s", told)
    archive = _fetched(inputs.input_images, workspace / "fetched" / "pictures")
    from preprocess import open_pictures, prepare_dataset

    # The base may decide the size of the pictures. What is checked here does not depend on it.
    config = inputs.preprocess_config(inputs.resolution or PreprocessConfig.target_size)
    pictures = open_pictures(archive, workspace / "fetched" / "unpacked", config)

    # Here, after the inputs, pictures and captions are checked: importing this takes seconds.
    configure_logging()
    from sdxl.training_run import train_on_pictures

    recorder = Recorder(History(), workspace / OUTPUT, asked=inputs.asked, described=_descriptions())
    return train_on_pictures(
        inputs,
        workspace,
        prepare_dataset=functools.partial(prepare_dataset, pictures),
        recorder=recorder,
        on_step=recorder.before(on_step or _record_metrics),
    )


def _fetched(source: str, folder: pathlib.Path) -> pathlib.Path:
    """The archive at `source`, fetched into `folder`. What is no archive is refused before a base is fetched."""
    archive = fetch(source, folder)
    require_archive(archive)
    return archive


def _descriptions() -> dict[str, str]:
    """What each input means."""
    declarations = {name: declared.declaration for name, declared in declared_inputs(train).items()}
    return {name: getattr(one, "description", "") for name, one in declarations.items()}


def _record_metrics(report: "StepReport") -> None:
    """Pass the numbers of a step to Cog, if Cog runs the training."""
    scope: Any = current_scope()
    if scope is not None:
        for name in ("step", "loss", "learning_rate", "ti_learning_rate", "steps_per_second"):
            scope.record_metric(name, getattr(report, name))


def train_with_report(**inputs: Any) -> list[pathlib.Path]:
    """Run the training; return the tar, and the report if there is one. Of several processes only the first has them."""
    tar = pathlib.Path(train(**inputs))
    return [path for path in (tar, tar.with_name(REPORT)) if path.exists()]


if __name__ == "__main__":
    about = (__doc__ or "").splitlines()[0]
    with_report = functools.wraps(train)(train_with_report)
    exit_with(lambda: run_in_each(lambda argv: run_command_line(with_report, description=about, argv=argv)))
