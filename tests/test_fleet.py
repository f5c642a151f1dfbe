"""A fleet as `serve run` starts it, with two replicas of the miniature."""

import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from benchmarks import fleet as bench
from benchmarks.fleet_server import NOT_NICE, Fleet, running_fleet
from benchmarks.serving import settings

FINE_TUNES, REPLICAS = 4, 2
LONG = {"prompt": "a fish", "width": 256, "height": 256, "num_inference_steps": 500, "num_outputs": 4}
"""A request that takes minutes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fleet")
    bench.write_fine_tunes(made / "fine_tunes", FINE_TUNES)
    return made


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[bench.Job, str]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings(folder).items():
            patch.setenv(name, value)
        return bench.draw_references(folder / "fine_tunes", FINE_TUNES)


@pytest.fixture(scope="module")
def fleet(folder: Path) -> Iterator[Fleet]:
    """Each replica keeps one fine-tune."""
    with running_fleet(
        folder / "ray", settings(folder) | NOT_NICE, replicas=REPLICAS, fine_tunes=1
    ) as running:
        yield running


def test_requests_go_to_the_replica_that_holds_their_fine_tune(
    fleet: Fleet, references: dict[bench.Job, str]
):
    """Two replicas with one fine-tune each: sooner or later each keeps its own."""
    jobs = [(number % 2, 0) for number in range(8)]
    while True:
        drawn = bench.send_all(fleet, jobs, references, clients=1)
        assert not [one for one in drawn if one.lost or one.wrong]
        first, second = ({one.replica for one in drawn[part::2]} for part in (0, 1))
        if all(one.found for one in drawn) and not first & second:
            break
    counters = ("models_load_counter_total{", "get_model_requests_counter_total{")
    while not all(f"ray_serve_multiplexed_{name}" in fleet.metrics() for name in counters):
        time.sleep(0.2)  # Ray writes them now and then


def test_a_killed_replica_loses_no_request_and_draws_no_wrong_picture(
    fleet: Fleet, references: dict[bench.Job, str]
):
    before = fleet.painters()
    assert len(before) == REPLICAS

    def each(done: int) -> None:
        if done == 5:
            os.kill(before[0], signal.SIGKILL)

    drawn = bench.send_all(fleet, bench.skewed(FINE_TUNES, 20), references, clients=4, each=each)
    assert len(drawn) == 20 and not [one for one in drawn if one.lost or one.wrong]
    fleet.wait_for(REPLICAS)
    assert before[0] not in fleet.painters()


def test_a_client_that_goes_away_stops_its_drawing(fleet: Fleet, references: dict[bench.Job, str]):
    """A replica draws one request after another. So when all draw again, the drawing has ended: before its end."""
    judged = fleet.log.count("judged:")
    client = http.client.HTTPConnection(fleet.url.removeprefix("http://"))
    client.request("POST", "/predictions", json.dumps({"input": LONG | {"seed": 777_000}}))
    while "Seed: 777000" not in fleet.log:
        time.sleep(0.1)
    client.close()
    drew: set[str] = set()
    while len(drew) < REPLICAS:
        drawn = bench.send_all(fleet, [(n, 0) for n in range(FINE_TUNES)], references, clients=4)
        assert not [one for one in drawn if one.lost or one.wrong]
        drew |= {one.replica for one in drawn}
    assert fleet.log.count("judged:") == judged  # of these only the long request is judged, at its end


def test_answers_have_the_form_of_cogs(fleet: Fleet):
    answer = requests.post(
        f"{fleet.url}/predictions", json={"id": "mine", "input": bench.SMALL | {"seed": 1}}
    )
    body = answer.json()
    assert (answer.status_code, body["id"], body["status"], body["error"]) == (200, "mine", "succeeded", None)
    assert body["output"][0].startswith("data:image/png;base64,")
    assert "Seed: 1\n" in body["logs"]
    for given, told in (
        ({"replicate_weights": "/etc/passwd"}, "this server takes no paths"),
        ({"replicate_weights": "http://127.0.0.1:1/a.tar"}, "http://127.0.0.1:1/a.tar could not be fetched"),
        ({"width": 65}, "multiple of 8"),
        ({"prompts": 5}, "must be a text"),
    ):
        answer = fleet.draw(bench.SMALL | given)
        assert answer.status_code == 422 and told in answer.json()["error"], answer.text
        assert answer.json()["status"] == "failed"
    large = requests.post(f"{fleet.url}/predictions", data=b" " * ((100 << 20) + 1))
    assert large.status_code == 413 and "100 MiB" in large.json()["error"]
    health = requests.get(f"{fleet.url}/health-check")
    assert (health.status_code, health.json()) == (200, {"status": "READY", "replicas": REPLICAS})
