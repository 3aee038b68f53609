"""Device side of the sampler: the cache of every slot, and the three jitted calls that work on some of the slots.

`extend_slots` adds given tokens (a prompt, or a tool's response with its images); `copy_slots` gives a slot the prompt
that another slot already holds (the samples of one group prefill it once); `decode_slots` draws tokens in every open
turn and stops early when all turns have ended.

The state keeps for each slot the hidden state of its last token, not a sampled token: a decoding step draws from it,
then feeds what it drew. So the last token of a turn is never in the cache; it is the first token of the next extension.

The first axis of every array is Z, the row shards (devices along the batch): a call takes R of the C slots of each
shard, so that no entry of the cache moves between devices. A request names a slot by its index inside the shard; the
index C marks an empty row, which reads any slot and writes none. Requests may come in smaller pieces than the state
(`_join`). N: tokens of a decoding chunk; E: stop ids.

Keys and values lie in the slots, or in pages (`models/pages.py`). Then a call also gets a table of the pages of each
row, by their index inside the shard, and works on the pages where they lie; hidden states stay with the slots.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tapo_jax import sharding
from tapo_jax.batch import ModelInputs
from tapo_jax.models import qwen3_vl
from tapo_jax.models.cache import Cache, init_cache
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.rollout.drawing import DrawLimits, draw, turn_keys
from tapo_jax.rollout.schedule import Draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotState:
    """The cache of all slots. S: cache entries of a slot; A: head dimension."""

    k: tuple[jax.Array, ...]
    """One array [Z, layers, C, K, S, A] for each part of the model's cache; with pages, of N pages in place of C slots
    and the entries of a page in place of S."""
    v: tuple[jax.Array, ...]
    """The same for the values."""
    hidden_ZxCxD: jax.Array
    """Hidden state of each slot's last cached token."""
    prompt_hidden_ZxCxD: jax.Array
    """Hidden state of the last token of each slot's prompt."""
    seen_ZxCxV: Any = None
    """bool, the tokens of each slot's open turn. Only a decoding call with limits has it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DrawRequest:
    """The rows of a decoding call: `schedule.Draw` as int32 arrays [Z, R]. slot_ZxR is the index inside the shard."""

    slot_ZxR: Any
    length_ZxR: Any
    position_ZxR: Any
    allowance_ZxR: Any
    drawn_ZxR: Any
    prompt_ZxR: Any
    sample_ZxR: Any
    turn_ZxR: Any

    @classmethod
    def of(cls, draws: Sequence[Draw], index_ZxR: np.ndarray, slots_per_shard: int) -> "DrawRequest":
        """Gather the draws of a call.

        index_ZxR: index of the draw of each row; -1 makes an empty row: slot C, else zeros.
        slots_per_shard: C.
        """

        def column(name: str, empty: int = 0) -> np.ndarray:
            return np.array([*(getattr(draw, name) for draw in draws), empty], np.int32)[index_ZxR]

        slot_ZxR = np.array([*(draw.slot % slots_per_shard for draw in draws), slots_per_shard], np.int32)[index_ZxR]
        rest = [field.name for field in dataclasses.fields(Draw) if field.name not in ("slot", "pages")]
        return cls(slot_ZxR, **{f"{name}_ZxR": column(name) for name in rest})

    @classmethod
    def abstract(cls, shards: int, rows: int, layout: Any) -> "DrawRequest":
        """Return a request of shapes, for compiling. layout: the sharding of an array of rows."""
        shape = jax.ShapeDtypeStruct((shards, rows), jnp.int32, sharding=layout)
        return cls(*[shape] * len(dataclasses.fields(cls)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DrawRule:
    """How tokens are drawn, the same in every row."""

    seed: Any
    """int32, part of the random keys."""
    step: Any
    """int32, part of the random keys."""
    temperature: Any
    """float32, as in `drawing.draw`."""
    top_p: Any
    """float32, as in `drawing.draw`."""
    forbidden_V: Any
    """bool, tokens that are never drawn."""
    stop_E: Any
    """int32, tokens that end a turn."""
    limits: DrawLimits | None = None
    """Further limits, which only evaluations have; None makes a program without them."""


def _pin(state: SlotState) -> SlotState:
    """Keep the layout over the mesh the same from call to call."""
    place_kv = functools.partial(
        jax.tree.map, lambda x: sharding.constrain(x, "batch", None, None, "heads", None, None)
    )
    place_hidden = lambda x: sharding.constrain(x, "batch", None, None)  # noqa: E731
    return SlotState(
        place_kv(state.k),
        place_kv(state.v),
        place_hidden(state.hidden_ZxCxD),
        place_hidden(state.prompt_hidden_ZxCxD),
        None if state.seen_ZxCxV is None else place_hidden(state.seen_ZxCxV),
    )


def _on_rows(tree: Any) -> Any:
    """Lay the rows of a call out as the slots are; in a pod, processes may have put them in smaller pieces."""
    return jax.tree.map(lambda x: sharding.constrain(x, "batch", *[None] * (x.ndim - 1)), tree)


def _join(request_ZxR: Any, slot_ZxR: jax.Array, state: SlotState) -> tuple[Any, jax.Array]:
    """Return a request and its slots by the shards of the state, where these hold the slots of several pieces.

    In a pod the devices of a shard may belong to several processes, each with a piece of the shard's slots and rows.
    """
    shards, slots = state.hidden_ZxCxD.shape[:2]
    pieces = slot_ZxR.shape[0] // shards
    if pieces > 1:
        own = slots // pieces
        first_Zx1 = own * (jnp.arange(slot_ZxR.shape[0], dtype=jnp.int32) % pieces)[:, None]
        slot_ZxR = jnp.where(slot_ZxR < own, slot_ZxR + first_Zx1, slots)
        together = lambda x: x.reshape(shards, pieces * x.shape[1], *x.shape[2:])  # noqa: E731
        request_ZxR, slot_ZxR = jax.tree.map(together, request_ZxR), together(slot_ZxR)
    return _on_rows((request_ZxR, slot_ZxR))


def _join_pages(page_ZxRxM: jax.Array, state: SlotState) -> jax.Array:
    """Return the pages of rows as `_join` returns their slots: every piece has pages of its own."""
    shards, pages = state.hidden_ZxCxD.shape[0], state.k[0].shape[2]
    pieces = page_ZxRxM.shape[0] // shards
    if pieces > 1:
        first_Zx1x1 = pages // pieces * (jnp.arange(page_ZxRxM.shape[0], dtype=jnp.int32) % pieces)[:, None, None]
        page_ZxRxM = (page_ZxRxM + first_Zx1x1).reshape(shards, pieces * page_ZxRxM.shape[1], -1)
    return _on_rows(page_ZxRxM)


def _spread(logits_RxV: jax.Array) -> jax.Array:
    """Give every device whole rows of its own of logits that are split along V, if there are enough rows."""
    if logits_RxV.shape[0] % sharding.pieces("drawn"):
        return logits_RxV
    # First as the product leaves them: else the compiler would split its rows too, and gather the table for that.
    return sharding.constrain(sharding.constrain(logits_RxV, "batch", "vocab"), "drawn", None)


def _take_kv(x_ZxLxCxKxSxA: jax.Array, slot_ZxR: jax.Array, window: int) -> jax.Array:
    """Return the first `window` entries of the named slots as the model's cache array [L, Z·R, K, window, A]."""
    shards, _, slots = x_ZxLxCxKxSxA.shape[:3]
    rows_ZxLxRxKxWxA = x_ZxLxCxKxSxA[:, :, :, :, :window]
    if slot_ZxR.shape[1] < slots:
        clipped_ZxR = jnp.minimum(slot_ZxR, slots - 1)
        rows_ZxLxRxKxWxA = jax.vmap(lambda x, slot_R: x[:, slot_R])(rows_ZxLxRxKxWxA, clipped_ZxR)
    rows = jnp.moveaxis(rows_ZxLxRxKxWxA, 0, 1)
    return rows.reshape(rows.shape[0], shards * rows.shape[2], *rows.shape[3:])


def _put_kv(x_ZxLxCxKxSxA: jax.Array, rows_LxBxKxWxA: jax.Array, slot_ZxR: jax.Array) -> jax.Array:
    """Write the rows of `_take_kv` back. Rows whose slot is C are skipped."""
    shards, layers, slots = x_ZxLxCxKxSxA.shape[:3]
    R, window = slot_ZxR.shape[1], rows_LxBxKxWxA.shape[3]
    rows_ZxLxRxKxWxA = jnp.moveaxis(rows_LxBxKxWxA.reshape(layers, shards, R, *rows_LxBxKxWxA.shape[2:]), 1, 0)
    if slots == R:  # rows are the slots in order, and rows without tokens were not changed
        return jax.lax.dynamic_update_slice_in_dim(x_ZxLxCxKxSxA, rows_ZxLxRxKxWxA, 0, 4)
    return jax.vmap(lambda x, slot_R, new: x.at[:, slot_R, :, :window].set(new, mode="drop"))(
        x_ZxLxCxKxSxA, slot_ZxR, rows_ZxLxRxKxWxA
    )


def _take_cache(
    state: SlotState, slot_ZxR: jax.Array, length_ZxR: jax.Array, window: int, table_ZxRxM: jax.Array | None
) -> Cache:
    """Return the rows of a call as the model's cache. With pages it is all of them, uncopied, and the rows' table."""
    if table_ZxRxM is None:
        k, v = (tuple(_take_kv(x, slot_ZxR, window) for x in part) for part in (state.k, state.v))
        return Cache(k, v, length_ZxR.reshape(-1))

    def pool(x_ZxLxNxKxPxA: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x_ZxLxNxKxPxA, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    k, v = (tuple(pool(x) for x in part) for part in (state.k, state.v))
    table_ZxRxM = _join_pages(table_ZxRxM, state)
    return Cache(k, v, length_ZxR.reshape(-1), table_ZxRxM.reshape(-1, table_ZxRxM.shape[2]))


def _put_cache(state: SlotState, cache: Cache, slot_ZxR: jax.Array) -> SlotState:
    """Write what `_take_cache` returned back."""
    if cache.table_BxM is None:
        put = functools.partial(_put_kv, slot_ZxR=slot_ZxR)
    else:
        put = lambda x, pool: jnp.moveaxis(pool.reshape(x.shape[1], x.shape[0], *x.shape[2:]), 1, 0)  # noqa: E731
    k, v = (
        tuple(put(x, rows) for x, rows in zip(old, new, strict=True))
        for old, new in ((state.k, cache.k), (state.v, cache.v))
    )
    return dataclasses.replace(state, k=k, v=v)


def _put_rows(x_ZxCxD: jax.Array, slot_ZxR: jax.Array, new_ZxRxD: jax.Array) -> jax.Array:
    return jax.vmap(lambda x, slot_R, new: x.at[slot_R].set(new, mode="drop"))(x_ZxCxD, slot_ZxR, new_ZxRxD)


def _take_rows(x_ZxCxD: jax.Array, slot_ZxR: jax.Array) -> jax.Array:
    return jax.vmap(lambda x, slot_R: x[jnp.minimum(slot_R, x.shape[0] - 1)])(x_ZxCxD, slot_ZxR)


# The three calls. An empty row has slot C: read from any slot, written nowhere.


@functools.partial(jax.jit, static_argnames=("config", "shards", "slots", "capacity", "dtype", "pool"))
def init_slots(
    config: Qwen3VLConfig,
    shards: int,
    slots: int,
    capacity: int,
    dtype: jnp.dtype,
    pool: tuple[int, int] | None = None,
) -> SlotState:
    """Return empty slots: `slots` of `capacity` entries for each of `shards`.

    pool: pages of a shard, those that are nobody's included, and the entries of a page; None: no pages."""
    cache = init_cache(config, *(pool or (slots, capacity)), dtype)
    k, v = (tuple(jnp.zeros((shards, *x.shape), x.dtype) for x in part) for part in (cache.k, cache.v))
    hidden_ZxCxD = jnp.zeros((shards, slots, config.hidden), dtype)
    return _pin(SlotState(k, v, hidden_ZxCxD, hidden_ZxCxD))


@functools.partial(jax.jit, static_argnames=("shards", "slots", "vocab"))
def init_seen(shards: int, slots: int, vocab: int) -> jax.Array:
    """Return seen_ZxCxV of turns that hold nothing yet."""
    return sharding.constrain(jnp.zeros((shards, slots, vocab), bool), "batch", None, None)


@functools.partial(jax.jit, static_argnames=("graphdef", "window"), donate_argnames="state")
def extend_slots(
    graphdef: Any,
    params: Any,
    state: SlotState,
    inputs: ModelInputs,
    request_ZxRx3: jax.Array,
    table_ZxRxM: jax.Array | None = None,
    *,
    window: int,
) -> SlotState:
    """Add given tokens to slots.

    graphdef, params: the model.
    state: the slots; its buffers are donated.
    inputs: the tokens to add, one row for each of the Z·R rows.
    request_ZxRx3: slot, tokens that the slot already holds, whether the new ones are a prompt.
    table_ZxRxM: the pages of the rows that hold `window` entries, if there are pages.
    window: cache entries of each slot that the call works on.
    """
    model = nnx.merge(graphdef, params)
    request_ZxRx3, slot_ZxR = _join(request_ZxRx3, request_ZxRx3[..., 0], state)
    inputs, before_ZxR, fresh_ZxR = _on_rows(inputs), request_ZxRx3[..., 1], request_ZxRx3[..., 2]
    cache = _take_cache(state, slot_ZxR, before_ZxR, window, table_ZxRxM)
    hidden_BxTxD, cache = qwen3_vl.extend(model, cache, inputs)
    state = _put_cache(state, cache, slot_ZxR)
    count_B = jnp.sum(inputs.segment_BxT > 0, axis=1, dtype=jnp.int32)
    last_BxD = jnp.take_along_axis(hidden_BxTxD, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)[:, 0]
    last_ZxRxD = last_BxD.reshape(*slot_ZxR.shape, -1)
    prompt_slot_ZxR = jnp.where(fresh_ZxR > 0, slot_ZxR, state.hidden_ZxCxD.shape[1])
    return _pin(
        dataclasses.replace(
            state,
            hidden_ZxCxD=_put_rows(state.hidden_ZxCxD, slot_ZxR, last_ZxRxD),
            prompt_hidden_ZxCxD=_put_rows(state.prompt_hidden_ZxCxD, prompt_slot_ZxR, last_ZxRxD),
        )
    )


@functools.partial(jax.jit, donate_argnames="state")
def copy_slots(state: SlotState, request_ZxRx2: jax.Array, page_ZxRx2: jax.Array | None = None) -> SlotState:
    """Copy prompts between slots. request_ZxRx2: source slot, target slot. All reads happen before all writes.

    page_ZxRx2: with pages, the source and the target of the one page that is copied; 0 and 0 copy none."""
    _, source_ZxR = _join((), request_ZxRx2[..., 0], state)
    _, target_ZxR = _join((), request_ZxRx2[..., 1], state)
    from_ZxR, to_ZxR = source_ZxR, target_ZxR
    if page_ZxRx2 is not None:
        from_ZxR, to_ZxR = jnp.moveaxis(_join_pages(page_ZxRx2, state), -1, 0)

    def whole(x_ZxLxCxKxSxA: jax.Array) -> jax.Array:
        return jax.vmap(lambda x, s, t: x.at[:, t].set(x[:, jnp.minimum(s, x.shape[1] - 1)], mode="drop"))(
            x_ZxLxCxKxSxA, from_ZxR, to_ZxR
        )

    prompt_ZxRxD = _take_rows(state.prompt_hidden_ZxCxD, source_ZxR)
    return _pin(
        SlotState(
            k=jax.tree.map(whole, state.k),
            v=jax.tree.map(whole, state.v),
            hidden_ZxCxD=_put_rows(state.hidden_ZxCxD, target_ZxR, prompt_ZxRxD),
            prompt_hidden_ZxCxD=_put_rows(state.prompt_hidden_ZxCxD, target_ZxR, prompt_ZxRxD),
        )
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "window", "chunk"), donate_argnames="state")
def decode_slots(
    graphdef: Any,
    params: Any,
    state: SlotState,
    request: DrawRequest,
    rule: DrawRule,
    table_ZxRxM: jax.Array | None = None,
    *,
    window: int,
    chunk: int,
) -> tuple[SlotState, tuple[jax.Array, jax.Array, jax.Array]]:
    """Draw up to `chunk` tokens in every open turn.

    graphdef, params: the model.
    state: the slots; its buffers are donated.
    request: the rows of the call.
    rule: how tokens are drawn.
    table_ZxRxM: as in `extend_slots`.
    window: cache entries of each slot that the call works on.
    chunk: N.

    Returns the state and (token_ZxRxN, logp_ZxRxN, count_ZxR).
    """
    model, shape_2 = nnx.merge(graphdef, params), request.slot_ZxR.shape
    request, slot_ZxR = _join(request, request.slot_ZxR, state)
    rows = slot_ZxR.size
    flat = jax.tree.map(lambda x_ZxR: x_ZxR.reshape(rows), request)
    before_R, position_R, allowance_R, drawn_R = flat.length_ZxR, flat.position_ZxR, flat.allowance_ZxR, flat.drawn_ZxR
    key_R = turn_keys(rule.seed, rule.step, flat.prompt_ZxR, flat.sample_ZxR, flat.turn_ZxR)

    seen_RxV = None
    if rule.limits is not None:  # a turn that has drawn nothing yet holds nothing
        seen_RxV = _take_rows(state.seen_ZxCxV, slot_ZxR).reshape(rows, -1) & (drawn_R > 0)[:, None]

    def step(carry: tuple) -> tuple:
        i, active_R, cache, hidden_RxD, token_RxN, logp_RxN, count_R, seen_RxV = carry
        keys_R = jax.vmap(jax.random.fold_in)(key_R, drawn_R + i)
        logits_RxV = _spread(qwen3_vl.logits(model, hidden_RxD))
        new_R, new_logp_R = _on_rows(
            draw(logits_RxV, keys_R, rule.temperature, rule.top_p, rule.forbidden_V, rule.limits, seen_RxV)
        )
        if seen_RxV is not None:
            seen_RxV = seen_RxV.at[jnp.arange(rows), new_R].max(active_R)
        token_RxN = token_RxN.at[:, i].set(jnp.where(active_R, new_R, 0))
        logp_RxN = logp_RxN.at[:, i].set(jnp.where(active_R, new_logp_R, 0.0))
        count_R += active_R
        active_R &= (count_R < allowance_R) & ~jnp.any(new_R[:, None] == rule.stop_E[None], axis=1)
        inputs = ModelInputs(
            token_BxT=new_R[:, None],
            segment_BxT=active_R[:, None].astype(jnp.int32),
            position_BxTx3=jnp.broadcast_to((position_R + i)[:, None, None], (rows, 1, 3)),
        )
        next_RxTxD, cache = qwen3_vl.extend(model, cache, inputs)
        hidden_RxD = jnp.where(active_R[:, None], next_RxTxD[:, 0], hidden_RxD)
        return i + 1, active_R, cache, hidden_RxD, token_RxN, logp_RxN, count_R, seen_RxV

    start = (
        jnp.int32(0),
        allowance_R > 0,
        _take_cache(state, slot_ZxR, before_R, window, table_ZxRxM),
        _take_rows(state.hidden_ZxCxD, slot_ZxR).reshape(rows, -1),
        jnp.zeros((rows, chunk), jnp.int32),
        jnp.zeros((rows, chunk), jnp.float32),
        jnp.zeros(rows, jnp.int32),
        seen_RxV,
    )
    _, _, cache, hidden_RxD, token_RxN, logp_RxN, count_R, seen_RxV = jax.lax.while_loop(
        lambda carry: (carry[0] < chunk) & jnp.any(carry[1]), step, start
    )
    state = _put_cache(state, cache, slot_ZxR)
    hidden_ZxRxD = hidden_RxD.reshape(*slot_ZxR.shape, -1)
    state = dataclasses.replace(state, hidden_ZxCxD=_put_rows(state.hidden_ZxCxD, slot_ZxR, hidden_ZxRxD))
    if seen_RxV is not None:
        seen_ZxRxV = seen_RxV.reshape(*slot_ZxR.shape, -1)
        state = dataclasses.replace(state, seen_ZxCxV=_put_rows(state.seen_ZxCxV, slot_ZxR, seen_ZxRxV))
    drawn = (x.reshape(*shape_2, *x.shape[1:]) for x in (token_RxN, logp_RxN, count_R))
    token, logp, count = (sharding.constrain(x, "batch", *[None] * (x.ndim - 1)) for x in drawn)
    return _pin(state), (token, logp, count)
