"""What the log says before a training starts."""

import dataclasses

import pytest

from sdxl.training.announcement import preset_line, seen
from tests.test_training import CONFIG


@pytest.mark.parametrize(
    ("changes", "images", "processes", "told"),
    [
        (
            {"max_train_steps": 1000, "train_batch_size": 4},
            6,
            1,
            ["Each picture is seen 667 times: 150 to 300 times suit most subjects."],
        ),
        (
            {
                "max_train_steps": 500,
                "train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "random_views": 5,
            },
            10,
            1,
            ["Each picture is seen 200 times, 5 random crops of it included."],
        ),
        (
            {"max_train_steps": 1001, "train_batch_size": 1},
            10,
            2,
            [
                "2 GPUs see 2 times as many pictures in a step as one: for as many in all as one GPU would see, set "
                "max_train_steps to 501.",
                "Each picture is seen 200 times.",
            ],
        ),
    ],
)
def test_the_log_says_how_often_pictures_are_seen(changes: dict, images: int, processes: int, told: list):
    config = dataclasses.replace(CONFIG, **changes)
    assert list(seen(config, images=images, processes=processes, given=["max_train_steps"])) == told
    assert list(seen(config, images=images, processes=processes, given=["num_train_epochs"])) == told[-1:]


def test_a_preset_may_show_few_pictures_often():
    config = dataclasses.replace(CONFIG, max_train_steps=400, train_batch_size=4)
    [told] = seen(config, images=2, processes=1)
    assert told == (
        "Each picture is seen 800 times, as preset good does with 2: preservation=1 would keep other prompts as they are."
    )
    [told] = seen(dataclasses.replace(config, preservation=1.0), images=2, processes=1)
    assert told.endswith("with 2: preservation keeps other prompts as they are.")
    assert list(seen(config, images=8, processes=1)) == ["Each picture is seen 200 times."]
    [told] = seen(config, images=100, processes=1)
    assert told == "Each picture is seen 16 times: 150 to 300 times suit most subjects."


def test_the_log_says_what_the_preset_decided_and_what_replaced_it():
    assert preset_line(CONFIG, ["num_train_epochs", "ti_lr", "lora_lr"]) == (
        "Preset good: max_train_steps=6, unet_learning_rate=0.001, ti_lr=0.01, lr_warmup_steps=0. "
        "Given, not from the preset: num_train_epochs, ti_lr."
    )
    line = preset_line(dataclasses.replace(CONFIG, is_lora=True, preset="patient"), [])
    assert line.startswith(
        "Preset patient: max_train_steps=6, lora_rank=4, lora_targets=transformer, lora_lr=0.001"
    )
    assert line.endswith("Given, not from the preset: nothing.")
