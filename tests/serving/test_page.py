"""The page in a real browser."""

from __future__ import annotations

import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import served  # skips where the server's libraries are missing

from eventful_det.detectors.vitdet.detector import Detector

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
exceptions = pytest.importorskip("selenium.common.exceptions")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BROWSER and DRIVER), reason="no chromium with its driver (apt-get install chromium chromium-driver)"
    ),
]
Keys = webdriver.Keys
T = TypeVar("T")
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update "
    "disable-sync disable-dev-shm-usage window-size=1280,900"
)


class Page:
    """The page, and what is on it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def count(self, selector: str) -> int:
        return len(self.driver.find_elements("css selector", selector))

    def text(self, selector: str) -> str:
        return str(self.find(selector).get_attribute("textContent"))

    def until(self, look: Callable[[], T], seconds: float = 30.0) -> T:
        """What `look` sees, once it is something."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if found := look():
                    return found
            except exceptions.StaleElementReferenceException:
                pass
            assert time.monotonic() < deadline, self.find("body").text
            time.sleep(0.05)

    def tokens(self) -> int:
        """Recomputed tokens of the newest frame on the page; -1 = none yet, or all because the stream began anew."""
        flush = self.find(".flush").is_displayed()
        number = self.text("[data-fact=tokens]").split(" / ")[0]
        return -1 if flush or not number.isdigit() else int(number)

    def picture(self) -> str:
        """The picture on the page."""
        return str(self.driver.execute_script("return document.querySelector('.picture').toDataURL()"))

    def is_still(self) -> bool:
        """Whether the picture on the page stays."""
        before = self.picture()
        time.sleep(0.3)
        return self.picture() == before

    def complaints(self) -> list[dict[str, Any]]:
        """Errors of the page's script, and what its policy forbade."""
        return [e for e in self.driver.get_log("browser") if e["level"] == "SEVERE" and e["source"] != "network"]


@pytest.fixture
def address(tiny_detector: Detector, clip: Path) -> Iterator[str]:
    """Where a server without streams is."""
    runner = served.PoolRunner(served.StreamPool(tiny_detector, budget=0.25))
    with served.listening(runner, served.SourceOpener(media=clip.parent, max_bytes=200_000)) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def page(address: str, tmp_path: Path) -> Iterator[Page]:
    """A browser that has just opened the page."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS.split(), f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        driver.get(address)
        yield Page(driver)
    finally:
        driver.quit()


def test_the_page_at_work(page: Page, clip: Path, tmp_path: Path) -> None:
    page.until(lambda: page.find("#empty").is_displayed())

    # An upload that is no video gets a clear message, and the dialog stays for another try.
    page.find("#open").click()
    page.until(lambda: page.find("#file").is_enabled() and "up to 0 MiB" in page.text("#limit"))
    (tmp_path / "notes.mp4").write_text("no video at all\n" * 100)
    page.find("#file").send_keys(str(tmp_path / "notes.mp4"))
    page.until(lambda: "notes.mp4 is not a video" in page.text("#problem"))
    (tmp_path / "big.mp4").write_bytes(b"x" * 200_001)
    page.find("#file").send_keys(str(tmp_path / "big.mp4"))
    page.until(lambda: "too large" in page.text("#problem"))
    assert page.count(".tile") == 0

    # A video is watched, and moves.
    page.find("#file").send_keys(str(clip))
    page.until(lambda: page.count(".tile") == 1 and page.tokens() > 0)
    assert not page.find("#dialog").is_displayed() and not page.find("#empty").is_displayed()
    assert page.text(".tile h2") == "clip.mp4"
    before = page.picture()
    page.until(lambda: page.picture() != before)
    for _ in range(3):  # frozen, with frames under way, and again: none of them is owed for ever
        for frozen in (True, False):
            page.find("#freeze").click()
            page.until(lambda frozen=frozen: page.is_still() == frozen)  # type: ignore[misc]

    # The slider, by keyboard, changes the cost.
    slider = page.find("#slider")
    slider.send_keys(Keys.HOME)
    page.until(lambda: page.text("#value") == "1 % of tokens" and 0 <= page.tokens() <= 1)
    page.until(lambda: "of dense" in page.text("#spent"))
    slider.send_keys(Keys.END)
    # A mean over two seconds, in which every second frame is held.
    page.until(lambda: page.text("#value") == "100 % of tokens" and page.tokens() > 8)
    for _ in range(50):
        slider.send_keys(Keys.ARROW_LEFT)
    page.until(lambda: page.text("#value") == "50 % of tokens" and 1 < page.tokens() <= 30)

    # What somebody else chooses is shown, too.
    budget = urllib.request.Request(
        page.driver.current_url + "api/budget",
        b'{"budget": "0.4 GMACs"}',
        {"Content-Type": "application/json"},
        method="PUT",
    )
    urllib.request.urlopen(budget).close()
    page.until(lambda: page.text("#value") == "0.40 GMACs" and page.find("[value=gmacs]").is_selected())

    # A second stream by name, an unknown one, and both gone again.
    page.find("#open").click()
    source = page.find("#source")
    page.until(source.is_displayed)
    source.send_keys("../secret.mp4", Keys.ENTER)
    page.until(lambda: "is no source" in page.text("#problem"))
    source.clear()
    source.send_keys("clip.mp4", Keys.ENTER)
    page.until(lambda: page.count(".tile") == 2)
    for left in (1, 0):
        page.find(".remove").click()
        page.until(lambda left=left: page.count(".tile") == left)  # type: ignore[misc]
    page.until(lambda: page.find("#empty").is_displayed())
    assert page.complaints() == []


def test_a_lost_server_is_told_and_found_again(page: Page) -> None:
    page.until(lambda: page.find("#empty").is_displayed())
    assert not page.find("#lost").is_displayed()
    page.driver.set_network_conditions(offline=True, latency=0, throughput=0)
    page.driver.execute_script("live.close()")
    page.until(lambda: page.find("#lost").is_displayed())
    page.driver.delete_network_conditions()
    page.until(lambda: not page.find("#lost").is_displayed())
