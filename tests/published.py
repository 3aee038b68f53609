"""Invented rows in the schemas of the published data sets, small, with the variants that copies of them have."""

import base64
import io
import json

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq


def encoded(shade: int, size=(6, 4), kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    PIL.Image.new("RGB", size, (shade, 0, 0)).save(data, kind)
    return data.getvalue()


def save(path, shade: int, kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(shade, kind=kind))


def parquet(path, rows: list[dict], schema: pa.Schema | None = None, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, **options)


def json_lines(path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def fvqa_row(i: int, **changes) -> dict:
    return {
        "prompt": [{"content": f"which {i}?", "role": "user"}],
        "images": [{"bytes": encoded(i)}],
        "reward_model": {
            "candidate_answers": "[]" if i == 0 else json.dumps([f"c{i}", "🇸🇪", f"g{i}"]),
            "ground_truth": f"g{i}",
            "style": "rule",
        },
        "data_source": "mmsearch_r1/fvqa_train",
        "image_urls": None,
        "data_id": f"fvqa_{i}",
        "category": "search_free",
    } | changes


def fvqa_schema(variant: str) -> pa.Schema | None:
    """The published types, or those that other writers give the same rows; None: what pyarrow makes of them."""
    text = pa.large_string() if variant == "large" else pa.string()  # pyarrow writes views at the top level only
    binary = pa.large_binary() if variant == "large" else pa.binary()
    many = pa.large_list if variant == "large" else pa.list_
    image = pa.struct([("bytes", binary), *([("path", pa.null())] if variant == "path" else [])])
    fields = [
        ("prompt", many(pa.struct([("content", text), ("role", text)]))),
        ("images", many(image)),
        ("reward_model", pa.struct([(name, text) for name in ("candidate_answers", "ground_truth", "style")])),
        ("data_source", pa.string_view() if variant == "view" else text),
        ("image_urls", pa.null()),
        ("data_id", pa.string_view() if variant == "view" else text),
        ("category", text),
    ]
    return None if variant == "inferred" else pa.schema(fields[::-1] if variant == "reversed" else fields)


def hr_row(i: int, **changes) -> dict:
    return {
        "sample_id": f"hr_{i}", "query": "who?", "query_image": {"bytes": encoded(i), "path": "x.png"},
        "ground_truth": f"g{i}", "difficulty": "hard", "category": "Sports",
    } | changes  # fmt: skip


def mmsearch_row(i: int, **changes) -> dict:
    image = {"bytes": encoded(i), "path": None} if i % 2 else None
    return {
        "sample_id": f"m{i}", "query": "when?", "query_image": image,
        "image_search_result": {"bytes": encoded(100 + i), "path": None} if i % 2 else None, "area": "News",
        "gt_requery": "release", "gt_answer": f"g{i}", "alternative_gt_answers": [f"a{i}"] if i else [],
    } | changes  # fmt: skip


def simplevqa_row(i: int, **changes) -> dict:
    return {
        "data_id": i, "image": base64.b64encode(encoded(i)).decode(), "image_description": "",
        "language": "EN" if i % 2 else "CN", "question": "图中建筑是什么?", "answer": f"故宫{i}",
    } | changes  # fmt: skip


def shades(prompts) -> list[int]:
    """The first image's shade of each prompt: which picture it was."""
    return [int(np.asarray(prompt.images[0])[0, 0, 0]) for prompt in prompts]
