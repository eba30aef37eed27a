"""A web application to watch detectors at work: ``python tools/serve.py``. Needs ``pip install 'eventful_det[serve]'``."""
