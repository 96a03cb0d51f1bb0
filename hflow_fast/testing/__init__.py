"""Property tests for flow layers: ours, and yours.

- :func:`assert_invertible`: both round trips, and log-dets that are each other's negative.
- :func:`assert_log_det`: the log-det against the Jacobian that autograd computes.
- :func:`randomize`: weights that hide nothing, for tests of your own.

A failure is an ``AssertionError`` that says what differs, where, by how much, how much was allowed, and the seed.
Nothing here needs a test framework; with pytest or hypothesis, call these functions from a test.
"""

from .invertible import assert_invertible
from .log_det import assert_log_det
from .weights import randomize

__all__ = ["assert_invertible", "assert_log_det", "randomize"]
