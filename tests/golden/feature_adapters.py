"""Golden cases of methods that compare feature maps."""

from __future__ import annotations

from read_golden import Case
from result import Result, cross_entropy, load_weights, map_terms, read_inputs, result

from kdbench.methods.fitnet import FitNet


def fitnet(case: Case) -> Result:
    x = read_inputs(case)
    method, found = map_terms(FitNet, {"weight": case.hp["feat_weight"]}, x)
    weights = load_weights(method, case, {"conv_reg.": "regressors.0."})
    return result(case, x, {"total": found()["hint"], "ce": cross_entropy(x)}, weights)


FEATURES = {"fitnet": fitnet}
