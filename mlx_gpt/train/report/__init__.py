"""What a run reports: metrics, live panel, plot, trackers."""
