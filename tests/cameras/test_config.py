"""cameras.yaml: what it may say, and a line for each fault."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from eventful_det.cameras.config import Camera, Limits, Zone
from eventful_det.cameras.site_file import Faults, edit_regions, read_site
from eventful_det.errors import UserError

GOOD = """
cameras:
  gate:
    source: rtsp://u:${GATE_PASSWORD}@10.0.0.7/stream
    fps: 5
    priority: 2
    classes: {person: {score: 0.3}, car: {}}
    masks: [[[0, 0], [1, 0], [1, 0.2]]]
    zones:
      drive: {polygon: [[0, 0.5], [1, 0.5], [1, 1]], classes: [car]}
    lines:
      door: {start: [0, 0], end: [1, 1]}
  yard: {source: 0}
mqtt: {host: localhost, user: me, password: "${GATE_PASSWORD}"}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cameras.yaml"
    path.write_text(text)
    return path


def faults(tmp_path: Path, text: str, names: tuple[str, ...] | None = None) -> list[str]:
    with pytest.raises(Faults) as caught:
        read_site(write(tmp_path, text), names)
    return caught.value.faults


def test_a_good_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATE_PASSWORD", "a b/c")
    site = read_site(write(tmp_path, GOOD), ("person", "car"))
    gate = site.cameras["gate"]
    assert gate.source == "rtsp://u:a b/c@10.0.0.7/stream" and gate.zones["drive"].classes == ("car",)
    assert site.cameras["yard"] == Camera(source=0)
    assert site.mqtt is not None and site.mqtt.password == "a b/c" and "a b/c" not in repr(site.mqtt)
    assert gate.limits("person") == Limits(score=0.3) and gate.limits("car") == Limits(score=0.5)
    assert gate.limits("dog") is None
    assert gate.stream_options().priority == 2 and gate.stream_options().ignore == gate.masks


def test_every_fault_has_its_line_camera_and_field(tmp_path: Path) -> None:
    text = """cameras:
  gate:
    source: rtsp://${NO_SUCH_VARIABLE}/x
    fps: fast
    zoness: {}
    zones:
      drive:
        polygon: [[0, 0.5], [1, 2]]
        score: 3
  yard: {}
  shed:
    source: 0
    masks: [[[0, 0], [1, 1]]]
    fps: 1
    fps: 2
mqtt: {host: localhost, prot: 3}
webhook: {url: "ftp://x", secret: "long enough, is it not"}
"""
    assert faults(tmp_path, text) == [
        "cameras.yaml:3: there is no variable NO_SUCH_VARIABLE in the environment",
        "cameras.yaml:4: cameras.gate.fps must be a number above 0 or null, got 'fast'",
        "cameras.yaml:5: cameras.gate: unknown option 'zoness'; did you mean zones?",
        "cameras.yaml:8: cameras.gate.zones.drive.polygon[1][1] must be a number from 0 to 1, got 2",
        "cameras.yaml:9: cameras.gate.zones.drive.score must be a number from 0 to 1 or null, got 3",
        "cameras.yaml:10: cameras.yard: give source as well",
        "cameras.yaml:11: cameras.shed: masks[0] needs 3 to 200 different points, got 2",
        "cameras.yaml:15: fps is there twice",
        "cameras.yaml:16: mqtt: unknown option 'prot'; did you mean port?",
        "cameras.yaml:17: webhook: url must begin with http:// or https://",
    ]


def test_classes_that_the_detector_does_not_know(tmp_path: Path) -> None:
    text = """cameras:
  gate:
    source: 0
    classes: {person: {}, carr: {}}
    zones:
      drive: {polygon: [[0, 0.5], [1, 0.5], [1, 1]], classes: [dog]}
"""
    assert faults(tmp_path, text, ("person", "car")) == [
        "cameras.yaml:4: cameras.gate.classes: unknown class 'carr'; did you mean car?",
        "cameras.yaml:6: cameras.gate.zones.drive.classes: unknown class 'dog'; known: car, person",
    ]
    assert read_site(write(tmp_path, text)).cameras, "without a detector nobody can tell"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "expected options"),
        ("- 1", "expected options"),
        ("cameras: [", "not YAML"),
        ("cameras: {a: {source: 0}}\n---\ncameras: {}", "not YAML"),
        ("cameras: {a: &a {source: 0, masks: *a}}", "not YAML|masks"),
        ("cameras: 3", "cameras must be a group of options"),
        ("cameras: {1: {source: 0}}", "'1' has to stand in quotes"),
        ("cameras: {'a/b': {source: 0}}", "a name has letters, digits, - and _ only"),
        ("cameras: {'.a.': {source: 0}}", "a name has letters, digits, - and _ only"),
        ("cameras: {a: {source: -1}}", "source must be"),
        ("cameras: {a: {source: 0, hold: often}}", "hold must be"),
        ("cameras: {a: {source: 0, record: 1}}", "record must be true or false, got 1"),
        ("cameras: {a: {source: 0, min_area: 0.5, max_area: 0.1}}", "min_area must be at most max_area"),
        ("cameras: {a: {source: 0, min_area: 0.5, classes: {car: {max_area: 0.1}}}}", "min_area must be at most"),
        ("cameras: {a: {source: 0, lines: {x: {start: [0, 0], end: [0, 0]}}}}", "two points"),
        ("cameras: {a: {source: 0}}\nmqtt: {host: h, prefix: 'a/#'}", "prefix must be a topic"),
        ("cameras: {a: {source: 0}}\nwebhook: {url: 'http://x', secret: short}", "16 characters"),
        ("cameras: {a: {source: ''}}", "source must not be empty"),
        (
            "cameras: {a: {source: 0, zones: {b: {polygon: [[0, 0], [1, 0], [1, 1]]}}}, a_zones_b: {source: 1}}",
            "must not be called a_zones_b",
        ),
        ("cameras: {a: {source: 0, masks: [[[0, 0], [0.5, 0.5], [1, 1]]]}}", "on one line"),
        (
            "cameras: {a: {source: 0, zones: {b: {polygon: [[0, 0], [1, 1], [1, 0], [0, 1]]}}}}",  # a bow tie
            "cameras.a.zones.b: polygon crosses or touches itself",
        ),
        (
            "cameras: {a: {source: 0, masks: [[[0, 0], [1, 0], [0.5, 0], [0, 1]]]}}",  # it doubles back
            "cameras.a: masks[0] crosses or touches itself",
        ),
        ("cameras: {a\0: {source: 0}}", "not YAML: special characters are not allowed"),
        ('cameras: {a: {source: 0}}\nfolder: "a\\0b"', "control character"),
        ("cameras: {a: {source: 0}}\nmqtt: {host: ''}", "host must be"),
        ("cameras: {a: {source: 0}}\nmqtt: {host: a..b}", "host must be"),
        ("cameras: {a: {source: 0}}\nmqtt: {host: h, password: x}", "give user"),
        ("cameras: {a: {source: 0}}\nwebhook: {url: 'http://x:y/', secret: 0123456789abcdef}", "url must name a host"),
        ("cameras: {a: {source: 0}}\njournal: 1.0e+308", "journal must be"),
        ("cameras: &all {a: *all}", "not YAML: an alias stands in what it repeats"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, text: str, fault: str) -> None:
    (line,) = faults(tmp_path, text)
    assert line.startswith("cameras.yaml:") and any(part in line for part in fault.split("|"))


def test_a_missing_package_is_a_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paho.mqtt.enums", None)  # as of versions below 2
    (line,) = faults(tmp_path, "cameras: {a: {source: 0}}\nmqtt: {host: h}\n")
    assert line == "cameras.yaml:2: mqtt: it needs the package paho-mqtt: pip install 'paho-mqtt>=2'"


def test_borders_may_be_hollow_and_closed() -> None:
    hollow = ((0, 0), (1, 0), (0.5, 0.2), (1, 1), (0, 1), (0.2, 0.5))
    for polygon in (hollow, hollow[::-1], (*hollow, (0, 0)), ((0, 0), (0, 0), (0.5, 0), (1, 0), (1, 1))):
        assert Zone(polygon=polygon).polygon == polygon


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read .*No such file"):
        read_site(tmp_path / "none.yaml")


def test_anchors_serve_many_cameras(tmp_path: Path) -> None:
    text = "cameras:\n  a: &all {source: 0, fps: 3}\n  b: {<<: *all, source: 1}\n"
    site = read_site(write(tmp_path, text))
    assert site.cameras == {"a": Camera(source=0, fps=3), "b": Camera(source=1, fps=3)}


def test_what_makes_a_stream_begin_anew_and_what_does_not() -> None:
    before = Camera(source=0)
    soft = Camera(source=0, priority=3, zones={"z": Zone(polygon=((0, 0), (1, 0), (1, 1)))}, record=False)
    assert before.fixed() == soft.fixed() and before.fixed() != Camera(source=0, hold=2).fixed()


@pytest.mark.parametrize(
    "text",
    [
        "# mine\ncameras:\n  gate:  # front\n    source: 0  # webcam\n    fps: 3\n  yard: {source: 1}\n# end\n",
        "cameras: {gate: {source: 0, fps: 3}, yard: {source: 1}}  # end\n",
        "cameras:\n  gate:\n    masks:\n      - - [0, 0]\n        - [1, 0]\n        - [1, 1]  # a comment\n"
        "    # another\n    fps: 3\n    source: 0\n  yard: {source: 1}  # end\n",
        "cameras:\n  gate:\n    source: 0\n    fps: 3\n    masks: []\n"
        "    zones: {old: {polygon: [[0, 0], [1, 0], [1, 1]]}}\n  # end\n  yard: {source: 1}\n",
    ],
)
def test_masks_and_zones_are_exchanged_and_all_else_stays(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    mask, zone = ((0.25, 0.5), (1, 0.5), (1, 1)), ((0, 0), (1, 0), (0.5, 0.5))
    for _ in range(2):  # then it stands there already
        edit_regions(path, "gate", {"masks": [mask], "zones": {"drive": {"polygon": zone, "classes": ["car"]}}})
        site = read_site(path)
        assert site.cameras["gate"].masks == (mask,) and site.cameras["yard"] == Camera(source=1)
        assert site.cameras["gate"].zones == {"drive": Zone(polygon=zone, classes=("car",))}
        assert (site.cameras["gate"].source, site.cameras["gate"].fps) == (0, 3)
    edited = path.read_text()
    assert all(one in edited for one in ("# mine", "# front", "# webcam", "# end", "# another") if one in text)


def test_what_cannot_be_exchanged_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    text = "cameras:\n  a: {source: 0, masks: &m [[[0, 0], [1, 0], [1, 1]]]}\n  b: {source: 1, masks: *m}\n"
    path = write(tmp_path, text)
    with pytest.raises(UserError, match="b: masks is shared with others"):
        edit_regions(path, "b", {"masks": []})
    with pytest.raises(Faults, match="undefined alias"):  # b has them from there
        edit_regions(path, "a", {"masks": []})
    with pytest.raises(Faults, match="different points"):
        edit_regions(path, "a", {"zones": {"z": {"polygon": ((0, 0), (1, 1))}}})
    with pytest.raises(UserError, match="must not name variables"):
        edit_regions(path, "a", {"zones": {"${PATH}": {"polygon": ((0, 0), (1, 0), (1, 1))}}})
    assert path.read_text() == text
    merged = "cameras:\n  a: &a {source: 0}\n  b:\n    <<: *a\n    source: 1\n"
    edit_regions(write(tmp_path, merged), "b", {"masks": []})
    assert read_site(path).cameras["b"] == Camera(source=1)


def test_aliases_cannot_blow_a_file_up(tmp_path: Path) -> None:
    value = "&a0 [x, x, x, x, x, x, x, x, x, x]"
    for i in range(1, 12):
        value = f"&a{i} [{value}{f', *a{i - 1}' * 9}]"
    (line,) = faults(tmp_path, f"cameras:\n  a: {{source: 0, fps: {value}}}\n")
    assert line.startswith("cameras.yaml:2: not YAML: more than")
    path = write(tmp_path, "#" * (2**18 + 1))
    with pytest.raises(UserError, match="more than 256 KiB"):
        read_site(path)


def test_every_bad_name_is_told_where_it_stands(tmp_path: Path) -> None:
    zone = "{polygon: [[0, 0], [1, 0], [1, 1]]}"
    found = faults(
        tmp_path, f"cameras:\n  a/b: {{source: 0}}\n  ä: {{source: 0}}\n  c: {{source: 0, zones: {{x y: {zone}}}}}\n"
    )
    assert [line.split(": a name")[0] for line in found] == [
        "cameras.yaml:2: cameras",
        "cameras.yaml:3: cameras",
        "cameras.yaml:4: cameras.c.zones",
    ]


@pytest.mark.parametrize(
    "value", ["12345678", "[hunter12345678]", "*hunter12345678", "!hunter12345678", "&hunter12345678 [x]"]
)
@pytest.mark.parametrize("option", ["mqtt:\n  host: h\n  user: me\n  password", "webhook:\n  url: http://x\n  secret"])
def test_faults_tell_no_secret(tmp_path: Path, option: str, value: str) -> None:
    (line,) = faults(tmp_path, f"cameras: {{}}\n{option}: {value}\n")
    assert line.startswith("cameras.yaml:") and "12345678" not in line


def test_an_edited_file_keeps_its_mode_and_its_link(tmp_path: Path) -> None:
    path, link = write(tmp_path, "cameras:\n  a: {source: 0}\n  b: {<<: {source: 1}}\n"), tmp_path / "link.yaml"
    path.chmod(0o600)
    link.symlink_to(path)
    edit_regions(link, "a", {"masks": [((0, 0), (1, 0), (1, 1))]})
    assert link.is_symlink() and len(read_site(path).cameras["a"].masks) == 1
    assert path.stat().st_mode & 0o777 == 0o600, "it may hold passwords"
    merged = "cameras:\n  <<: {a: {source: 0}}\n"
    with pytest.raises(UserError, match="no camera a of its own"):
        edit_regions(write(tmp_path, merged), "a", {"masks": []})


def test_faults_tell_nothing_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATE", "hunter12345678")
    text = "cameras: {a: {source: 0, fps: '${GATE}', masks: [[['${GATE}', 0], [1, 0], [1, 1]]], hold: '${GATE}'}}\n"
    found = faults(tmp_path, text + "mqtt: {host: h, port: '${GATE}', prefix: '#${GATE}'}\n")
    assert len(found) == 4 and "hunter" not in " ".join(found)
