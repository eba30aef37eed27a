"""Dependencies, each with its reason, and where packages lie. All other metadata is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

PLOTS = ["matplotlib>=3.8"]  # cost.png of detect, plots of sweeps
TRAIN = ["tensorboard>=2.15"]  # training curves
SERVE = [
    "fastapi>=0.115",  # routes, validation and their tests
    "uvicorn>=0.30",  # the HTTP server
    "websockets>=13",  # pictures to the browser, over one connection for all streams
]
CAMERAS = ["paho-mqtt>=2"]  # events to MQTT brokers, and so to Home Assistant
CONFIGS = [
    "eventful_det.configs",
    *(f"eventful_det.configs.{folder}" for folder in find_namespace_packages("configs", exclude=["detectron2*"])),
]

setup(
    # A wheel holds the tools and their configs inside the package; in a checkout they lie beside it.
    packages=[*find_namespace_packages(include=["eventful_det*"]), "eventful_det.tools", *CONFIGS],
    package_dir={"eventful_det.tools": "tools", "eventful_det.configs": "configs"},
    package_data={
        "eventful_det": ["py.typed", "weights/*.safetensors", "serving/*.html"],
        **dict.fromkeys(CONFIGS, ["*.yaml"]),
    },
    install_requires=[
        "torch>=2.6",  # the networks; before, torch.load(weights_only=True) could run a program (CVE-2025-32434)
        "torchvision>=0.21",  # region operators: roi_align, non-maximum suppression
        "timm>=1.0.22",  # ViT blocks, ImageNet weights, layer-wise decay
        "numpy>=1.26",  # pictures and boxes outside the network
        "opencv-python-headless>=4.9.0.80",  # resizing, drawing, webcams; headless: servers lack the GUI's libraries
        "av>=17",  # decode any video; write H.264 that survives a crash (FFmpeg 7.1) in true colours (17)
        "pycocotools>=2.0.8",  # average precision, as everyone computes it
        "hydra-core>=1.3",  # configs of the tools
        "safetensors>=0.4",  # weights without pickle
        "pyyaml>=6",  # names of classes beside labels of YOLO
        "rich>=13",  # progress bars and tables
    ],
    extras_require={
        "fast": ["faster-coco-eval>=1.6"],  # average precision in half the time
        "cluster": [
            "hydra-submitit-launcher>=1.2",  # jobs on SLURM
            "hydra-joblib-launcher>=1.2",  # jobs side by side on one machine
        ],
        # detectron2 is not on PyPI; docs/detectron2.md has the commands that install it
        "plots": PLOTS,
        "train": TRAIN,
        "serve": SERVE,
        "cameras": [*SERVE, *CAMERAS],  # eventful-det serve cameras.yaml
        "openvino": ["openvino>=2025.0"],  # tools/export.py format=openvino, and its engine
        "int8": ["openvino>=2025.0", "nncf>=2.18"],  # the same with precision=int8
        "onnx": ["onnxruntime>=1.18", "onnx>=1.16"],  # the same for format=onnx
        "hf": ["transformers>=5.3"],  # RF-DETR
        "hub": ["huggingface_hub>=0.30"],  # weights on the Hugging Face Hub, to and fro
        "ray": ["ray>=2.40"],  # tools/demo.py on=ray: archives of videos on many machines
        "docs": [
            "zensical>=0.0.73",  # the site
            "mkdocstrings-python>=2",  # its API reference, from docstrings
        ],
        "teacher": ["onnxruntime>=1.18"],  # tools/pseudo_label.py
        "supervision": ["supervision>=0.26"],  # to_supervision
        # trackers brings opencv-python, which needs libGL; where that is missing: pip install --no-deps trackers
        "tracks": ["trackers>=2.6", "supervision>=0.26"],  # ByteTrack
        "dev": [
            *PLOTS,
            *TRAIN,
            *SERVE,
            *CAMERAS,
            "pytest>=8",  # tests
            "pytest-xdist>=3",  # tests on all cores
            "hypothesis>=6",  # property tests of index arithmetic
            "rtsp>=2.0.3",  # an RTSP server to test against
            "torchmetrics>=1.4",  # a second opinion on average precision
            "faster-coco-eval>=1.6",  # a third one
            "ruff>=0.8",  # lint and format
            "mypy>=1.13",  # types
            "httpx2>=2",  # requests of FastAPI's TestClient
            "selenium>=4.20",  # the page in a real browser
            "supervision>=0.26",  # to_supervision
            "transformers>=5.3",  # RF-DETR, DINOv2 and DINOv3, with random weights
            "onnxruntime>=1.18",  # as in teacher
            "onnx>=1.16",  # a tiny teacher, made by the tests
            "openvino>=2025.0",  # as in openvino
            "nncf>=2.18",  # as in int8
            "nbclient>=0.10",  # runs the notebook
            "ipykernel>=6.29",  # the notebook's Python
        ],
    },
)
