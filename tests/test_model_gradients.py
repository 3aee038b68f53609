"""The gradient of one loss for every parameter is transformers' own: 1e-3 of its largest entry (seen: 1e-5)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_models import CONFIGS, conversation, models, torch_logits

from tapo_jax.batch import ModelInputs
from tapo_jax.learn.logprobs import token_logp
from tapo_jax.models import hf, parameters, positions, qwen3_vl

TOLERANCE = 1e-3


def _our_gradient(model, inputs, remat="none"):
    graph, state = nnx.split(model)

    def loss(state):
        model = nnx.merge(graph, state)
        hidden = qwen3_vl.hidden_states(model, inputs, remat=remat)
        return -jnp.mean(token_logp(model, hidden, inputs.token_BxT, chunk=4)[0][:, 1:])

    value, gradient = jax.jit(jax.value_and_grad(loss))(state)
    return value, nnx.traversals.flatten_mapping(nnx.to_pure_dict(gradient))


def _case(config):
    merge = config.vision.merge
    return conversation(config, [(1, 2 * merge, merge), (1, merge, 2 * merge)], text=3)


@functools.cache
def _plain_gradient(name):
    _, model = models(name)
    tokens, pixels, grid = _case(model.config)
    return _our_gradient(model, ModelInputs(**positions.row_inputs(tokens, pixels, grid, None, model.config)))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter(name):
    reference, model = models(name)
    config = model.config
    tokens, pixels, grid = _case(config)
    reference.zero_grad()
    logits = torch_logits(reference, tokens, pixels, grid).logits
    target = torch.tensor(tokens[:, 1:], dtype=torch.long)
    expected_loss = torch.nn.functional.cross_entropy(logits[0, :-1], target[0])
    expected_loss.backward()
    theirs = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    loss, ours = _plain_gradient(name)
    np.testing.assert_allclose(loss, expected_loss.detach(), rtol=1e-5)
    compared = 0
    for path, spec in parameters.specs(config).items():
        for i, tensor in enumerate(hf.tensor_names(path, spec)):
            mine = np.asarray(ours[path][i] if spec.axes[0] == "layers" else ours[path])
            mine = hf.as_theirs(mine, path, theirs[tensor].shape)
            scale = np.abs(theirs[tensor]).max()
            assert scale > 0 or tensor.endswith(("k_norm.bias", "qkv.bias")), tensor
            np.testing.assert_allclose(mine, theirs[tensor], atol=TOLERANCE * max(scale, 1e-6), rtol=0, err_msg=tensor)
            compared += 1
    assert compared == len(theirs)


@pytest.mark.parametrize("name", ["grouped", "deep_stacked"])
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_nothing(name, remat):
    """The same numbers are computed again, in unrolled and scanned stacks: equal up to the order of additions."""
    _, model = models(name)
    tokens, pixels, grid = _case(model.config)
    inputs = ModelInputs(**jax.tree.map(jnp.asarray, positions.row_inputs(tokens, pixels, grid, None, model.config)))
    loss, gradient = _plain_gradient(name)
    again, remade = _our_gradient(model, inputs, remat)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    for path, value in gradient.items():
        np.testing.assert_allclose(remade[path], value, atol=1e-5, err_msg="/".join(path))


def test_unknown_remat_is_an_error():
    _, model = models("grouped")
    tokens, pixels, grid = _case(model.config)
    inputs = ModelInputs(**positions.row_inputs(tokens, pixels, grid, None, model.config))
    with pytest.raises(KeyError, match="everything"):
        qwen3_vl.hidden_states(model, inputs, remat="everything")
