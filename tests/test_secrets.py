"""secrets.py: what must not be shown is not."""

from __future__ import annotations

import pytest

from eventful_det.secrets import mask_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rtsp://admin:S3cret@cam:554/s", "rtsp://admin:***@cam:554/s"),
        ("rtsp://admin:S3#cret@cam/s", "rtsp://admin:***@cam/s"),
        ("rtsp://admin:S3/cret?x@cam/s", "rtsp://admin:***@cam/s"),
        ("rtsp://admin:123/S3cret@10.0.0.2/s", "rtsp://admin:***@10.0.0.2/s"),
        ("rtsp://admin:S3@cret@cam/s", "rtsp://admin:***@cam/s"),
        ("rtsp://[admin:S3cret@cam/s", "rtsp://[admin:***@cam/s"),
        ("cannot open rtsp://my user:S3 cre t@cam/s: refused", "cannot open rtsp://my user:***@cam/s: refused"),
        ("rtsp://a:S3 c@ret@cam/s rtsp://b:S3\tcret@10.0.0.2", "rtsp://a:***@cam/s rtsp://b:***@10.0.0.2"),
        ("http://cam/v?user=a&loginpas=S3cret#token=S3cret", "http://cam/v?user=a&loginpas=***"),
        ("http://cam/v#token=S3cret", "http://cam/v#token=***"),
        ("rtsp:/admin:S3cret@cam/s", "rtsp:/admin:***@cam/s"),
        ("http://S3cret@cam/", "http://***@cam/"),
        ("http://cam/v.cgi?usr=admin&pwd=S3#cret", "http://cam/v.cgi?usr=admin&pwd=***"),
        ("http://cam/v?accessToken=S3cret&x=2", "http://cam/v?accessToken=***&x=2"),
        ("rtsp://cam:554/user=admin_password=S3cret_channel=1", "rtsp://cam:554/user=admin_password=***"),
        (
            "demo.py source=[http://a:S3cret@b/c,http://d] token=S3cret",
            "demo.py source=[http://a:***@b/c,http://d] token=***",
        ),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert mask_secrets(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "rtsp://host:554/a:b@c",
        "rtsp://host:554/a b@c",
        "from http://cam/v to me@mail.example",
        "C:b@c.mp4",
        "C:/a/b@c.mp4",
        "clip.mp4",
        "tokens=96 keyframes=2 monkey=1",
        "me@mail.example",
        "",
    ],
)
def test_the_rest_is_shown(text: str) -> None:
    assert mask_secrets(text) == text
