"""Public data as NumPy float64 arrays, in the units in which they were published: from installed packages, or short tables here."""

from __future__ import annotations

import numpy as np

Arrays = tuple[np.ndarray, ...]


def engel() -> Arrays:
    """Income and food expenditure of 235 Belgian working-class households, in francs (Engel 1857)."""
    return _columns(_statsmodels("engel"), "income", "foodexp")


def cars() -> Arrays:
    """Weight (1000 lb), power (hp), quarter-mile time (s) and miles per gallon of 32 cars (Motor Trend, 1974)."""
    from plotnine.data import mtcars

    return _columns(mtcars, "wt", "hp", "qsec", "mpg")


def huron() -> Arrays:
    """Years since 1874, and the level of Lake Huron (feet), 1875 to 1972."""
    from plotnine.data import huron

    year, level = _columns(huron, "year", "level")
    return year - 1874.0, level


def longley() -> Arrays:
    """Six macroeconomic series, shape ``(16, 6)``, and US employment in thousands, 1947 to 1962 (Longley 1967)."""
    table = _statsmodels("longley")
    return np.stack(_columns(table, "GNPDEFL", "GNP", "UNEMP", "ARMED", "POP", "YEAR"), -1), *_columns(table, "TOTEMP")


def horseshoe() -> Arrays:
    """Ten standardised measurements of 442 patients, and the standardised progress of their diabetes (Efron et al. 2004)."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


def sunspots() -> Arrays:
    """The number of sunspots in each year from 1700 to 2008."""
    return _columns(_statsmodels("sunspots"), "SUNACTIVITY")


def volatility() -> Arrays:
    """Growth of US real GDP in per cent a quarter, 1975 to 1994: the Great Moderation begins half-way."""
    year, gdp = _columns(_statsmodels("macrodata"), "year", "realgdp")
    growth = 100.0 * np.diff(np.log(gdp))
    return (growth[(year[1:] >= 1975) & (year[1:] < 1995)],)


def coal() -> Arrays:
    """Mid-points of 28 periods of four years since 1851, and British coal-mining disasters in each (Jarrett 1979)."""
    disasters = [int(digit) for digit in _DISASTERS]
    return 4.0 * np.arange(28) + 2.0, np.reshape(disasters, (28, 4)).sum(-1).astype(float)


def nile() -> Arrays:
    """Annual flow of the Nile at Aswan, 1871 to 1970 (10^8 cubic metres)."""
    return _columns(_statsmodels("nile"), "volume")


def lynx_hare() -> Arrays:
    """Pelts of hares and of lynxes (thousands) taken by the Hudson's Bay Company, 1900 to 1920, shape ``(21, 2)``."""
    return (np.stack([_HARES, _LYNXES], -1),)


def mpg() -> Arrays:
    """Class (0 to 6), displacement (litres) and highway miles per gallon of 234 cars (EPA, 1999 and 2008)."""
    from plotnine.data import mpg

    names, group = np.unique(np.asarray(mpg["class"], str), return_inverse=True)
    assert len(names) == 7
    return group.astype(float), *_columns(mpg, "displ", "hwy")


def party() -> Arrays:
    """Left-right placement, age, education and income, ``(189, 4)``, and party (0 to 6) of every fifth American asked in 1996."""
    table = _statsmodels("anes96")[::5]
    return np.stack(_columns(table, "selfLR", "age", "educ", "income"), -1), *_columns(table, "PID")


def heart() -> Arrays:
    """Days and age of 45 dead, then of 24 surviving patients after a heart transplant (Miller 1976)."""
    days, died, age = _columns(_statsmodels("heart"), "survival", "censors", "age")
    return days[died == 1], age[died == 1], days[died == 0], age[died == 0]


def seeds() -> Arrays:
    """Seeds that germinated, of how many, seed type and root extract on 21 plates (Crowder 1978)."""
    germinated = [10, 23, 23, 26, 17, 5, 53, 55, 32, 46, 10, 8, 10, 8, 23, 0, 3, 22, 15, 32, 3]
    total = [39, 62, 81, 51, 39, 6, 74, 72, 51, 79, 13, 16, 30, 28, 45, 4, 12, 41, 30, 51, 7]
    return (
        np.array(germinated, float),
        np.array(total, float),
        np.repeat([0.0, 1.0], [11, 10]),
        np.repeat([0.0, 1.0, 0.0, 1.0], [5, 6, 5, 5]),
    )


def _statsmodels(name: str):
    import statsmodels.api as sm

    return getattr(sm.datasets, name).load_pandas().data


def _columns(table, *names: str) -> Arrays:
    return tuple(np.array(table[name], float) for name in names)


# Disasters in each year from 1851 to 1962: 191 in all.
_DISASTERS = (
    "4541043406334026335453144155342522342132211113001011003103220111010100021000110233112111124200140001000001001010"
)
_HARES = np.array(
    [
        30,
        47.2,
        70.2,
        77.4,
        36.3,
        20.6,
        18.1,
        21.4,
        22,
        25.4,
        27.1,
        40.3,
        57,
        76.6,
        52.3,
        19.5,
        11.2,
        7.6,
        14.6,
        16.2,
        24.7,
    ]
)
_LYNXES = np.array(
    [4, 6.1, 9.8, 35.2, 59.4, 41.7, 19, 13, 8.3, 9.1, 7.4, 8, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6]
)
