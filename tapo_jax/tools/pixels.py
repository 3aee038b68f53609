"""Convert pictures of any mode to what a model is shown: uint8 RGB, alpha on white, 16 bit scaled to 8."""

import numpy as np
import PIL.Image


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert an image of any mode to RGB: alpha on white, 16 bit scaled.

    Raises ValueError if its numbers are no picture.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return PIL.Image.fromarray(eight_bit(np.asarray(image))).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def eight_bit(value_HxW: np.ndarray) -> np.ndarray:
    """Convert to uint8: 16-bit integers by their high byte, numbers in 0..1 times 255, numbers up to 255 as they are.

    Raises ValueError for other numbers.
    """
    low, high = float(value_HxW.min()), float(value_HxW.max())
    if np.issubdtype(value_HxW.dtype, np.integer):
        if low < 0 or high > 65535:
            raise ValueError(f"integers from {low:g} to {high:g} are no picture")
        wide = value_HxW.dtype.itemsize == 2 or high > 255
        return (value_HxW >> 8 if wide else value_HxW).astype(np.uint8)
    if not (low >= 0 and high <= 255):
        raise ValueError(f"numbers from {low:g} to {high:g} are no picture")
    return np.round(value_HxW * (255 if high <= 1 else 1)).astype(np.uint8)
