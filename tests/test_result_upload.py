"""A result goes to a signed URL: whole, in parts, and again after troubles. The server is real."""

from pathlib import Path

import pytest

from sdxl import settings
from sdxl.errors import UploadError, UserInputError
from sdxl.files.result_upload import ATTEMPTS, Target, parse_target, upload_file
from tests.bucket import Bucket

CONTENT = bytes(range(256)) * 8192  # 2 MB


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = tmp_path / "trained_model.tar"
    path.write_bytes(CONTENT)
    return path


def test_a_file_arrives_whole(bucket: Bucket, tar: Path):
    target = parse_target(f"{bucket.url}/a/model.tar?signature=secret", "upload_url")
    upload_file(tar, target)
    assert bucket.kept == {"/a/model.tar": CONTENT}
    assert target.address == f"{bucket.url}/a/model.tar", "without the signature"


@pytest.mark.parametrize("troubles", [[503], [0], [500, 429, 0]])
def test_passing_troubles_are_waited_out(bucket: Bucket, tar: Path, troubles: list[int]):
    bucket.answers = [*troubles]
    upload_file(tar, Target(url=f"{bucket.url}/x"))
    assert bucket.kept["/x"] == CONTENT and len(bucket.requests) == len(troubles) + 1


def test_a_resumable_session_goes_on_where_it_was(bucket: Bucket, tar: Path):
    bucket.answers = [0]
    upload_file(tar, Target(url=f"{bucket.url}/x?upload_id=1"))
    assert bucket.kept["/x"] == CONTENT
    half, size = len(CONTENT) // 2, len(CONTENT)
    assert [wanted for _, _, wanted in bucket.requests] == [
        "",
        f"bytes */{size}",
        f"bytes {half}-{size - 1}/{size}",
    ]


@pytest.mark.parametrize(("status", "requests"), [(403, 1), (404, 1), (503, ATTEMPTS)])
def test_a_refusal_is_told_without_the_signature(bucket: Bucket, tar: Path, status: int, requests: int):
    bucket.answers = [status] * ATTEMPTS
    with pytest.raises(
        UploadError, match=rf"^The upload to {bucket.url}/x failed \(HTTP {status}\)"
    ) as error:
        upload_file(tar, Target(url=f"{bucket.url}/x?signature=secret"))
    assert "secret" not in str(error.value) and len(bucket.requests) == requests


def test_parts_are_put_together(bucket: Bucket, tar: Path):
    bucket.answers = [200, 0]
    parts = tuple(f"{bucket.url}/part-{number}" for number in range(3))
    upload_file(tar, Target(url=f"{bucket.url}/whole", parts=parts))
    assert b"".join(bucket.kept[f"/part-{number}"] for number in range(3)) == CONTENT
    tags = [f'<PartNumber>{n + 1}</PartNumber><ETag>"tag of /part-{n}"</ETag>' for n in range(3)]
    assert bucket.posted == (
        "<CompleteMultipartUpload>"
        + "".join(f"<Part>{tag}</Part>" for tag in tags)
        + "</CompleteMultipartUpload>"
    )
    bucket.answer_to_post = "<Error><Code>InternalError</Code></Error>"
    with pytest.raises(UploadError, match="could not put the parts together"):
        upload_file(tar, Target(url=f"{bucket.url}/whole", parts=parts))


def test_more_parts_than_bytes(bucket: Bucket, tmp_path: Path):
    (tmp_path / "x").write_bytes(b"ab")
    parts = tuple(f"{bucket.url}/part-{number}" for number in range(4))
    upload_file(tmp_path / "x", Target(url=f"{bucket.url}/whole", parts=parts))
    assert [bucket.kept[f"/part-{number}"] for number in range(4)] == [b"a", b"b", b"", b""]


def test_a_redirect_is_not_followed(bucket: Bucket, tar: Path):
    bucket.answers = [307]
    with pytest.raises(UploadError, match="HTTP 307"):
        upload_file(tar, Target(url=f"{bucket.url}/x"))


def test_strangers_cannot_upload_into_a_private_network(
    bucket: Bucket, tar: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(settings, "public_urls_only", lambda: True)
    with pytest.raises(UserInputError):
        upload_file(tar, Target(url=f"{bucket.url}/x"))
    assert bucket.requests == []


@pytest.mark.parametrize(
    "text",
    [
        "out/model.tar",
        "ftp://example.com/x",
        "data:,x",
        "http://[::1",
        "https://",
        "https://example.com:x/",
        "{",
        "{}",
        '{"parts": [], "complete": "https://example.com/x"}',
        '{"parts": ["https://example.com/1"], "complete": 7}',
        '{"parts": [7], "complete": "https://example.com/x"}',
        '{"parts": 7, "complete": "https://example.com/x"}',
        '{"parts": "ab", "complete": "https://example.com/x"}',
        '{"a":' * 5000,
    ],
)
def test_what_is_no_target_is_refused_in_a_sentence(text: str):
    with pytest.raises(UploadError, match=r"^upload_url must be an http") as error:
        parse_target(text, "upload_url")
    assert len(str(error.value)) <= 300
