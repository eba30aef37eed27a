"""COCO-video JSON: the one data format of training, streaming evaluation and tools.

It is COCO's detection format plus ``videos``, so ``pycocotools`` reads it as it is::

    {"info":        {"image_root": ".."},               optional; relative to this file
     "categories":  [{"id": 1, "name": "airplane"}],
     "videos":      [{"id": 1, "name": "val/ILSVRC2015_val_00000000"}],
     "images":      [{"id": 1, "video_id": 1, "frame_id": 0, "file_name": "Data/...JPEG",
                      "width": 1280, "height": 720}],
     "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [x, y, w, h], "area": w * h,
                      "iscrowd": 0, "track_id": 0, "occluded": false, "generated": false}]}

``track_id`` is unique within its video. ``frame_id`` orders the frames of a video and may have gaps. An image
with ``"labelled": false`` is there to keep the stream whole, but nobody knows what is on it: do not train on it
and do not score it. An image with ``"labelled_category_ids": [1, 7]`` was searched for these categories alone: any
other may be on it without a box, so it is no negative for them, neither in training nor in scoring. A file without
``videos`` (plain COCO) holds still pictures: each is a video of one frame.
"""

from eventful_det.data.coco_video.reader import clip_box as clip_box
from eventful_det.data.coco_video.reader import json_rows as json_rows
from eventful_det.data.coco_video.reader import load_coco_video as load_coco_video
from eventful_det.data.coco_video.reader import parse_coco_video as parse_coco_video
from eventful_det.data.coco_video.reader import read_json_object as read_json_object
from eventful_det.data.coco_video.records import Annotation as Annotation
from eventful_det.data.coco_video.records import Box as Box
from eventful_det.data.coco_video.records import CocoVideo as CocoVideo
from eventful_det.data.coco_video.records import Frame as Frame
from eventful_det.data.coco_video.records import Problem as Problem
from eventful_det.data.coco_video.records import Video as Video
