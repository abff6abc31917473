# Shapes: N out_features, K in_features, G groups along K, g = group_size.
"""Scales searched for the error that remains after *both* roundings, instead of taken from each group's largest weight.

A scale below min-max clips the largest weights of a group and rounds all others finer. For a channel-scaled target the
group scales live on the E4M3 grid under the canonical form (one group of the row at the peak), so the row's outer scale
is chosen jointly with them: it slides the whole grid.
"""

import torch
from torch import Tensor

from duotone.contract import fp8_product
from duotone.scheme import Scheme
from duotone.solver.scales import Scales, bf16, fit_scales, grouped, nearest_code

#: Shares of the min-max scale to try: for the row's outer scale, and for each BF16 group scale.
_OUTER_SHARES = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)
_GROUP_SHARES = tuple(1.0 - 0.025 * i for i in range(17))
#: E4M3 values to try for each group (eight to the octave), downwards from the first one above this share of min-max.
_GRID_VALUES, _GRID_FROM = 7, 1.06
#: The outer scale of a row moves all its groups at once; so many columns, spread over the row, tell enough to choose it.
_SAMPLE_COLUMNS = 1024
#: Rows searched at a time: temporaries stay in the cache.
_ROWS = 64


def search_scales(w_NK: Tensor, scheme: Scheme) -> Scales:
    """Group and outer scales of least squared error, row by row; never worse than min-max by the same measure."""
    start = fit_scales(w_NK, scheme)
    search = _search_rows if scheme.target.channel_outer_scale else _search_groups
    parts = [search(w_NK[i : i + _ROWS], _rows_of(start, i), scheme) for i in range(0, len(w_NK), _ROWS)]
    group_NG, outer_N = (torch.cat(values) for values in zip(*parts, strict=True))
    return Scales(group_NG, start.zero_point, outer_N if scheme.target.channel_outer_scale else start.outer_scale)


def _rows_of(scales: Scales, start: int) -> Scales:
    rows = slice(start, start + _ROWS)
    zero = None if scales.zero_point is None else scales.zero_point[rows]
    outer = scales.outer_scale[rows] if len(scales.outer_scale) > 1 else scales.outer_scale
    return Scales(scales.group_scale[rows], zero, outer)


def _search_rows(w_NK: Tensor, start: Scales, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Canonical pairs for some rows: the outer scale from a sample of the columns, then the group scales from all of them."""
    w_NGg = grouped(w_NK, scheme)
    stride = max(1, w_NK.shape[1] // _SAMPLE_COLUMNS)
    sample_NGg = w_NGg[..., ::stride].contiguous()
    best_N = torch.full_like(start.outer_scale, torch.inf)
    outer_N = start.outer_scale
    for share in _OUTER_SHARES:
        trial_N = _outer_from_row_max(start.outer_scale * scheme.peak_group_scale * share, scheme)
        error_N = _best_groups(sample_NGg, start, trial_N, scheme)[1].sum(-1)
        outer_N = torch.where(error_N < best_N, trial_N, outer_N)
        best_N = torch.minimum(error_N, best_N)
    group_NG, error_NG = _best_groups(w_NGg, start, outer_N, scheme)
    # A sample may mislead: a row that min-max serves better keeps it.
    minmax_N = _error(w_NGg, start.group_scale, start.zero_point, start.outer_scale, scheme).sum(-1)
    keep_N = minmax_N <= error_NG.sum(-1)
    return torch.where(keep_N[:, None], start.group_scale, group_NG), torch.where(keep_N, start.outer_scale, outer_N)


def _best_groups(w_NGg: Tensor, start: Scales, outer_N: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The E4M3 value of least error for every group under an outer scale, one of each row at the peak, and those errors."""
    grid = _scale_grid(scheme).to(w_NGg.device)
    at_NG = torch.searchsorted(grid, start.step / outer_N[:, None] * _GRID_FROM).clamp(max=len(grid) - 1)
    group_NG = torch.full_like(start.group_scale, scheme.peak_group_scale)
    error_NG = torch.full_like(group_NG, torch.inf)
    for below in range(_GRID_VALUES):
        trial_NG = grid[(at_NG - below).clamp(min=0)]
        trial_error_NG = _error(w_NGg, trial_NG, start.zero_point, outer_N[:, None], scheme)
        better = trial_error_NG < error_NG
        group_NG, error_NG = torch.where(better, trial_NG, group_NG), torch.where(better, trial_error_NG, error_NG)
    return _raise_one_to_peak(w_NGg, group_NG, error_NG, start, outer_N, scheme)


def _raise_one_to_peak(
    w_NGg: Tensor, group_NG: Tensor, error_NG: Tensor, start: Scales, outer_N: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """Where no group of a row is at the peak, put there the one that loses least; clamped rows are free (canonical form)."""
    peak = torch.full_like(group_NG, scheme.peak_group_scale)
    peak_error_NG = _error(w_NGg, peak, start.zero_point, outer_N[:, None], scheme)
    cheapest_N = (peak_error_NG - error_NG).argmin(-1)
    clamped_N = outer_N <= torch.tensor(scheme.smallest_outer_scale, dtype=torch.float32)
    lacking_N = (group_NG.amax(-1) < scheme.peak_group_scale) & ~clamped_N
    raised = torch.zeros_like(group_NG, dtype=torch.bool).scatter_(1, cheapest_N[:, None], lacking_N[:, None])
    return torch.where(raised, peak, group_NG), torch.where(raised, peak_error_NG, error_NG)


def _outer_from_row_max(row_max_N: Tensor, scheme: Scheme) -> Tensor:
    """The outer scale that a reader rebuilds from a row maximum, which the file keeps in BF16."""
    return (bf16(row_max_N) / scheme.peak_group_scale).clamp(min=scheme.smallest_outer_scale)


def _search_groups(w_NK: Tensor, start: Scales, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """BF16 group scales under the tensor's power of two: each group by itself."""
    w_NGg = grouped(w_NK, scheme)
    best_NG, best_error_NG = start.group_scale, torch.full_like(start.group_scale, torch.inf)
    for share in _GROUP_SHARES:
        trial_NG = bf16(start.group_scale * share)
        error_NG = _error(w_NGg, trial_NG, start.zero_point, start.outer_scale, scheme)
        better = error_NG < best_error_NG
        best_NG, best_error_NG = torch.where(better, trial_NG, best_NG), torch.where(better, error_NG, best_error_NG)
    return best_NG, start.outer_scale


def _error(w_NGg: Tensor, group_NG: Tensor, zero_NG: Tensor | None, outer: Tensor, scheme: Scheme) -> Tensor:
    """Squared error of each group after rounding to INT4 and to FP8, [N, G], in units of the weights."""
    group = group_NG.unsqueeze(-1)
    zero = None if zero_NG is None else zero_NG.unsqueeze(-1)
    scaled_NGg = w_NGg / outer.reshape(-1, 1, 1)
    level = nearest_code(scaled_NGg, group, zero, scheme) + scheme.levels[0]
    residual = fp8_product(level, zero, group, scheme.target.fp8).sub_(scaled_NGg)
    return residual.square_().sum(-1) * outer.reshape(-1, 1).square()


def _scale_grid(scheme: Scheme) -> Tensor:
    """The positive values a group scale may take, rising to the peak."""
    values = scheme.target.fp8.decode(torch.arange(1, 127, dtype=torch.uint8))
    return values[torch.isfinite(values) & (values <= scheme.peak_group_scale)]
