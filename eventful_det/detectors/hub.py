"""Detectors in folders and on the Hugging Face Hub: safetensors and a model card, nothing that is run."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, Self

import yaml

from eventful_det.errors import UserError, first_line
from eventful_det.outputs import write_text

WEIGHTS = "model.safetensors"
CARD = "README.md"
_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?!.*\.\.)(\w[\w./-]*))?", re.ASCII)
_SUFFIXES = (".safetensors", ".pth", ".pt", ".pkl", ".bin", ".onnx")
_FILES = ["*.json", "*.safetensors", CARD]


def local_source(source: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The folder of `owner/name` or `owner/name@revision` of the Hub, fetched; what is here or no such name, as it is.

    Raises:
        UserError: it cannot be fetched.
    """
    if not isinstance(source, str) or Path(source).exists() or source.endswith(_SUFFIXES):
        return source
    if (named := _REPOSITORY.fullmatch(source)) is None:
        return source
    try:
        return fetch(*named.groups())
    except UserError as error:
        raise UserError(f"no weights {source!r}: there is no such file or folder, and {error}") from None


def fetch(repository: str, revision: str | None = None) -> Path:
    """The folder in the Hub's cache that holds a repository, brought up to date where there is a network.

    Raises:
        UserError: it cannot be fetched.
    """
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, revision=revision, allow_patterns=_FILES))
    except ImportError:
        raise UserError("the Hub needs the package huggingface_hub: pip install huggingface_hub") from None
    except Exception as error:  # network, cache, permissions, disk
        raise UserError(f"huggingface.co/{repository} cannot be fetched ({first_line(error)})") from None


class _Saving(Protocol):
    """A detector that can be saved."""

    @property
    def names(self) -> tuple[str, ...]:
        """Class names."""

    def save_pretrained(self, folder: str | os.PathLike[str], notes: Mapping[str, object] | None = None) -> None:
        """See `HubDetector`."""

    def _save_files(self, folder: Path, notes: Mapping[str, object]) -> None: ...


class HubDetector:
    """Gives a detector `from_pretrained`, `save_pretrained` and `push_to_hub`."""

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str]) -> Self:
        """A detector of this class; `load_detector` tells the class by itself, and has options.

        Args:
            source: `owner/name` or `owner/name@revision` on the Hugging Face Hub, or a folder, file or shipped name.

        Raises:
            UserError: it cannot be loaded, or is a detector of another class.
        """
        from eventful_det import load_detector

        detector: object = load_detector(source)
        if not isinstance(detector, cls):
            raise UserError(f"{source} is a {type(detector).__name__}, no {cls.__name__}; open it with load_detector")
        return detector

    def save_pretrained(
        self: _Saving, folder: str | os.PathLike[str], notes: Mapping[str, object] | None = None
    ) -> None:
        """Write weights and a model card into a folder, for `from_pretrained`. A card that is there stays.

        Args:
            folder: made if it is missing.
            notes: what to say of the weights: `{"license": "apache-2.0", "training": "..."}`. `license` and `datasets`
                (names in a list, or with commas between) go where the Hub looks for them.

        Raises:
            UserError: the files cannot be written.
        """
        folder = Path(folder)
        self._save_files(folder, notes or {})
        if not (folder / CARD).exists():
            write_text(folder / CARD, _card(self, f"owner/{folder.resolve().name}", notes or {}))

    def push_to_hub(
        self: _Saving,
        repository: str,
        notes: Mapping[str, object] | None = None,
        *,
        private: bool = False,
        token: str | None = None,
        message: str = "Upload of eventful_det",
    ) -> str:
        """Write what `save_pretrained` writes into a repository of the Hugging Face Hub; a card that is there stays.

        Args:
            repository: `owner/name`; made if it is missing.
            notes: see `save_pretrained`.
            private: whether a new repository is hidden from others.
            token: None = that of `hf auth login` or HF_TOKEN.
            message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            UserError: no such name, no permission, no network.
        """
        named = _REPOSITORY.fullmatch(repository)
        if named is None or named[2]:
            raise UserError(f"push_to_hub: expected owner/name, got {repository!r}")
        try:
            from huggingface_hub import HfApi
        except ImportError:
            raise UserError("the Hub needs the package huggingface_hub: pip install huggingface_hub") from None
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_text(folder / CARD, _card(self, repository, notes or {}))
            self.save_pretrained(folder, notes)
            try:
                api = HfApi(token=token)
                api.create_repo(repository, private=private, exist_ok=True)
                ignored = [CARD] if api.file_exists(repository, CARD) else []
                done = api.upload_folder(
                    repo_id=repository, folder_path=folder, commit_message=message, ignore_patterns=ignored
                )
            except Exception as error:  # network, permissions, names that the Hub refuses
                raise UserError(f"huggingface.co/{repository} cannot be written ({first_line(error)})") from None
        return str(done.commit_url)

    def _save_files(self, folder: Path, notes: Mapping[str, object]) -> None:
        raise UserError(f"a {type(self).__name__} has no files of its own; see save_detector and save_detectron2")


def _card(detector: _Saving, repository: str, notes: Mapping[str, object]) -> str:
    """A model card, as the Hub shows it."""
    about: dict[str, object] = {"library_name": "eventful_det", "pipeline_tag": "object-detection"}
    about["tags"] = ["video-object-detection", "eventful-transformer", "safetensors"]
    if "license" in notes:
        about["license"] = str(notes["license"])
    if "datasets" in notes:
        given = notes["datasets"]
        names = given if isinstance(given, (list, tuple)) else str(given).split(",")
        about["datasets"] = [str(name).strip() for name in names]
    told = "".join(f"- {key}: {value}\n" for key, value in notes.items() if key not in about)
    return f"""---
{yaml.safe_dump(about, sort_keys=False)}---

# {repository.split("/")[1]}

A video object detector ({type(detector).__name__}) for eventful_det, which recomputes only what changed.

```python
from eventful_det import load_detector

detector = load_detector("{repository}")  # or the folder of this file
for result in detector.stream("video.mp4"):
    print(result.frame_index, result.detections)
```

{told}
Finds {len(detector.names)} classes: {", ".join(detector.names)}.
"""
