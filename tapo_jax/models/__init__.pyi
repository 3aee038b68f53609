from . import hf, lora, qwen3_vl
from .config import Qwen3VLConfig, VisionConfig
from .image_processor import ImageProcessor
from .inputs import PixelStore
from .qwen3_vl import Qwen3VL

__all__ = ["ImageProcessor", "PixelStore", "Qwen3VL", "Qwen3VLConfig", "VisionConfig", "hf", "lora", "qwen3_vl"]
