"""Which backend an operator takes: argument, context manager, environment, first of the list."""

import threading

import pytest
import torch

from densezoo.kernels import neighborhood_attention, runtime
from densezoo.kernels.runtime import Choice, choose, requested_backend, use_backend, which_backend


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv(runtime.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def refusals(**reasons):
    return {name: lambda reason=reason: reason for name, reason in reasons.items()}


def test_an_argument_goes_before_the_context_and_that_before_the_environment(monkeypatch):
    assert requested_backend() == (None, "")
    monkeypatch.setenv(runtime.VARIABLE, "cpu")
    assert requested_backend() == ("cpu", "DENSEZOO_BACKEND=cpu")
    with use_backend("reference"):
        assert requested_backend()[0] == "reference"
        with use_backend("triton"):
            assert requested_backend()[0] == "triton"
            assert requested_backend("cpu") == ("cpu", "backend='cpu'")
        assert requested_backend() == ("reference", "use_backend('reference')")
    assert requested_backend()[0] == "cpu"
    monkeypatch.setenv(runtime.VARIABLE, "")
    assert requested_backend() == (None, "")


def test_a_context_ends_with_an_error_and_holds_for_its_thread_alone():
    seen = []
    with pytest.raises(KeyError), use_backend("cpu"):
        thread = threading.Thread(target=lambda: seen.append(requested_backend()))
        thread.start()
        thread.join()
        raise KeyError
    assert seen == [(None, "")]
    assert requested_backend() == (None, "")


def test_the_first_that_can_is_taken_and_the_others_say_why_not():
    choice = choose("op", refusals(triton="no GPU", cpu=None, reference=None))
    assert choice == Choice("cpu", choice.reason, {"triton": "no GPU"})
    assert "first" in choice.reason
    assert choose("op", refusals(cpu="x", reference=None)).backend == "reference"


def test_what_is_asked_for_runs_or_raises_and_never_falls_back(monkeypatch):
    able = refusals(triton="no GPU", cpu=None, reference=None)
    assert choose("op", able, "reference").backend == "reference"
    message = "cannot run this call of op: no GPU"
    with pytest.raises(ValueError, match=f"backend='triton' {message}"):
        choose("op", able, "triton")
    with use_backend("triton"), pytest.raises(ValueError, match=f"'triton'. {message}"):
        choose("op", able)
    monkeypatch.setenv(runtime.VARIABLE, "triton")
    with pytest.raises(ValueError, match=f"DENSEZOO_BACKEND=triton {message}"):
        choose("op", able)
    with pytest.raises(ValueError, match="cannot run this call of op"):
        choose("op", refusals(cpu=None, reference=None))


def test_without_any_that_can_every_reason_is_named():
    with pytest.raises(ValueError, match="of op: triton: no GPU; cpu: no dtype"):
        choose("op", refusals(triton="no GPU", cpu="no dtype"))


def test_the_interpreter_runs_kernels_on_the_cpu_when_asked_for_by_name_alone(monkeypatch):
    device = torch.device("cpu")
    assert "on the CPU" in runtime.why_no_triton(device)
    assert not runtime.is_interpreted()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert runtime.is_interpreted()
    assert runtime.why_no_triton(device) is None
    able = refusals(triton=None, cpu=None)
    assert choose("op", able).backend == "cpu"
    assert choose("op", able, "triton").backend == "triton"


def test_triton_is_for_cuda_and_rocm():
    assert "'meta'" in runtime.why_no_triton(torch.device("meta"))


def test_which_backend_asks_operators_alone():
    query = torch.zeros(1, 5, 6, 1, 2)
    assert which_backend(neighborhood_attention, query, query, query, 3).backend == "cpu"
    with pytest.raises(ValueError, match="neighborhood_attention"):
        which_backend(torch.add, query, query)
    with pytest.raises(ValueError, match="kernel_size is 7"):
        which_backend(neighborhood_attention, query, query, query, 7)
