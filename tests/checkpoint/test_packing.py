# Shapes: N out_features, K in_features.
"""Storage packing: against words written by hand, against compressed_tensors, and back."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from duotone.checkpoint.packing import pack_int4, unpack_int4

THOROUGH = settings(max_examples=100, deadline=None, derandomize=True)

#: Eight codes, first in the lowest four bits, and the int32 they make.
KNOWN_WORDS = [
    ([0, 0, 0, 0, 0, 0, 0, 0], 0),
    ([1, 0, 0, 0, 0, 0, 0, 0], 1),
    ([0, 1, 0, 0, 0, 0, 0, 0], 16),
    ([0, 1, 2, 3, 4, 5, 6, 7], 0x76543210),
    ([8, 9, 10, 11, 12, 13, 14, 15], 0xFEDCBA98 - 2**32),
    ([0, 0, 0, 0, 0, 0, 0, 7], 0x70000000),
    ([0, 0, 0, 0, 0, 0, 0, 8], -(2**31)),
    ([8, 8, 8, 8, 8, 8, 8, 8], 0x88888888 - 2**32),
    ([15, 15, 15, 15, 15, 15, 15, 7], 2**31 - 1),
    ([15, 15, 15, 15, 15, 15, 15, 15], -1),
]


@st.composite
def code_matrices(draw: st.DrawFn) -> torch.Tensor:
    """Codes uint8 0..15 [N, K], K a multiple of 8."""
    rows, columns = draw(st.integers(1, 9)), 8 * draw(st.integers(1, 9))
    codes = draw(st.binary(min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(list(codes), dtype=torch.uint8).reshape(rows, columns) & 15


@pytest.mark.parametrize(("codes", "word"), KNOWN_WORDS)
def test_known_words(codes: list[int], word: int) -> None:
    """The first value lies in the lowest four bits, the eighth ends in the sign bit; both ways."""
    packed = pack_int4(torch.tensor([codes], dtype=torch.uint8))
    assert packed.dtype == torch.int32
    assert packed.tolist() == [[word]]
    assert unpack_int4(torch.tensor([[word]], dtype=torch.int32), 8).tolist() == [codes]


def test_every_code_in_every_place() -> None:
    """All 16 codes in all 8 places of a word, between neighbors of all zeros and of all ones."""
    for neighbor in (0, 15):
        codes = torch.full((16 * 8, 8), neighbor, dtype=torch.uint8)
        for code in range(16):
            for place in range(8):
                codes[code * 8 + place, place] = code
        words = pack_int4(codes)
        around = [sum(neighbor << 4 * other for other in range(8) if other != place) for place in range(8)]
        expected = [around[place] + (code << 4 * place) for code in range(16) for place in range(8)]
        assert (words[:, 0].long() & 0xFFFFFFFF).tolist() == expected
        assert torch.equal(unpack_int4(words, 8), codes)


@THOROUGH
@given(codes=code_matrices(), dropped=st.integers(0, 7))
def test_round_trip(codes: torch.Tensor, dropped: int) -> None:
    """Unpacking gives back what was packed, uint8 and contiguous, also when the last word is only partly wanted."""
    columns = codes.shape[1] - dropped
    back = unpack_int4(pack_int4(codes), columns)
    assert back.dtype == torch.uint8
    assert back.is_contiguous()
    assert torch.equal(back, codes[:, :columns])


@THOROUGH
@given(codes=code_matrices())
def test_equals_compressed_tensors(codes: torch.Tensor) -> None:
    """Word for word what compressed_tensors packs from the signed values, and each reads the other's words."""
    signed = (codes.to(torch.int16) - 8).to(torch.int8)
    words = pack_int4(codes)
    assert torch.equal(words, pack_to_int32(signed, 4))
    assert torch.equal(unpack_from_int32(words, 4, signed.shape), signed)
    assert torch.equal(unpack_int4(pack_to_int32(signed, 4), codes.shape[1]), codes)


@THOROUGH
@given(stored_NG=code_matrices().map(lambda codes: codes.T.contiguous()))
def test_zero_points_equal_compressed_tensors(stored_NG: torch.Tensor) -> None:
    """Zero points are packed along the rows: packing the transpose is what compressed_tensors does with packed_dim 0."""
    signed = (stored_NG.to(torch.int16) - 8).to(torch.int8)
    words = pack_int4(stored_NG.T.contiguous()).T
    assert torch.equal(words, pack_to_int32(signed, 4, packed_dim=0))


def test_transposed_codes() -> None:
    """A view that is not contiguous packs like its copy."""
    codes = torch.arange(16 * 24, dtype=torch.int64).remainder(16).to(torch.uint8).reshape(16, 24).T
    assert not codes.is_contiguous()
    assert torch.equal(pack_int4(codes), pack_int4(codes.contiguous()))


@pytest.mark.parametrize("columns", [1, 7, 9, 12])
def test_refuses_a_part_of_a_word(columns: int) -> None:
    """The caller pads: K that 8 does not divide is a mistake."""
    with pytest.raises(ValueError, match=f"K={columns} is not a multiple of 8"):
        pack_int4(torch.zeros(2, columns, dtype=torch.uint8))
