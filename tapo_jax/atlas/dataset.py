"""Atlas as a TFDS data set: questions about country outlines in a scene, with accepted answers.

The builder writes array_record files without TensorFlow; the same settings and seed give the same bytes.
"""

import fcntl
import io
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from tapo_jax.atlas.play import Settings, make_prompt
from tapo_jax.atlas.world import real_world

SPLITS = ("train", "held_out")


class Atlas(tfds.core.GeneratorBasedBuilder):
    """Splits "train" and "held_out" share no country. `sizes` are the numbers of questions of the two splits."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(__file__).parent  # TFDS looks for description files here

    def __init__(self, *, settings: Settings, seed: int, sizes: tuple[int, int], **options):
        self._settings, self._seed, self._sizes = settings, seed, sizes
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "id": tfds.features.Text(),
                "question": tfds.features.Text(),
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "answers": tfds.features.Sequence(tfds.features.Text()),
                "hops": np.int32,
                "chain": tfds.features.Sequence(tfds.features.Text()),
                "attribute": tfds.features.Text(),
            }
        )
        return self.dataset_info_from_configs(features=features, description=Atlas.__doc__)

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager
        return {split: self._generate_examples(split, size) for split, size in zip(SPLITS, self._sizes, strict=True)}

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[int, dict]]:
        world = real_world(split)
        for i in range(size):
            rng = np.random.default_rng((self._seed, SPLITS.index(split), i))
            prompt, question, _ = make_prompt(world, self._settings, rng)
            png = io.BytesIO()
            PIL.Image.fromarray(prompt.images[0]).save(png, format="PNG")
            yield (
                i,
                {
                    "id": prompt.id,
                    "question": prompt.question,
                    "image": png.getvalue(),
                    "answers": list(prompt.answers),
                    "hops": prompt.hops,
                    "chain": list(question.chain),
                    "attribute": question.attribute,
                },
            )

    def encoded(self, split: str) -> Sequence[dict]:
        """Return the rows of a split with random access; their images are PNG bytes."""
        return self.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})


def prepare(directory: str | pathlib.Path, *, settings: Settings, seed: int, sizes: tuple[int, int]) -> Atlas:
    """Return the builder with its files under `directory`.

    Missing files are made (seconds) by one process while others wait."""
    tfds.disable_progress_bar()
    pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    with open(pathlib.Path(directory) / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Only now: a builder reads what is there when it is made, and files that came later would not be its own.
        builder = Atlas(settings=settings, seed=seed, sizes=sizes, data_dir=str(directory))
        builder.download_and_prepare()
    return builder
