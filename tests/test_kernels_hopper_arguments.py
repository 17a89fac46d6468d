"""What the Hopper launchers refuse, and by which name; nothing is launched."""

import pytest
import torch

from attention_cases import make_case

pytest.importorskip("triton")

from kernels.capability import has_hopper_decode, has_hopper_prefill, is_hopper
from kernels.hopper_decode import DecodeSchedule, check_decode, decode_attention_hopper, why_not
from kernels.hopper_prefill import check_prefill


def decodes():
    return make_case([1, 1], [50, 700], num_decodes=2, device="cpu")


def test_decode_names_the_wrong_argument():
    case = decodes()
    table, schedule = case.plan.page_table, DecodeSchedule(case.plan.context_lens, 8, 2, 128)
    good = (case.q, case.cache, 1, table, schedule, torch.zeros(2, 8))
    check_decode(*good)
    wrong = {
        "cache must be": (1, case.cache[:, :, :, :, ::2]),
        "layer 2": (2, 2),
        "page_table must be": (3, table.long()),
        "q is": (0, case.q.half()),
        "q must have": (0, case.q.transpose(0, 1).contiguous().transpose(0, 1)),
        "the schedule is for": (4, DecodeSchedule(case.plan.context_lens, 4, 2, 128)),
        "lse must be": (5, torch.zeros(2, 8, dtype=torch.float64)),
    }
    for message, (place, value) in wrong.items():
        arguments = list(good)
        arguments[place] = value
        with pytest.raises(ValueError, match=message):
            check_decode(*arguments)


def test_a_schedule_names_the_wrong_argument():
    lens = torch.ones(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="context_lens"):
        DecodeSchedule(lens.long(), 8, 2, 128)
    with pytest.raises(ValueError, match="heads 9"):
        DecodeSchedule(lens, 9, 2, 128)
    with pytest.raises(ValueError, match="queries"):
        DecodeSchedule(lens, 8, 1, 128, queries=9)
    with pytest.raises(ValueError, match="queries"):
        DecodeSchedule(lens, 8, 1, 128, queries=0)
    with pytest.raises(ValueError, match="window"):
        DecodeSchedule(lens, 8, 2, 128, window=-1)
    with pytest.raises(ValueError, match="skip"):
        DecodeSchedule(lens, 8, 2, 128, skip=lens.long())


def test_a_schedule_is_for_its_number_of_queries():
    case = make_case([3, 3], [50, 700], num_decodes=2, decode_queries=3, device="cpu")
    lens, table = case.plan.context_lens, case.plan.page_table
    check_decode(case.q, case.cache, 1, table, DecodeSchedule(lens, 8, 2, 128, queries=3), None)
    with pytest.raises(ValueError, match="the schedule is for"):
        check_decode(case.q, case.cache, 1, table, DecodeSchedule(lens, 8, 2, 128, queries=2), None)


def test_queries_over_a_prefix_may_end_within_a_tile():
    case = make_case([1, 1], [50, 700], num_decodes=2, device="cpu")
    table = case.plan.page_table[:1].expand(2, -1)
    schedule = DecodeSchedule(case.plan.context_lens, 8, 2, 128, queries=2, causal=False)
    check_decode(case.q, case.cache, 1, table, schedule, None)
    with pytest.raises(ValueError, match="the schedule is for"):
        check_decode(case.q.repeat(3, 1, 1), case.cache, 1, table, schedule, None)


def test_more_work_than_the_kernels_can_count():
    case = decodes()
    case.plan.contexts = [2**31, 2**31]
    with pytest.raises(ValueError, match="context_lens"):
        decode_attention_hopper(case.q, case.cache, 1, case.plan)


def test_prefill_names_the_wrong_argument():
    case = make_case([3, 5], [50, 700], device="cpu")
    check_prefill(case.q, case.cache, 1, case.plan, torch.zeros(8, 8))
    with pytest.raises(ValueError, match="lse"):
        check_prefill(case.q, case.cache, 1, case.plan, torch.zeros(8, 4))
    with pytest.raises(ValueError, match="layer"):
        check_prefill(case.q, case.cache, 2, case.plan, None)
    wide = make_case([3], [50], d=80, device="cpu")
    with pytest.raises(ValueError, match="head_dim 80"):
        check_prefill(wide.q, wide.cache, 1, wide.plan, None)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((64, 16, 1, torch.bfloat16), ""),
        ((128, 128, 64, torch.float16), ""),
        ((96, 64, 4, torch.bfloat16), "head_dim 96"),
        ((128, 32, 4, torch.bfloat16), "page_size 32"),
        ((128, 64, 71, torch.bfloat16), "71 query heads"),
        ((128, 64, 4, torch.float32), "float32"),
    ],
)
def test_shapes_for_the_plain_kernel_have_a_reason(shape, reason):
    assert reason in why_not(*shape)
    assert bool(reason) == bool(why_not(*shape))


def test_a_cpu_is_no_hopper():
    case = decodes()
    assert not is_hopper(torch.device("cpu"))
    assert not has_hopper_decode(case.q, case.cache)
    assert not has_hopper_prefill(case.q, case.cache)
