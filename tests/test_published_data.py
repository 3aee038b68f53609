"""The published training set and the seven benchmarks, in small, with the variants that are found of them."""

import json
import sys
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from tapo_jax.config import BadImage, UserError
from tapo_jax.data import read, spool
from tapo_jax.data.readers import BENCHMARK_SPLIT
from tapo_jax.types import root_image
from tests import published
from tests.published import encoded, shades


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


# ---- FVQA


@pytest.mark.parametrize("variant", ["published", "path", "large", "view", "inferred", "reversed"])
def test_fvqa(tmp_path, variant):
    rows = [published.fvqa_row(i) for i in range(5)]
    published.parquet(tmp_path / "fvqa_train.parquet", rows, published.fvqa_schema(variant))
    prompts = read("fvqa", tmp_path, "train")
    assert [prompt.id for prompt in prompts] == [f"fvqa_{i}" for i in range(5)]
    assert prompts[0].answers == ("g0",) and prompts[2].answers == ("g2", "c2", "🇸🇪")
    assert [prompt.question for prompt in prompts] == [f"which {i}?" for i in range(5)]
    assert shades(prompts) == [0, 1, 2, 3, 4] and shades(prompts[::-1]) == [4, 3, 2, 1, 0]
    assert prompts[1].meta == {
        "data_source": "mmsearch_r1/fvqa_train", "image_urls": None, "category": "search_free",
    }  # fmt: skip


def test_fvqa_without_the_fields_that_small_copies_lack(tmp_path):
    rows = [published.fvqa_row(i) for i in range(2)]
    rows = [{name: row[name] for name in ("prompt", "images", "reward_model")} for row in rows]
    published.parquet(tmp_path / "mmsearch_r1_infoseek_sub_2k.parquet", rows)
    prompts = read("fvqa", tmp_path, "infoseek_sub_2k")
    assert [prompt.id for prompt in prompts] == ["infoseek_sub_2k_0", "infoseek_sub_2k_1"] and prompts[0].meta == {}


def test_one_id_for_two_questions_is_made_two(tmp_path):
    rows = [published.fvqa_row(i, data_id="same") for i in range(2)] + [published.fvqa_row(0, data_id="same")]
    published.parquet(tmp_path / "fvqa_train.parquet", rows)
    assert [prompt.id for prompt in read("fvqa", tmp_path, "train")] == ["same", "same#2", "same"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": [{"content": "s", "role": "system"}]}, "'prompt' is .*expected a list with"),
        ({"prompt": None}, "'prompt' is null"),
        ({"prompt": [{"content": "<image><image>?", "role": "user"}]}, "'prompt' .* and it has 2"),
        ({"images": [{"bytes": None}]}, "'images' .* each with bytes"),
        ({"reward_model": {"ground_truth": None, "candidate_answers": None}}, "'reward_model.ground_truth' is null"),
        ({"reward_model": {"ground_truth": "x", "candidate_answers": "[x"}}, "candidate_answers' .* JSON list"),
        ({"reward_model": {"ground_truth": "x", "candidate_answers": "[1]"}}, "candidate_answers' .* list of texts"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, changes, says):
    published.parquet(tmp_path / "fvqa_train.parquet", [published.fvqa_row(0), published.fvqa_row(1, **changes)])
    with pytest.raises(UserError, match=rf"fvqa_train.parquet, row 2: the field.*{says}"):
        read("fvqa", tmp_path, "train")


def test_a_missing_column_is_named(tmp_path):
    row = published.fvqa_row(0)
    del row["reward_model"]
    published.parquet(tmp_path / "fvqa_train.parquet", [row])
    with pytest.raises(UserError, match="row 1: the field 'reward_model.ground_truth' is missing .the row has prompt"):
        read("fvqa", tmp_path, "train")


# ---- Parquet files


def test_shards_are_read_in_order_and_all_of_them(tmp_path):
    for n in range(3):
        rows = [published.hr_row(2 * n + i) for i in range(2)]
        published.parquet(tmp_path / "data" / f"train-{n:05d}-of-00003.parquet", rows)
    prompts = read("hr_mmsearch", tmp_path, "train")
    assert [prompt.id for prompt in prompts] == [f"hr_{i}" for i in range(6)] and shades(prompts) == list(range(6))
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(UserError, match="has 2 of the 3 files of its split 'train': number 1 is missing"):
        read("hr_mmsearch", tmp_path, "train")


def test_any_order_of_reading_gives_the_same_pictures(tmp_path):
    """Row groups of three rows, a batch of eight, and jumps back and forth."""
    rows = [published.hr_row(i) for i in range(40)]
    published.parquet(tmp_path / "train.parquet", rows, row_group_size=17, data_page_size=64)
    prompts = read("hr_mmsearch", tmp_path, "train")
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(40), 2)).tolist()
    assert shades([prompts[i] for i in order]) == order


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of git-lfs"),
        (b"<html>", "is no Parquet file"),
        (b"", "is no Parquet file"),
        (b"PAR1" + b"\0" * 100, "cannot be read"),
    ],
)
def test_a_file_that_is_no_parquet_file_is_one_sentence(tmp_path, data, says):
    (tmp_path / "fvqa_train.parquet").write_bytes(data)
    with pytest.raises(UserError, match=says):
        read("fvqa", tmp_path, "train")


def test_a_parquet_file_that_is_cut_is_one_sentence(tmp_path):
    path = tmp_path / "fvqa_train.parquet"
    published.parquet(path, [published.fvqa_row(i) for i in range(5)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"fvqa_train.parquet cannot be read \("):
        read("fvqa", tmp_path, "train")


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    published.parquet(tmp_path / "fvqa_train.parquet", [published.fvqa_row(0)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'tapo_jax\[parquet\]'"):
        read("fvqa", tmp_path, "train")


def test_a_set_takes_no_memory_for_its_pictures(tmp_path):
    """24 pictures of 4K: 600 MB decoded, and here 48 MB encoded, in one row group."""
    rng = np.random.default_rng(0)
    noise = [rng.bytes(2 << 20) for _ in range(24)]  # stands for JPEG data, which does not compress
    rows = [published.hr_row(i, query_image={"bytes": encoded(i) + noise[i], "path": None}) for i in range(24)]
    published.parquet(tmp_path / "train.parquet", rows, compression="none")
    del noise, rows
    tracemalloc.start()
    prompts = read("hr_mmsearch", tmp_path, "train")
    assert tracemalloc.get_traced_memory()[0] < 1 << 20
    before = pa.total_allocated_bytes()
    assert shades(prompts) == list(range(24))
    assert tracemalloc.get_traced_memory()[0] < 1 << 20 and pa.total_allocated_bytes() == before
    tracemalloc.stop()


def test_pictures_are_copied_once_and_again_when_the_file_is_another(tmp_path, monkeypatch):
    copies = []
    monkeypatch.setattr(spool, "_write", lambda *given, write=spool._write: copies.append(1) or write(*given))
    path = tmp_path / "train.parquet"
    published.parquet(path, [published.hr_row(i) for i in range(3)])
    for _ in range(2):
        assert shades(read("hr_mmsearch", tmp_path, "train")) == [0, 1, 2] and len(copies) == 1
    published.parquet(path, [published.hr_row(i) for i in (5, 6, 7, 8)])
    assert shades(read("hr_mmsearch", tmp_path, "train")) == [5, 6, 7, 8] and len(copies) == 2


def test_a_copy_that_was_cut_short_is_made_again(tmp_path, monkeypatch):
    def die(*given):
        raise OSError(28, "No space left on device")

    published.parquet(tmp_path / "train.parquet", [published.hr_row(i) for i in range(3)])
    says = r"cannot be copied into the cache folder .* \(No space left on device\): make room"
    with monkeypatch.context() as full:
        full.setattr(spool.os, "replace", die)
        with pytest.raises(UserError, match=says):
            read("hr_mmsearch", tmp_path, "train")
    assert [path.suffix for path in spool.cache_folder().iterdir()] == [".lock"]
    assert shades(read("hr_mmsearch", tmp_path, "train")) == [0, 1, 2]


def test_cells_may_hold_paths_bytes_or_text(tmp_path):
    published.save(tmp_path / "p" / "7.png", 7)
    kinds = [{"path": "p/7.png", "bytes": None}, {"path": "/somewhere/p/7.png", "bytes": None}]
    published.parquet(
        tmp_path / "train.parquet",
        [published.hr_row(i, query_image=kind) for i, kind in enumerate(kinds)],
        pa.schema(
            [("sample_id", pa.string()), ("query", pa.string()), ("ground_truth", pa.string()),
             ("query_image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
        ),
    )  # fmt: skip
    assert shades(read("hr_mmsearch", tmp_path, "train")) == [7, 7]
    published.parquet(tmp_path / "train.parquet", [published.hr_row(0, query_image={"path": "../x", "bytes": None})])
    with pytest.raises(BadImage, match=r"train.parquet, row 1, query_image cannot be shown: there is no file '../x'"):
        read("hr_mmsearch", tmp_path, "train")[0].images[0]
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view()):
        schema = pa.schema([("query", pa.string()), ("ground_truth", pa.string()), ("query_image", kind)])
        published.parquet(tmp_path / "train.parquet", [published.hr_row(0, query_image=encoded(9))], schema)
        assert shades(read("hr_mmsearch", tmp_path, "train")) == [9]


# ---- the benchmarks


@pytest.mark.parametrize("as_text", [False, True])
def test_mmsearch(tmp_path, as_text):
    rows = [published.mmsearch_row(i) for i in range(6)]
    if as_text:
        rows = [row | {"alternative_gt_answers": json.dumps(row["alternative_gt_answers"])} for row in rows]
    published.parquet(tmp_path / "end2end.parquet", rows)
    prompts = read("mmsearch", tmp_path, "end2end")
    assert [len(prompt.images) for prompt in prompts] == [0, 1, 0, 1, 0, 1]
    assert [prompt.answers for prompt in prompts[:2]] == [("g0",), ("g1", "a1")]
    with_image = read("mmsearch", tmp_path, BENCHMARK_SPLIT["mmsearch"])
    assert [prompt.id for prompt in with_image] == ["m1", "m3", "m5"] and shades(with_image) == [1, 3, 5]
    (thumbnail,) = with_image[0].meta["image_search"].thumbnails
    assert thumbnail()[0, 0, 0] == 101 and with_image[0].meta["gt_requery"] == "release"


def test_simplevqa(tmp_path):
    rows = [published.simplevqa_row(i) for i in range(6)]
    published.parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    everything = read("simplevqa", tmp_path, "test")
    assert shades(everything) == list(range(6)) and everything[2].answers == ("故宫2",)
    assert shades(read("simplevqa", tmp_path, "test_en")) == [1, 3, 5]
    assert [prompt.id for prompt in read("simplevqa", tmp_path, "test_cn")] == ["0", "2", "4"]


def test_a_picture_that_is_no_base64_text(tmp_path):
    published.parquet(tmp_path / "test.parquet", [published.simplevqa_row(0, image="***")])
    with pytest.raises(BadImage, match="row 1, image cannot be shown: it is no base64 text"):
        read("simplevqa", tmp_path, "test")[0].images[0]


def test_infoseek(tmp_path):
    for i, name in enumerate(["a/oven_0.jpg", "oven_1.JPEG", "images/oven_2.png"]):
        published.save(tmp_path / name, 40 * i, "PNG" if name.endswith("png") else "JPEG")
    (tmp_path / "images" / "again").symlink_to(tmp_path)
    rows = [
        {"data_id": f"v{i}", "image_id": f"oven_{i}", "question": "which?", "answer": ["China"], "answer_eval": ["cn"]}
        for i in range(4)
    ]
    rows[1] |= {"answer": ["1889"], "answer_eval": [{"wikidata": 1889.0, "range": [1700.1, 2077.9]}]}
    published.json_lines(tmp_path / "infoseek_val.jsonl", rows)
    prompts = read("infoseek", tmp_path, "val")
    assert prompts[0].answers == ("China", "cn") and "ranges" not in prompts[0].meta
    assert prompts[1].answers == ("1889",) and prompts[1].meta["ranges"] == [[1700.1, 2077.9]]
    np.testing.assert_allclose(shades(prompts[:3]), [0, 40, 80], atol=3)
    with pytest.raises(BadImage, match=r"oven_3 \(.*infoseek_val.jsonl, line 4\) cannot be shown: no file in"):
        prompts[3].images[0]


@pytest.mark.parametrize("value", [[{"range": [2, 1]}], [{"range": ["a", 1]}], [{}], [5], [{"range": [1]}], {"a": 1}])
def test_a_range_that_is_none_is_named(tmp_path, value):
    row = {"data_id": "v", "image_id": "o", "question": "which?", "answer": ["1"], "answer_eval": value}
    published.json_lines(tmp_path / "infoseek_val.jsonl", [row])
    with pytest.raises(UserError, match="line 1: the field 'answer_eval' is"):
        read("infoseek", tmp_path, "val")


@pytest.mark.parametrize("place", ["", "data/samples/qa"])
@pytest.mark.parametrize("lead", ["/image/", "image/", "", "/"])
def test_livevqa(tmp_path, place, lead):
    for i in range(2):
        published.save(tmp_path / "image" / f"{i}.png", i)
    rows = [
        {"sample_id": "s0", "query": "who?", "query_image": f"{lead}0.png", "gt_answer": "Conan", "level": 1},
        {"sample_id": "s1", "query": "who?", "query_image": f"{lead}1.png", "gt_answer": ["O'Brien", "Conan"]},
    ]
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "qa.json").write_text(json.dumps(rows))
    prompts = read("livevqa", tmp_path, "test")
    assert shades(prompts) == [0, 1] and [prompt.answers for prompt in prompts] == [("Conan",), ("O'Brien", "Conan")]
    assert prompts[0].meta == {"level": 1}


def test_mat_search_has_two_halves(tmp_path):
    rows = [{"id": i, "question": "how?", "answer": ["30", "thirty"] if i else "30", "image_path": f"{i}.png"}
            for i in range(4)]  # fmt: skip
    for i in range(4):
        published.save(tmp_path / "MAT-Benchmark" / "MAT-Search-image" / f"{i}.png", i)
    (tmp_path / "MAT-Benchmark" / "MAT-Search.json").write_text(json.dumps(rows))
    assert shades(read("mat_search", tmp_path, "test")) == [0, 1, 2, 3]
    simple, hard = read("mat_search", tmp_path, "simple"), read("mat_search", tmp_path, "hard")
    assert [prompt.id for prompt in simple] == ["0", "1"] and [prompt.id for prompt in hard] == ["2", "3"]
    assert simple[0].answers == ("30",) and {prompt.meta["half"] for prompt in hard} == {"hard"}


def test_a_picture_that_is_missing_is_named_when_it_is_drawn(tmp_path):
    rows = [{"id": 0, "question": "how?", "answer": "1", "image_path": "../../secret.png"}]
    published.save(tmp_path / "secret.png", 0)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "MAT-Search.json").write_text(json.dumps(rows))
    with pytest.raises(BadImage, match=r"'../../secret.png' \(.*MAT-Search.json, row 1\) .* there is no such file in"):
        read("mat_search", folder, "test")[0].images[0]


# ---- SenseNova-MARS


def mars(folder, root: str, **changes) -> None:
    for name in ("a", "b"):
        for i in range(2):
            published.save(folder / "eval" / name / "images" / f"{i}.png", i)
            published.save(folder / "eval" / name / "thumbs" / f"{i}.png", 50 + i)
        rows = [
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "<image>Which city?"}],
                "image": [f"images/{i}.png"],
                "reward_model": {"ground_truth": [f"g{i}", "x"]},
                "image_search_title_list": ["one", "two"],
                "image_search_thumbnail_list": [f"{root}/eval/{name}/thumbs/{i}.png", None],
                "image_search_summary": "It is so.",
                "data_source": name,
            }
            for i in range(2)
        ]
        published.json_lines(folder / "eval" / name / "data.jsonl", rows)
    sets = {
        name: {
            "root": f"{root}/eval/{name}", "annotation": f"{root}/eval/{name}/data.jsonl", "length": 2,
            "repeat_time": 1, "reward_fn": ["llm_score"],
        } | changes
        for name in ("a", "b")
    }  # fmt: skip
    (folder / "test_all.json").write_text(json.dumps(sets))


@pytest.mark.parametrize("root", ["{folder}", "/mnt/afs/somebody/SenseNova-MARS-Data", "."])
def test_mars(tmp_path, root):
    mars(tmp_path, root.format(folder=tmp_path))
    prompts = read("mars", tmp_path, "test")
    assert [prompt.id for prompt in prompts] == ["a_0", "a_1", "b_0", "b_1"] and shades(prompts) == [0, 1, 0, 1]
    first = prompts[0]
    assert first.question == "<image>Which city?" and first.answers == ("g0", "x")
    assert first.meta["benchmark"] == "a" and first.meta["system"] == "s" and first.meta["data_source"] == "a"
    recording = first.meta["image_search"]
    assert recording.titles == ("one", "two") and recording.summary == "It is so."
    assert recording.thumbnails[0]()[0, 0, 0] == 50 and recording.thumbnails[1] is None
    for split in ("b", "test_all", "test"):
        assert [prompt.meta["benchmark"] for prompt in read("mars", tmp_path, split)][-1] == "b"
    assert len(read("mars", tmp_path / "test_all.json", "b")) == 2


@pytest.mark.parametrize(
    ("changes", "count"), [({"repeat_time": 3}, 12), ({"repeat_time": 0.5}, 2), ({"repeat_time": 1.5}, 6)]
)
def test_mars_repeats_a_set(tmp_path, changes, count):
    mars(tmp_path, str(tmp_path), **changes)
    assert len(read("mars", tmp_path, "test")) == count


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"length": 3}, "data.jsonl has 2 rows and .*test_all.json says 3: download it again"),
        ({"annotation": "/etc/passwd"}, "annotation '/etc/passwd' of a is not in"),
        ({"annotation": "../x.jsonl"}, "annotation '../x.jsonl' of a is not in"),
        ({"repeat_time": "x"}, "'repeat_time' of a is 'x'"),
        ({"repeat_time": float("inf")}, "'repeat_time' of a is Infinity"),
    ],
)
def test_a_manifest_that_does_not_fit_is_named(tmp_path, changes, says):
    mars(tmp_path, str(tmp_path), **changes)
    with pytest.raises(UserError, match=says):
        read("mars", tmp_path, "test")


def test_a_split_that_mars_does_not_have_lists_those_it_has(tmp_path):
    mars(tmp_path, str(tmp_path))
    with pytest.raises(UserError, match="no split 'train': its manifests have test_all, a, b"):
        read("mars", tmp_path, "train")


# ---- all of them


@pytest.mark.parametrize("name", list(BENCHMARK_SPLIT))
def test_an_empty_folder_is_one_sentence(tmp_path, name):
    with pytest.raises(UserError, match=str(tmp_path)):
        read(name, tmp_path, BENCHMARK_SPLIT[name])
    with pytest.raises(UserError, match="does not exist: give the folder"):
        read(name, tmp_path / "nothing", BENCHMARK_SPLIT[name])


def test_the_same_picture_has_the_same_root_wherever_it_comes_from(tmp_path):
    published.parquet(tmp_path / "train.parquet", [published.hr_row(3)])
    published.save(tmp_path / "3.png", 3)
    published.json_lines(tmp_path / "x.jsonl", [{"question": "?", "images": ["3.png"], "answers": ["x"]}])
    one, two = read("hr_mmsearch", tmp_path, "train")[0], read("jsonl", tmp_path, "x")[0]
    assert root_image(one.images[0]).root == root_image(two.images[0]).root
