"""bench.step's own members do the same work, which is what makes their times comparable."""

import numpy as np
import pytest

from bench import step
from bench.step_parts import MEMBERS, Size, for_trl, from_trl, make_rows, write_inputs

TINY = Size(vocabulary=40, width=32, intermediate=48, layers=2, heads=2, kv_heads=1, rows=10, scale=0.1)


def test_packed_and_padded_steps_have_one_loss_and_gradient(tmp_path):
    write_inputs(tmp_path, TINY, make_rows(TINY, TINY.rows), threads=1)
    said = {layout: MEMBERS[layout](tmp_path)() for layout in ("packed", "padded")}
    step.check_agreement(said)


def test_a_member_that_does_other_work_is_refused():
    with pytest.raises(SystemExit, match="not the same work"):
        step.check_agreement({"packed": {"loss": 1.0, "grad_norm": 1.0}, "trl": {"loss": 1.0, "grad_norm": 1.01}})


def test_what_trl_is_given_is_the_same_row():
    for row in make_rows(TINY, 3):
        same = from_trl(0, for_trl(row))
        for name in ("token_ids", "trained", "logprobs", "advantages"):
            np.testing.assert_array_equal(getattr(same, name), getattr(row, name))


def test_even_rows_leave_nothing_to_pad():
    assert len({len(row.token_ids) for row in make_rows(TINY, 6, even=True)}) == 1
