"""Dependencies, each with its reason. All other metadata is in pyproject.toml."""

from setuptools import setup

setup(
    install_requires=[
        "torch>=2.4",  # the networks
        "torchvision>=0.19",  # region operators: roi_align, non-maximum suppression
        "timm>=1.0.9",  # ViT blocks, ImageNet weights, layer-wise decay
        "numpy>=1.26",  # pictures and boxes outside the network
        "opencv-python-headless>=4.9",  # resizing, drawing, webcams; headless: servers lack the GUI's libraries
        "av>=17",  # decode any video; write H.264 that survives a crash (FFmpeg 7.1) in true colours (17)
        "pycocotools>=2.0.8",  # average precision, as everyone computes it
        "hydra-core>=1.3",  # configs of the tools
        "safetensors>=0.4",  # weights without pickle
        "rich>=13",  # progress bars and tables
        "matplotlib>=3.8",  # plots
        "tensorboard>=2.15",  # training curves
    ],
    extras_require={
        # detectron2 is not on PyPI; docs/detectron2.md has the commands that install it
        "dev": [
            "pytest>=8",  # tests
            "pytest-xdist>=3",  # tests on all cores
            "hypothesis>=6",  # property tests of index arithmetic
            "torchmetrics>=1.4",  # a second opinion on average precision
            "ruff>=0.8",  # lint and format
            "mypy>=1.13",  # types
        ],
    },
)
