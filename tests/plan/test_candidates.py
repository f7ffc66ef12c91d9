"""Which inputs the engine rounds together, by type."""

from __future__ import annotations

import pytest

from joulesmith.plan.candidates import activation_block


@pytest.mark.parametrize(
    ("kinds", "block"),
    [
        (("F32", "BF16", "INT4-G64"), 0),
        (("Q8_0", "Q4_1", "IQ4_NL", "MXFP4", "NVFP4", "Q1_0"), 32),
        (("Q4_K", "Q6_K", "IQ4_XS", "IQ3_S", "IQ2_XXS", "IQ1_M", "TQ2_0"), 256),
    ],
)
def test_super_blocks_share_a_scale_of_256_inputs(kinds: tuple[str, ...], block: int) -> None:
    assert {activation_block(k) for k in kinds} == {block}
