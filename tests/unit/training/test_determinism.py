"""What torch refuses when kernels must be deterministic, and what is made of it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch._utils import ExceptionWrapper

from trainer.config.job import Train
from trainer.errors import JobError
from trainer.training.determinism import DEBUG_MODES, any_kernels, choose_kernels, missing_kernels_named


@pytest.fixture(autouse=True)
def left_as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.set_deterministic_debug_mode(0)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def put() -> None:
    """An operation without a deterministic kernel, on any device."""
    torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))


def put_in_a_replica() -> None:
    """As DataParallel tells of it."""
    try:
        put()
    except RuntimeError:
        wrapper = ExceptionWrapper(where="in replica 0 on device 0")
        wrapper.reraise()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("given, meant", [(True, "true"), (False, "false"), ("warn", "warn"), ("True", "true")])
def test_what_yaml_makes_of_the_choices_is_accepted(given: object, meant: str) -> None:
    assert Train(deterministic=given).deterministic == meant  # type: ignore[arg-type]


@pytest.mark.parametrize("compute", [put, put_in_a_replica])
@pytest.mark.parametrize("compiled", [False, True])
def test_true_names_the_option_and_the_remedy(compute: object, compiled: bool) -> None:
    choose_kernels("true", compiled)
    with pytest.raises(JobError, match="put_ does not have a deterministic impl") as caught, missing_kernels_named():
        compute()  # type: ignore[operator]
    assert caught.value.key == "train.deterministic" and "warn" in str(caught.value)
    assert "but you set" not in str(caught.value) and "\n" not in str(caught.value)


def test_warn_warns() -> None:
    choose_kernels("warn", False)
    with pytest.warns(UserWarning, match="deterministic"):
        put()


def test_false_says_nothing() -> None:
    choose_kernels("false", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        put()


def test_other_problems_stay_what_they_are() -> None:
    choose_kernels("true", False)
    with pytest.raises(RuntimeError, match=r"size mismatch|inconsistent"), missing_kernels_named():
        torch.ones(3) @ torch.ones(4)
    choose_kernels("warn", False)
    with pytest.raises(RuntimeError, match="deterministic"), missing_kernels_named():
        raise RuntimeError("this is not deterministic")


def test_any_kernels_may_be_used_for_a_while() -> None:
    choose_kernels("true", False)
    with pytest.warns(UserWarning, match="deterministic"), any_kernels():
        put()
    assert torch.get_deterministic_debug_mode() == DEBUG_MODES["true"]


def test_the_compiler_is_not_imported_for_it() -> None:
    program = "import sys, trainer.training.determinism as d; d.choose_kernels('true', False); " \
              "sys.exit('torch._dynamo' in sys.modules)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
