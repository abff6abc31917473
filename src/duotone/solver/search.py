# Shapes: N out_features, K in_features, B columns of a group, G groups along K, g = group_size, S shards.
# torch is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Scales searched for the error that remains after *both* roundings, instead of taken from each group's largest weight.

A scale below min-max clips the largest weights of a group and rounds all others finer. For a channel-scaled target the
group scales live on the E4M3 grid under the canonical form (one group of the row at the peak), so the row's outer scale
is chosen jointly with them: it slides the whole grid.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.contract import divided
from duotone.scheme import Scheme
from duotone.solver.scales import Scales, bf16, fit_scales, grouped, single_level
from duotone.solver.sweep import Grid, scale_error

#: Shares of the min-max scale to try: for the row's outer scale, and for each BF16 group scale.
_OUTER_SHARES = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)
_GROUP_SHARES = tuple(1.0 - 0.025 * i for i in range(17))
#: E4M3 values to try for each group (eight to the octave), downwards from the first one above this share of min-max.
_GRID_VALUES, _GRID_FROM = 7, 1.06
#: The outer scale of a row moves all its groups at once; so many columns, spread over the row, tell enough to choose it.
_SAMPLE_COLUMNS = 1024
#: How often a wide weight's columns are all tried, about: by groups, and for the outer scale on a sample of them.
SCALE_TRIALS = _GRID_VALUES + 2


def search_scales(
    w_NK: Tensor,
    scheme: Scheme,
    column_weight_K: Tensor | None = None,
    outer_scale: Tensor | None = None,
    shards: int = 1,
) -> Scales:
    """Group and outer scales of least squared error, row by row; never worse than min-max by the same measure.

    With `column_weight_K` each column's squared error counts that often. outer_scale: a tensor's, where it is settled already.
    shards: ranks that will each have a share of the columns and rebuild their scales from that share alone; every share of a
    row then has a group at the peak, so that all of them rebuild these (min-max may be better; it has not).
    """
    start = fit_scales(w_NK, scheme)
    if outer_scale is not None:
        start = Scales(start.group_scale * (start.outer_scale / outer_scale), start.zero_point, outer_scale)
    weight = _Weight(w_NK, scheme.group_size, column_weight_K)
    return (
        _search_rows(weight, start, scheme, shards)
        if scheme.target.channel_outer_scale
        else _search_groups(weight, start, scheme)
    )


def refresh_scale(grid: Grid, group: int, updated_BN: Tensor) -> None:
    """Search one group's scale (and zero point) anew on the weights it now has to cover, and put it into the grid.

    The outer scale stays, as all groups of a row share it. So does the canonical form: a group leaves the peak only while
    another of its row, already visited or still to come, is there; a row with none at the peak is clamped, and free.
    """
    w_NB, scheme = updated_BN.T.contiguous(), grid.scheme
    outer_N, weight = grid.outer_scale, _Weight(w_NB, scheme.group_size, None)
    step_N, zero_N = single_level(w_NB, scheme)
    zero_N1 = None if zero_N is None else zero_N[:, None]
    start = Scales((step_N / outer_N)[:, None], zero_N1, outer_N)
    if scheme.target.channel_outer_scale:
        peaks_GN = grid.group_scale_GN == scheme.peak_group_scale
        bound_N = peaks_GN[group] & (peaks_GN.sum(0) == 1)
        found_N1, _ = _best_groups(weight, start, outer_N, scheme, lacking_N=bound_N)
    else:
        found_N1 = _search_groups(weight, start, scheme).group_scale
    grid.group_scale_GN[group] = found_N1[:, 0]
    if grid.zero_point_GN is not None and zero_N is not None:
        grid.zero_point_GN[group] = zero_N


@dataclass(frozen=True, eq=False)
class _Weight:
    """A weight [N, K] to fit, or a sample of its columns: the width of its groups, and how much each column counts."""

    w_NK: Tensor
    group_size: int
    column_weight_K: Tensor | None

    def sample(self) -> "_Weight":
        """Columns spread over the row, equally many of each group (a short one is filled with zeros, which cost nothing)."""
        stride = max(1, self.w_NK.shape[1] // _SAMPLE_COLUMNS)
        if stride == 1:
            return self
        sampled_NGg = grouped(self.w_NK, self.group_size)[..., ::stride]
        weight_K = self.column_weight_K
        weight_K = None if weight_K is None else grouped(weight_K[None], self.group_size)[..., ::stride].reshape(-1)
        return _Weight(sampled_NGg.reshape(len(self.w_NK), -1), sampled_NGg.shape[-1], weight_K)

    def error(self, candidates_NGC: Tensor, start: Scales, outer: Tensor, scheme: Scheme) -> Tensor:
        """Squared error [N, G, C] under each candidate group scale."""
        given = Scales(start.group_scale, start.zero_point, outer)
        return scale_error(self.w_NK, candidates_NGC, given, scheme, self.group_size, self.column_weight_K)


def _search_rows(weight: _Weight, start: Scales, scheme: Scheme, shards: int) -> Scales:
    """Canonical pairs: the outer scale of each row from a sample of the columns, then the group scales from all of them."""
    sample = weight.sample()
    best_N = torch.full_like(start.outer_scale, torch.inf)
    outer_N = start.outer_scale
    for share in _OUTER_SHARES:
        trial_N = _outer_from_row_max(start.outer_scale * scheme.peak_group_scale * share, scheme)
        error_N = _best_groups(sample, start, trial_N, scheme, shards)[1].sum(-1)
        outer_N = torch.where(error_N < best_N, trial_N, outer_N)
        best_N = torch.minimum(error_N, best_N)
    group_NG, error_NG = _best_groups(weight, start, outer_N, scheme, shards)
    if shards > 1:
        return Scales(group_NG, start.zero_point, outer_N)
    # A sample may mislead: a row that min-max serves better keeps it.
    minmax_N = weight.error(start.group_scale.unsqueeze(-1), start, start.outer_scale, scheme)[..., 0].sum(-1)
    keep_N = minmax_N <= error_NG.sum(-1)
    group_NG = torch.where(keep_N[:, None], start.group_scale, group_NG)
    return Scales(group_NG, start.zero_point, torch.where(keep_N, start.outer_scale, outer_N))


def _best_groups(
    weight: _Weight, start: Scales, outer_N: Tensor, scheme: Scheme, shards: int = 1, lacking_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The E4M3 value of least error for every group under an outer scale, one of each row at the peak, and those errors.

    shards: equal parts of a row, each of which has one there. lacking_N: the rows that must have a group at the peak, where
    others than these groups count too.
    """
    grid = _scale_grid(scheme).to(outer_N.device)
    at_NG = torch.searchsorted(grid, start.step / outer_N[:, None] * _GRID_FROM).clamp(max=len(grid) - 1)
    below_C = torch.arange(_GRID_VALUES, device=grid.device)
    trial_NGC = grid[(at_NG.unsqueeze(-1) - below_C).clamp(min=0)]
    peak_NG1 = torch.full_like(trial_NGC[..., :1], scheme.peak_group_scale)
    error_NGC = weight.error(torch.cat([trial_NGC, peak_NG1], -1), start, outer_N, scheme)
    error_NG, best_NG = error_NGC[..., :-1].min(-1)
    group_NG, peak_error_NG = trial_NGC.gather(-1, best_NG.unsqueeze(-1)).squeeze(-1), error_NGC[..., -1]
    # Where no group of a row is at the peak, the one that loses least goes there; clamped rows are free (canonical form).
    if lacking_N is None:
        lacking_N = outer_N > torch.tensor(scheme.smallest_outer_scale, dtype=torch.float32)
    loss_NSG = (peak_error_NG - error_NG).unflatten(1, (shards, -1))
    lacking_NS1 = lacking_N[:, None, None] & (
        group_NG.unflatten(1, (shards, -1)).amax(-1, keepdim=True) < scheme.peak_group_scale
    )
    raised_NG = (
        torch.zeros_like(loss_NSG, dtype=torch.bool).scatter_(2, loss_NSG.argmin(-1, keepdim=True), lacking_NS1).flatten(1)
    )
    return group_NG.masked_fill(raised_NG, scheme.peak_group_scale), torch.where(raised_NG, peak_error_NG, error_NG)


def _outer_from_row_max(row_max_N: Tensor, scheme: Scheme) -> Tensor:
    """The outer scale that a reader rebuilds from a row maximum, which the file keeps in BF16."""
    return divided(bf16(row_max_N), scheme.peak_group_scale).clamp(min=scheme.smallest_outer_scale)


def _search_groups(weight: _Weight, start: Scales, scheme: Scheme) -> Scales:
    """BF16 group scales under the tensor's power of two: each group by itself."""
    shares_C = torch.tensor(_GROUP_SHARES, device=start.group_scale.device)
    trial_NGC = bf16(start.group_scale.unsqueeze(-1) * shares_C)
    best_NG = weight.error(trial_NGC, start, start.outer_scale, scheme).argmin(-1)
    return Scales(trial_NGC.gather(-1, best_NG.unsqueeze(-1)).squeeze(-1), start.zero_point, start.outer_scale)


def _scale_grid(scheme: Scheme) -> Tensor:
    """The positive values a group scale may take, rising to the peak."""
    values = scheme.target.fp8.decode(torch.arange(1, 127, dtype=torch.uint8))
    return values[torch.isfinite(values) & (values <= scheme.peak_group_scale)]
