"""Detectors in folders and on a Hub that is a folder: what comes back is what was put there."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml

from eventful_det import Detector, UserError, load_detector
from eventful_det.detectors.checkpoints.files import read_weights
from eventful_det.detectors.rf_detr.model import EventfulRFDETR
from eventful_det.detectors.rf_detr.sizes import random_model

NOTES = {"license": "apache-2.0", "datasets": "mine, yours", "training": "make train"}


class FakeHub:
    """The functions of `huggingface_hub` that are used, on a folder."""

    def __init__(self, root: Path, token: str | None = None) -> None:
        self.root, self.token, self.private = root, token, False

    def __call__(self, token: str | None = None) -> FakeHub:
        self.token = token
        return self

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
        if repo_id.startswith("stranger/"):
            raise PermissionError("403 Forbidden: you may not write to stranger's namespace\nTraceback of much")
        assert exist_ok
        self.private = private
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def file_exists(self, repo_id: str, filename: str) -> bool:
        return (self.root / repo_id / filename).exists()

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str, ignore_patterns: list[str]) -> Any:
        assert commit_message
        for path in folder_path.iterdir():
            if path.name not in ignore_patterns:
                shutil.copy(path, self.root / repo_id / path.name)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")

    def snapshot_download(self, repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert not any(pattern.endswith((".bin", ".pth", ".pkl", ".py", "*")) for pattern in allow_patterns)
        if not (self.root / repo_id).is_dir():
            raise FileNotFoundError(f"404: no repository {repo_id} at {revision}")
        return str(self.root / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    with contextlib.suppress(ImportError):
        import transformers.utils.hub  # noqa: F401  # which looks at the true HfApi
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return fake


def small_rf_detr() -> EventfulRFDETR:
    pytest.importorskip("transformers")
    config = {"d_model": 32, "decoder_ffn_dim": 48, "decoder_self_attention_heads": 2}
    config |= {"decoder_cross_attention_heads": 4, "num_queries": 20}
    backbone = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 4, "patch_size": 8, "image_size": 64}
    return EventfulRFDETR(random_model("rf-detr-nano", backbone={**backbone, "out_indices": [2, 4]}, config=config))


def assert_equal(a: torch.nn.Module, b: torch.nn.Module) -> None:
    own, other = a.state_dict(), b.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in own.items())


def test_folders(tiny_detector: Detector, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    tiny_detector.save_pretrained(folder, NOTES)
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "README.md"}
    for source in (folder, str(folder), folder / "model.safetensors"):
        loaded = Detector.from_pretrained(source)
        assert loaded.config == tiny_detector.config and not loaded.training
        assert_equal(loaded, tiny_detector)
    with pytest.raises(UserError, match="is a Detector, no EventfulRFDETR; open it with load_detector"):
        EventfulRFDETR.from_pretrained(folder)


def test_a_damaged_folder_is_told_of_as_what_it_is(tiny_detector: Detector, tmp_path: Path) -> None:
    tiny_detector.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model.safetensors is not a readable safetensors file"):
        load_detector(tmp_path)


def test_the_card_can_be_read_by_the_hub_and_is_not_overwritten(tiny_detector: Detector, tmp_path: Path) -> None:
    tiny_detector.save_pretrained(tmp_path, NOTES)
    card = (tmp_path / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["license"] == "apache-2.0" and about["datasets"] == ["mine", "yours"]
    assert about["library_name"] == "eventful_det" and about["pipeline_tag"] == "object-detection"
    assert "training: make train" in body and "circle, square, star" in body
    assert huggingface_hub.ModelCard(card).data.license == "apache-2.0"
    (tmp_path / "README.md").write_text("by a person")
    tiny_detector.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "by a person"


def test_notes_may_be_any_values(tiny_detector: Detector, tmp_path: Path) -> None:
    tiny_detector.save_pretrained(tmp_path, {"epochs": 3, "datasets": ["mine", "yours"]})
    assert read_weights(tmp_path / "model.safetensors").notes["epochs"] == "3"
    _, head, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["datasets"] == ["mine", "yours"] and "- epochs: 3" in body


def test_to_the_hub_and_back(tiny_detector: Detector, hub: FakeHub) -> None:
    url = tiny_detector.push_to_hub("me/tiny", NOTES, private=True, token="hf_secret")
    assert url == "https://huggingface.co/me/tiny/commit/1" and hub.private and hub.token == "hf_secret"
    for source in ("me/tiny", "me/tiny@v1.0"):
        assert_equal(load_detector(source), tiny_detector)
    assert_equal(Detector.from_pretrained("me/tiny"), tiny_detector)
    card = hub.root / "me" / "tiny" / "README.md"
    assert card.read_text().startswith("---\n") and 'load_detector("me/tiny")' in card.read_text()
    card.write_text("by a person")
    tiny_detector.push_to_hub("me/tiny")
    assert card.read_text() == "by a person"


def test_rf_detr(hub: FakeHub, tmp_path: Path) -> None:
    detector = small_rf_detr()
    detector.save_pretrained(tmp_path / "rf")
    assert {path.name for path in (tmp_path / "rf").iterdir()} == {
        *("config.json", "model.safetensors", "preprocessor_config.json", "README.md")
    }
    detector.push_to_hub("me/rf")
    for source in (tmp_path / "rf", "me/rf"):
        loaded = EventfulRFDETR.from_pretrained(source)
        assert loaded.names == detector.names and loaded.parts.side == detector.parts.side
        assert_equal(loaded, detector)
    with pytest.raises(UserError, match="is a EventfulRFDETR, no Detector"):
        Detector.from_pretrained("me/rf")


def test_a_folder_or_file_comes_before_the_hub(tiny_detector: Detector, hub: FakeHub, tmp_path: Path) -> None:
    tiny_detector.save_pretrained("runs/mine")
    assert_equal(load_detector("runs/mine"), tiny_detector)
    with pytest.raises(UserError, match="^no weights 'runs/mine.safetensors': neither a file"):
        load_detector("runs/mine.safetensors")  # a file, and no name of the Hub


@pytest.mark.parametrize("revision", ["../../x", "a/../../x", "/etc/hostname", ".", "-x"])
def test_a_revision_does_not_lead_out_of_the_cache(revision: str, hub: FakeHub) -> None:
    """The Hub's client reads the file of that name."""
    with pytest.raises(UserError, match="neither a file"):
        load_detector(f"me/tiny@{revision}")


@pytest.mark.parametrize("name", ["me/none", "me/none@main"])
def test_what_cannot_be_fetched(name: str, hub: FakeHub) -> None:
    with pytest.raises(UserError) as error:
        load_detector(name)
    assert re.fullmatch(
        f"no weights '{name}': there is no such file or folder, and huggingface.co/me/none cannot be fetched .*",
        str(error.value),
    )


def test_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^no weights 'me/tiny': .* cannot be fetched \([^\n]*\)$"):
        load_detector("me/tiny")
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_written(tiny_detector: Detector, hub: FakeHub) -> None:
    with pytest.raises(UserError, match=r"^huggingface.co/stranger/tiny cannot be written \(403 [^\n]*\)$"):
        tiny_detector.push_to_hub("stranger/tiny")
    for name in ("tiny", "a/b/c", "me/tiny@v1", "../up"):
        with pytest.raises(UserError, match="expected owner/name"):
            tiny_detector.push_to_hub(name)
    assert not hub.root.exists()


def test_nothing_of_a_repository_is_run(tiny_detector: Detector, hub: FakeHub) -> None:
    """A pickle under the name of the weights is refused."""
    tiny_detector.push_to_hub("me/tiny")
    torch.save({"model": Evil()}, hub.root / "me" / "tiny" / "model.safetensors")
    with pytest.raises(UserError):
        load_detector("me/tiny")
    assert not Path("run").exists()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("run"),)
