"""How far a measured share may be from the true one."""

import math

NORMAL_95 = 1.959963984540054  # 2.5 % of a normal distribution lie above


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n independent examples.

    With z = 1.96, the values p for which |share - p| <= z sqrt(p (1 - p) / n):

        (share + z^2 / 2n +- z sqrt(share (1 - share) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    It stays within 0 and 1 and holds for small n too (Wilson 1927, Journal of the
    American Statistical Association 22).
    """
    z = NORMAL_95
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / (1 + z**2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)
