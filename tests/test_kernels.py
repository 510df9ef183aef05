"""The kernels against float64: the reference here, the Triton kernels in an interpreter.

Triton reads TRITON_INTERPRET when it is first imported, and other tests import it (transformers
does). So the last test runs this file once more, with that variable set, in a process of its own.
With a GPU the compiled kernels are tested too.
"""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import types
import warnings

import pytest
import torch

from kernels import bench, reference, softmax_kl, token_logprob

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton")
plain_torch = pytest.mark.skipif(INTERPRETED, reason="about the reference")
both_directions = pytest.mark.parametrize("direction", ["forward", "reverse"])
in_two_temperatures = pytest.mark.parametrize("temperature", [1.0, 0.6])
# Against 5e-3 where bf16 is rounded: the interpreter cuts it off, by up to one part in 128.
in_two_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
widths = [1, 8] if INTERPRETED or GPU else [8]  # the reference has none
in_both_widths = pytest.mark.parametrize("small_blocks", widths, indirect=True)
half_precision = {torch.bfloat16: 8e-3 if INTERPRETED else 5e-3, torch.float16: 1e-3}
inf = float("inf")
V = 200  # with the blocks of the fixture below: three whole ones and a part


@pytest.fixture(params=["cpu", "cuda"] if GPU else ["cpu"])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """Little data is enough for several blocks and chunks; lanes of a width."""
    monkeypatch.setattr(reference, "CHUNK", 2 * V)
    if INTERPRETED or GPU:
        for name in ("softmax_kl", "logprob"):
            module = importlib.import_module(f"kernels.{name}")
            monkeypatch.setattr(module, "BLOCK", 64)
            monkeypatch.setattr(module, "lane_width", lambda sizes: getattr(request, "param", 8))
    with warnings.catch_warnings():  # the interpreter warns of −inf − (−inf)
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_logits(*shape, device="cpu", dtype=torch.float32):
    student, teacher = 1.5 * torch.randn(*shape), 1.5 * torch.randn(*shape)
    return student.to(device, dtype).requires_grad_(), teacher.to(device, dtype)


def true_kl(student, teacher, direction, temperature=1.0):
    """By autograd, in float64: the KL, and the student's logits that get the gradient."""
    student = student.detach().double().requires_grad_()
    log_s = (student / temperature).log_softmax(-1)
    log_t = (teacher.double() / temperature).log_softmax(-1)
    log_p, log_q = (log_s, log_t) if direction == "reverse" else (log_t, log_s)
    return (log_p.exp() * (log_p - log_q)).sum(-1), student


def check_kl(student, teacher, direction, temperature=1.0, tolerance=5e-6, floor=0.0, **options):
    """Loss and gradient, under an incoming gradient that differs by token.

    The floor is for rows whose gradient vanishes: there the truth in float64 is rounding, too.
    """
    weight = torch.rand(student.shape[:-1], device=student.device) + 0.5
    kl = softmax_kl(student, teacher, direction, temperature, **options)
    kl.backward(weight)
    truth, exact = true_kl(student, teacher, direction, temperature)
    truth.backward(weight.double())
    assert kl.dtype == torch.float32 and student.grad.dtype == student.dtype
    assert ((kl - truth).abs() <= 3e-6 + 2e-6 * truth).all()
    error = (student.grad - exact.grad).abs().amax(-1)
    assert (error <= tolerance * exact.grad.abs().amax(-1) + floor).all()


# --- softmax_kl ----------------------------------------------------------------------------------


@plain_torch
@both_directions
@in_two_temperatures
def test_gradcheck_of_the_kl(direction, temperature):
    student, teacher = make_logits(2, 3, 7, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    run = lambda s: softmax_kl(s, teacher, direction, temperature, mask)  # noqa: E731
    assert torch.autograd.gradcheck(run, student)


@in_both_widths
@both_directions
@in_two_temperatures
@pytest.mark.parametrize("vocabulary", [1, 25, 64, V])
def test_kl(direction, temperature, vocabulary, device):
    student, teacher = make_logits(2, 3, vocabulary, device=device)
    check_kl(student, teacher, direction, temperature)


@both_directions
@pytest.mark.parametrize("dtype, tolerance", half_precision.items())
def test_kl_of_half_precision(direction, dtype, tolerance, device):
    student, teacher = make_logits(4, V, device=device, dtype=dtype)
    check_kl(student, teacher, direction, tolerance=tolerance)
    student, _ = make_logits(4, V, device=device)
    check_kl(student, teacher, direction)  # the teacher's precision may differ


@both_directions
@in_two_temperatures
def test_kl_under_an_offset(direction, temperature, device):
    student, teacher = make_logits(4, V, device=device)
    check_kl((student.detach() + 1e4).requires_grad_(), teacher, direction, temperature)
    student, teacher = make_logits(4, V, device=device)
    check_kl(student, teacher - 1e4, direction, temperature)


@in_both_widths
@both_directions
def test_kl_of_huge_logits(direction, device):
    huge = (torch.rand(2, 8, V, device=device) * 2 - 1) * 1e4
    check_kl(huge[0].clone().requires_grad_(), huge[1], direction, floor=1e-11)
    # Close to each other, the KL is small, and an error of the size of the logits would show.
    close = huge[0] + torch.randn(8, V, device=device)
    check_kl(huge[0].clone().requires_grad_(), close, direction, floor=1e-11)


def almost_one_hot(device):
    """Both sure of one token, to 1e-2 and up to 1e-9; or the student torn between two."""
    student, teacher = make_logits(6, V, device=device)
    with torch.no_grad():
        for logits in (student, teacher):
            logits[:, 70] = torch.tensor([10.0, 13, 16, 20, 26, 20], device=device)
            logits[3] -= 60
        student[5, 7] = 20
    return student, teacher


@both_directions
@in_two_temperatures
def test_kl_where_one_token_has_almost_all_probability(direction, temperature, device):
    """Its gradient is a difference of numbers that are almost equal, and as exact as the others."""
    check_kl(*almost_one_hot(device), direction, temperature, floor=1e-15)


@in_both_widths
@both_directions
def test_kl_where_both_have_no_probability(direction, device):
    student, teacher = make_logits(4, V, device=device)
    gone = torch.zeros(V, dtype=torch.bool, device=device)
    gone[:64] = gone[150] = True  # a whole first block, and one
    with torch.no_grad():
        student[:, gone] = teacher[:, gone] = -inf
    kl = softmax_kl(student, teacher, direction)
    kl.sum().backward()
    truth, exact = true_kl(student[:, ~gone], teacher[:, ~gone], direction)
    truth.sum().backward()
    torch.testing.assert_close(kl.double(), truth, rtol=2e-6, atol=3e-6)
    torch.testing.assert_close(student.grad[:, ~gone].double(), exact.grad, rtol=0, atol=1e-6)
    assert (student.grad[:, gone] == 0).all()


@in_both_widths
@both_directions
@pytest.mark.parametrize("where", [0, 100, slice(0, 64)])
def test_kl_where_one_has_no_probability(direction, where, device):
    """KL(p‖q) is infinite where q alone is 0, with gradient 0, and finite where p alone is."""
    student, teacher = make_logits(3, V, device=device)
    p, q = (student, teacher) if direction == "reverse" else (teacher, student)
    with torch.no_grad():
        q[0, where] = -inf
        p[1, where] = -inf
    kl = softmax_kl(student, teacher, direction)
    kl.sum().backward()
    assert kl[0] == inf and kl[1:].isfinite().all() and (kl[1:] > 0).all()
    assert (student.grad[0] == 0).all() and student.grad.isfinite().all()
    keep = torch.ones(V, dtype=torch.bool, device=device)
    keep[where] = False
    log_p = p[1].detach().double().log_softmax(-1)[keep]
    log_q = q[1].detach().double().log_softmax(-1)[keep]
    truth = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(kl[1].double(), truth, rtol=2e-6, atol=3e-6)
    expected = log_p.exp() * (log_p - log_q - truth)
    if direction == "forward":
        expected = log_q.exp() - log_p.exp()
    torch.testing.assert_close(student.grad[1, keep].double(), expected, rtol=0, atol=1e-6)


@both_directions
def test_kl_where_a_probability_underflows(direction, device):
    """e^−300 is 0 in fp32, also if its block came first, and then 0 · inf must be 0."""
    student, teacher = make_logits(2, V, device=device)
    p, q = (student, teacher) if direction == "reverse" else (teacher, student)
    with torch.no_grad():
        p[:, :64] -= 300
        q[:, :64] = -inf
    kl = softmax_kl(student, teacher, direction)
    kl.sum().backward()
    truth, _ = true_kl(student[:, 64:], teacher[:, 64:], direction)
    torch.testing.assert_close(kl.double(), truth, rtol=2e-6, atol=3e-6)
    assert student.grad.isfinite().all() and (student.grad[:, :64] == 0).all()


@both_directions
def test_kl_of_equals(direction, device):
    student, _ = make_logits(4, V, device=device)
    kl = softmax_kl(student, student.detach().clone(), direction)
    kl.sum().backward()
    assert (kl.abs() <= 3e-6).all() and (student.grad.abs() <= 1e-6).all()


@both_directions
def test_kl_of_neighbours(direction, device):
    """The closer the two, the smaller the gradient, and almost as exact as any other."""
    student = 3 * torch.randn(64, V, device=device)
    teacher = student + 0.03 * torch.randn(64, V, device=device)
    triton = INTERPRETED or device == "cuda"  # balances a row only where one token has most of it
    tolerance = 1e-4 if triton and direction == "forward" else 5e-6
    check_kl(student.requires_grad_(), teacher, direction, tolerance=tolerance)


@both_directions
def test_kl_of_the_full_vocabulary(direction, device, monkeypatch):
    monkeypatch.undo()  # blocks as they are
    student, teacher = (4 * torch.randn(2, 2, 151_936, device=device)).unbind()
    check_kl(student.requires_grad_(), teacher, direction)


@both_directions
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_kl_of_no_rows(direction, shape, device):
    student, teacher = make_logits(*shape, V, device=device)
    kl = softmax_kl(student, teacher, direction)
    kl.sum().backward()
    assert kl.shape == shape and student.grad.shape == (*shape, V)


@both_directions
def test_kl_of_one_token_alone(direction, device):
    student, teacher = make_logits(V, device=device)
    check_kl(student, teacher, direction)


@both_directions
def test_kl_of_slices(direction, device):
    """A wider head is sliced without a copy; rows that lie unevenly are copied."""
    student, teacher = make_logits(2, 4, V + 8, device=device)
    student = student.detach()
    check_kl(student[..., :V].contiguous().requires_grad_(), teacher[..., 8:], direction)
    check_kl(student[..., 8:].requires_grad_(), teacher[..., :V].contiguous(), direction)
    check_kl(student[:, :-1].requires_grad_(), teacher[:, 1:], direction)
    sideways = teacher[0].t().contiguous().t()  # vocabulary not in the last place of the memory
    check_kl(student[0].requires_grad_(), sideways, direction)


@both_directions
def test_kl_of_float64(direction, device):
    """On a GPU computed in fp32, whatever comes; where torch computes, in float64."""
    student, teacher = make_logits(4, V, device=device, dtype=torch.float64)
    kl = softmax_kl(student, teacher, direction)
    kl.sum().backward()
    truth, exact = true_kl(student, teacher, direction)
    truth.sum().backward()
    assert kl.dtype == (torch.float64 if device == "cpu" else torch.float32)
    assert student.grad.dtype == torch.float64 and ((kl - truth).abs() < 1e-5).all()
    torch.testing.assert_close(student.grad, exact.grad, atol=1e-6, rtol=0)


def test_a_column_of_masks_and_of_ids(device):
    """Their numbers do not lie side by side in the memory."""
    student, teacher = make_logits(4, V, device=device)
    table = torch.tensor([[1, 7], [0, 8], [1, 9], [0, 6]], device=device)
    kl = softmax_kl(student, teacher, "reverse", mask=table[:, 0])
    torch.testing.assert_close(kl, softmax_kl(student, teacher, "reverse") * table[:, 0])
    same = softmax_kl(student, teacher, "reverse", mask=torch.ones((), device=device).expand(4))
    assert torch.equal(same, softmax_kl(student, teacher, "reverse"))
    check_logprob(student, table[:, 1])


@both_directions
@in_two_precisions
@pytest.mark.parametrize("inplace", [False, True])
def test_kl_leaves_out_what_has_no_weight(direction, inplace, dtype, device):
    """Rows of mask 0 and rows of incoming gradient 0 get exact zeros, even if they are NaN."""
    student, teacher = make_logits(2, 3, V, device=device, dtype=dtype)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], device=device)
    weight = torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 1.0]], device=device)
    live = (mask != 0) & (weight != 0)
    expected, _ = true_kl(student, teacher, direction)
    reading = student.detach().clone().requires_grad_()
    softmax_kl(reading, teacher, direction).backward(weight * live)
    with torch.no_grad():
        student[~live] = torch.nan
        teacher[~live] = torch.nan
    kl = softmax_kl(student, teacher, direction, mask=mask, inplace_backward=inplace)
    assert (kl[mask == 0] == 0).all() and kl[(mask != 0) & ~live].isnan().all()
    torch.testing.assert_close(kl[live].double(), expected[live], rtol=2e-6, atol=3e-6)
    kl.backward(weight)
    assert (student.grad[~live] == 0).all()
    torch.testing.assert_close(student.grad, reading.grad, rtol=0, atol=1e-7)


@both_directions
def test_nan_is_not_hidden(direction, device):
    student, teacher = make_logits(2, V, device=device)
    with torch.no_grad():
        student[0, 3] = torch.nan
    kl = softmax_kl(student, teacher, direction)
    kl.sum().backward()
    assert kl[0].isnan() and student.grad[0].isnan().any() and student.grad[1].isfinite().all()


# --- the gradient in place -----------------------------------------------------------------------


def losses(direction_or_ids, teacher=None):
    """What the tests in place run, for either function."""
    if teacher is None:
        return lambda z, **options: sum(token_logprob(z, direction_or_ids, **options)).sum()
    return lambda z, **options: softmax_kl(z, teacher, direction_or_ids, **options).sum()


@pytest.fixture(params=["forward", "reverse", "logprob"])
def loss(request, device):
    if request.param == "logprob":
        return losses(torch.arange(4, device=device))
    return losses(request.param, make_logits(4, V, device=device)[1])


def test_in_place_is_the_same_gradient_in_the_logits_memory(loss, device):
    student, _ = make_logits(4, V + 8, device=device)
    loss(student[:, :V]).backward()
    memory = student.detach().clone()
    logits = memory[:, :V].requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, inplace_backward=True), logits)
    torch.testing.assert_close(gradient, student.grad[:, :V], rtol=0, atol=0)
    assert gradient.data_ptr() == memory.data_ptr()
    torch.testing.assert_close(memory[:, :V], gradient, rtol=0, atol=0)
    torch.testing.assert_close(memory[:, V:], student.detach()[:, V:], rtol=0, atol=0)


def test_a_second_backward_after_one_in_place_raises(loss, device):
    student, _ = make_logits(4, V, device=device)
    value = loss(student, inplace_backward=True)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_other_use_of_logits_that_were_overwritten_raises(loss, device):
    student, _ = make_logits(4, V, device=device)
    logits = student.tanh()  # whose backward needs its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss(logits, inplace_backward=True).backward()
    first, second = loss(student, inplace_backward=True), loss(student)
    first.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_in_place_behind_a_linear_layer(loss, device):
    """The ordinary case: nothing else needs the logits, and the weights' gradient is the same."""
    head, hidden = torch.nn.Linear(8, V, device=device), torch.randn(4, 8, device=device)
    expected = torch.autograd.grad(loss(head(hidden)), head.weight)
    found = torch.autograd.grad(loss(head(hidden), inplace_backward=True), head.weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# --- token_logprob -------------------------------------------------------------------------------


def true_logprob(logits, ids, temperature=1.0):
    logits = logits.detach().double().requires_grad_()
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1), logits


def check_logprob(logits, ids, temperature=1.0, tolerance=5e-6, floor=0.0):
    weight, other = torch.randn(2, *ids.shape, device=ids.device)
    logp, entropy = token_logprob(logits, ids, temperature)
    torch.autograd.backward([logp, entropy], [weight, other])
    true_logp, true_entropy, exact = true_logprob(logits, ids, temperature)
    torch.autograd.backward([true_logp, true_entropy], [weight.double(), other.double()])
    assert logp.dtype == entropy.dtype == torch.float32 and logits.grad.dtype == logits.dtype
    assert ((logp - true_logp).abs() <= 3e-6 + 2e-6 * true_logp.abs()).all()
    assert ((entropy - true_entropy).abs() <= 3e-6 + 2e-6 * true_entropy).all()
    error = (logits.grad - exact.grad).abs().amax(-1)
    assert (error <= tolerance * exact.grad.abs().amax(-1) + floor).all()


@plain_torch
@in_two_temperatures
def test_gradcheck_of_logprob(temperature):
    logits, _ = make_logits(2, 3, 7, dtype=torch.float64)
    run = lambda z: token_logprob(z, torch.tensor([[0, 6, 3], [1, 1, 2]]), temperature)  # noqa: E731
    assert torch.autograd.gradcheck(run, logits)


@in_both_widths
@in_two_temperatures
@pytest.mark.parametrize("vocabulary", [1, 25, 64, V])
def test_logprob(temperature, vocabulary, device):
    ids = torch.randint(vocabulary, (2, 3), device=device)
    check_logprob(make_logits(2, 3, vocabulary, device=device)[0], ids, temperature)


def test_logprob_of_half_precision(device):
    for dtype, tolerance in half_precision.items():
        logits, _ = make_logits(4, V, device=device, dtype=dtype)
        check_logprob(logits, torch.arange(4, device=device), tolerance=tolerance)


@in_two_temperatures
def test_logprob_of_large_logits(temperature, device):
    ids = torch.arange(4, device=device)
    logits, _ = make_logits(4, V, device=device)
    check_logprob((logits.detach() + 1e4).requires_grad_(), ids, temperature)
    huge = (torch.rand(4, V, device=device) * 2 - 1) * 1e4
    check_logprob(huge.requires_grad_(), huge.argmax(-1), temperature, floor=1e-11)
    check_logprob(huge.detach().requires_grad_(), ids, temperature, floor=1e-11)


@in_two_temperatures
@pytest.mark.parametrize("token", [70, 7])
def test_logprob_where_one_token_has_almost_all_probability(token, temperature, device):
    ids = torch.full((6,), token, device=device)
    check_logprob(almost_one_hot(device)[0], ids, temperature, floor=1e-15)


@in_both_widths
def test_logprob_where_there_is_no_probability(device):
    """Over a whole first block and for an id; the id's log-probability is −inf then."""
    logits, ids = make_logits(4, V, device=device)[0], torch.tensor([70, 71, 0, 72], device=device)
    with torch.no_grad():
        logits[:, :64] = -inf
    logp, entropy = token_logprob(logits, ids)
    (logp[ids >= 64].sum() + entropy.sum()).backward()
    true_logp, true_entropy, exact = true_logprob(logits[:, 64:], (ids - 64).clamp(min=0))
    (true_logp[ids >= 64].sum() + true_entropy.sum()).backward()
    assert logp[2] == -inf and (logits.grad[:, :64] == 0).all()
    torch.testing.assert_close(entropy.double(), true_entropy, rtol=2e-6, atol=3e-6)
    torch.testing.assert_close(logits.grad[:, 64:].double(), exact.grad, rtol=0, atol=1e-6)


def test_logprob_of_the_full_vocabulary(device, monkeypatch):
    monkeypatch.undo()
    ids = torch.tensor([5, 151_935], device=device)
    check_logprob(make_logits(2, 151_936, device=device)[0], ids)


@in_two_precisions
def test_logprob_leaves_out_what_has_no_weight(dtype, device):
    """Both weights must be 0 for that; an output that is not used has weight 0."""
    logits, _ = make_logits(3, V, device=device, dtype=dtype)
    ids = torch.arange(3, device=device)
    with torch.no_grad():
        logits[1] = torch.nan
    weight = torch.tensor([1.0, 0.0, 2.0], device=device)
    for output in (0, 1):
        logits.grad = None
        token_logprob(logits, ids)[output].backward(weight)
        true_logp_or_entropy = true_logprob(logits[[0, 2]], ids[[0, 2]])
        exact = true_logp_or_entropy[2]
        true_logp_or_entropy[output].backward(weight[[0, 2]].double())
        assert (logits.grad[1] == 0).all()
        tolerance = half_precision.get(dtype, 1e-6) * max(1.0, exact.grad.abs().max())
        assert (logits.grad[[0, 2]].double() - exact.grad).abs().max() <= tolerance


def test_logprob_of_no_rows_and_of_slices(device):
    logits, _ = make_logits(2, 0, V, device=device)
    ids = torch.zeros(2, 0, dtype=torch.long, device=device)
    sum(token_logprob(logits, ids)).sum().backward()
    assert logits.grad.shape == (2, 0, V)
    logits, ids = make_logits(2, 4, V + 8, device=device)[0], torch.arange(8, device=device)
    check_logprob(logits[..., :V].detach().requires_grad_(), ids.view(2, 4))
    check_logprob(logits[:, :-1].detach().requires_grad_(), ids.view(2, 4)[:, 1:])


# --- bad input -----------------------------------------------------------------------------------


def refused(match, function, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as error:
        function(*args, **kwargs)
    return str(error.value)


def test_bad_input_to_the_kl():
    z, wider = torch.zeros(2, 3, 5), torch.zeros(2, 3, 6)
    both = r".*student_logits \[2, 3, 5\], teacher_logits \[2, 3, 5\]"
    refused(r"\[2, 3, 5\], teacher_logits \[2, 3, 6\]", softmax_kl, z, wider, "forward")
    refused("teacher_logits require" + both, softmax_kl, z, z.clone().requires_grad_(), "forward")
    refused("student_logits are torch.int64" + both, softmax_kl, z.long(), z, "forward")
    refused("teacher_logits are torch.int32" + both, softmax_kl, z, z.int(), "forward")
    refused("direction is 'backward'" + both, softmax_kl, z, z, "backward")
    refused(r"mask .*" + both + r", mask \[2, 5\]", softmax_kl, z, z, "forward", mask=z[:, 0])


def test_bad_input_to_logprob(device):
    """On a GPU, too, where indexing alone would end the process's use of it."""
    z, ids = torch.zeros(2, 3, 5, device=device), torch.zeros(2, 3, dtype=torch.long, device=device)
    both = r".*logits \[2, 3, 5\], ids \[2, 3\]"
    refused("ids are not all in" + both, token_logprob, z, ids + 5)
    refused("ids are not all in" + both, token_logprob, z, ids - 100)
    refused("logits are torch.int64" + both, token_logprob, z.long(), ids)
    refused(r"ids are not one.*\[2, 3, 5\], ids \[2, 2\]", token_logprob, z, ids[:, 1:])


# --- the package, the bench, Triton --------------------------------------------------------------


@needs_triton
def test_the_name_is_the_function_after_the_module_was_imported():
    module = importlib.import_module("kernels.softmax_kl")
    from kernels import softmax_kl as name

    assert isinstance(module, types.ModuleType) and name is softmax_kl
    assert isinstance(name, types.FunctionType)


@plain_torch
def test_import_and_use_without_triton():
    code = """if True:
        import sys
        sys.modules["triton"] = None  # as if it were not installed
        import torch
        from kernels import softmax_kl, token_logprob
        softmax_kl(torch.zeros(2, 3), torch.zeros(2, 3), "reverse")
        token_logprob(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))"""
    subprocess.run([sys.executable, "-c", code], check=True)


@plain_torch
def test_bench_on_the_cpu(capsys, monkeypatch):
    """Half of eager's memory at most. The time is for the bench to say, on a quiet machine."""
    monkeypatch.undo()
    shares = bench.cpu_report(sizes=((256, 8_000),), rounds=2)
    assert [memory <= 0.5 for _, memory in shares.values()] == [True] * len(bench.MOVES)
    assert "ours / eager" in capsys.readouterr().out


@plain_torch
@pytest.mark.parametrize("kernel", list(bench.MOVES))
def test_bench_table(kernel):
    """The rows of the GPU's table, on the CPU: gradients are right, and in place saves memory."""
    problem = bench.Problem(70, 500, torch.float32, "cpu")
    rows = [
        bench.measure(kernel, name, loss, problem, "cpu", 1e10, warmup=1, repeats=4)
        for name, loss in bench.contestants(kernel).items()
        if "Liger" not in name
    ]
    assert [row[:4] for row in rows] == [
        [kernel, "70", "500", name] for name in ("eager", "ours", "ours, in place")
    ]
    assert all(float(row[-1]) < 5e-5 for row in rows)
    eager, ours, in_place = (float(row[-2]) for row in rows)
    assert eager > ours > in_place + 0.9
    assert all(line.count("|") == 10 for line in bench.markdown(rows).splitlines())


@pytest.mark.skipif(not GPU, reason="no CUDA")
@both_directions
def test_more_than_2_to_the_31_logits(direction, monkeypatch):
    monkeypatch.undo()
    tokens, vocabulary = 14_200, 151_936
    assert tokens * vocabulary > 2**31
    teacher = torch.randn(tokens, vocabulary, device="cuda", dtype=torch.bfloat16)
    student = torch.randn_like(teacher)
    last = student[-4:].clone().requires_grad_()
    expected = softmax_kl(last, teacher[-4:], direction)
    expected.sum().backward()
    kl = softmax_kl(student.requires_grad_(), teacher, direction, inplace_backward=True)
    kl.sum().backward()
    torch.testing.assert_close(kl[-4:], expected)
    torch.testing.assert_close(student.grad[-4:], last.grad)


@needs_triton
@plain_torch
def test_triton_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


# The parameters of a kernel that are no fp32 pointers, and what they are.
KINDS = {"mask_ptr": "*i1", "ids_ptr": "*i64", "beta": "fp32"}
KINDS |= dict.fromkeys(["V", "p_stride", "q_stride", "grad_stride"], "i32")


@needs_triton
@plain_torch
@pytest.mark.parametrize(
    "vocabulary, logits",
    [(151_936, "*bf16"), (151_669, "*bf16"), (1, "*bf16"), (151_669, "*fp64")],
)
@pytest.mark.parametrize("kernel, kind, loads, powers", [
    ("forward", True, 2, 2 * 9), ("forward", False, 1, 9), ("backward", "forward", 2, 2 * 8),
    ("backward", "reverse", 2, 8), ("backward", "logprob", 1, 8),
])  # fmt: skip
def test_compiles_for_an_h100(
    kernel, kind, loads, powers, vocabulary, logits, tmp_path, monkeypatch
):
    """Without one: no thread waits in the loop, which loads 16 bytes at once where rows allow it;
    where there is no q, nothing is loaded or computed for it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    module = importlib.import_module("kernels.softmax_kl")
    function = getattr(module, f"{kernel}_kernel")
    constants = {"BLOCK": module.BLOCK, "WIDTH": module.lane_width([vocabulary])}
    constants |= {"HAS_Q": kind, "KIND": kind}
    known = KINDS | dict.fromkeys(["p_ptr", "q_ptr", "grad_ptr"], logits)
    kinds, constant, aligned = {}, {}, {}
    for place, argument in enumerate(function.arg_names):
        kinds[argument] = "constexpr" if argument in constants else known.get(argument, "*fp32")
        if argument in constants:
            constant[(place,)] = constants[argument]
        elif kinds[argument] == "i32" and vocabulary == 1:  # as at a launch
            kinds[argument], constant[(place,)] = "constexpr", 1
        elif kinds[argument] != "fp32" and (kinds[argument] != "i32" or vocabulary % 16 == 0):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = compiler.ASTSource(function, kinds, constant, aligned)
    ptx = compiler.compile(source, target=target, options={"num_warps": 16}).asm["ptx"]
    loops = re.findall(r"(\$L__BB0_\d+):(.*?)bra\s+\1;", ptx, re.DOTALL)
    assert len(loops) == (vocabulary > 1) and "ld.global" in ptx
    for _, loop in loops:
        assert "bar.sync" not in loop and "shfl" not in loop
        wide = vocabulary == 151_936
        assert loop.count("ld.global.v4") == loads * wide
        assert loop.count("ex2.approx") == powers or not wide
        assert ("st.global.v4" in loop) == (wide and kernel == "backward")


@needs_triton
@plain_torch
def test_lanes_are_wide_where_every_row_begins_at_a_16th():
    lane_width = importlib.import_module("kernels.softmax_kl").lane_width
    assert [lane_width(sizes) for sizes in ([151_936, 152_064], [151_936, 151_669])] == [8, 1]


@plain_torch
def test_bench_without_cuda_says_so(capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(bench, "cpu_report", lambda: ran.append(1))
    bench.main([])
    assert ran and capsys.readouterr().out.startswith("No CUDA")


@plain_torch
def test_bench_writes_a_table_that_names_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch, "compile", lambda loss, dynamic: loss)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(bench, "times", lambda *args, **counts: [0.5, 0.5, 0.5, 0.5])
    bench.gpu_report(tmp_path / "t.md", [70], [500], "cpu")
    text = (tmp_path / "t.md").read_text()
    assert text.startswith("# a GPU\n") and text.count("| torch.compile |") == len(bench.MOVES)
    assert "| forward KL | 70 | 500 | ours | 0.500 | 0.000 | 7% |" in text  # 5 * 70 * 500 * 2 B
