"""Score numeric questions by InfoSeek's rule: the answer's number is in an accepted range."""

import re
from collections.abc import Sequence

# A minus sign precedes a number and is not between two ("1700-1800"); commas separate thousands.
_NUMBER = re.compile(r"(?<![\w.,])[-\u2212]?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\d+", re.ASCII)


def in_range(answer: str | None, ranges: Sequence[Sequence[float]]) -> float:
    """Return 1.0 if the answer has exactly one number and it is in one of the (low, high) ranges, else 0.0.

    "1,889 m" has one number, "10 or 12" two.
    """
    numbers = _NUMBER.findall(answer or "")
    if len(numbers) != 1:
        return 0.0
    value = float(numbers[0].replace(",", "").replace("\N{MINUS SIGN}", "-"))
    return float(any(low <= value <= high for low, high in ranges))
