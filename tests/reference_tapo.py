"""TAPO with plain Python loops, lists and dicts, written from the definitions, sharing nothing with the package but the
call types.

One group at a time. A step is (trajectory g, tool name, parameters) or None for an empty slot.
"""

import collections
import re
import unicodedata

from tapo_jax.types import Identity, Number, Region, Text


def call_similarity(a, b, measure="dice", features=None):
    """Similarity of two calls (name, parameters); features: number of bins that `bin_of` hashes words into, or None."""
    (name_a, parameters_a), (name_b, parameters_b) = a, b
    if name_a != name_b:
        return 0.0
    by_kind_a, by_kind_b = split_kinds(parameters_a), split_kinds(parameters_b)
    if by_kind_a[Identity] != by_kind_b[Identity]:
        return 0.0
    values = []
    for kind in (Region, Text, Number):
        for i in range(max(len(by_kind_a[kind]), len(by_kind_b[kind]))):
            if i >= len(by_kind_a[kind]) or i >= len(by_kind_b[kind]):
                values.append(0.0)
            elif kind is Region:
                values.append(region_similarity(by_kind_a[kind][i], by_kind_b[kind][i]))
            elif kind is Number:
                values.append(number_similarity(by_kind_a[kind][i], by_kind_b[kind][i]))
            else:
                values.append(text_similarity(by_kind_a[kind][i].value, by_kind_b[kind][i].value, measure, features))
    return sum(values) / len(values) if values else 1.0


def split_kinds(parameters):
    kinds = {Region: [], Text: [], Number: [], Identity: []}
    for position, parameter in enumerate(parameters):
        kinds[type(parameter)].append((position, parameter.value) if type(parameter) is Identity else parameter)
    return kinds


def region_similarity(a, b):
    if a.root != b.root:
        return 0.0
    if tuple(a.box) == tuple(b.box):
        return 1.0
    width = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
    height = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = sum(max(x.box[2] - x.box[0], 0.0) * max(x.box[3] - x.box[1], 0.0) for x in (a, b)) - shared
    return shared / union if union > 0 else 0.0


def number_similarity(a, b):
    return max(0.0, 1.0 - abs(a.value - b.value) / (a.high - a.low))


def text_similarity(a, b, measure, bin_of):
    a, b = (" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in (a, b))
    if a == b:
        return 1.0
    if measure == "exact":
        return 0.0
    count_a, count_b = text_bag(a, bin_of), text_bag(b, bin_of)
    if measure == "cosine":
        dot = sum(count_a[k] * count_b[k] for k in count_a)
        norm = (sum(v * v for v in count_a.values()) * sum(v * v for v in count_b.values())) ** 0.5
        return dot / norm if norm else 0.0
    shared = sum(min(count_a[k], count_b[k]) for k in count_a)
    total = sum(count_a.values()) + sum(count_b.values())
    if measure == "dice":
        return 2 * shared / total if total else 0.0
    return shared / (total - shared) if total - shared else 0.0


def text_bag(text, bin_of):
    words = re.findall(r"\w+", text)
    if not words and text:
        words = [text]
    bag = collections.Counter()
    for word in words:
        bag[bin_of("w" + word)] += 1
        padded = " " + word + " "
        for i in range(len(padded) - 2):
            bag[bin_of(padded[i : i + 3])] += 1
    return bag


def find_clusters(sim, witnesses, theta, kind):
    """List of lists of slots. theta: a number for each slot."""
    if kind == "components":
        left, clusters = set(witnesses), []
        for start in witnesses:
            if start not in left:
                continue
            left.remove(start)
            cluster, open_slots = [start], [start]
            while open_slots:
                i = open_slots.pop()
                for j in sorted(left):
                    if sim[i][j] >= theta[i] and sim[i][j] > 0:
                        left.remove(j)
                        cluster.append(j)
                        open_slots.append(j)
            clusters.append(sorted(cluster))
        return clusters
    clusters = []
    for i in witnesses:
        best = max(clusters, key=lambda c: sim[i][c[0]], default=None)  # the earliest of equals
        if best is not None and sim[i][best[0]] >= theta[i] and sim[i][best[0]] > 0:
            best.append(i)
        else:
            clusters.append([i])
    return clusters


def group_transfer(
    sim,
    trajectory,
    valid,
    success,
    advantage,
    *,
    theta,
    alpha_min,
    beta,
    cluster="components",
    cluster_theta=None,
    aggregate="mean",
    support=True,
    clip=True,
    weight=None,
    question=None,
):
    """One group: dict of lists over its slots, with the names of CreditTransfer's fields, and "clusters"."""
    slots, G = range(len(valid)), len(success)
    theta = theta if isinstance(theta, list) else [theta] * len(valid)
    cluster_theta = theta if cluster_theta is None else [cluster_theta] * len(valid)
    weight = weight or [1.0] * G
    question = question or [0] * G
    witnesses = [s for s in slots if valid[s] and success[trajectory[s]]]
    clusters = []
    for members in find_clusters(sim, witnesses, cluster_theta, cluster):
        rollouts = sorted({trajectory[s] for s in members})
        asked = {question[g] for g in rollouts}
        total = sum(weight[g] for g in range(G) if success[g] and question[g] in asked)
        sup = sum(weight[g] for g in rollouts) / total if total > 0 else 0.0
        values = [advantage[g] * weight[g] for g in rollouts]
        credit = {"mean": sum(values) / len(values), "max": max(values), "min": min(values)}[aggregate]
        clusters.append((min(members), members, sup if support else 1.0, credit))

    out = collections.defaultdict(list)
    for s in slots:
        own = advantage[trajectory[s]]
        ranked = sorted((-max(sim[s][m] for m in members), -sup, first) for first, members, sup, _ in clusters)
        row = dict(advantage=own, corrected=False, correctable=False, sim=0.0, support=0.0, cluster=-1, witness=-1)
        if valid[s] and ranked:
            first = ranked[0][2]
            _, members, sup, credit = next(c for c in clusters if c[0] == first)
            best = max(sim[s][m] for m in members)
            row.update(sim=best, support=sup, cluster=first, witness=min(m for m in members if sim[s][m] == best))
            row["correctable"] = not success[trajectory[s]] and best >= theta[s]
            row["corrected"] = row["correctable"] and best * sup >= alpha_min and own < 0
            if row["corrected"]:
                new = own + beta * (best * sup * credit if credit > 0 else 0.0)
                row["advantage"] = min(new, 0.0) if clip else new
        for name, value in row.items():
            out[name].append(value)
    return {**out, "clusters": len(clusters)}


def token_rows(advantage, step_advantage, steps, step):
    """One group: per-token advantages of its rollouts. step[g][t] is k or -1; slot = g * steps + k."""
    return [[step_advantage[g * steps + k] if k >= 0 else advantage[g] for k in step[g]] for g in range(len(advantage))]
