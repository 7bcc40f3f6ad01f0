"""The report of a run: metrics, live panel, plot, trackers."""
