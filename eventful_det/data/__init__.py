"""Where frames come from: category tables, ILSVRC trees, COCO-video files, synthetic videos, streams.

Importing this package is free; import the module you need::

    from eventful_det.data.coco_video import load_coco_video
    from eventful_det.data.synthetic import SceneOptions, render_video
"""
