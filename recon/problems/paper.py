"""The results that Recon's authors report, to be printed beside one's own.

All figures are from Shi et al., "Recon: Reducing Conflicting Gradients from the Root for Multi-Task Learning", ICLR
2023, arXiv 2302.11289: means over three seeds, in the units of the tables there. #P is the model's size in MB, of
float32 parameters (2^20 bytes each). Δm is as printed; in table 5, it is about 0.4 below what the rows give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SOURCE = "arXiv 2302.11289"

Column = tuple[str, str, float]
"""A task, a metric, and what the paper's number is multiplied by to be in the metric's own unit."""


@dataclass(frozen=True)
class PaperRow:
    """One row of a table: the metrics in the order of the columns, Δm in percent, and the size in MB."""

    metrics: tuple[float, ...]
    delta_m: float | None
    size: float


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables of results.

    Args:
        number: its number there.
        columns: what its metrics are here.
        rows: by method and surgery, in recon's words: `("pcgrad", "Recon")`.
    """

    number: int
    columns: tuple[Column, ...]
    rows: Mapping[tuple[str, str], PaperRow]


@dataclass(frozen=True)
class CosineTable:
    """One of the paper's tables of the distribution of cosines over all shared parameters.

    Args:
        number: its number there.
        edges: the bins' lower ends but for -1, from the top; a bin holds its lower end.
        severe: the "reduction" is that of cosines below this.
        shares: in percent, from the top bin to the lowest, by method and surgery.
    """

    number: int
    edges: tuple[float, ...]
    severe: float
    shares: Mapping[tuple[str, str], tuple[float, ...]]


def results(problem: str, backbone: str) -> PaperTable | None:
    """The paper's results on a problem with this network, if it has any."""
    return _RESULTS.get((problem, backbone))


def cosines(problem: str, backbone: str) -> CosineTable | None:
    """The paper's distribution of cosines on a problem with this network, if it has one."""
    return _COSINES.get((problem, backbone))


def _rows(text: str) -> dict[tuple[str, str], PaperRow]:
    """Lines of `method[+surgery] metric ... Δm size`."""
    rows = {}
    for line in text.strip().splitlines():
        name, *metrics, delta_m, size = line.split()
        change = None if delta_m == "-" else float(delta_m)
        rows[_key(name)] = PaperRow(tuple(map(float, metrics)), change, float(size))
    return rows


def _shares(text: str) -> dict[tuple[str, str], tuple[float, ...]]:
    """Lines of `method[+surgery] share ...`, from the top bin to the lowest."""
    lines = [line.split() for line in text.strip().splitlines()]
    return {_key(name): tuple(map(float, shares)) for name, *shares in lines}


def _key(name: str) -> tuple[str, str]:
    method, _, surgery = name.partition("+")
    return method, surgery


_PERCENT = 0.01


def _segmentation_and_depth(depth: str) -> tuple[Column, ...]:
    return (
        ("segmentation", "mean_iou", _PERCENT),
        ("segmentation", "pixel_accuracy", _PERCENT),
        (depth, "absolute_error", 1.0),
        (depth, "relative_error", 1.0),
    )


_CITYSCAPES = _segmentation_and_depth("inverse_depth")
_NORMALS: tuple[Column, ...] = (
    ("normals", "mean_angle", 1.0),
    ("normals", "median_angle", 1.0),
    ("normals", "within_11.25", _PERCENT),
    ("normals", "within_22.5", _PERCENT),
    ("normals", "within_30", _PERCENT),
)
_NYUV2 = _segmentation_and_depth("depth") + _NORMALS

_RESULTS = {
    ("multi-fashion-mnist", "ResNet18"): PaperTable(
        1,
        (("digit", "accuracy", _PERCENT), ("fashion", "accuracy", _PERCENT)),
        _rows("""
            single-task     98.37 89.63     -  85.62
            joint           97.42 88.82 -0.94  42.81
            joint+Recon     98.13 89.26 -0.33  43.43
            mgda            95.19 89.46 -1.71  42.81
            mgda+Recon      98.33 89.28 -0.22  43.43
            pcgrad          97.37 88.68 -1.04  42.81
            pcgrad+Recon    98.30 89.77  0.04  43.43
            graddrop        97.38 88.57 -1.10  42.81
            graddrop+Recon  98.25 89.51 -0.13  43.43
            cagrad          97.47 88.85 -0.90  42.81
            cagrad+Recon    98.28 89.65 -0.04  43.43
        """),
    ),
    ("celeba", "ResNet18"): PaperTable(
        2,
        (("", "error", _PERCENT),),  # the mean over the tasks
        _rows("""
            single-task     8.38     -  1706.03
            joint           8.33  0.55    43.26
            joint+Recon     8.22  1.92    68.03
            cagrad          8.31  0.79    43.26
            cagrad+Recon    8.23  1.74    68.03
            graddrop        8.33  0.23    43.26
            graddrop+Recon  8.20  2.13    68.03
            pcgrad          8.64 -3.14    43.26
            pcgrad+Recon    8.36  0.24    68.03
        """),
    ),
    ("cityscapes", "SegNet"): PaperTable(
        3,
        _CITYSCAPES,
        _rows("""
            single-task     74.36 93.22 0.0128  29.98      -  190.59
            joint           74.13 93.13 0.0166 116.00 -79.32   95.43
            joint+Recon     74.17 93.21 0.0136  43.18 -12.63  108.44
            mgda            70.74 92.19 0.0130  47.09 -16.22   95.43
            mgda+Recon      71.01 92.17 0.0129  33.41  -4.46  108.44
            graddrop        74.08 93.08 0.0173 115.79 -80.48   95.43
            graddrop+Recon  74.17 93.11 0.0134  41.37 -10.69  108.44
            pcgrad          73.98 93.08 0.02   114.50 -78.39   95.43
            pcgrad+Recon    74.18 93.14 0.0136  46.02 -14.92  108.44
            cagrad          73.81 93.02 0.0153  88.29 -53.81   95.43
            cagrad+Recon    74.22 93.10 0.0130  38.27  -7.38  108.44
        """),
    ),
    ("cityscapes", "MTAN"): PaperTable(
        16,
        _CITYSCAPES,
        _rows("""
            single-task      73.74 93.05 0.0129 27.71      -  190.58
            joint            75.35 93.55 0.0169 45.64 -23.26  157.19
            joint+Recon      75.72 93.74 0.0130 40.90 -11.36  196.32
            joint+Recon*     76.32 93.76 0.0132 46.40 -16.44  159.19
            mgda             70.46 91.75 0.0224 34.33 -26.02  157.19
            mgda+Recon       72.23 92.60 0.0122 26.93   1.37  196.32
            mgda+Recon*      70.83 92.14 0.0125 25.69   1.31  159.19
            graddrop         75.19 93.53 0.0168 46.35 -23.90  157.19
            graddrop+Recon   75.60 93.72 0.0127 38.55  -8.71  196.32
            graddrop+Recon*  76.49 93.82 0.0129 47.54 -16.81  159.19
            pcgrad           75.64 93.54 0.02   43.53 -23.60  157.19
            pcgrad+Recon     75.89 93.71 0.0129 40.05 -10.35  196.32
            pcgrad+Recon*    76.24 93.69 0.0128 45.24 -14.66  159.19
            cagrad           75.26 93.50 0.0176 44.23 -23.40  157.19
            cagrad+Recon     75.65 93.71 0.0125 36.23  -6.15  196.32
            cagrad+Recon*    76.25 93.74 0.0123 40.05  -8.99  159.19
        """),
    ),
    # Its four tasks: all but the edges.
    ("pascal-context", "MobileNetV2RASPP"): PaperTable(
        4,
        (
            ("semseg", "mean_iou", _PERCENT),
            ("semseg", "pixel_accuracy", _PERCENT),
            ("human_parts", "mean_iou", _PERCENT),
            ("human_parts", "pixel_accuracy", _PERCENT),
            ("saliency", "max_iou", _PERCENT),
            *_NORMALS[:4],
        ),
        _rows("""
            single-task     65.00 90.53 59.59 92.61 65.61 14.55 12.36 46.51 81.29     -  30.09
            joint           64.06 90.45 57.91 92.17 62.71 16.40 14.23 39.38 75.93 -4.82   8.04
            joint+Recon     64.73 90.50 59.00 92.44 66.17 14.99 12.68 44.82 80.11 -0.66  10.20
            mgda            46.05 86.62 54.82 91.39 64.76 15.77 13.54 41.98 77.82 -7.67   8.04
            mgda+Recon      55.82 87.73 56.31 91.67 64.91 15.12 12.88 44.36 79.81 -4.14  10.20
            pcgrad          63.91 90.45 58.01 92.19 63.09 16.34 14.19 39.62 76.06 -4.59   8.04
            pcgrad+Recon    65.02 90.45 59.22 92.46 66.14 14.95 12.73 44.96 80.22 -0.55  10.20
            graddrop        64.14 90.34 57.62 92.12 62.64 16.46 14.28 39.29 75.71 -5.00   8.04
            graddrop+Recon  64.48 90.45 59.08 92.46 66.23 14.94 12.72 45.03 80.25 -0.63  10.20
            cagrad          63.37 90.17 57.49 92.07 64.16 16.30 14.12 39.80 76.23 -4.37   8.04
            cagrad+Recon    64.60 90.40 59.27 92.47 65.67 14.92 12.71 45.10 80.33 -0.76  10.20
        """),
    ),
    ("nyuv2", "MTAN"): PaperTable(
        5,
        _NYUV2,
        _rows("""
            single-task     38.67 64.27 0.6881 0.2788 24.87 18.99 30.43 57.81 69.70     -  285.88
            joint           39.48 65.23 0.5491 0.2235 27.87 23.76 22.68 47.91 61.58  0.75  168.72
            joint+Recon     39.54 65.20 0.5312 0.2234 26.55 21.40 26.53 52.60 65.31  4.14  169.59
            mgda            29.28 60.30 0.6027 0.2515 24.89 19.32 29.85 57.18 69.38 -2.26  168.72
            mgda+Recon      32.82 61.26 0.5884 0.2295 25.17 19.72 28.18 56.49 68.96  0.53  169.59
            graddrop        38.70 64.97 0.5565 0.2333 27.41 23.00 23.79 49.45 62.87  0.49  168.72
            graddrop+Recon  40.14 66.08 0.5265 0.2241 26.51 21.45 26.51 52.48 65.26  4.67  169.59
            pcgrad          38.55 65.07 0.54   0.23   26.90 22.05 24.98 51.36 64.41  2.02  168.72
            pcgrad+Recon    38.61 65.48 0.5350 0.2271 26.31 21.11 26.90 53.21 65.95  3.87  169.59
            cagrad          39.89 66.47 0.5496 0.2281 26.36 21.47 25.50 52.68 65.90  3.74  168.72
            cagrad+Recon    39.92 66.07 0.5320 0.2200 25.80 20.59 27.60 54.31 67.05  5.80  169.59
        """),
    ),
    ("nyuv2", "SegNet"): PaperTable(
        15,
        _NYUV2,
        _rows("""
            single-task      38.67 64.27 0.6881 0.2788 24.8683 18.9919 30.43 57.81 69.7  -  285.88
            joint            38.62 65.36 0.5378 0.2273 29.92 25.82 20.79 44.29 57.36 -1.62   95.58
            joint+Recon      40.68 66.12 0.5786 0.2558 26.72 21.41 26.58 52.58 65.20  2.15  139.59
            joint+Recon*     38.81 63.69 0.5637 0.2413 26.75 21.73 26.16 51.80 64.64  1.59  121.59
            mgda             25.71 57.72 0.6033 0.2358 24.53 18.65 31.22 58.46 70.21 -2.15   95.58
            mgda+Recon       36.64 62.36 0.5613 0.2255 24.66 18.66 31.30 58.47 70.16  5.37  139.59
            mgda+Recon*      36.85 63.51 0.5760 0.2362 24.89 18.96 30.53 57.94 69.82  4.34  121.59
            graddrop         39.01 66.13 0.5462 0.2296 29.72 25.51 19.87 44.68 58.12 -1.52   95.58
            graddrop+Recon   39.78 65.63 0.5460 0.2280 26.42 21.16 26.89 53.16 65.84  4.45  139.59
            graddrop+Recon*  39.97 65.71 0.5544 0.2261 26.52 21.37 26.65 52.65 65.46  4.21  121.59
            pcgrad           40.01 65.77 0.5349 0.2227 28.53 24.08 22.33 47.42 60.69  1.43   95.58
            pcgrad+Recon     40.03 65.92 0.5523 0.2384 26.24 20.89 27.30 53.66 66.25  4.19  139.59
            pcgrad+Recon*    39.93 65.46 0.5494 0.2315 26.82 21.70 26.34 52.04 64.74  3.53  121.59
            cagrad           38.87 66.54 0.5331 0.2289 25.85 20.60 27.50 54.41 67.10  5.60   95.58
            cagrad+Recon     40.68 66.12 0.5372 0.2266 25.44 19.87 28.96 56.00 68.28  6.99  139.59
            cagrad+Recon*    39.97 65.92 0.5298 0.2273 25.56 20.11 28.69 55.37 67.75  6.47  121.59
        """),
    ),
}

_FINE, _COARSE = (0.0, -0.01, -0.02, -0.03), (0.0, -0.02, -0.04, -0.06, -0.08)
DEFAULT_EDGES, DEFAULT_SEVERE = _FINE, -0.01
"""The paper's bins on Multi-Fashion+MNIST, for problems that it has no table of."""

# The paper's "random" has as many layers as Recon (its RSL).
_COSINES = {
    ("multi-fashion-mnist", "ResNet18"): CosineTable(
        6,
        _FINE,
        -0.01,
        _shares("""
            joint           56.56 31.25  9.26 2.05 1.25
            joint+random    53.44 27.35 13.45 4.18 1.58
            joint+Recon     58.53 37.67  3.04 0.5  0.25
            mgda            56.06 32.36  8.87 1.71 1.0
            mgda+Recon      56.50 40.93  2.12 0.26 0.18
            graddrop        57.26 31.06  8.93 1.72 1.03
            graddrop+Recon  57.61 38.28  3.32 0.54 0.26
            pcgrad          56.72 31.19  9.09 1.90 1.10
            pcgrad+Recon    57.75 38.76  2.87 0.42 0.2
            cagrad          56.18 31.25  9.37 2.00 1.20
            cagrad+Recon    59.06 37.84  2.44 0.41 0.25
        """),
    ),
    ("cityscapes", "SegNet"): CosineTable(
        8,
        _COARSE,
        -0.02,
        _shares("""
            joint           59.55 10.14 8.52 6.45 4.79 10.54
            joint+random    53.16  9.01 7.34 5.69 4.53 20.26
            joint+Recon     73.62 20.13 5.13 0.94 0.14  0.03
            mgda            63.9  12.51 8.59 5.39 3.29  6.33
            mgda+Recon      78.27 12.54 5.54 2.23 0.85  0.56
            graddrop        59.56  9.61 8.19 6.49 4.76 11.38
            graddrop+Recon  73.82 19.75 5.17 1.05 0.16  0.05
            pcgrad          59.85  9.58 7.94 6.24 4.41 11.98
            pcgrad+Recon    74.52 19.43 4.89 0.96 0.15  0.06
            cagrad          60.79 11.13 8.83 6.05 4.06  9.13
            cagrad+Recon    74.54 19.77 4.62 0.89 0.13  0.04
        """),
    ),
    ("nyuv2", "MTAN"): CosineTable(
        9,
        _COARSE,
        -0.04,
        _shares("""
            joint           61.96  3.85 3.63 3.39 3.11 24.05
            joint+random    52.61  3.75 3.60 3.43 3.30 33.31
            joint+Recon     73.99 14.17 7.07 2.89 1.13  0.76
            mgda            61.28  2.97 2.77 2.81 2.64 27.53
            mgda+Recon      74.08 13.38 7.21 3.19 1.28  0.87
            graddrop        62.93  3.83 3.70 3.45 3.16 22.92
            graddrop+Recon  75.35 13.50 6.71 2.71 1.03  0.70
            pcgrad          63.25  3.61 3.62 3.26 3.06 23.20
            pcgrad+Recon    75.54 12.66 6.66 2.98 1.25  0.90
            cagrad          61.95  3.53 3.39 3.21 3.05 24.88
            cagrad+Recon    74.49 14.20 6.96 2.71 1.01  0.63
        """),
    ),
    ("pascal-context", "MobileNetV2RASPP"): CosineTable(
        10,
        _COARSE,
        -0.02,
        _shares("""
            joint           61.26  9.66 7.90 5.85 4.16 11.16
            joint+random    59.20 21.01 9.91 3.05 1.32  1.30
            joint+Recon     63.99 23.57 7.65 2.59 1.07  1.13
            mgda            60.40  8.51 7.27 5.68 4.35 13.80
            mgda+Recon      63.61 33.53 2.04 0.45 0.17  0.20
            graddrop        61.18  9.66 7.89 5.80 4.21 11.24
            graddrop+Recon  63.76 23.41 7.83 2.71 1.12  1.16
            pcgrad          61.35  9.83 7.90 5.82 4.13 10.97
            pcgrad+Recon    63.83 23.61 7.65 2.66 1.10  1.16
            cagrad          60.99  9.95 8.03 5.91 4.23 10.88
            cagrad+Recon    63.78 24.04 7.53 2.51 1.04  1.08
        """),
    ),
}
