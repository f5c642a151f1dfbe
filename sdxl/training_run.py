"""The stages of a training, from the user's pictures to the tar.

Knows the order of the stages and what each gets from the others; does not know how a stage works, public inputs or Cog.
Importing it takes seconds, because it imports torch and diffusers.
"""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dataset_and_utils import ExampleDataset, TokenMap
from sdxl import settings
from sdxl.data.dataset_folder import PreparedPicture, read_dataset_folder
from sdxl.data.helper_models import lent
from sdxl.history import History
from sdxl.model import fine_tune_files, full_results
from sdxl.model.base_checks import tell_of_distillation
from sdxl.model.bases import Base, find_base
from sdxl.model.components import Components, default_device, load_components, native_resolution
from sdxl.model.fine_tune_files import TrainedFineTune
from sdxl.model.loaded_fine_tune import load_for
from sdxl.model.trained_web_ui import write_for_web_uis
from sdxl.process import keep_compiled_kernels
from sdxl.report.recorder import Recorder
from sdxl.serving.fine_tune_cache import FineTuneCache
from sdxl.serving.previews import PreviewDrawer, drawer, preview_prompts, preview_side
from sdxl.training import data_parallel, resuming
from sdxl.training.announcement import announce
from sdxl.training.config import TrainingConfig, prompts_of
from sdxl.training.early_check import early_check
from sdxl.training.examples import cache_examples, held_out_examples, kept_out
from sdxl.training.inputs import TrainInputs
from sdxl.training.lora_memory import waits_on_cpu
from sdxl.training.preview_scores import preview_scorer
from sdxl.training.prior import PriorConfig, prior_dataset
from sdxl.training.recipe import StepReport, fine_tune
from sdxl.training.start_words import start_words
from sdxl.training.starting_point import StartingPoint
from sdxl.training.stops import finish_on_signal
from sdxl.training.watch import Watch
from sdxl.workspace import CHECKPOINTS, OUTPUT, PREVIEWS, RESULT

log = logging.getLogger(__name__)


def train_on_pictures(
    inputs: TrainInputs,
    workspace: Path,
    *,
    prepare_dataset: Callable[..., Path],
    recorder: Recorder,
    on_step: Callable[[StepReport], None],
) -> Path:
    """Train on the user's pictures. All files of the run are in `workspace`. Returns the tar.

    prepare_dataset: makes a dataset folder of the pictures, as the preprocessor does.
    recorder: takes what the report tells.
    on_step: takes the report of each step.
    """
    # Pictures → dataset folder.
    named = resuming.opened(inputs.resume, workspace)
    base = find_base(inputs.source_of_base, called=inputs.base_is_called)
    tell_of_distillation(base.folder, base.name)
    resolution = native_resolution(base.folder) if inputs.resolution is None else inputs.resolution
    preprocess_config = inputs.preprocess_config(resolution)
    check = early_check(inputs, base.folder, resolution)
    dataset_folder = prepare_dataset(
        workspace / "dataset", config=preprocess_config, check=check, on_advice=recorder.take_advice
    )
    shutil.rmtree(workspace / "fetched", ignore_errors=True)

    # Only now the pictures and captions are known, so the number of steps and the words to start from are too.
    pictures = read_dataset_folder(dataset_folder)
    captions = [picture.caption for picture in pictures]
    config = inputs.training_config(
        resolution=resolution,
        images=len(pictures),
        processes=data_parallel.world_size(),
        seed=data_parallel.agreed(settings.resolve_seed(inputs.seed)),
        base=base.name,
        token_init=start_words(inputs.options.token_init, captions, inputs.token_map, base.folder),
    )

    # What the run begins with: the base, a fine-tune of it, or the state of a run that stopped.
    keep_compiled_kernels()
    device = default_device()
    components = load_components(
        base.folder,
        is_lora=config.is_lora,
        device=device,
        unet_waits=waits_on_cpu(config, device),
        **base.replaced(),
    )
    begin_with = _starting_point(inputs.init_from, config, components) if inputs.init_from else None
    facts = base.facts() | ({"init_from": begin_with.digest} if begin_with else {})
    record = fine_tune_files.run_record(config.as_json() | preprocess_config.as_json(), dataset_folder, facts)
    resuming.require_one_run(record, captions)
    saved = resuming.chosen(named, inputs.resume, record, seed=inputs.seed)
    if saved is not None:
        config = dataclasses.replace(config, seed=saved.notes.seed)
        record["settings"]["seed"] = config.seed
    announce(
        config,
        components.device,
        images=len(pictures),
        masks=any(picture.mask for picture in pictures),
        processes=data_parallel.world_size(),
        given=inputs.instead_of_preset,
    )

    # Dataset folder and base → fine-tune → tar.
    examples = cache_examples(
        dataset_folder,
        components,
        inputs.token_map,
        seed=config.seed,
        views=config.random_views or 0,
        flip=config.horizontal_flip,
        leave_out=kept_out(len(pictures)) if config.checks else (),
    )
    keep = data_parallel.by_first(
        fine_tune_files.keeper(
            workspace / OUTPUT / CHECKPOINTS,
            record,
            lambda trained: full_results.in_form(trained, config.full_result, base),
        )
    )
    watch = _watch(config, components, dataset_folder, pictures, recorder.history, workspace / OUTPUT, keep)
    prior = _prior(config, components, base.facts()) if config.prior_prompts else None
    components.vae.to("cpu")  # type: ignore[arg-type]  # all pictures are encoded: its memory is free for training
    with resuming.states_of(config, record, saved, (examples, prior)) as states:
        trained = fine_tune(
            components,
            examples,
            config,
            prior=prior,
            begin_with=begin_with,
            states=states,
            watch=watch,
            on_step=on_step,
            on_checkpoint=keep,
        )
        data_parallel.by_first(_write)(
            trained,
            record | recorder.choice(),
            workspace,
            components,
            base,
            config,
            tell=lambda: recorder.finish(record, dataset_folder),
        )
    states.discard()
    for folder in (dataset_folder, workspace / resuming.UNPACKED):
        shutil.rmtree(folder, ignore_errors=True)
    log.info("Done: %s contains the fine-tune.", RESULT)
    return workspace / RESULT


def _watch(
    config: TrainingConfig,
    components: Components,
    dataset_folder: Path,
    pictures: Sequence[PreparedPicture],
    history: History,
    output: Path,
    keep: Callable[[int, TrainedFineTune], None],
) -> Watch:
    """What checks the training, and adds to its history. Previews are drawn into `output`.

    keep: takes the fine-tunes of all checked moments, if they are wanted.
    """
    asked = finish_on_signal()
    if not settings.behind_server():
        log.info("To end this training early, with the best moment so far: kill -USR1 %d", os.getpid())
    if not config.checks:
        return Watch(asked_to_finish=asked)
    token_map = TokenMap.parse(config.token_map)
    watch = Watch(
        checks=config.checks,
        asked_to_finish=asked,
        history=history,
        keep=keep if config.keep_checked else None,
        held_out=held_out_examples(
            dataset_folder, components, token_map, seed=config.seed, pictures=kept_out(len(pictures))
        ),
    )
    # Processes that share the UNet must draw together; only the files of the first one stay.
    if config.preview_prompts != "none" and (data_parallel.rank() == 0 or not config.is_lora):
        word = next(iter(token_map.parse_init(config.token_init).values()), "")
        named, captions = config.preview_prompts, [picture.caption for picture in pictures]
        watch.history.prompts = list(
            prompts_of(named, name="preview_prompts") if named else preview_prompts(captions, token_map, word)
        )
        watch.folder = output
        watch.draw = PreviewDrawer(
            components,
            token_map,
            watch.history.prompts,
            output / PREVIEWS,
            side=preview_side(config.resolution),
            seed=config.seed,
            at_once=config.at_once_without_gradients // 2,  # with guidance a picture has two rows
        )
        if data_parallel.rank() == 0:
            watch.score = preview_scorer(config, history, pictures, folder=output, device=components.device)
    return watch


def _write(
    trained: TrainedFineTune,
    record: dict[str, Any],
    workspace: Path,
    components: Components,
    base: Base,
    config: TrainingConfig,
    *,
    tell: Callable[[], None],
) -> None:
    """Fine-tune → tar. `tell` adds what is for people."""
    output, checkpoint_of = workspace / OUTPUT, base if config.single_file else None
    trained = full_results.in_form(trained, config.full_result, base)
    fine_tune_files.write(trained, output, record)
    write_for_web_uis(trained, output, record, components, checkpoint_of=checkpoint_of)
    tell()
    fine_tune_files.pack(output, workspace / RESULT)
    # First by one rename: a kill while they are removed must not leave checkpoints that look whole.
    shutil.rmtree(output.rename(workspace / f".{OUTPUT}.partial"))


def _starting_point(source: str, config: TrainingConfig, components: Components) -> StartingPoint:
    """The fine-tune at `source`, to begin with: a path, a URL, a `data:` URI or a name on the hub."""
    limits = dataclasses.replace(settings.cache_limits(), memory=0)
    cache = FineTuneCache(settings.cache_folder(), limits, lambda files: load_for(components, files))
    return StartingPoint(fine_tune=cache.get(source), config=config)


def _prior(config: TrainingConfig, components: Components, base: dict[str, Any]) -> ExampleDataset:
    """The encoded pictures of the prior. The base in `components` draws them, unless an earlier run has kept them.

    base: what identifies the base.
    """
    wanted = PriorConfig.parse(
        config.prior_prompts, base=json.dumps(base), images=config.prior_images, resolution=config.resolution
    )
    with lent(components.unet, components.device):  # it may wait on the CPU
        folder = prior_dataset(wanted, drawer(components))
    return cache_examples(folder, components, TokenMap({}), seed=0)
