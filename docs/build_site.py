"""The documentation as a site: README, docs/ and an API reference from docstrings, by Zensical.

    python docs/build_site.py [FOLDER]        # outputs/site, to be opened in a browser

Pages lie in the site as they do in the repository, so that their links hold in both. Files that they link to come
along.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
_CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(<?([^)\s>]+)>?[^)]*\)|(?:src|href)=\"([^\"]+)\"")


def pages() -> list[Path]:
    """All pages of the documentation."""
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("datasets/*.md"))]


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The file and the anchor that each relative link of a page leads to."""
    for found in _LINK.finditer(_CODE.sub("", page.read_text(encoding="utf-8"))):
        target, _, anchor = (found[1] or found[2]).partition("#")
        if "://" not in target and not target.startswith("mailto:"):
            yield (page.parent / unquote(target)).resolve() if target else page, anchor


def anchors(page: Path) -> set[str]:
    """What links to headings of a page may end in, as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.+?)\s*$", _CODE.sub(_keep_inline, page.read_text(encoding="utf-8")), re.MULTILINE)
    texts = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in texts}


def _keep_inline(code: re.Match[str]) -> str:
    return "" if code[1] else code[0].strip("`")


def reference() -> str:
    """A page with a directive of mkdocstrings for each public name."""
    from eventful_det import _PUBLIC

    names = sorted(_PUBLIC, key=str.lower)
    return "# API\n\n" + "\n".join(f"::: {_PUBLIC[name]}.{name}\n" for name in names)


def build(output: Path) -> None:
    """Build the site into a folder, which is emptied before."""
    shutil.rmtree(output, ignore_errors=True)
    source = output / ".source"
    for path in {*pages(), *(target for page in pages() for target, _ in links(page) if target.is_file())}:
        copy = source / "pages" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    (source / "pages" / "README.md").rename(source / "pages" / "index.md")
    (source / "pages" / "docs" / "api.md").write_text(reference(), encoding="utf-8")
    shutil.copyfile(ROOT / "docs" / "zensical.toml", source / "zensical.toml")
    subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=source, check=True)
    shutil.copytree(source / "site", output, dirs_exist_ok=True)
    shutil.rmtree(source)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/site"))
