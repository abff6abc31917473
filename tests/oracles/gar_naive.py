"""Group-aware reordering with loops over Python lists and nothing clever."""


def gar(diagonal: list[float], group_size: int) -> list[int]:
    """perm[new] = old: repeatedly take the group with the largest remaining entry, then its columns by falling diagonal.

    Equal values: the earlier group or column first.
    """
    groups = [list(range(start, min(start + group_size, len(diagonal)))) for start in range(0, len(diagonal), group_size)]
    permutation: list[int] = []
    while groups:
        first = groups[0]
        for group in groups[1:]:
            if max(diagonal[k] for k in group) > max(diagonal[k] for k in first):
                first = group
        groups.remove(first)
        columns = list(first)
        while columns:
            best = columns[0]
            for k in columns[1:]:
                if diagonal[k] > diagonal[best]:
                    best = k
            columns.remove(best)
            permutation.append(best)
    return permutation
