"""The entry points behind the real Cog server, driven over HTTP with the miniature, and through Replicate's real client with a
stand-in for its API."""

import base64
import http.server
import io
import json
import queue
import re
import resource
import shutil
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import replicate
import requests
from PIL import Image
from replicate.exceptions import ModelError, ReplicateError

from tests.bucket import Bucket
from tests.cog_server import LONG, SMALL, Server, Webhook, data_uri, http_server, picture, serve
from tests.conftest import QUICK, REPOSITORY, png, write_zip
from tests.replicate_api import Handler, Replicate, Version
from tests.tiny_helpers import write_captioner, write_segmenter
from tools import cog_schema

# What Replicate calls its models.
PREPROCESSOR = "replicate/sdxl_preprocess:bd1158a5052ed46176da900ad7e2a80ea04a3c46196d93f9e1db879fd1ce7f29"
TRAINER = "replicate-internal/sdxl:d46d67520dc4d9853de7b9695e1fedc0cfbdf47af45597899fe471a96894b0df"
DESTINATION = "your-username/sdxl_mixes"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """The preprocessor, the trainer and the predictor. Their users may name addresses on this machine."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("preprocess", "train", "predict")}
    helpers = {
        "SDXL_CAPTIONER": str(write_captioner(folders["preprocess"])),
        "SDXL_SEGMENTER": str(write_segmenter(folders["preprocess"])),
    }
    own = {"preprocess": helpers, "train": {"SDXL_INPUTS": str(folders["train"] / "inputs")}, "predict": {}}
    with ExitStack() as stack:
        started = {
            name: stack.enter_context(serve(folder / "workspace", name, SDXL_PRIVATE_URLS="1", **own[name]))
            for name, folder in folders.items()
        }
        for server in started.values():
            server.wait_until("READY")
        yield started


@pytest.fixture
def preprocessor(servers: dict[str, Server]) -> Server:
    return servers["preprocess"]


@pytest.fixture
def trainer(servers: dict[str, Server]) -> Server:
    return servers["train"]


@pytest.fixture
def predictor(servers: dict[str, Server]) -> Server:
    return servers["predict"]


def test_a_training_its_tar_and_a_prediction_with_it(trainer: Server, predictor: Server, captioned_zip: Path):
    training = trainer.post({"input_images": data_uri(captioned_zip.read_bytes()), **QUICK}).json()
    assert training["status"] == "succeeded", training
    assert "Training a LoRA of rank 16" in training["logs"]
    assert "step/s" in training["logs"]
    assert training["metrics"]["step"] == 4
    assert training["metrics"]["loss"] > 0
    tar = training["output"]
    assert tar.startswith("data:application/x-tar;base64,")

    base = predictor.post(SMALL).json()
    tuned = predictor.post({**SMALL, "replicate_weights": tar}).json()
    again = predictor.post(SMALL).json()
    assert [answer["status"] for answer in (base, tuned, again)] == ["succeeded"] * 3, tuned
    assert picture(tuned["output"][0]).size == (64, 64)
    assert "<s0><s1>" in tuned["logs"]
    assert tuned["output"] != base["output"]
    assert again["output"] == base["output"]


def test_a_result_that_is_too_large_goes_to_a_signed_url(
    trainer: Server, captioned_zip: Path, bucket: Bucket, tmp_path: Path
):
    given = {"input_images": data_uri(captioned_zip.read_bytes()), **QUICK}
    bucket.answers = [403]
    failed = trainer.post({**given, "upload_url": f"{bucket.url}/m.tar?secret"}).json()
    assert failed["status"] == "failed" and failed["error"].endswith(
        "trained_model.tar is kept on the server."
    )
    assert "secret" not in failed["error"] + failed["logs"]
    done = trainer.post({**given, "upload_url": f"{bucket.url}/m.tar?secret"}).json()
    assert (done["status"], done["output"]) == ("succeeded", f"{bucket.url}/m.tar")
    (tmp_path / "m.tar").write_bytes(bucket.kept["/m.tar"])
    with tarfile.open(tmp_path / "m.tar") as tar:
        assert {"lora.safetensors", "embeddings.pti", "training.json"} <= set(tar.getnames())
        assert b"secret" not in b"".join(tar.extractfile(m).read() for m in tar if m.name.endswith(".json"))  # type: ignore[union-attr]
    pushed = trainer.post({**given, "push_to": "owner/name"}).json()["error"]
    assert "push_to is not opened for that owner on this server" in pushed
    assert (
        "upload_url must be an http(s) URL" in trainer.post({**given, "upload_url": "here"}).json()["error"]
    )


def test_pictures_of_several_shapes_go_from_the_preprocessor_through_a_training(
    preprocessor: Server, trainer: Server, tmp_path: Path
):
    sizes = {"wide": (320, 160), "tall": (160, 320), "square": (256, 256)}
    files = {f"{name}.png": png(i, size) for i, (name, size) in enumerate(sizes.items())}
    texts = {f"{name}.txt": f"a {name} TOK" for name in sizes}
    raw = write_zip(tmp_path / "raw.zip", files | texts)
    served = preprocessor.get("openapi.json")["components"]["schemas"]["Input"]
    assert served["required"] == ["files"] and "prompt" not in served["properties"]
    assert preprocessor.post({"files": data_uri(b"no zip")}).json()["status"] == "failed"
    missing = preprocessor.post({})
    assert missing.status_code == 422 and "files" in json.dumps(missing.json()["detail"])
    assert "files is missing: give" in preprocessor.post({"files": ""}).json()["error"]
    inputs = {"files": data_uri(raw.read_bytes()), "target_size": 128.0, "bucketing": True}
    answer = preprocessor.post(inputs).json()
    assert answer["status"] == "succeeded" and "Advice:" in answer["logs"], answer
    tar = base64.b64decode(answer["output"].split(",", 1)[1])
    with tarfile.open(fileobj=io.BytesIO(tar)) as members:
        names = set(members.getnames())
        assert {"0.src.png", "captions.csv", "contact_sheet.jpg", "advice.txt"} <= names
        shapes = set()
        for name in ("0.src.png", "1.src.png", "2.src.png"):
            member = members.extractfile(name)
            assert member is not None
            shapes.add(Image.open(io.BytesIO(member.read())).size)
    assert len(shapes) == 3
    quick = QUICK | {"resolution": 128, "bucketing": True, "max_train_steps": 6}
    training = trainer.post({"input_images": data_uri(tar, "application/x-tar"), **quick}).json()
    assert training["status"] == "succeeded" and training["metrics"]["step"] == 6, training


def test_a_server_from_its_setup_to_its_end(predictor: Server, fine_tunes: dict[str, Path], tmp_path: Path):
    """During setup it says so. Weights given at start serve requests that name none, and requests do not reach the server's network.
    SIGTERM stops a job that a client waits for."""
    weights = data_uri(fine_tunes["lora"].read_bytes(), "application/x-tar")
    expected = predictor.post({**SMALL, "replicate_weights": weights}).json()["output"]
    asked, answered = threading.Event(), threading.Event()

    class Weights(Webhook):
        events: queue.Queue[dict[str, Any]] = queue.Queue()

        def do_GET(self) -> None:
            asked.set()
            answered.wait()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(fine_tunes["lora"].read_bytes())

    with (
        http_server(Weights) as url,
        serve(tmp_path / "workspace", "predict", COG_WEIGHTS=f"{url}/lora.tar") as server,
        ThreadPoolExecutor() as background,
    ):
        asked.wait()
        assert server.get("health-check")["status"] == "STARTING"
        assert requests.post(f"{server.url}/predictions", json={"input": SMALL}).status_code == 503
        answered.set()
        server.wait_until("READY")
        assert server.post(SMALL).json()["output"] == expected
        for name in ("replicate_weights", "image", "mask"):
            answer = server.post({**SMALL, name: f"{server.url}/health-check"}).json()
            assert answer["status"] == "failed"
            assert "not an address on the public internet" in answer["error"]
        results = list((tmp_path / "workspace").iterdir())

        body = {"input": {**SMALL, **LONG}, "webhook": f"{url}/told"}
        job = background.submit(requests.post, f"{server.url}/predictions", json=body)
        while "Seed: 0" not in Weights.events.get().get("logs", ""):
            pass
        server.process.terminate()
        answer = job.result().json()
        assert answer["status"] == "canceled", answer
        assert server.process.wait() == 0
    assert list((tmp_path / "workspace").iterdir()) == results


def test_strangers_do_not_reach_the_servers_files(trainer: Server, predictor: Server, captioned_zip: Path):
    picture = str(REPOSITORY / "docs" / "demo.jpg")
    for server, inputs in (
        (predictor, {**SMALL, "image": picture}),
        (predictor, {**SMALL, "image": f"file://{picture}"}),
        (predictor, {**SMALL, "image": picture, "mask": picture}),
        (predictor, {**SMALL, "replicate_weights": str(captioned_zip)}),
        (predictor, {**SMALL, "extra_lora": [str(captioned_zip)]}),
        (trainer, {**QUICK, "input_images": str(captioned_zip)}),
        (trainer, {**QUICK, "input_data_tar_or_zip": str(captioned_zip)}),
    ):
        answer = server.post(inputs).json()
        assert answer["status"] == "failed", answer
        assert "this server takes no paths" in answer["error"]
    assert predictor.post(SMALL).json()["status"] == "succeeded"


def test_a_request_without_enough_memory_is_told_and_the_next_one_is_right(predictor: Server):
    expected = predictor.post(SMALL).json()["output"]
    large = {**SMALL, "width": 2048, "height": 2048, "num_inference_steps": 1}
    [worker] = predictor.workers()
    addresses = re.search(r"VmSize:\s+(\d+)", Path(f"/proc/{worker}/status").read_text())
    assert addresses is not None
    most = int(addresses[1]) * 1024 + 60 * 10**6
    before = resource.prlimit(worker, resource.RLIMIT_AS, (most, -1))
    try:
        answer = predictor.post(large).json()
    finally:
        resource.prlimit(worker, resource.RLIMIT_AS, before)
    assert answer["error"].endswith(
        "This machine has too little free memory for this run: choose a smaller width and height, or fewer num_outputs, "
        "or free memory that other programs hold."
    )
    assert predictor.post(SMALL).json()["output"] == expected


def test_the_schema_of_the_sources_is_served(trainer: Server, predictor: Server):
    expected = cog_schema.build(REPOSITORY / "cog.yaml")["components"]["schemas"]
    served = predictor.get("openapi.json")["components"]["schemas"]
    assert served["Input"] == expected["Input"]
    assert trainer.get("openapi.json")["components"]["schemas"]["TrainingInput"] == expected["TrainingInput"]


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({"num_outputs": 5}, "num_outputs"),
        ({"num_inference_steps": "many"}, "num_inference_steps"),
        ({"scheduler": "EULER"}, "scheduler"),
        ({"guidance_scale": -0.1}, "guidance_scale"),
    ],
)
def test_bad_prediction_inputs_answer_422(predictor: Server, inputs: dict, field: str):
    answer = predictor.post({**SMALL, **inputs})
    assert answer.status_code == 422
    assert field in json.dumps(answer.json()["detail"])


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({"max_train_steps": 0}, "max_train_steps"),
        ({"lr_scheduler": "wave"}, "lr_scheduler"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_bad_training_inputs_answer_422(trainer: Server, inputs: dict, field: str):
    answer = trainer.post({**QUICK, **inputs})
    assert answer.status_code == 422
    assert field in json.dumps(answer.json()["detail"])


def test_json_is_read_as_meant(predictor: Server, trainer: Server):
    """A whole number may have a point, and an empty text is no file."""
    expected = predictor.post(SMALL).json()["output"]
    numbers = {"width": 64.0, "num_inference_steps": 3.0, "seed": 0.0, "num_outputs": 1.0}
    nothing = {"image": "", "mask": "", "replicate_weights": "", "extra_lora": [""]}
    answer = predictor.post({**SMALL, **numbers, **nothing}).json()
    assert answer["status"] == "succeeded", answer
    assert answer["output"] == expected
    answer = trainer.post({**QUICK, "resolution": 64.0, "max_train_steps": 4.0, "input_images": ""}).json()
    assert "input_images is missing: give" in answer["error"]


def test_failed_jobs_say_what_to_do(trainer: Server, predictor: Server):
    failed = trainer.post({"input_images": data_uri(b"\0no archive"), **QUICK}).json()
    assert failed["status"] == "failed"
    assert "neither a zip nor a tar archive: pack the files" in failed["error"]
    failed = trainer.post(QUICK).json()
    assert "input_images is missing" in failed["error"]
    failed = predictor.post({**SMALL, "width": 100}).json()
    assert failed["status"] == "failed"
    assert "width is 100, but must be a multiple of 8" in failed["error"]
    assert predictor.post(SMALL).json()["status"] == "succeeded"


def test_a_cancelled_training_stops_and_the_server_goes_on(trainer: Server, captioned_zip: Path):
    """The server tells a webhook what happens, in order, so the test needs no clock."""
    events = Webhook.events
    inputs = {**QUICK, "input_images": data_uri(captioned_zip.read_bytes()), "max_train_steps": 100_000}
    url = f"{trainer.url}/trainings/long"
    with http_server(Webhook) as webhook:
        body = {"id": "long", "input": inputs, "webhook": webhook}
        assert requests.put(url, json=body, headers={"Prefer": "respond-async"}).status_code == 202
        while events.get().get("metrics", {}).get("step", 0) < 3:
            pass
        assert requests.post(f"{url}/cancel").status_code == 200
        while (last := events.get())["status"] in ("starting", "processing"):
            pass
    assert last["status"] == "canceled" and "output" not in last, last
    assert last["metrics"]["step"] < 100_000
    assert "The state after step" in last["logs"] or "the run stopped amid a step" in last["logs"]
    assert "input_images is missing" in trainer.post(QUICK).json()["error"]


def test_a_file_of_the_operator_and_the_old_name_of_its_input(trainer: Server, captioned_zip: Path):
    folder = trainer.log.parent / "inputs"
    folder.mkdir()
    shutil.copy(captioned_zip, folder / "pictures.zip")
    answer = trainer.post({**QUICK, "input_data_tar_or_zip": "pictures.zip", "max_train_steps": 2}).json()
    assert answer["status"] == "succeeded", answer
    assert (folder / "pictures.zip").is_file()


def test_an_archive_that_its_url_does_not_have_is_told(trainer: Server):
    with http_server(http.server.SimpleHTTPRequestHandler) as url:
        assert "404" in trainer.post({**QUICK, "input_images": f"{url}/missing.zip"}).json()["error"]


# ---------------------------------------------------------------------------------------------------------------------
# Through Replicate


@pytest.fixture(scope="module")
def service(servers: dict[str, Server]) -> Iterator[Replicate]:
    """The stand-in, in front of the servers."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as api:
        trains = Version(server=servers["train"].url, kind="trainings")
        versions = {
            PREPROCESSOR: Version(server=servers["preprocess"].url),
            TRAINER: Version(server=servers["predict"].url, trains=trains),
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
