"""The page of recorded episodes: complete, self-contained, and safe whatever the policy wrote."""

import base64
import dataclasses
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import PIL.Image
import pytest
from recorded import recorded

from tapo_jax import records
from tapo_jax.records import RecordedEpisode, RecordedTurn
from tapo_jax.viewer import credit_map
from tapo_jax.viewer import page as viewer


class Page(HTMLParser):
    """Every start tag with its attributes, all visible text, and the text of style and script elements."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.raw = "", {"style": [], "script": []}
        self._inside = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in self.raw else None

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside:
            self.raw[self._inside].append(data)
        else:
            self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def picture(shade: int, side: int = 8) -> bytes:
    return records.png(np.full((side, side, 3), shade, np.uint8))


BLACK = picture(0)


def turn(**fields) -> RecordedTurn:
    return RecordedTurn(**{"text": "<think>t</think><answer>a</answer>"} | fields)


def episode(
    turns, *, sample=0, prompt=0, step=1, success=False, images=(BLACK,), prompt_images=1, **fields
) -> RecordedEpisode:
    given = dict(prompt_id="id", question="Where?", answers=("here",), hops=1, answer="a", finish="answer")
    return RecordedEpisode(
        step=step,
        prompt=prompt,
        sample=sample,
        images=tuple(images),
        prompt_images=prompt_images,
        turns=tuple(turns),
        success=success,
        rewards={"accuracy": float(success)},
        reward=float(success),
        advantage=1.0 if success else -1.0,
        **given | fields,
    )


def zoom(box, **fields) -> RecordedTurn:
    arguments = {"bbox_2d": box, "img_idx": 0}
    call = f"<tool_call>{json.dumps({'name': 'image_zoom_in_tool', 'arguments': arguments})}</tool_call>"
    call = f"<think>look</think>{call}"
    return turn(text=call, call_name="image_zoom_in_tool", call_arguments=arguments, result="Image 1.", **fields)


def page_of(*groups, **options) -> Page:
    return Page(viewer.render(groups, title="run", total=len(groups), **options))


def borrowed_pair() -> list[RecordedEpisode]:
    witness = zoom(
        [100, 200, 300, 400],
        slot=0,
        adv_before=1.0,
        adv_after=1.0,
        sim=1.0,
        support=1.0,
        witness=(0, 0, 0),
        result_images=(1,),
    )
    borrower = zoom(
        [100, 200, 300, 420],
        slot=0,
        adv_before=-1.0,
        adv_after=-0.25,
        sim=0.91,
        support=0.5,
        witness=(0, 0, 0),
        correctable=True,
        corrected=True,
        result_images=(1,),
    )
    images = (picture(0), picture(99))
    return [episode([witness], success=True, images=images), episode([borrower], sample=1, images=images)]


def test_a_run_of_scripted_players(tmp_path):
    """Real scenes and tools: every question, every turn and every correction of two recorded steps is on the page."""
    first = recorded(2, 4, step=1)
    episodes = first + [dataclasses.replace(e, step=20) for e in first]
    for step in (1, 20):
        records.save(tmp_path / "episodes" / f"step_{step:06d}.npz", [e for e in episodes if e.step == step])
    viewer.write_page(sorted((tmp_path / "episodes").glob("*.npz")), tmp_path / "episodes.html")
    page = Page((tmp_path / "episodes.html").read_text())
    classes = [(attributes.get("class") or "").split() for attributes in page.of("article")]
    assert len(classes) == sum(len(e.turns) for e in episodes)
    corrected = sum(t.corrected for e in episodes for t in e.turns)
    assert corrected > 0, "the scripted players share no call: give another seed"
    assert sum("fixed" in names for names in classes) == corrected
    assert all(e.question in page.text for e in episodes)
    assert (
        sum(1 for name, attributes in page.tags if name == "path" and attributes.get("class") == "arrow") == corrected
    )
    assert len(page.of("image")) == len({image for e in episodes for image in e.images})
    assert not list(tmp_path.glob("*.tmp"))


def test_credit_of_a_borrowed_step():
    page = page_of(borrowed_pair())
    chips = [text.strip() for text in re.findall(r"[+−]\d\.\d\d", page.text)]
    assert "−0.25" in chips and "−1.00" in chips and "+1.00" in chips
    assert "similarity 0.91 · support 0.50 · borrowed from" in " ".join(page.text.split())
    links = [attributes["href"] for attributes in page.of("a")]
    assert "#s1-q0-g0-k0" in links, "the borrower links to its witness"
    assert "#s1-q0-g1-k0" in links, "the witness links to its borrower"
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)


def test_zoom_box_is_drawn_where_the_call_put_it():
    """A box in thousandths of an 8-pixel image: 100..300 is 0.8..2.4, 200..400 is 1.6..3.2."""
    page = page_of(borrowed_pair())
    drawn = [a for a in page.of("rect") if (a.get("class") or "") == "zoom only"]
    assert [float(drawn[0][name]) for name in ("x", "y", "width", "height")] == pytest.approx([0.8, 1.6, 1.6, 1.6])
    on_question = [a for a in page.of("rect") if (a.get("class") or "") in ("zoom right", "zoom fixed")]
    assert len(on_question) == 2


@pytest.mark.parametrize(
    "box",
    [
        "all",
        [1, 2, 3],
        [500, 0, 100, 100],
        [0, 0, 10, 2000],
        [0, 0, float("nan"), 10],
        [True, 0, 10, 10],
        [[1], 2, 3, 4],
        {"x": 1},
    ],
)
def test_box_that_is_none_is_not_drawn(box):
    page = page_of([episode([zoom(box, error="bad_box")])])
    assert not [a for a in page.of("rect") if "zoom" in (a.get("class") or "")]


@pytest.mark.parametrize("number", [-1, 1, 2**70, 0.0, True, "0", None])
def test_image_that_does_not_exist_is_not_shown(number):
    bad = turn(call_name="image_search_tool", call_arguments={"img_idx": number}, error="bad_image", result="Error")
    assert "on image" not in page_of([episode([bad])]).text


HOSTILE = (
    "</script></style><script>alert(1)</script>\"'><img src=https://evil.example/x onerror=alert(1)>"
    "<svg onload=alert(2)>{{ 7*7 }}\x00\ud800"
)


def hostile() -> RecordedEpisode:
    turns = [
        turn(text=HOSTILE, call_name=HOSTILE, call_arguments={HOSTILE: HOSTILE}, result=HOSTILE, error=HOSTILE),
        turn(text=f"<think>{HOSTILE}</think><answer>{HOSTILE}</answer>", slot=0, witness=(0, 7, 7)),
    ]
    text = dict(prompt_id=HOSTILE, question=HOSTILE, answers=(HOSTILE,), answer=HOSTILE, finish=HOSTILE)
    return dataclasses.replace(episode(turns, **text), rewards={HOSTILE: 1.0})


def test_nothing_that_the_policy_wrote_is_markup(tmp_path):
    records.save(tmp_path / HOSTILE[:8].replace("/", "_") / "step_1.npz", [hostile()])
    viewer.write_page(list(tmp_path.rglob("*.npz")), tmp_path / "page.html")
    raw = (
        (tmp_path / "page.html").read_bytes().decode("utf-8")
    )  # the lone surrogate became something that can be written
    page, harmless = Page(raw), page_of([episode([turn(), turn()])])
    assert len(page.of("script")) == 1 and len(page.of("style")) == 1 and not page.of("img")
    assert page.raw["script"] == harmless.raw["script"]
    assert {name for name, _ in page.tags} <= {name for name, _ in harmless.tags} | {"pre", "a"}
    assert "alert(1)" in page.text, "it is shown, as text"
    assert "{{ 7*7 }}" in page.text and "49" not in page.text
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert not {"src", "style", "action", "formaction", "srcdoc"} & set(attributes), (tag, attributes)
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#")[:1] == "#" or attributes[name].startswith("data:image/png;base64,"), (
                attributes
            )


def test_policy_of_the_page_allows_only_its_own_style_and_script():
    page = page_of(borrowed_pair())
    (policy,) = [a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:" and "unsafe" not in policy
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256("".join(page.raw[kind]).encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"https?://|@import|url\((?!#)", "".join(page.raw["style"] + page.raw["script"]))


def test_witness_that_is_not_on_the_page_has_no_link():
    lonely = turn(slot=0, correctable=True, corrected=True, sim=0.8, support=1.0, witness=(5, 2, 3))
    page = page_of([episode([lonely])])
    assert "question 5, g2 k3" in page.text
    assert all("q5" not in attributes["href"] for attributes in page.of("a"))


def test_witness_of_an_earlier_step_is_named_without_a_place():
    remembered = turn(slot=0, correctable=True, corrected=True, sim=0.8, support=1.0)
    assert "borrowed from a sample of an earlier step" in " ".join(page_of([episode([remembered])]).text.split())


def test_large_images_are_made_smaller_and_equal_ones_kept_once():
    noise = np.random.default_rng(0).integers(0, 256, (600, 1200, 3), np.uint8)
    large = records.png(noise)
    page = page_of(
        [episode([turn()], images=(large, large), prompt_images=2)], [episode([turn()], images=(large,), prompt=1)]
    )
    (kept,) = page.of("image")
    kind, data = kept["href"].split(";base64,")
    assert kind == "data:image/jpeg"
    assert PIL.Image.open(io.BytesIO(base64.b64decode(data))).size == (512, 256)


def test_most_corrected_questions_are_kept_where_there_are_too_many(tmp_path):
    """Two steps of three questions each, two places: from each step the one question with a corrected step."""
    for step in (1, 2):
        plain = [episode([turn()], prompt=p, step=step, question=f"plain {p}") for p in (0, 2)]
        found = [
            episode(
                [turn(slot=0, corrected=True, witness=(1, 0, 0))], prompt=1, step=step, question=f"corrected in {step}"
            )
        ]
        records.save(tmp_path / f"step_{step}.npz", plain + found)
    viewer.write_page(sorted(tmp_path.glob("*.npz")), tmp_path / "page.html", max_groups=2)
    text = " ".join(Page((tmp_path / "page.html").read_text()).text.split())
    assert "corrected in 1" in text and "corrected in 2" in text and "plain" not in text
    assert "episodes of 2 of 6 questions" in text


def test_page_without_episodes(tmp_path):
    viewer.write_page([], tmp_path / "page.html")
    assert "No episodes were recorded." in (tmp_path / "page.html").read_text()


def test_shades_are_ordered_and_symmetric():
    """sqrt(0.25) = 0.5, so a quarter of the scale has half of the levels."""
    assert [credit_map.shade(v, 2.0) for v in (-9.0, -2.0, -0.5, -1e-9, 0.0, 1e-9, 0.5, 2.0, 9.0)] == [
        -10,
        -10,
        -5,
        -1,
        0,
        1,
        5,
        10,
        10,
    ]
    assert credit_map.shade(math.nan, 2.0) == 0
    assert len({shade["fill"] for shade in credit_map.SHADES}) == 21
