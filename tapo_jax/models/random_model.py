"""Make a small Qwen3-VL of random weights with a tokenizer of your own, to try a whole job before the real model.

    python -m tapo_jax.models.random_model TOKENIZER OUT

TOKENIZER is a folder with the tokenizer of a Qwen-VL model (tokenizer.json, tokenizer_config.json, the chat template);
a complete model directory is fine too, its weights are not read. OUT is a model directory in Hugging Face form: some
megabytes, bfloat16, the vocabulary and the image processor of the published models.
"""

import json
from pathlib import Path

from flax import nnx
from tokenizers import Tokenizer

from tapo_jax.config import UserError, run_main
from tapo_jax.models import hf, model_files
from tapo_jax.models.config import Qwen3VLConfig, VisionConfig
from tapo_jax.models.image_processor import ImageProcessor
from tapo_jax.models.qwen3_vl import Qwen3VL

_STOPS = ("<|im_end|>", "<|endoftext|>")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def make(tokenizer: str | Path, out: str | Path, *, hidden: int = 64, layers: int = 2, seed: int = 0) -> Path:
    """Write a model directory of random weights; return its path.

    tokenizer: a folder with tokenizer.json; all its files but weights and config.json are copied.
    out: the directory to write; it must not exist, or be empty.
    hidden: width of the decoder, a multiple of 32.
    layers: of the decoder.
    seed: of the weights.

    Raises UserError for a folder without a Qwen-VL tokenizer, or one that is not empty.
    """
    tokenizer, out = Path(tokenizer), Path(out)
    if not (tokenizer / "tokenizer.json").is_file():
        raise UserError(f"{tokenizer} has no tokenizer.json: give the folder of a Qwen-VL tokenizer.")
    model_files.check_no_pointer(tokenizer / "tokenizer.json")
    if hidden < 32 or hidden % 32 or layers < 1:
        raise UserError(f"hidden is {hidden} and layers {layers}: give a multiple of 32, and at least 1 layer.")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: give another folder, or remove it.")
    words = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    out.mkdir(parents=True, exist_ok=True)
    model_files.copy_assets(tokenizer, out)
    if not any((out / name).exists() for name in _PROCESSORS):
        _write(out / _PROCESSORS[0], ImageProcessor().to_hf())
    if not (out / "generation_config.json").exists():
        _write(out / "generation_config.json", {"eos_token_id": [_token(words, stop, tokenizer) for stop in _STOPS]})
    config = _config(words, tokenizer, ImageProcessor.from_dir(out), hidden, layers)
    hf.save(Qwen3VL(config, rngs=nnx.Rngs(seed)), config, out, dtype="bfloat16")
    return out


def _config(words: Tokenizer, folder: Path, processor: ImageProcessor, hidden: int, layers: int) -> Qwen3VLConfig:
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    image, video, start, end = (_token(words, name, folder) for name in names)
    vision = VisionConfig(
        depth=2, hidden=32, mlp=64, heads=2, patch=processor.patch, merge=processor.merge, temporal=processor.temporal,
        channels=3, out=hidden, positions=256, deepstack=(0,),
    )  # fmt: skip
    return Qwen3VLConfig(
        vocab=-(-words.get_vocab_size(with_added_tokens=True) // 256) * 256,  # more rows than tokens, as published
        hidden=hidden, mlp=2 * hidden, layers=layers, heads=4, kv_heads=2, head_dim=16, rope_theta=5e6,
        mrope_section=(4, 2, 2), norm_epsilon=1e-6, attention_bias=False, tied=True, max_positions=262144,
        image_token=image, video_token=video, vision_start=start, vision_end=end, vision=vision,
    )  # fmt: skip


def _token(words: Tokenizer, name: str, folder: Path) -> int:
    found = words.token_to_id(name)
    if found is None:
        raise UserError(f"The tokenizer in {folder} has no token {name}: give that of a Qwen-VL model.")
    return found


def _write(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def main(argv: list[str]) -> None:
    if len(argv) != 3:
        raise UserError("Give two folders: python -m tapo_jax.models.random_model TOKENIZER OUT.")
    print(f"written to {make(argv[1], argv[2])}")


if __name__ == "__main__":
    run_main(main, words=True)
