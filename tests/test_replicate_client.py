"""The way through Replicate: its real Python client, a stand-in for its API, and the real Cog servers behind it."""

import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import replicate
import requests
from PIL import Image
from replicate.exceptions import ModelError, ReplicateError

from tests.conftest import QUICK, png, write_zip
from tests.replicate_api import Handler, Replicate, Version
from tests.test_cog_server import SMALL, serve
from tests.tiny_helpers import write_captioner, write_segmenter

PREPROCESSOR = "replicate/sdxl_preprocess:bd1158a5052ed46176da900ad7e2a80ea04a3c46196d93f9e1db879fd1ce7f29"
TRAINER = "replicate-internal/sdxl:d46d67520dc4d9853de7b9695e1fedc0cfbdf47af45597899fe471a96894b0df"
DESTINATION = "your-username/sdxl_mixes"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicate]:
    """The stand-in, with the preprocessor, the trainer and the predictor behind it."""
    folders = [tmp_path_factory.mktemp(name) for name in ("preprocessor", "trainer", "predictor")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDXL_CAPTIONER", str(write_captioner(folders[0])))
        patch.setenv("SDXL_SEGMENTER", str(write_segmenter(folders[0])))
        patch.setenv("SDXL_PRIVATE_URLS", "1")  # the stand-in's files are on this machine
        with (
            serve(folders[0] / "workspace", "preprocess.py:Preprocessor") as preprocessor,
            serve(folders[1] / "workspace", "train.py:train") as trainer,
            serve(folders[2] / "workspace", "predict.py:Predictor") as predictor,
            http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as api,
        ):
            for server in (preprocessor, trainer, predictor):
                server.wait_until("READY")
            versions = {
                PREPROCESSOR: Version(server=preprocessor.url),
                TRAINER: Version(server=predictor.url, trains=Version(server=trainer.url, kind="trainings")),
            }
            url = f"http://127.0.0.1:{api.server_address[1]}"
            Handler.service = Replicate(versions=versions, destinations={DESTINATION}, url=url)
            threading.Thread(target=api.serve_forever, daemon=True).start()
            yield Handler.service
            api.shutdown()


@pytest.fixture
def client(service: Replicate) -> Iterator[replicate.Client]:
    made = replicate.Client(api_token="r8_token", base_url=service.url)
    yield made
    made._client.close()  # the client leaves its connections open


def read(url: str) -> bytes:
    """The content of an output. The client makes file objects of https addresses only, and these are http."""
    return requests.get(url).content


def test_from_raw_pictures_to_new_ones(service: Replicate, client: replicate.Client, tmp_path: Path):
    """Preprocess, train on its tar, and draw with the version that the training made."""
    raw = write_zip(tmp_path / "file.zip", {f"{i}.png": png(i, (96, 64)) for i in range(2)})
    with raw.open("rb") as file:
        output = client.run(
            PREPROCESSOR,
            input={
                "files": file,
                "caption_text": "a photo of a MANTOKEN",
                "mask_target_prompts": "a face of a man",
                "target_size": 64,
                "crop_based_on_salience": True,
                "use_face_detection_instead": False,
                "temp": 1.0,
            },
        )
    with tarfile.open(fileobj=io.BytesIO(read(output))) as tar:
        assert {"0.src.png", "0.mask.png", "captions.csv"} <= set(tar.getnames())

    training = client.trainings.create(
        version=TRAINER,
        input={
            "input_data_tar_or_zip": output,
            "token_map": "MANTOKEN:2",
            "num_train_epochs": 2,
            "unet_learning_rate": 6e-6,
            "ti_learning_rate_multiplier": 100,
            "is_lora": False,
            "train_batch_size": 1,
            "random_views": 0,
            "preservation": 0,
            "checks": 0,
        },
        destination=DESTINATION,
    )
    assert training.status in ("starting", "processing")
    while training.status in ("starting", "processing"):
        training.reload()
    assert training.status == "succeeded", training.error
    trained = client.trainings.get(training.id).output
    assert trained is not None and trained["version"].startswith(f"{DESTINATION}:")
    with tarfile.open(fileobj=io.BytesIO(read(trained["weights"]))) as tar:
        assert {"unet.safetensors", "embeddings.pti", "special_params.json"} <= set(tar.getnames())

    asked = SMALL | {"prompt": "a photo of MANTOKEN riding a rainbow unicorn"}
    [tuned] = client.run(trained["version"], input=asked)
    [base] = client.run(TRAINER, input=asked)
    assert Image.open(io.BytesIO(read(tuned))).size == (64, 64)
    assert read(tuned) != read(base)
    assert "<s0><s1>" in list(service.jobs.values())[-2]["logs"], "the version knows its new word"


def test_a_destination_that_does_not_exist_is_told(client: replicate.Client, captioned_zip: Path):
    with pytest.raises(ReplicateError, match="training destination your-username/none does not exist"):
        client.trainings.create(
            version=TRAINER, input={"input_images": captioned_zip}, destination="your-username/none"
        )


def test_a_training_is_cancelled_and_tells_its_webhook(
    service: Replicate, client: replicate.Client, captioned_zip: Path
):
    told: list[dict] = []
    heard = threading.Event()

    class Hook(Handler):
        def do_POST(self) -> None:
            told.append(
                requests.models.complexjson.loads(self.rfile.read(int(self.headers["Content-Length"])))
            )
            self._tell(200, {})
            heard.set()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook) as hook:
        threading.Thread(target=hook.serve_forever, daemon=True).start()
        training = client.trainings.create(
            version=TRAINER,
            input={"input_images": captioned_zip, **QUICK, "max_train_steps": 100_000},
            destination=DESTINATION,
            webhook=f"http://127.0.0.1:{hook.server_address[1]}",
        )
        while training.status == "starting":
            training.reload()
        while not heard.wait(0.2):  # a job that the server has not begun cannot be cancelled
            training.cancel()
        hook.shutdown()
    assert [(job["id"], job["status"]) for job in told] == [(training.id, "canceled")]


def test_a_failure_is_told_as_the_doors_say_it(client: replicate.Client):
    with pytest.raises(ModelError, match="width is 100, but must be a multiple of 8"):
        client.run(TRAINER, input=SMALL | {"width": 100})
    training = client.trainings.create(version=TRAINER, input={**QUICK}, destination=DESTINATION)
    while training.status in ("starting", "processing"):
        training.reload()
    assert training.status == "failed" and "input_images is missing: give" in (training.error or "")
