"""Cameras that run all year: masks, zones, events, clips; see ``docs/cameras.md``. It needs the extra `cameras`."""
