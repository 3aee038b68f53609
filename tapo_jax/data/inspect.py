"""Check and describe a set of questions, for `python -m tapo_jax.data`."""

import statistics
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from tapo_jax.config import BadImage
from tapo_jax.data.images import StoredImage
from tapo_jax.data.json_files import shown
from tapo_jax.data.pipeline import decoded
from tapo_jax.tools.recorded_image_search import Recording
from tapo_jax.types import Images, Prompt

EXAMPLES = 3


def check(prompts: Sequence[Prompt]) -> int:
    """Decode every image, one after another, and print each that cannot be shown.

    Returns how many questions a training run would skip. Thumbnails of recorded searches are checked too; a bad one
    does not skip its question.
    """
    skipped = thumbnails = images = 0
    bar = tqdm(range(len(prompts)), desc="questions", unit="", dynamic_ncols=True)
    for index in bar:
        prompt = prompts[index]
        images += len(prompt.images)
        try:
            decoded(prompt)
        except BadImage as error:
            skipped += 1
            bar.write(f"question '{prompt.id}': {error}", file=sys.stdout)
        recording = prompt.meta.get("image_search")
        for picture in recording.thumbnails if isinstance(recording, Recording) else ():
            try:
                _ = None if picture is None else picture()
            except BadImage as error:
                thumbnails += 1
                bar.write(f"question '{prompt.id}', recorded search: {error}", file=sys.stdout)
    print(
        f"{len(prompts)} questions with {images} images: {skipped} cannot be shown and would be skipped"
        + (f"; {thumbnails} thumbnails of recorded searches cannot be shown" if thumbnails else "")
        + "."
    )
    return skipped


def describe(prompts: Sequence[Prompt], *, title: str) -> str:
    """Return rows, images, sizes, answers and three examples, as text. Reads only the headers of images."""
    images, answers, sizes, broken, recorded, fields = [], [], [], 0, 0, {}
    for index in tqdm(range(len(prompts)), desc="questions", unit="", dynamic_ncols=True, leave=False):
        prompt = prompts[index]
        images.append(len(prompt.images))
        answers.append(len(prompt.answers))
        recorded += "image_search" in prompt.meta
        for name in prompt.meta:
            fields[name] = fields.get(name, 0) + 1
        for size in _sizes(prompt):
            broken += size is None
            sizes += [size] if size else []
    lines = [title, f"  questions          {len(prompts)}"]
    lines.append(f"  images a question  {_range(images)}")
    if sizes:
        pixels = sorted(sizes, key=lambda size: size[0] * size[1])
        chosen = [pixels[0], pixels[len(pixels) // 2], pixels[-1]]
        lines.append(
            "  sizes              " + ", ".join(f"{w} x {h}" for w, h in chosen) + " (smallest, median, largest)"
        )
    if broken:
        lines.append(f"  unreadable images  {broken} (python -m tapo_jax.data check names them)")
    lines.append(f"  answers accepted   {_range(answers)}")
    lines.append(f"  recorded searches  {recorded}")
    lines.append(f"  further fields     {', '.join(shown(name)[1:-1] for name in fields) or 'none'}")
    for prompt in [prompts[index] for index in range(min(EXAMPLES, len(prompts)))]:
        size = ", ".join("unreadable" if one is None else f"{one[0]} x {one[1]}" for one in _sizes(prompt))
        lines += ["", f"  {shown(prompt.id)}  {size or 'no image'}", f"    {shown(prompt.question, 300)}"]
        lines.append("    " + ", ".join(shown(answer) for answer in prompt.answers[:5]))
    return "\n".join(lines)


def _sizes(prompt: Prompt) -> Iterator[tuple[int, int] | None]:
    """Yield width and height of each image; None for one without a readable header."""
    for source in prompt.images.sources if isinstance(prompt.images, Images) else prompt.images:
        try:
            if isinstance(source, StoredImage):
                yield source.size()
            else:
                yield (source if isinstance(source, np.ndarray) else source()).shape[1::-1]
        except BadImage:
            yield None


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}, {statistics.mean(counts):.1f} on average"
