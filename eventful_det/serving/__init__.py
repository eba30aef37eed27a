"""A web application to watch detectors at work; see ``tools/serve.py``. It needs the extra `serve`."""
