"""The table of axes, meshes, and rows between hosts and devices."""

import jax
import numpy as np
import pytest
from test_train_step import CONFIG

from tapo_jax import sharding
from tapo_jax.config import UserError
from tapo_jax.models import hf, parameters


def spec(array_or_sharding) -> tuple:
    return tuple(array_or_sharding.spec)


def test_meshes_take_the_rest():
    assert dict(sharding.make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert sharding.batch_shards(sharding.make_mesh(2, -1, 2)) == 4  # data × fsdp


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (2, 2, 1), (-1, -1, 1), (0, 1, 8)])
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes):
    with pytest.raises(UserError, match="mesh"):
        sharding.make_mesh(*sizes)


def test_parameters_are_split_by_the_table():
    """tensor 2, fsdp 2 on the test model: embedding [32 vocab, 16 embed]; q [1 layer, 16 embed, 4 heads, 8]; norms
    stay whole."""
    mesh = sharding.make_mesh(2, 2, 2)
    layout = hf.param_shardings(CONFIG, mesh)
    assert spec(layout[("embedding",)]) == ("tensor", "fsdp")
    assert spec(layout[("decoder", "q")]) == (None, "fsdp", "tensor", None)
    assert spec(layout[("decoder", "down")]) == (None, "tensor", "fsdp")
    assert spec(layout[("decoder", "input_norm")]) == ()
    assert spec(layout[("vision", "patch_bias")]) == ()


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(1, 2, 4)
    assert spec(hf.param_shardings(CONFIG, mesh)[("decoder", "k")]) == (
        None,
        "fsdp",
        None,
        None,
    )  # 2 heads over 4


def test_every_matrix_of_the_model_is_split_over_fsdp():
    """What is not split costs memory on every device of a pod. Every matrix has an axis that fsdp takes."""
    mesh = sharding.make_mesh(1, 2, 4)
    layout = hf.param_shardings(CONFIG, mesh)
    for path, entry in parameters.specs(CONFIG).items():
        wide = [axis for axis in entry.axes if axis not in (None, "layers")]
        if len(wide) >= 2 and "bias" not in path[-1]:
            assert "fsdp" in spec(layout[path]), path


def test_moments_lie_like_their_parameters_and_counters_everywhere():
    mesh = sharding.make_mesh(2, 2, 2)
    axes = parameters.logical_axes(CONFIG)
    tree = {"0": {"mu": {"decoder": {"q": np.zeros((1, 16, 4, 8))}}}, "count": np.zeros(())}
    layout = sharding.parameters(tree, axes, mesh)
    assert spec(layout["0"]["mu"]["decoder"]["q"]) == (None, "fsdp", "tensor", None)
    assert spec(layout["count"]) == ()


def test_rows_go_to_the_devices_in_order_and_come_back():
    mesh = sharding.make_mesh(2, 2, 2)
    rows_Bx2 = np.arange(16).reshape(8, 2)
    placed = sharding.put_rows({"a": rows_Bx2}, mesh, 8)["a"]
    np.testing.assert_array_equal(placed, rows_Bx2)
    assert spec(placed.sharding) == (("data", "fsdp"),)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(sharding.local_rows(mesh, 8), np.arange(8))


def test_rows_that_do_not_divide_are_on_every_device():
    placed = sharding.put_rows(np.arange(3), sharding.make_mesh(), 3)
    assert placed.sharding.is_fully_replicated
    np.testing.assert_array_equal(placed, [0, 1, 2])


def test_constrain_pins_inside_of_on_and_does_nothing_outside():
    mesh = sharding.make_mesh(4, 1, 2)

    def program(x_BxD):
        with sharding.on(mesh):
            return sharding.constrain(x_BxD * 2, None, "heads")

    x_BxD = sharding.put_rows(np.ones((4, 6), np.float32), mesh, 4)
    assert spec(jax.jit(program)(x_BxD).sharding)[1] == "tensor"
    assert sharding.constrain(x_BxD, None, "heads") is x_BxD


def test_pieces_and_on_shards_see_each_devices_own_part():
    """Summing within a device's part of 8 rows over 4 devices: parts (0, 1), (2, 3), …: 1, 1, 5, 5, 9, 9, 13, 13."""
    mesh = sharding.make_mesh(4, 1, 2)

    def program(x_B):
        with sharding.on(mesh):
            assert (sharding.pieces("batch"), sharding.pieces("heads")) == (4, 2)
            return sharding.on_shards(lambda part: part * 0 + part.sum(), [("batch",)], x_B)

    placed = sharding.put_rows(np.arange(8.0, dtype=np.float32), mesh, 8)
    np.testing.assert_array_equal(jax.jit(program)(placed), [1, 1, 5, 5, 9, 9, 13, 13])
    assert sharding.pieces("batch") == 1


def test_path_names_leave_out_the_value_of_a_parameter_object():
    key = jax.tree_util
    path = (key.DictKey("decoder"), key.SequenceKey(0), key.DictKey("q"), key.GetAttrKey("value"))
    assert sharding.path_name(path) == "decoder/0/q"
