"""What people copy: the example of the documentation, the Dockerfile and the compose file beside it."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from running import ROOT, options_of

from eventful_det.cameras.config import Site
from eventful_det.cameras.site_file import read_site

DOCKER = ROOT / "docker"


def test_the_example_of_the_documentation_is_read(tmp_path: Path, monkeypatch: object) -> None:
    text = (ROOT / "docs" / "cameras.md").read_text()
    example = next(block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    for variable in re.findall(r"\$\{(\w+)\}", example):
        monkeypatch.setenv(variable, "a secret of some length")  # type: ignore[attr-defined]
    path = tmp_path / "cameras.yaml"
    path.write_text(example)
    site = read_site(path, ("person", "car"))
    assert site.mqtt and site.webhook and site.cameras["gate"].lines["door"].end == (0.5, 0.0)
    assert set(yaml.safe_load(example)) == set(Site.__dataclass_fields__), "it shows every option of a site"


def test_the_one_liner_of_the_documentation_is_read(tmp_path: Path) -> None:
    found = re.search(r"printf '(.*)' > cameras.yaml", (ROOT / "docs" / "cameras.md").read_text())
    assert found
    path = tmp_path / "cameras.yaml"
    path.write_text(found[1].replace("\\n", "\n"))
    assert read_site(path).mqtt


def test_the_compose_file_starts_what_there_is() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    command = [part.replace("${EVENTFUL_TOKEN:-auto}", "auto") for part in services["detector"]["command"]]
    options = options_of("serve", *command[1:])
    assert command[0] == "serve" and options.expose and options.token == "auto" and options.log == "json"
    build = services["detector"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
    for service in services.values():
        for volume in service["volumes"]:
            assert not volume.startswith(".") or (DOCKER / volume.partition(":")[0]).exists()
    assert read_site(DOCKER / "config" / "cameras.yaml").mqtt.host in services  # type: ignore[union-attr]


def test_the_dockerfile_copies_what_a_wheel_is_made_of() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    command = yaml.safe_load(re.findall(r"^CMD (\[.*\])", text, re.MULTILINE)[-1])
    assert options_of("serve", *command[1:]).host == "0.0.0.0"
    kept = [line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().split("\n") if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    assert {"eventful_det", "tools", "configs", "setup.py", "pyproject.toml"} <= set(kept)
