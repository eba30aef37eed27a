"""A data set seen by a detector of other classes."""

from pathlib import Path

import pytest

from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video
from eventful_det.data.labelling.remap import for_classes
from eventful_det.errors import UserError
from eventful_det.evaluation.detection import category_ids, evaluate

BOX = (10.0, 10.0, 30.0, 30.0)


@pytest.fixture
def data() -> CocoVideo:
    frame = Frame(1, "a.jpg", 100, 100, 0, [Annotation(1, BOX), Annotation(2, BOX)])
    return CocoVideo([(1, "cat"), (2, "other")], [Video(1, "v", [frame])], Path())


def test_only_common_classes_are_judged(data: CocoVideo) -> None:
    names = ("zebra", "cat")
    ours = for_classes(data, names)
    ids = category_ids(ours, names)
    assert ids[1] == 1 and len(data.videos[0].frames[0].annotations) == 2, "the original is not changed"
    found = [{"image_id": 1, "category_id": c, "bbox": [10, 10, 20, 20], "score": 0.9} for c in ids]
    scores = evaluate(ours, found)
    assert scores.ap50 == pytest.approx(1) and scores.objects == 1 and scores.detections == 1


def test_nothing_in_common(data: CocoVideo) -> None:
    with pytest.raises(UserError, match="no class is common"):
        for_classes(data, ("zebra",))
