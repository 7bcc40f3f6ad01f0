"""Level: loss and text on the ladder from chance to the best possible."""
