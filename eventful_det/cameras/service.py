"""The cameras of a `cameras.yaml` on the pool of a server, and everything that happens before them.

The file is read again when it changes and on request. Cameras that it leaves as they are go on undisturbed; of others
only what changed is exchanged, and a stream begins anew only where its source, rate, size or key frames did.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from eventful_det.cameras.clips import Recorder
from eventful_det.cameras.config import Site
from eventful_det.cameras.events import KINDS, Event, Kind, Watcher
from eventful_det.cameras.journal import Journal
from eventful_det.cameras.library import Library
from eventful_det.cameras.sinks import MqttSink, Sink, WebhookSink
from eventful_det.cameras.site_file import Faults, edit_regions, read_site
from eventful_det.cameras.source import open_camera
from eventful_det.errors import UserError
from eventful_det.files import JsonObject
from eventful_det.outputs import owned, reporting
from eventful_det.runtime.motion.key_frames import parse_hold
from eventful_det.runtime.pool.metrics import StreamMetrics
from eventful_det.runtime.regions import Polygon
from eventful_det.runtime.session import StreamResult
from eventful_det.serving.reports import metric
from eventful_det.serving.runner import PoolRunner
from eventful_det.serving.sources import OpenedSource
from eventful_det.serving.views import encode_jpeg
from eventful_det.viz import draw_detections

_TICK = 1.0  # seconds between two looks at the file and the cameras
_AGAIN = 10.0  # seconds until a camera that failed is tried again
_TIDY = 30.0  # seconds between two looks at old clips
_RECORDED: set[Kind] = {"enter", "stay", "leave", "cross"}  # events with a clip
_PICTURED: set[Kind] = {"enter", "cross"}  # events with a snapshot
_LOG = logging.getLogger(__name__)


@dataclass
class _Watched:
    """A camera at work: its name in the pool (None = it is not there), and when to try again."""

    watcher: Watcher
    recorder: Recorder
    stream: str | None = None
    again: float = 0.0
    online: bool | None = None
    error: str | None = None


class CameraService:
    """Runs the cameras of a file on a runner, which is started before and closed after it.

    Args:
        path: of the file.
        runner: of the pool.
        names: classes that the detector knows.

    Attributes:
        site: as the file says now.
        sinks: where events go.
        journal: of events.
        library: of clips.
        counts: events so far, by camera and kind.

    Raises:
        UserError: the file has faults (`Faults`), or something that it asks for is missing.
    """

    def __init__(self, path: Path, runner: PoolRunner, names: Sequence[str]) -> None:
        self.path, self._runner, self._names = path, runner, names
        self.site = read_site(path, names)
        self._stamp = self._stamped()
        folder = path.resolve().parent / self.site.folder
        with reporting(folder):
            self.library = Library(folder / "clips", self.site.clips)
            self.journal = Journal(folder / "events", int(1e6 * self.site.journal), self.library.make_room)
        self._ours = ExitStack()
        self._ours.enter_context(owned(folder))  # two processes would mix up their events
        self.sinks: dict[str, Sink] = {}
        self.counts: Counter[tuple[str, Kind]] = Counter()
        self._cameras: dict[str, _Watched] = {}
        self._lock = threading.RLock()  # of the cameras; never taken in the detector's thread
        self._stopped, self._asked = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="cameras", daemon=True)
        self._set_sinks(self.site, start=False)

    def start(self) -> None:
        """Begin to watch."""
        for sink in self.sinks.values():
            sink.start()
        with self._lock:
            self._apply(self.site)
        self._thread.start()

    def close(self) -> None:
        """Watch no longer: objects leave, clips end, and what is left is delivered if somebody takes it at once."""
        self._stopped.set()
        self._asked.set()
        self._thread.join()
        with self._lock:
            for name in list(self._cameras):
                self._drop(name)
            self.journal.flush()
            for sink in self.sinks.values():
                sink.close()
            self.journal.close()
            self._ours.close()

    def ask_to_reload(self) -> None:
        """Have the file read again soon; may be called by a signal's handler."""
        self._stamp = None
        self._asked.set()

    def reload(self) -> None:
        """Read the file again and do what it says.

        Raises:
            UserError: it has faults (`Faults`); everything stays as it was.
        """
        stamp = self._stamped()
        with self._lock:
            self._stamp = stamp  # in any case: faults are told once
            site = read_site(self.path, self._names)
            if (site.folder, site.journal) != (self.site.folder, self.site.journal):
                _LOG.warning("%s: folder and journal count from the next start on", self.path.name)
            self._set_sinks(site, start=True)
            self.library.options = site.clips
            self.site = site
            self._apply(site)
        _LOG.info("%s: read again", self.path.name)

    def regions(self) -> list[JsonObject]:
        """Masks and zones of all cameras, as JSON values."""
        with self._lock:
            return [
                {
                    "name": name,
                    "stream": self._cameras[name].stream,
                    "masks": camera.masks,
                    "zones": {zone: one.polygon for zone, one in camera.zones.items()},
                }
                for name, camera in self.site.cameras.items()
            ]

    def draw(self, camera: str, masks: Sequence[Polygon], zones: Mapping[str, Polygon]) -> None:
        """Have other masks and zones in the file and here; zones that stay keep their other options.

        Raises:
            UserError: they are none, or the file cannot be changed.
        """
        with self._lock:
            if camera not in self.site.cameras:
                raise UserError(f"no camera {camera!r} in {self.path.name}")
            old = self.site.cameras[camera].zones
            given: dict[str, JsonObject] = {}
            for name, polygon in zones.items():
                options = dataclasses.asdict(old[name]) if name in old else {}
                given[name] = {**{k: v for k, v in options.items() if v is not None}, "polygon": polygon}
            edit_regions(self.path, camera, {"masks": masks, "zones": given}, self._names)
            self.reload()

    def health(self) -> JsonObject:
        """How cameras and sinks do, as JSON values."""
        with self._lock:
            cameras = {name: "online" if one.online else "offline" for name, one in self._cameras.items()}
        sinks = {name: {"behind": sink.bookmark.behind, "error": sink.error} for name, sink in self.sinks.items()}
        return {"cameras": cameras, "sinks": sinks}

    def prometheus(self) -> str:
        """Counters of events and sinks in Prometheus' text format."""
        with self._lock:
            online = {f'{{camera="{name}"}}': int(bool(one.online)) for name, one in self._cameras.items()}
            events = {f'{{camera="{name}",kind="{k}"}}': self.counts[name, k] for name in self._cameras for k in KINDS}
        sinks = {f'{{sink="{name}"}}': sink for name, sink in self.sinks.items()}
        taken, refused = ({n: getattr(s, key) for n, s in sinks.items()} for key in ("delivered", "refused"))
        lost, behind = ({n: getattr(s.bookmark, key) for n, s in sinks.items()} for key in ("lost", "behind"))
        metrics = (
            ("camera_online", "gauge", "1 while the camera delivers frames.", online),
            ("events_total", "counter", "Events of the camera.", events),
            ("sink_delivered_total", "counter", "Events that were taken.", taken),
            ("sink_refused_total", "counter", "Events that will never be taken.", refused),
            ("sink_lost_bytes_total", "counter", "Events too old to wait.", lost),
            ("sink_behind_bytes", "gauge", "Events that wait.", behind),
            ("lost_files_total", "counter", "Clips and snapshots that could not be written.", {"": self.library.lost}),
            (
                "lost_events_total",
                "counter",
                "Events that no disk took, and too many for memory.",
                {"": self.journal.lost},
            ),
        )
        return "".join(metric(*one) for one in metrics)

    def _run(self) -> None:
        tidied = 0.0
        while not self._stopped.is_set():
            self._asked.wait(_TICK)
            self._asked.clear()
            if self._stopped.is_set():
                return
            try:
                if self._stamp != self._stamped():
                    self.reload()
                with self._lock:
                    self._look()
                self.journal.flush()
                if time.monotonic() - tidied > _TIDY:
                    tidied = time.monotonic()
                    self.library.tidy()
                    _give_back()
            except Faults as error:
                for fault in error.faults:
                    _LOG.error("%s", fault)
            except UserError as error:
                _LOG.error("%s", error)
            except Exception as error:  # whatever it is, the cameras are watched on
                _LOG.error("%s: %s", type(error).__name__, error)

    def _stamped(self) -> tuple[int, ...] | None:
        """What changes with the file."""
        try:
            about = os.stat(self.path)
        except OSError:
            return None
        return about.st_mtime_ns, about.st_size, about.st_ino

    def _set_sinks(self, site: Site, start: bool) -> None:
        """Begin and end sinks as the file says."""
        for name in ("mqtt", "webhook"):
            if name in self.sinks and getattr(site, name) != getattr(self.site, name):
                self.sinks.pop(name).close()
        added: list[Sink] = []
        if site.mqtt is not None and "mqtt" not in self.sinks:
            added.append(MqttSink(self.journal, site.mqtt))
        if site.webhook is not None and "webhook" not in self.sinks:
            added.append(WebhookSink(self.journal, site.webhook))
        for sink in added:
            self.sinks[sink.name] = sink
            if start:
                sink.start()

    def _apply(self, site: Site) -> None:
        """Have just the cameras of a site, each as it says."""
        for name in set(self._cameras) - set(site.cameras):
            self._drop(name)
        for name, camera in site.cameras.items():
            watched = self._cameras.get(name)
            if watched is not None and watched.watcher.camera.fixed() != camera.fixed():
                self._drop(name)
                watched = None
            if watched is None:
                recorder = Recorder(self.library, name, camera.record)
                self._cameras[name] = watched = _Watched(Watcher(name, camera), recorder)
                self._join(watched)
            elif watched.watcher.camera != camera:
                with self._runner.lock:
                    watched.watcher.camera, watched.recorder.on = camera, camera.record
                if watched.stream is not None:
                    with contextlib.suppress(UserError):  # it may have left by itself
                        self._runner.pool.configure(watched.stream, camera.stream_options())
        for sink in self.sinks.values():
            sink.configure(site.cameras)

    def _join(self, watched: _Watched) -> None:
        """Let a camera join the pool; where that fails it is tried again later."""
        watcher, camera = watched.watcher, watched.watcher.camera
        watched.again = time.monotonic() + _AGAIN

        def follow(result: StreamResult) -> StreamResult:
            return self._follow(watched, result)

        try:
            place = camera.source
            if isinstance(place, str) and os.path.exists(beside := self.path.parent / place):
                place = str(beside)
            source = open_camera(place, watched.recorder.packet, camera.fps)
            try:
                watched.stream = self._runner.add(
                    OpenedSource(source, watcher.name),
                    short_side=camera.short_side,
                    hold=parse_hold(camera.hold),
                    options=camera.stream_options(),
                    follow=follow,
                )
            except BaseException:
                source.close()
                raise
            watched.error = None
        except UserError as error:
            if watched.error != str(error):
                _LOG.error("%s: %s", watcher.name, error)
            watched.error = str(error)

    def _drop(self, name: str) -> None:
        """Watch a camera no longer."""
        watched = self._cameras.pop(name)
        if watched.stream is not None:
            self._runner.remove(watched.stream)
        with self._runner.lock:
            self._tell(watched, watched.watcher.close(), None)
            watched.recorder.close()
            if watched.online:
                self._append(Event(kind="offline", camera=name))

    def _look(self) -> None:
        """Which cameras deliver frames; those that left the pool join again."""
        streams = self._runner.pool.metrics().streams
        for name, watched in self._cameras.items():
            about = streams.get(watched.stream or "", StreamMetrics(active=False))
            online = about.active and not about.lost and about.frames > 0
            if not about.active and time.monotonic() > watched.again:
                if watched.stream is not None:
                    if about.error:
                        _LOG.error("%s: %s", name, about.error)
                    self._runner.remove(watched.stream)
                    watched.stream = None
                self._join(watched)
            awaited = watched.online is None and time.monotonic() < watched.again  # it was only just called
            if online != watched.online and (online or not awaited):
                watched.online = online
                if not online:
                    with self._runner.lock:
                        self._tell(watched, watched.watcher.close(), None)
                self._append(Event(kind="online" if online else "offline", camera=name))
            watched.recorder.finish()

    def _follow(self, watched: _Watched, result: StreamResult) -> StreamResult:
        """In the detector's thread: what happened on a frame."""
        result, events = watched.watcher(result)
        watched.recorder.frame(result.image)
        self._tell(watched, events, result)
        return result

    def _tell(self, watched: _Watched, events: Sequence[Event], result: StreamResult | None) -> None:
        """Write events down, with snapshot and clip."""
        snapshot = None
        for event in events:
            if watched.recorder.on and event.kind in _RECORDED and result is not None:
                event = dataclasses.replace(event, clip=watched.recorder.trigger())
                if event.kind in _PICTURED:
                    snapshot = snapshot or watched.recorder.snapshot(_picture(result))  # one for all of the frame
                    event = dataclasses.replace(event, snapshot=snapshot)
            self._append(event)

    def _append(self, event: Event) -> None:
        self.counts[event.camera, event.kind] += 1
        self.journal.append(event)


def _give_back() -> None:
    """Give memory that is free back to the system.

    PyAV's first frame of a video lies in a circle with its side data. And glibc keeps what is freed: frames of changing
    size and short-lived threads, each with a heap of its own, would leave ever more holes there.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # other systems have other allocators
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _picture(result: StreamResult) -> bytes:
    """A JPEG of a frame with its boxes."""
    return encode_jpeg(draw_detections(result.image, result.detections, result.names, 0.3))
