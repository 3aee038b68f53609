"""`python -m tapo_jax.data`: what it says of good and bad sets, and that a pickle is never run."""

import collections
import contextlib
import io
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from tapo_jax.config import UserError
from tapo_jax.data import read, unpickle
from tapo_jax.data.__main__ import main
from tapo_jax.data.convert_cache import convert
from tests import published


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    """Four questions of one's own; the second has a picture that is cut, the third a thumbnail that is none."""
    for n in range(3):
        published.save(tmp_path / f"{n}.png", n)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:44])
    (tmp_path / "t.png").write_text("<html>")
    rows = [
        {"id": f"q{n}", "question": f"which\n{n}?", "images": [f"{n}.png"], "answers": ["x", "ő"]} for n in range(3)
    ]
    rows[2]["image_search"] = {"titles": ["T"], "thumbnails": ["t.png"]}
    published.json_lines(tmp_path / "train.jsonl", [*rows, {"question": "none", "answers": ["y"], "source": "w"}])
    return tmp_path


def test_check_names_what_cannot_be_shown(folder, capsys):
    assert main(["check", "jsonl", str(folder)]) == 1
    said = capsys.readouterr().out
    assert f"question 'q1': The image {folder}/1.png cannot be shown: it is damaged" in said
    assert f"question 'q2', recorded search: The image {folder}/t.png cannot be shown: it is a web page" in said
    assert "4 questions with 3 images: 1 cannot be shown and would be skipped; 1 thumbnails of" in said
    (folder / "1.png").write_bytes(published.encoded(1))
    assert main(["check", "jsonl", str(folder), "--split=train"]) == 0


def test_describe_shows_rows_images_answers_and_three_examples(folder, capsys):
    assert main(["describe", "jsonl", str(folder)]) == 0
    said = capsys.readouterr().out
    for words in ("questions          4", "images a question  0 to 1, 0.8 on average", "answers accepted   1 to 2",
                  "6 x 4, 6 x 4, 6 x 4 (smallest", "recorded searches  1", "further fields     image_search, source",
                  "'q2'  6 x 4", "'which\\n0?'", "'x', 'ő'"):  # fmt: skip
        assert words in said, said
    assert "none" not in said.split("'q0'")[1], "three examples"


def test_a_mistake_is_one_sentence_and_code_1(tmp_path, capsys):
    assert main(["check", "fvqa", str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err.startswith("error: The data folder") and not capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["check", "nothing", str(tmp_path)])
    assert stopped.value.code == 2


def test_the_program_runs_and_writes_what_a_terminal_can_show(folder):
    done = subprocess.run(
        [sys.executable, "-m", "tapo_jax.data", "describe", "jsonl", str(folder)],
        capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and r"\u0151" in done.stdout, done.stderr


# ---- converting caches


def cache(picture) -> dict:
    return {
        "a": {
            "tool_returned_web_title_list": ["Győr - Wikidata", "\u2028"],
            "tool_returned_images_urls": ["https://example.org/1.jpg", picture],
        },
        "b": {"tool_returned_web_title_list": ["B"], "tool_returned_images_urls": [picture, "../../etc/passwd", 7]},
        "../c": {"tool_returned_web_title_list": [None], "tool_returned_images_urls": []},
        "odd": ["x"],
    }


def wheel(mode: str) -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
def test_a_pickled_cache_becomes_lines_and_pictures(tmp_path, mode, protocol):
    source, out = tmp_path / "cache.pkl", tmp_path / "out"
    source.write_bytes(pickle.dumps(cache(wheel(mode)), protocol))
    counts = convert(source, out)
    assert counts == {"questions": 3, "titles": 4, "thumbnails": 2, "addresses": 1, "unreadable": 2, "odd": 1}
    rows = {row["id"]: row for row in map(json.loads, (out / "image_search.jsonl").read_text("utf-8").split("\n")[:-1])}
    assert list(rows) == ["a", "b", "../c"] and rows["a"]["titles"] == ["Győr - Wikidata", "\u2028"]
    assert rows["a"]["thumbnails"][0] is None and rows["b"]["thumbnails"][1:] == [None, None]
    (file,) = (out / "thumbnails").iterdir()
    assert rows["a"]["thumbnails"][1] == rows["b"]["thumbnails"][0] == f"thumbnails/{file.name}"
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(file)), np.asarray(wheel(mode).convert("RGB")))


def test_a_picture_that_was_opened_from_a_file_is_one_too(tmp_path):
    data = io.BytesIO()
    wheel("RGB").save(data, "PNG")
    source = tmp_path / "cache.pkl"
    source.write_bytes(pickle.dumps(cache(PIL.Image.open(data))))
    assert convert(source, tmp_path / "out")["thumbnails"] == 2


def test_the_json_form_of_a_cache(tmp_path):
    published.save(tmp_path / "pics" / "1.png", 9)
    value = {
        "a": {"tool_returned_web_title": ["T", "U"], "cached_images_path": ["pics/1.png", None]},
        "b": {"tool_returned_web_title": ["V"], "cached_images_path": ["/elsewhere/pics/1.png", "pics/2.png"]},
    }
    (tmp_path / "cache.json").write_text(json.dumps(value))
    counts = convert(tmp_path / "cache.json", tmp_path / "out")
    assert counts == {"questions": 2, "titles": 3, "thumbnails": 2, "unreadable": 1}
    (file,) = (tmp_path / "out" / "thumbnails").iterdir()
    assert file.read_bytes() == (tmp_path / "pics" / "1.png").read_bytes() and file.suffix == ".png"


def test_a_converted_cache_is_found_beside_the_questions(tmp_path, capsys):
    published.parquet(tmp_path / "fvqa_train.parquet", [published.fvqa_row(i) for i in range(3)])
    value = {f"fvqa_{i}": {"tool_returned_web_title_list": [f"T{i}"], "tool_returned_images_urls": [wheel("L")]}
             for i in (0, 2)}  # fmt: skip
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(value))
    assert main(["convert-cache", str(tmp_path / "c.pkl"), str(tmp_path / "image_search_train")]) == 0
    assert "2 questions, 2 titles, 2 thumbnails; skipped: 0 addresses" in capsys.readouterr().out
    found = [prompt.meta.get("image_search") for prompt in read("fvqa", tmp_path, "train")]
    assert found[1] is None and found[2].titles == ("T2",) and found[2].thumbnails[0]().shape == (5, 7, 3)


def test_recordings_of_other_questions_are_refused(tmp_path):
    published.parquet(tmp_path / "fvqa_test.parquet", [published.fvqa_row(0)])
    published.json_lines(tmp_path / "image_search" / "image_search.jsonl", [{"id": "x", "titles": ["T"]}])
    with pytest.raises(UserError, match="'id' is 'x'; expected ids of the split 'test'"):
        read("fvqa", tmp_path, "test")


class Runs:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def bad_pickles(marker):
    command = f"touch {marker}"
    yield "posix.system", pickle.dumps({"a": Runs(os.system, command)})
    yield "subprocess.Popen", pickle.dumps([Runs(subprocess.Popen, ["touch", str(marker)])])
    yield "builtins.eval", pickle.dumps(Runs(eval, f"open({str(marker)!r}, 'w')"))
    yield "builtins.getattr", pickle.dumps(Runs(getattr, "", "join"))
    yield "PIL.Image.open", pickle.dumps(Runs(PIL.Image.open, str(marker)))
    yield "os.system", f"cos\nsystem\n(S'{command}'\ntR.".encode()
    yield "os.system", f"(S'{command}'\nios\nsystem\n.".encode()
    yield "PIL.Image.Image.open", b"\x80\x04\x8c\x09PIL.Image\x8c\x0aImage.open\x93."
    yield "numpy", pickle.dumps({"a": np.zeros(3)})
    yield "keeps a value under the number 2000000000", b"\x80\x02}r\x00\x94\x35\x77."
    yield "'int' object|no attribute|expected|must be|bytes in", pickle.dumps(Runs(bytearray, 1 << 40))
    yield "bytes in the encoding", b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R."


@pytest.mark.parametrize("number", range(12))
def test_a_pickle_that_asks_for_code_is_refused_and_not_run(tmp_path, number):
    marker = tmp_path / "ran"
    _, data = list(bad_pickles(marker))[number]
    name = list(bad_pickles(marker))[number][0]
    (tmp_path / "c.pkl").write_bytes(data)
    with pytest.raises(UserError, match=f"c.pkl is refused: .*{name}.* Nothing of it was run"):
        convert(tmp_path / "c.pkl", tmp_path / "out")
    assert not marker.exists() and not (tmp_path / "out" / "image_search.jsonl").exists()


def test_whatever_a_pickle_holds_ends_in_a_sentence(tmp_path):
    """Bytes changed at random in a good one: a value or a refusal, and no other name is ever asked for."""
    rng, good = np.random.default_rng(0), pickle.dumps(cache(wheel("RGB")))
    path = tmp_path / "c.pkl"
    for _ in range(400):
        changed = bytearray(good)
        for at in rng.integers(0, len(good), 2):
            changed[at] = rng.integers(256)
        path.write_bytes(bytes(changed))
        with contextlib.suppress(UserError):
            unpickle.load(path)


@pytest.mark.parametrize(
    "state",
    [
        [{}, "RGB", (2, 2), None, b"short"],
        [{}, "RGB", (10**6, 10**6), None, b""],
        [{}, "RGB", (-1, 2), None, b""],
        [{}, "EVIL", (2, 2), None, b"0" * 12],
        [{}, "P", (1, 1), ["x"], b"0"],
        {"mode": "RGB"},
        None,
    ],
)
def test_a_picture_with_an_odd_state_is_none(state):
    inert = unpickle.Inert()
    inert.__setstate__(state)
    assert unpickle.picture(inert) is None


def test_plain_values_of_old_pickles_are_read(tmp_path):
    value = {"a": collections.OrderedDict(x=[1, 2.5, None, True, b"\xff\x00", bytearray(b"\xfe")], y=({"s"}, "ő"))}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "c.pkl").write_bytes(pickle.dumps(value, protocol))
        assert unpickle.load(tmp_path / "c.pkl") == value


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"", "is refused"), (pickle.dumps([1]), "expected a dict"), (pickle.dumps({}), "expected a dict"),
     (pickle.dumps({"a": {"b": 1}}), "is no cache of image searches")],
)  # fmt: skip
def test_a_file_that_is_no_cache_is_one_sentence(tmp_path, data, says):
    (tmp_path / "c.pkl").write_bytes(data)
    with pytest.raises(UserError, match=says):
        convert(tmp_path / "c.pkl", tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        convert(tmp_path / "d.pkl", tmp_path / "out")
