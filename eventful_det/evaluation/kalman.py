"""A baseline: boxes that go on at constant velocity, as SORT has them (Bewley et al., ICIP 2016), without the image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eventful_det.detectors.results import Detections
from eventful_det.runtime.motion.boxes import EVERY_ID, BoxMover, View
from eventful_det.runtime.motion.optical_flow import Array

_SEEN = 0.05**2  # variance of where the network sees a side of a box, in sides of the box ...
_START = 0.1**2  # ... of the velocity of a new box, per frame ...
_CHANGE = 0.01**2  # ... and of the change of velocity from one frame to the next


class KalmanMover(BoxMover):
    """A `BoxMover` that looks at no picture: a Kalman filter for each of a box's four sides.

    On a key frame it does with moved boxes what a `BoxMover` does, so that the motion alone differs.
    """

    def __init__(self) -> None:
        super().__init__(EVERY_ID)  # velocities are known by track
        self._known: dict[int, tuple[Array, NDArray[np.float64]]] = {}  # by track: velocity (4,), covariance (2, 2)

    def view(self, image: NDArray[np.uint8]) -> View:
        """The size of a frame `(h, w, 3)`."""
        return View((image.shape[0], image.shape[1]), np.zeros((1, 1), np.uint8))

    def follow(self, view: View) -> None:
        """Go on to the next frame."""
        self._size = view.size
        self._flow.look(view.grey)
        if self._objects is None:
            return
        step, noise = np.array([[1.0, 1.0], [0.0, 1.0]]), _CHANGE * np.array([[0.25, 0.5], [0.5, 1.0]])
        tracks = self._objects.tracks.tolist()
        self._known = {i: (v, step @ p @ step.T + noise) for i, (v, p) in self._known.items() if i in tracks}
        velocity = np.array([self._known[i][0] for i in tracks], np.float32).reshape(-1, 4)
        self._objects = self._staying(self._objects._replace(boxes=self._objects.boxes + velocity))

    def key(self, found: Detections) -> Detections:
        """Take in what was detected on the last frame, and learn how boxes move."""
        before = (
            {} if self._objects is None else dict(zip(self._objects.tracks.tolist(), self._objects.boxes, strict=True))
        )
        super().key(found)
        assert self._objects is not None
        for i, box in zip(self._objects.tracks.tolist(), self._objects.boxes, strict=True):
            if i not in before:
                self._known[i] = np.zeros(4, np.float32), np.diag([_SEEN, _START])
            elif (error := box - before[i]).any():  # the network saw it
                velocity, p = self._known[i]
                gain = p[0] / (p[0, 0] + _SEEN)  # of position and velocity
                self._known[i] = velocity + np.float32(gain[1]) * error, p - np.outer(gain, p[0])
        return self.boxes()
