"""kdbench's methods against the numbers of published code, recorded in float64."""

import numpy as np
import pytest
from adapters import ADAPTERS
from read_golden import Case, methods, read_cases

CASES = [case for name in ADAPTERS for case in read_cases(name)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method}-{case.name}")
def test_every_output_and_gradient_is_that_of_the_published_code(case: Case):
    result = ADAPTERS[case.method](case)
    assert set(case.outputs) <= set(result.outputs)
    assert set(case.grads) <= set(result.grads)
    assert set(case.weight_grads) <= set(result.weight_grads)
    for name in case.outputs:
        case.check_loss(name, result.outputs[name])
    for name in case.grads:
        case.check_grad(name, result.grads[name])
    for name in (case.arrays["mid"].keys() - case.outputs.keys()) & result.outputs.keys():
        np.testing.assert_allclose(result.outputs[name], case.arrays["mid"][name], rtol=1e-9, atol=1e-11, err_msg=name)
    for name, want in case.weight_grads.items():
        case.check_grad(name, result.weight_grads[name], want)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method}-{case.name}")
def test_outputs_agree_to_the_last_digits_that_float64_holds(case: Case):
    result = ADAPTERS[case.method](case)
    for name in case.outputs:
        np.testing.assert_allclose(result.outputs[name], case.want(name), rtol=1e-12, atol=1e-14, err_msg=name)


def test_every_adapter_has_cases_and_every_case_an_adapter():
    assert sorted(ADAPTERS) == methods()
