r"""The laws of transforms and flows, to judge one's own by.

:func:`check` holds one transform or flow to every law and reports; :func:`laws` gives the same laws one by one, for a
suite of tests. What each demands, and why, is in :data:`LAWS`.

What is judged is a copy, in evaluation mode, in float64 and in float32. No tolerance is chosen by hand: an error counts as
rounding if it is no larger than what the map makes of data that differ in the last digits. Input, context and parameters
are shaken by :math:`256\,\epsilon`, relative to their size, and what that moves is the room that a value has, so that a
map that magnifies errors, as it must where its derivative is small or large, is not blamed for it. For float32 the shaking
is computed in float64, so that a formula that cancels has no excuse.

A class says of itself what cannot hold for it, by two attributes that are looked up in all modules of a flow:

- ``exempt_laws``, a dictionary from the names of laws to reasons;
- ``accuracy``, the relative error that its method leaves beside rounding, as a solver of differential equations does.
"""

from ._check import LAWS, Law, LawError, LawResult, Report, check, laws

__all__ = ["LAWS", "Law", "LawError", "LawResult", "Report", "check", "laws"]
