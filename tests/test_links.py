"""The documentation: every link and anchor leads somewhere, every page and public name is on the site."""

from __future__ import annotations

import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest

import eventful_det

ROOT = Path(__file__).resolve().parents[1]
SITE = runpy.run_path(str(ROOT / "docs" / "build_site.py"))


def broken(page: Path) -> list[str]:
    """Links of a page that lead nowhere."""
    return [
        f"{target}#{anchor}"
        for target, anchor in SITE["links"](page)
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in SITE["anchors"](target))
    ]


@pytest.mark.parametrize("page", SITE["pages"](), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert not broken(page)


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `rule` of [ours](x)\n\n```\n# No heading\n```\n")
    page = tmp_path / "page.md"
    good = (
        "[a](other.md) [b](other.md#a-rule-of-ours) [c](https://nowhere.example/x) `[d](none.md)`\n# Here\n[e](#here)"
    )
    page.write_text(good)
    assert not broken(page) and len(list(SITE["links"](page))) == 3
    page.write_text('[a](none.md) [b](other.md#no-heading) [c](#nowhere) ![d](none.png "title") <img src="no.png">')
    assert len(broken(page)) == 5


def test_the_menu_has_every_page() -> None:
    def entries(menu: list[dict[str, Any]]) -> set[str]:
        values = [value for entry in menu for value in entry.values()]
        return {page for v in values for page in ({v} if isinstance(v, str) else entries(v))}

    menu = tomllib.loads((ROOT / "docs" / "zensical.toml").read_text())["project"]["nav"]
    there = {str(page.relative_to(ROOT)) for page in SITE["pages"]() if page.parent.name != "results"}
    assert entries(menu) == there - {"README.md"} | {"index.md", "docs/api.md", "docs/results/README.md"}


def test_the_reference_has_every_public_name() -> None:
    found = {line.rpartition(".")[2] for line in SITE["reference"]().splitlines() if line.startswith("::: ")}
    assert found | {"__version__"} == set(eventful_det.__all__)
