"""Read the golden vectors: inputs, outputs and gradients of published losses, recorded in float64.

    for case in read_cases("nkd"):
        case.inputs["logits_s"], case.hp["gamma"], case.outputs["total"], case.grads["logits_s"]
        case.check_loss("total", mine); case.check_grad("logits_s", mine)

Needs only numpy and the standard library. File layout: <method>/<case>.npz with keys
  in.<x>      input                       w.<name>     parameter or buffer before the step (authors' state_dict names)
  out.<x>     output; out.total (or out.loss) is what gradients refer to unless cot.* is present
  cot.<x>     fixed cotangent: the objective is then the sum over x of sum(out.x * cot.x)
  grad.<x>    d objective / d in.x        gradw.<name> d objective / d w.name
  mid.<x>     intermediate                stable.<x>   log-space reference where the authors' code is not finite
  float32.<x> / gradfast.<x>              extra records, explained in meta
  meta        JSON: method, case, set, kind, source, hp (or named settings), tol, notes, finite
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent
PREFIXES = ("in", "w", "out", "cot", "grad", "gradw", "mid", "stable", "float32", "gradfast")


@dataclass(frozen=True)
class Case:
    method: str
    name: str
    meta: dict
    arrays: dict[str, dict[str, np.ndarray]] = field(repr=False)

    @property
    def inputs(self):
        return self.arrays["in"]

    @property
    def weights(self):
        return self.arrays["w"]

    @property
    def outputs(self):
        return self.arrays["out"]

    @property
    def grads(self):
        return self.arrays["grad"]

    @property
    def weight_grads(self):
        return self.arrays["gradw"]

    @property
    def cotangents(self):
        return self.arrays["cot"]

    @property
    def hp(self) -> dict:
        return self.meta.get("hp", self.meta)

    @property
    def finite(self) -> bool:
        return self.meta.get("finite", True)

    def want(self, name: str) -> np.ndarray:
        """Output to match: the log-space value where the authors' number is not finite."""
        stable = self.arrays["stable"]
        return stable[name] if not self.finite and name in stable else self.outputs[name]

    def want_grad(self, name: str) -> np.ndarray:
        stable = self.arrays["stable"]
        key = f"grad_{name}"
        return stable[key] if not self.finite and key in stable else self.grads[name]

    def check_loss(self, name: str, got) -> None:
        tol = self.meta.get("tol") or {}
        tol = tol if isinstance(tol, dict) else {}
        np.testing.assert_allclose(
            np.asarray(got),
            self.want(name),
            rtol=tol.get("loss_rtol", 1e-9),
            atol=tol.get("loss_atol", 1e-11),
            err_msg=f"{self.method}/{self.name}: {name}",
        )

    def check_grad(self, name: str, got, want: np.ndarray | None = None) -> None:
        want = self.want_grad(name) if want is None else want
        tol = self.meta.get("tol") or {}
        tol = tol if isinstance(tol, dict) else {}
        scale = float(np.max(np.abs(want))) if want.size else 1.0
        np.testing.assert_allclose(
            np.asarray(got),
            want,
            rtol=tol.get("grad_rtol", 1e-7),
            atol=max(tol.get("grad_atol", 0.0), 1e-9 * max(scale, 1e-2)),
            err_msg=f"{self.method}/{self.name}: gradient of {name}",
        )


def read_case(path: Path) -> Case:
    arrays: dict[str, dict[str, np.ndarray]] = {p: {} for p in PREFIXES}
    with np.load(path, allow_pickle=False) as z:
        meta = json.loads(str(z["meta"]))
        for key in z.files:
            prefix, _, name = key.partition(".")
            if name:
                arrays[prefix][name] = z[key]
    return Case(method=path.parent.name, name=path.stem, meta=meta, arrays=arrays)


def methods(root: Path = ROOT) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and any(p.glob("*.npz")))


def read_cases(method: str, root: Path = ROOT) -> list[Case]:
    return [read_case(p) for p in sorted((root / method).glob("*.npz"))]


if __name__ == "__main__":
    for m in methods():
        cases = read_cases(m)
        print(f"{m:16} {len(cases):3} {cases[0].meta.get('kind', ''):40} {', '.join(c.name for c in cases)}")
