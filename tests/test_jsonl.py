"""Own questions as JSON lines: what is understood, and the sentence for what is not."""

import json
import os
import unicodedata

import PIL.Image
import pytest

from tapo_jax.config import BadImage, UserError
from tapo_jax.data import read

ROW = {"question": "q?", "images": ["a.png"], "answers": ["x"]}


def line(**changes) -> str:
    return json.dumps(ROW | changes, ensure_ascii=False)


def folder(tmp_path, data: bytes | str):
    PIL.Image.new("RGB", (6, 4), (9, 8, 7)).save(tmp_path / "a.png")
    (tmp_path / "train.jsonl").write_bytes(data if isinstance(data, bytes) else data.encode())
    return tmp_path


def load(tmp_path, data: bytes | str):
    return read("jsonl", folder(tmp_path, data), "train")


def test_a_folder_of_questions(tmp_path):
    first, second = load(tmp_path, line() + "\n" + '{"id": "b", "question": "r", "answers": ["z", "y"], "hops": 2}')
    assert (first.id, first.answers, first.hops, len(first.images)) == ("1", ("x",), 1, 1)
    assert first.images[0].shape == (4, 6, 3) and first.images[0][0, 0].tolist() == [9, 8, 7]
    assert (second.id, second.hops, second.images, second.answers) == ("b", 2, (), ("z", "y"))


@pytest.mark.parametrize(
    "data",
    [
        line(),
        line() + "\r\n" + line() + "\r\n",
        "\n\n" + line() + "\n  \n" + line() + "\n\n",
        b"\xef\xbb\xbf" + line().encode() + b"\n",
        line(images=None),
        line(id=7, hops=None),
    ],
)
def test_files_as_people_write_them(tmp_path, data):
    prompts = load(tmp_path, data)
    assert all(prompt.question == "q?" for prompt in prompts)
    assert len(prompts) == data.count(b"q?" if isinstance(data, bytes) else "q?")


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x1c", "\x0b", "\x0c", "\x00"])
@pytest.mark.parametrize("escaped", [False, True])
def test_no_character_of_a_text_ends_a_line(tmp_path, character, escaped):
    text = f"one{character}two"
    if not escaped and ord(character) < 32:
        pytest.skip("JSON allows these escaped only")
    data = json.dumps(ROW | {"question": text}, ensure_ascii=escaped)
    assert [prompt.question for prompt in load(tmp_path, data + "\n" + line())] == [text, "q?"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("{", "line 1: found '{', which is no JSON"),
        (line() + "\n[]", r"line 2: found \[\]; expected a JSON object"),
        ("null", "found null; expected a JSON object"),
        ("[" + line() + "]", "is a JSON list: write one object a line"),
        (json.dumps(ROW, indent=1), "line 1: found '{', which is no JSON"),
        ("# mine\n" + line(), "line 1: found '# mine'"),
        (line() + "\r" + line(), "line 1: .* no JSON"),
        (line().encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (line() + "\n" + line(question="caf\xe9"), "line 2: byte 18 is not UTF-8"),
        ("", "has no questions"),
        ("\n", "has no questions"),
        ('{"question": "a", "question": "b", "answers": ["x"]}', "the field 'question' stands twice"),
        ("[" * 10**5, "JSON list"),
        ('{"question": ' + "[" * 10**5, "line 1: .*(nested too deep|no JSON)"),
        ("9" * 5000, "line 1: .* no JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of git-lfs"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, data, says):
    if isinstance(data, str) and "\xe9" in data:
        data = data.encode("latin-1")
    with pytest.raises(UserError, match=says):
        load(tmp_path, data)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"question": ["q"]}, r"the field 'question' is \[\"q\"\]; expected a text"),
        ({"question": ""}, "the field 'question' is ''; expected a text"),
        ({"question": "a \ud83d b"}, "'question' .* half of a surrogate pair"),
        ({"question": "<image> and <image>?"}, "'question' .* one for each of the row's 1 images, and it has 2"),
        ({"answers": "Paris"}, r"'answers' is 'Paris'; expected a list of at least one text, like \[\"Paris\"\]"),
        ({"answers": 5}, "'answers' is 5"),
        ({"answers": [5]}, r"'answers' is \[5\]"),
        ({"answers": [None]}, "'answers'"),
        ({"answers": {"Paris": 1}}, "'answers'"),
        ({"answers": []}, "'answers'"),
        ({"answers": [""]}, "'answers' .* is empty to the reward"),
        ({"answers": ["x", " "]}, "'answers' .* is empty to the reward"),
        ({"answers": ["\ud83d"]}, "'answers' .* surrogate"),
        ({"images": "a.png"}, r"'images' is 'a.png'; expected a list of paths"),
        ({"images": ["b.png"]}, "'images' .*'b.png' is none"),
        ({"images": [3]}, "'images' .* 3 is none"),
        ({"images": ["/etc/hostname"]}, "'/etc/hostname' is none"),
        ({"images": ["../secret.png"]}, "'../secret.png' is none"),
        ({"images": ["x/../../secret.png"]}, "is none"),
        ({"images": ["."]}, "is none"),
        ({"images": ["https://example.com/a.png"]}, "is none"),
        ({"images": ["a\x00.png"]}, "is none"),
        ({"images": ["a" * 5000]}, "is none"),
        ({"hops": "two"}, "'hops' is 'two'; expected a whole number"),
        ({"hops": 2.5}, "'hops'"),
        ({"hops": 0}, "'hops'"),
        ({"hops": True}, "'hops'"),
        ({"id": [1]}, "'id' .* a text or a whole number"),
        ({"id": "\ud83d"}, "'id' .* surrogate"),
        ({"image_search": []}, "'image_search' .* expected an object"),
        ({"image_search": {"titles": 3}}, "image_search: the field 'titles' is 3"),
        ({"image_search": {"thumbnails": ["b.png"]}}, "image_search: the field 'thumbnails'"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, changes, says):
    (tmp_path / "folder").mkdir()
    PIL.Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    with pytest.raises(UserError, match=rf"train.jsonl, line 2.*{says}"):
        load(tmp_path / "folder", line() + "\n" + json.dumps(ROW | changes))


@pytest.mark.parametrize(
    ("row", "meant"),
    [
        ({"question": "q", "imagse": ["a.png"], "answers": ["x"]}, "images"),
        ({"question": "q", "image": "a.png", "answers": ["x"]}, "images"),
        ({"question": "q", "picture_path": "a.png", "answers": ["x"]}, "images"),
        ({"question": "q", "Images": [], "answers": ["x"]}, "images"),
        ({"question": "q", "answer": "x"}, "answers"),
        ({"qestion": "q", "answers": ["x"]}, "question"),
        ({"question": "q", "answers": ["x"], "hop": 2}, "hops"),
    ],
)
def test_a_misspelt_field_is_no_field_of_yours(tmp_path, row, meant):
    with pytest.raises(UserError, match=f"line 1: there is a field .* and no '{meant}'"):
        load(tmp_path, json.dumps(row))


def test_other_fields_are_kept(tmp_path):
    own = {"question_id": 7, "source": {"page": "w"}, "image_url": "https://x/a.png", "score": 1.5}
    (prompt,) = load(tmp_path, line(**own))
    assert prompt.meta == own


@pytest.mark.parametrize(
    "ids",
    [
        ({"id": "1"}, {"id": "1"}),
        ({"id": "2"}, {}),  # the second line's id is its number
    ],
)
def test_one_id_for_two_questions_is_refused(tmp_path, ids):
    """A success on one would be a witness for the other."""
    with pytest.raises(UserError, match="line 2: the id .* is that of line 1: give each question its own"):
        load(tmp_path, "\n".join(line(**one) for one in ids))


def test_marks_stay_where_they_are_written(tmp_path):
    (prompt,) = load(tmp_path, line(question="left <image> right"))
    assert prompt.question == "left <image> right"


def test_linked_pictures_and_folders_are_followed(tmp_path):
    data, store = tmp_path / "data", tmp_path / "store"
    data.mkdir(), store.mkdir()
    PIL.Image.new("RGB", (5, 5)).save(store / "b.png")
    (data / "b.png").symlink_to(store / "b.png")
    (data / "store").symlink_to(store)
    (tmp_path / "link").symlink_to(data)
    rows = [line(images=["b.png"]), line(images=["store/b.png"]), line(images=[str(data.resolve() / "a.png")])]
    folder(data, "\n".join(rows))
    prompts = read("jsonl", tmp_path / "link", "train")
    assert [prompt.images[0].shape for prompt in prompts] == [(5, 5, 3), (5, 5, 3), (4, 6, 3)]


def test_names_in_either_unicode_form_are_found(tmp_path):
    PIL.Image.new("RGB", (5, 5)).save(tmp_path / unicodedata.normalize("NFC", "café.png"))
    (prompt,) = load(tmp_path, line(images=[unicodedata.normalize("NFD", "café.png")]))
    assert prompt.images[0].shape == (5, 5, 3)


def test_a_broken_picture_says_so_when_it_is_looked_at(tmp_path):
    (tmp_path / "b.png").write_text("no picture")
    prompts = load(tmp_path, line() + "\n" + line(images=["b.png"]))
    assert prompts[0].images[0].shape == (4, 6, 3)
    with pytest.raises(BadImage, match="b.png cannot be shown: it is none of"):
        prompts[1].images[0]
    os.remove(tmp_path / "b.png")
    with pytest.raises(BadImage, match="b.png cannot be shown: it cannot be read"):
        prompts[1].images[0]


@pytest.mark.parametrize("split", ["", "../train", "/etc/passwd", ".hidden", "held_out"])
def test_a_split_that_is_no_file_is_refused(tmp_path, split):
    with pytest.raises(UserError, match="split"):
        read("jsonl", folder(tmp_path, line()), split)


def test_a_deep_value_is_one_sentence_too(tmp_path):
    for depth in (300, 900, 5000, 200_000):
        with pytest.raises(UserError, match=r"line 1.*(deep|'answers' is)"):
            load(tmp_path, '{"question": "q", "answers": ' + "[" * depth + "]" * depth + "}")
