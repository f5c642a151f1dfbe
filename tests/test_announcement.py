"""What the log says before a training starts."""

import dataclasses

import pytest

from sdxl.training.announcement import seen
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
    assert list(seen(config, images=images, processes=processes)) == told
    assert list(seen(config, images=images, processes=processes, by_epochs=True)) == told[-1:]
