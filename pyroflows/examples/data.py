"""The published numbers behind the packaged examples, as plain Python tuples.

Sources:

- ``SCHOOLS_*``: D. B. Rubin, "Estimation in parallel randomized experiments", Journal of Educational
  Statistics 6(4), 1981, https://doi.org/10.3102/10769986006004377
- ``FLIGHT_*``: S. R. Dalal, E. B. Fowlkes, B. Hoadley, "Risk analysis of the space shuttle: pre-Challenger
  prediction of failure", Journal of the American Statistical Association 84(408), 1989,
  https://doi.org/10.1080/01621459.1989.10478858
- ``CAR_*``: H. V. Henderson, P. F. Velleman, "Building multiple regression models interactively",
  Biometrics 37(2), 1981, https://doi.org/10.2307/2530428 (road tests of Motor Trend magazine, 1974; known as
  R's ``mtcars``)
"""

from __future__ import annotations

# Schools A to H: estimated effect of coaching on the SAT-V score, and its standard error.
SCHOOLS_EFFECT = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
SCHOOLS_ERROR = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)

# The 23 shuttle flights before Challenger whose boosters were recovered: temperature of the joints in degrees
# Fahrenheit, and whether any primary O-ring showed thermal distress.
FLIGHT_TEMPERATURE = (
    66.0, 70.0, 69.0, 68.0, 67.0, 72.0, 73.0, 70.0, 57.0, 63.0, 70.0, 78.0,
    67.0, 53.0, 67.0, 75.0, 70.0, 81.0, 76.0, 79.0, 75.0, 76.0, 58.0,
)  # fmt: skip
FLIGHT_DISTRESS = (
    0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0,
    0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0,
)  # fmt: skip

# 32 cars of the model years 1973 and 1974: weight (1000 lb), gross horsepower, miles per US gallon.
CAR_WEIGHT = (
    2.620, 2.875, 2.320, 3.215, 3.440, 3.460, 3.570, 3.190, 3.150, 3.440, 3.440,
    4.070, 3.730, 3.780, 5.250, 5.424, 5.345, 2.200, 1.615, 1.835, 2.465, 3.520,
    3.435, 3.840, 3.845, 1.935, 2.140, 1.513, 3.170, 2.770, 3.570, 2.780,
)  # fmt: skip
CAR_HORSEPOWER = (
    110.0, 110.0, 93.0, 110.0, 175.0, 105.0, 245.0, 62.0, 95.0, 123.0, 123.0,
    180.0, 180.0, 180.0, 205.0, 215.0, 230.0, 66.0, 52.0, 65.0, 97.0, 150.0,
    150.0, 245.0, 175.0, 66.0, 91.0, 113.0, 264.0, 175.0, 335.0, 109.0,
)  # fmt: skip
CAR_MPG = (
    21.0, 21.0, 22.8, 21.4, 18.7, 18.1, 14.3, 24.4, 22.8, 19.2, 17.8,
    16.4, 17.3, 15.2, 10.4, 10.4, 14.7, 32.4, 30.4, 33.9, 21.5, 15.5,
    15.2, 13.3, 19.2, 27.3, 26.0, 30.4, 15.8, 19.7, 15.0, 21.4,
)  # fmt: skip
