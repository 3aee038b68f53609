"""TAPO's kernel as plain Python loops over the same encoded arrays, the baseline of `python -m tapo_jax.bench tapo`.

It has only the default options (Dice, components, mean, support, clip). Every array is a nested list, so that no loop
pays for numpy's indexing.
"""

from tapo_jax.tapo.encode import Steps


def as_lists(steps: Steps) -> list[list[dict]]:
    """Return one dict for each slot of each prompt."""
    P, S = steps.valid_PxS.shape
    fields = {
        "valid": steps.valid_PxS,
        "trajectory": steps.trajectory_PxS,
        "tool": steps.tool_PxS,
        "identity": steps.identity_PxS,
        "root": steps.root_PxSxR,
        "box": steps.box_PxSxRx4,
        "has_region": steps.has_region_PxSxR,
        "text": steps.text_PxSxXxF,
        "text_hash": steps.text_hash_PxSxX,
        "has_text": steps.has_text_PxSxX,
        "number": steps.number_PxSxN,
        "has_number": steps.has_number_PxSxN,
    }
    lists = {name: array.tolist() for name, array in fields.items()}
    return [[{name: lists[name][p][s] for name in lists} for s in range(S)] for p in range(P)]


def similarity(a: dict, b: dict) -> float:
    if not (a["valid"] and b["valid"]) or a["tool"] != b["tool"] or a["identity"] != b["identity"]:
        return 0.0
    values = []
    for i, (has_a, has_b) in enumerate(zip(a["has_region"], b["has_region"], strict=True)):
        if has_a or has_b:
            values.append(_iou(a["root"][i], a["box"][i], b["root"][i], b["box"][i]) if has_a and has_b else 0.0)
    for i, (has_a, has_b) in enumerate(zip(a["has_text"], b["has_text"], strict=True)):
        if has_a or has_b:
            values.append(_dice(a["text"][i], b["text"][i]) if has_a and has_b else 0.0)
    for i, (has_a, has_b) in enumerate(zip(a["has_number"], b["has_number"], strict=True)):
        if has_a or has_b:
            values.append(max(0.0, 1.0 - abs(a["number"][i] - b["number"][i])) if has_a and has_b else 0.0)
    return sum(values) / len(values) if values else 1.0


def _iou(root_a, box_a, root_b, box_b):
    if root_a != root_b:
        return 0.0
    if box_a == box_b:
        return 1.0
    width = max(min(box_a[2], box_b[2]) - max(box_a[0], box_b[0]), 0.0)
    height = max(min(box_a[3], box_b[3]) - max(box_a[1], box_b[1]), 0.0)
    areas = (box_a[2] - box_a[0]) * (box_a[3] - box_a[1]) + (box_b[2] - box_b[0]) * (box_b[3] - box_b[1])
    union = areas - width * height
    return width * height / union if union > 0 else 0.0


def _dice(count_a, count_b):
    shared = total = 0
    for x, y in zip(count_a, count_b, strict=True):
        shared += x if x < y else y
        total += x + y
    return 2 * shared / total if total else 1.0


def transfer(
    slots: list[dict], success: list[bool], advantage: list[float], theta: float, alpha_min: float, beta: float
) -> list[float]:
    """Return the corrected advantages of one group's slots."""
    S = range(len(slots))
    sim = [[similarity(slots[i], slots[j]) for j in S] for i in S]
    witnesses = [s for s in S if slots[s]["valid"] and success[slots[s]["trajectory"]]]
    label = {s: s for s in witnesses}
    for i in witnesses:
        for j in witnesses:
            if sim[i][j] >= theta and label[i] != label[j]:
                low, high = sorted((label[i], label[j]))
                for s in witnesses:
                    if label[s] == high:
                        label[s] = low
    support, credit = {}, {}
    for name in set(label.values()):
        rollouts = {slots[s]["trajectory"] for s in witnesses if label[s] == name}
        support[name] = len(rollouts) / sum(success)
        credit[name] = sum(advantage[g] for g in rollouts) / len(rollouts)
    out = []
    for s in S:
        own = advantage[slots[s]["trajectory"]]
        new = own
        if slots[s]["valid"] and witnesses and not success[slots[s]["trajectory"]] and own < 0:
            best = max(witnesses, key=lambda w: (sim[s][w], support[label[w]], -label[w]))
            evidence = sim[s][best] * support[label[best]]
            if sim[s][best] >= theta and evidence >= alpha_min:
                new = min(own + beta * max(evidence * credit[label[best]], 0.0), 0.0)
        out.append(new)
    return out


def token_rows(advantage: list[float], step_advantage: list[float], steps: int, step: list[list[int]]):
    """Return the per-token advantages of one group's rollouts."""
    return [[step_advantage[g * steps + k] if k >= 0 else advantage[g] for k in row] for g, row in enumerate(step)]
