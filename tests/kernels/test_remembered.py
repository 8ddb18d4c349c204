import torch
from linearize_kernels.reference.visibility import ancestors
from linearize_kernels.remembered import remembered
from torch._subclasses.fake_tensor import FakeTensorMode


@remembered(2)
def ramp(length):
    return torch.arange(length) + torch.zeros(length)


def test_the_same_tensor_is_given_again():
    ramp.cache_clear()
    assert ramp(3) is ramp(3) and ramp(4) is not ramp(3)


def test_what_is_kept_can_be_trained_with():
    ramp.cache_clear()
    with torch.inference_mode():
        ramp(3)
    (torch.ones(3, requires_grad=True) * ramp(3)).sum().backward()


def test_what_is_kept_is_on_a_cpu_whatever_the_default():
    ramp.cache_clear()
    with torch.device("meta"):
        assert ramp(3).device.type == "cpu"


def test_tensors_without_values_are_not_kept():
    ramp.cache_clear()
    ancestors.cache_clear()
    with FakeTensorMode():
        assert type(ramp(3)) is not torch.Tensor
        ancestors((-1, 0))
    assert ramp(3).tolist() == [0, 1, 2]
    assert ancestors((-1, 0))[0].tolist() == [[True, False], [True, True]]
