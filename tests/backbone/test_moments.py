"""The moments of a layer's input, against torch's own in double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modmeta.backbone import channel_moments


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
    center=st.floats(-100, 100),
    scale=st.floats(1e-3, 100),
    channels_last=st.booleans(),
)
def test_moments_are_those_of_the_whole_batch(shape, center, scale, channels_last):
    x = center + scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    mean, variance = channel_moments(x)
    true_variance, true_mean = torch.var_mean(x.double(), dim=[0, 2, 3], correction=0)
    # What an input is known to in single precision, in units of its own size.
    error = 1e-6 * (abs(center) + 10 * scale)
    torch.testing.assert_close(mean.double(), true_mean, atol=error, rtol=0)
    torch.testing.assert_close(variance.double(), true_variance, atol=error * scale * 10, rtol=1e-5)
    assert (variance >= 0).all()


def test_a_variance_survives_images_that_differ():
    dark, bright = torch.zeros(1, 3, 64, 64), torch.full((1, 3, 64, 64), 1000.0)
    x = torch.cat([dark, bright]).contiguous(memory_format=torch.channels_last)
    mean, variance = channel_moments(x)
    torch.testing.assert_close(mean, torch.full((3,), 500.0))
    torch.testing.assert_close(variance, torch.full((3,), 250_000.0))


@pytest.mark.parametrize(("shape", "dim"), [((4, 7), 1), ((4, 9, 7), -1), ((4, 7, 9), 1), ((4, 5, 5, 7), -1)])
def test_the_axis_of_the_channels_may_be_any(shape, dim):
    x = torch.randn(shape)
    mean, variance = channel_moments(x, dim)
    rows = x.movedim(dim, -1).reshape(-1, 7)
    torch.testing.assert_close(mean, rows.mean(0))
    torch.testing.assert_close(variance, rows.var(0, correction=0))


def test_gradients_are_those_of_torch():
    x = torch.randn(2, 3, 40, 40).contiguous(memory_format=torch.channels_last).requires_grad_()
    mean, variance = channel_moments(x)
    (mine,) = torch.autograd.grad((mean + variance.square()).sum(), x)
    variance, mean = torch.var_mean(x, dim=[0, 2, 3], correction=0)
    (true,) = torch.autograd.grad((mean + variance.square()).sum(), x)
    torch.testing.assert_close(mine, true, atol=1e-8, rtol=1e-4)


def test_half_precision_loses_no_more_than_torch_does():
    x = (3 + torch.randn(4, 8, 64, 64)).bfloat16().contiguous(memory_format=torch.channels_last)
    mean, variance = channel_moments(x)
    assert mean.dtype == variance.dtype == torch.bfloat16
    torch.testing.assert_close(variance.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-2, atol=0)
