"""The embedded default: a small world, its oracle, a model of it, and preferences."""

import ncp  # noqa: F401  (keeps library notices off the screen)
