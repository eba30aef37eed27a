"""Masks and zones are drawn in a real browser, with the mouse and by keyboard, and stand in the file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import served
from test_page import Keys, Page, page, pytestmark, webdriver  # noqa: F401

from eventful_det.cameras.service import CameraService
from eventful_det.cameras.site_file import read_site
from eventful_det.detectors.vitdet.detector import Detector


@pytest.fixture
def file(clip: Path, tmp_path: Path) -> Path:
    path = tmp_path / "cameras.yaml"
    zone = "{polygon: [[0, 0], [1, 0], [1, 1]], score: 0.25}"
    path.write_text(
        f"# mine\ncameras:\n  gate:\n    source: {clip}\n    zones:\n      old: {zone}\n  other: {{source: 99}}\n"
    )
    return path


@pytest.fixture
def address(tiny_detector: Detector, file: Path) -> Iterator[str]:
    """Where masks and zones are drawn."""
    runner = served.PoolRunner(served.StreamPool(tiny_detector))
    service = CameraService(file, runner, tiny_detector.names)
    with served.listening(runner, served.SourceOpener(), cameras=service) as port:
        deadline = time.monotonic() + 60
        while runner.newest("gate") is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/cameras"


def test_masks_and_zones_are_drawn_and_saved(page: Page, file: Path) -> None:  # noqa: F811
    page.until(lambda: "zone old, 3 points" in page.text("#shapes"))
    canvas = page.find("#canvas")
    page.until(lambda: page.driver.execute_script("return picture.naturalWidth") > 0)

    # With the mouse: three clicks, and one point is dragged.
    page.find("#mask").click()
    wide, high = canvas.size["width"], canvas.size["height"]

    def at(x: float, y: float) -> tuple[int, int]:
        return round((x - 0.5) * wide), round((y - 0.5) * high)

    for place in ((0.1, 0.1), (0.5, 0.1), (0.5, 0.6)):
        webdriver.ActionChains(page.driver).move_to_element_with_offset(canvas, *at(*place)).click().perform()
    drag = webdriver.ActionChains(page.driver).move_to_element_with_offset(canvas, *at(0.5, 0.6)).click_and_hold()
    drag.move_to_element_with_offset(canvas, *at(0.5, 0.9)).release().perform()
    page.until(lambda: "mask 1, 3 points" in page.text("#shapes"))

    # By keyboard: a zone of three points, of which the last is picked up and moved.
    page.find("#name").send_keys("drive", Keys.ENTER)
    keys = [" ", Keys.SHIFT + Keys.ARROW_RIGHT * 3 + Keys.NULL, " ", Keys.SHIFT + Keys.ARROW_DOWN * 2 + Keys.NULL, " "]
    keys += [" ", Keys.ARROW_DOWN * 5, " ", Keys.ARROW_LEFT]
    for key in keys:
        page.driver.switch_to.active_element.send_keys(key)
    page.until(lambda: "zone drive, 3 points" in page.text("#shapes"))
    assert "79 % from the left, 75 % from the top; zone drive, 3 points" in page.text("#told")

    page.find("#camera").send_keys("other")
    page.until(lambda: "is not saved" in page.text("#told"))
    assert page.find("#camera").get_attribute("value") == "gate", "what is drawn is not dropped"

    page.find("#save").send_keys(Keys.ENTER)
    page.until(lambda: "Saved" in page.text("#told"))
    assert page.driver.switch_to.active_element.get_attribute("id") == "save", "the keyboard stays where it was"
    gate = read_site(file).cameras["gate"]
    (mask,) = gate.masks
    assert [value for point in mask for value in point] == pytest.approx([0.1, 0.1, 0.5, 0.1, 0.5, 0.9], abs=0.01)
    assert gate.zones["drive"].polygon == ((0.5, 0.5), (0.8, 0.5), (0.8, 0.75))
    assert gate.zones["old"].score == 0.25 and file.read_text().startswith("# mine\n")

    if os.environ.get("EVENTFUL_PICTURES"):  # to be looked at
        for theme, width in (("dark", 1280), ("light", 1280), ("light", 390)):
            page.driver.set_window_size(width, 900)
            page.driver.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
            page.driver.save_screenshot(f"{os.environ['EVENTFUL_PICTURES']}/regions_{theme}_{width}.png")

    # What is no polygon is told, and the file stays as it was.
    page.find("#name").send_keys("thin", Keys.ENTER)
    page.driver.switch_to.active_element.send_keys(" ")
    page.find("#save").click()
    page.until(lambda: "needs 3 to 200 different points" in page.text("#told"))
    assert set(read_site(file).cameras["gate"].zones) == {"old", "drive"}
    page.find("#undo").click()
    page.until(lambda: "thin" not in page.text("#shapes"))
    assert page.complaints() == []
